"""Trains a reward model on K-wise rankings (M2) and reports how well it agrees with its labelers.

    python experiments/reward_model.py --config=configs/reward_model.py:toyworld \\
        --config.init=runs/sft/model --workdir=runs/reward_model \\
        --config.data.comparisons="('runs/collect/comparisons.jsonl',)"

Writes WORKDIR/model and WORKDIR/accuracy.json: validation accuracy, by source and by pair of
policies, beside a predictor that sees only the answers' lengths; calibration. Run again, it
resumes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from instruct_jax import cli
from instruct_jax.data.config import DataConfig
from instruct_jax.data.encoding import Encoded, encode_demonstrations
from instruct_jax.data.rows import Comparison, DataError
from instruct_jax.data.sources import Source, open_source
from instruct_jax.errors import ConfigError
from instruct_jax.evaluation.markup import percent
from instruct_jax.evaluation.reward_model import (
    evaluate_rewards,
    fit_length_baseline,
    ordered_pairs,
)
from instruct_jax.files import write_json
from instruct_jax.models.config import ComputeConfig
from instruct_jax.models.transformer import scalar_from_language, scalar_model
from instruct_jax.settings import Settings, setting
from instruct_jax.stages import reward_model
from instruct_jax.stages.evaluations import (
    evaluate_with,
    keeping_best,
    users_evaluation,
    with_users,
)
from instruct_jax.stages.inputs import (
    data_acts,
    no_held_out,
    paired,
    read_rankings,
    where_held_out,
)
from instruct_jax.stages.reward_model import RewardModelConfig, score_comparisons, score_rows
from instruct_jax.stages.trained import TrainedModel, load_trained, save_trained
from instruct_jax.training.mesh import check_batch_size, make_mesh
from instruct_jax.training.state import TrainState

Rows = dict[str, np.ndarray]

# Beside what every run writes; --overwrite replaces these.
WRITES = ("reward_model.jsonl", "accuracy.json")

# What is drawn by weights, where its files have any.
WEIGHED = ("comparisons",)


@dataclass(frozen=True)
class Config(Settings):
    """A run from the trunk of the language model in `init`."""

    acts_if: ClassVar[Mapping[str, str]] = {
        **data_acts("comparisons", demonstrations="reward_model.normalisation"),
        "reward_model.eval_every": f"{where_held_out('comparisons')} or evaluate_with",
    }

    init: str = setting("runs/sft/model", "model folder of a language model, whose trunk it is")
    data: DataConfig = DataConfig()
    model: ComputeConfig = ComputeConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    evaluate_with: str | None = evaluate_with("reward_model.eval_every")
    measure_lengths: bool = setting(
        False, "whether prompt_length and response_length are cut to what the training rows need"
    )

    def __post_init__(self) -> None:
        """ConfigError also where no demonstrations are named that the score is normalised on."""
        super().__post_init__()
        scale, named = self.reward_model.normalisation, self.data.demonstrations
        if scale != "none" and self.data.source == "files" and not named:
            raise ConfigError(
                f"reward_model.normalisation={scale} needs data.demonstrations, answers whose mean "
                "score is made 0: name them, or set it to none"
            )


def main(config: Config, run: cli.Run) -> Path:
    """Trains, reports and returns the model folder."""
    users = users_evaluation(config.evaluate_with)
    start = load_trained(config.init, kind="language", compute=config.model, field="config.init")
    stage, mesh = config.reward_model, make_mesh(run.mesh)
    check_batch_size(stage.batch_size, mesh, micro_batches=stage.micro_batches)
    source = open_source(config.data, template=start.template, model=config.init, weighed=WEIGHED)
    stage, rows, valid, held_out = read_rankings(
        stage,
        source,
        start,
        group="config.reward_model",
        measure=config.measure_lengths,
        note=run.note,
    )
    judged = paired(valid) > 0
    standard = read_standard(stage, source, start)
    run.record_data(source.provenance(), source.licences(), source.counts())
    if not judged:
        run.note(no_held_out("comparisons"))

    model = scalar_model(start.config)

    def evaluate(step: int, state: TrainState) -> dict[str, float]:
        """How the held-out rankings are ordered so far."""
        scores = score_comparisons(model, state.params, valid, batch_size=16)
        metrics = evaluate_rewards(scores, valid["ranks"], where=valid["where"]).metrics
        return {"valid_accuracy": metrics.accuracy.mean, "valid_loss": metrics.log_loss}

    first = scalar_from_language(start.params, jax.random.key(stage.seed), start.config)
    trained = start._replace(kind="scalar", params=first, stage="reward_model")
    params = reward_model.train(
        stage,
        model,
        first,
        rows,
        shares=source.shares("comparisons", rows["index"]),
        standard=standard,
        mesh=mesh,
        workdir=run.workdir,
        evaluate=with_users(evaluate if judged else None, users, trained, mesh),
        on_best=keeping_best(run.workdir, trained, run.say),
    )
    trained = trained._replace(params=params)
    notes, figure = {}, ""
    if judged:
        report = judge_reward_model(trained, rows, valid, standard, held_out)
        if run.writes:
            write_json(run.workdir / "accuracy.json", report)
        notes = {"accuracy": report["accuracy"], "length_only": report["length_only"]}
        right, by_length = (notes[name]["mean"] for name in notes)
        figure = (
            f" (held-out accuracy {percent(right)} on {report['pairs']:,} pairs, "
            f"by length alone {percent(by_length)})"
        )
    folder = save_trained(run.workdir / "model", trained, notes=notes)
    run.say(f"model: {folder}{figure}")
    return folder


def read_standard(stage: RewardModelConfig, source: Source, start: TrainedModel) -> Encoded | None:
    """The demonstrations that fix the scale of the score; None where it is left as it is."""
    if stage.normalisation == "none":
        return None
    try:
        return encode_demonstrations(
            source.demonstrations("train"),
            start.tokenizer,
            prompt_length=stage.prompt_length,
            response_length=stage.response_length,
            group="config.reward_model",
            positions=start.config.max_length,
        )
    except DataError as error:
        raise ConfigError(
            f"config.reward_model.normalisation={stage.normalisation} needs demonstrations: "
            f"{error}; or normalise by none"
        ) from error


def judge_reward_model(
    trained: TrainedModel,
    train_rows: Encoded,
    valid_rows: Encoded,
    demonstrations: Encoded | None,
    comparisons: Sequence[Comparison],
) -> dict[str, Any]:
    """RM-6 on the validation rankings, beside a predictor that sees the answers' lengths only."""
    scores = score_comparisons(trained.model, trained.params, valid_rows, batch_size=16)
    standard = None
    if demonstrations is not None:
        standard = score_rows(
            trained.model, trained.params, demonstrations["tokens"], demonstrations["mask"]
        )
    train_lengths, lengths = (rows["mask"].sum(-1) for rows in (train_rows, valid_rows))
    kept = [comparisons[i] for i in valid_rows["index"]]
    k = scores.shape[1]
    sources = [[*row.sources, *[""] * k][:k] for row in kept]
    report = evaluate_rewards(
        scores,
        valid_rows["ranks"],
        where=valid_rows["where"],
        lengths=lengths,
        sources=sources,
        datasets=[str(row.meta.get("dataset", "")) for row in kept],
        demonstration_scores=standard,
    )
    baseline = fit_length_baseline(
        train_lengths, ordered_pairs(train_rows["ranks"], train_rows["where"])
    )
    pairs = ordered_pairs(valid_rows["ranks"], valid_rows["where"])
    metrics = report.metrics
    return {
        "accuracy": metrics.accuracy._asdict(),
        "length_only": baseline.accuracy(lengths, pairs)._asdict(),
        "pairs": metrics.pairs,
        "prompts": metrics.prompts,
        "tied": metrics.tied,
        "log_loss": metrics.log_loss,
        "ece": metrics.ece,
        "calibration": [row._asdict() for row in metrics.calibration],
        "mean_better": report.mean_better,
        "mean_worse": report.mean_worse,
        "mean_demonstration": report.mean_demonstration,
        "length_correlation": report.length_correlation,
        "length_correlation_within": report.length_correlation_within,
        "by_dataset": {name: value._asdict() for name, value in report.by_dataset.items()},
        "by_sources": {name: value._asdict() for name, value in report.by_sources.items()},
    }


if __name__ == "__main__":
    cli.run(main, Config, default="configs/reward_model.py", writes=WRITES, once=True)
