"""Trains a reward model on K-wise rankings (M2) and reports how well it agrees with its labelers.

    python experiments/reward_model.py --config=configs/reward_model.py:toyworld \\
        --config.init=runs/sft/model --workdir=runs/reward_model \\
        --config.data.comparisons="('runs/collect/comparisons.jsonl',)"

Writes WORKDIR/model and WORKDIR/accuracy.json: validation accuracy, by source and by pair of
policies, beside a predictor that sees only the answers' lengths; calibration. Run again, it
resumes.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from instruct_jax import cli
from instruct_jax.data.encoding import encode_comparisons, encode_demonstrations
from instruct_jax.data.rows import Comparison
from instruct_jax.data.sources import DataConfig, open_source
from instruct_jax.evaluation.reward_model import (
    evaluate_rewards,
    fit_length_baseline,
    ordered_pairs,
)
from instruct_jax.models.config import ComputeConfig, check_length
from instruct_jax.models.transformer import scalar_from_language, scalar_model
from instruct_jax.stages import reward_model
from instruct_jax.stages.reward_model import RewardModelConfig, score_comparisons, score_rows
from instruct_jax.stages.stage import TrainedModel, load_trained, save_trained
from instruct_jax.training.mesh import make_mesh

# Beside what every run writes; --overwrite replaces these.
WRITES = ("reward_model.jsonl", "accuracy.json")


@dataclass(frozen=True)
class Config:
    """`init` is the language model whose trunk the reward model starts from."""

    init: str = "runs/sft/model"
    data: DataConfig = DataConfig()
    model: ComputeConfig = ComputeConfig()
    reward_model: RewardModelConfig = RewardModelConfig()


def main(config: Config, run: cli.Run) -> Path:
    """Trains, reports and returns the model folder."""
    start = load_trained(config.init, kind="language", compute=config.model)
    longest = config.reward_model.prompt_length + config.reward_model.response_length
    field = "config.reward_model.prompt_length + response_length"
    check_length(start.config, longest, field=field)
    source = open_source(config.data)
    lengths = {
        "prompt_length": config.reward_model.prompt_length,
        "response_length": config.reward_model.response_length,
    }
    encode = {"completions": config.reward_model.completions, **lengths}
    train_rows = encode_comparisons(source.comparisons("train"), start.tokenizer, **encode)
    comparisons = source.comparisons("valid")
    valid_rows = encode_comparisons(comparisons, start.tokenizer, **encode)
    standard = encode_demonstrations(source.demonstrations("train"), start.tokenizer, **lengths)
    run.record_data(source.provenance(), source.licences())

    model_config = dataclasses.replace(
        start.config, residual_dropout=config.reward_model.residual_dropout
    )
    model = scalar_model(model_config)
    key = jax.random.key(config.reward_model.seed)
    params = reward_model.train(
        config.reward_model,
        model,
        scalar_from_language(start.params, key, model_config),
        train_rows,
        standard=standard,
        mesh=make_mesh(run.mesh),
        workdir=run.workdir,
    )
    trained = start._replace(
        kind="scalar", config=model_config, params=params, stage="reward_model"
    )
    report = judge_reward_model(trained, train_rows, valid_rows, standard, comparisons)
    if run.writes:
        (run.workdir / "accuracy.json").write_text(json.dumps(report, indent=2) + "\n")
    notes = {"accuracy": report["accuracy"], "length_only": report["length_only"]}
    return save_trained(run.workdir / "model", trained, notes=notes)


def judge_reward_model(
    trained: TrainedModel,
    train_rows: dict[str, np.ndarray],
    valid_rows: dict[str, np.ndarray],
    demonstrations: dict[str, np.ndarray],
    comparisons: Sequence[Comparison],
) -> dict[str, Any]:
    """RM-6 on the validation rankings, beside a predictor that sees the answers' lengths only."""
    scores = score_comparisons(trained.model, trained.params, valid_rows, batch_size=16)
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
    cli.run(main, Config, default="configs/reward_model.py", writes=WRITES)
