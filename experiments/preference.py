"""Trains a policy on comparisons directly: DPO and its kin, without reward model or sampling.

    python experiments/preference.py --config=configs/preference.py:toyworld \\
        --config.init=runs/sft/model --workdir=runs/dpo \\
        --config.data.comparisons="('runs/collect/comparisons.jsonl',)"

Writes WORKDIR/model and WORKDIR/preference.json: loss, accuracy and margin of the implicit reward
on held-out comparisons. Run again, it resumes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from instruct_jax import cli
from instruct_jax.data.config import DataConfig
from instruct_jax.data.sources import open_source
from instruct_jax.evaluation.markup import percent
from instruct_jax.files import write_json
from instruct_jax.models.config import ComputeConfig
from instruct_jax.settings import Settings, setting
from instruct_jax.stages import preference
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
from instruct_jax.stages.preference import PreferenceConfig
from instruct_jax.stages.trained import load_trained, save_trained
from instruct_jax.training.mesh import check_batch_size, make_mesh
from instruct_jax.training.state import TrainState

# Beside what every run writes; --overwrite replaces these.
WRITES = ("preference.jsonl", "preference.json")

# What is drawn by weights, where its files have any.
WEIGHED = ("comparisons",)


@dataclass(frozen=True)
class Config(Settings):
    """A run from the model in `init`, which is the reference too."""

    acts_if: ClassVar[Mapping[str, str]] = {
        **data_acts("comparisons"),
        "preference.eval_every": f"{where_held_out('comparisons')} or evaluate_with",
    }

    init: str = setting("runs/sft/model", "model folder to start from, and the reference")
    data: DataConfig = DataConfig()
    model: ComputeConfig = ComputeConfig()
    preference: PreferenceConfig = PreferenceConfig()
    evaluate_with: str | None = evaluate_with("preference.eval_every")
    measure_lengths: bool = setting(
        False, "whether prompt_length and response_length are cut to what the training rows need"
    )


def main(config: Config, run: cli.Run) -> Path:
    """Trains, reports and returns the model folder."""
    users = users_evaluation(config.evaluate_with)
    start = load_trained(config.init, kind="language", compute=config.model, field="config.init")
    stage, mesh = config.preference, make_mesh(run.mesh)
    check_batch_size(stage.batch_size, mesh, micro_batches=stage.micro_batches)
    source = open_source(config.data, template=start.template, model=config.init, weighed=WEIGHED)
    kto = stage.loss == "kto"
    stage, rows, valid, _ = read_rankings(
        stage,
        source,
        start,
        group="config.preference",
        measure=config.measure_lengths,
        note=run.note,
        labels=kto,
    )
    # KTO gives every prompt a completion of another.
    judged = paired(valid, labels=kto) > kto
    run.record_data(source.provenance(), source.licences(), source.counts())
    if not judged:
        run.note(no_held_out("comparisons"))
    model = start.model

    def evaluate(step: int, state: TrainState) -> dict[str, float]:
        """Metrics of the held-out comparisons."""
        metrics = preference.judge_preferences(
            stage, model, state.params, start.params, valid, mesh=mesh
        )
        return {f"valid_{name}": value for name, value in metrics.items()}

    trained = start._replace(stage="preference")
    params = preference.train(
        stage,
        model,
        start.params,
        rows,
        shares=source.shares("comparisons", rows["index"]),
        mesh=mesh,
        workdir=run.workdir,
        evaluate=with_users(evaluate if judged else None, users, trained, mesh),
        on_best=keeping_best(run.workdir, trained, run.say),
    )
    report, figure = {}, ""
    if judged:
        report = preference.judge_preferences(stage, model, params, start.params, valid, mesh=mesh)
        if run.writes:
            write_json(run.workdir / "preference.json", report)
        figure = (
            f" (held-out accuracy {percent(report['accuracy'])}, loss {report['loss']:.3f} "
            f"on {len(valid['tokens']):,} comparisons)"
        )
    folder = save_trained(run.workdir / "model", trained._replace(params=params), notes=report)
    run.say(f"model: {folder}{figure}")
    return folder


if __name__ == "__main__":
    cli.run(main, Config, default="configs/preference.py", writes=WRITES, once=True)
