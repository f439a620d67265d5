"""Trains a policy on comparisons directly: DPO and its kin, without reward model or sampling.

    python experiments/preference.py --config=configs/preference.py:toyworld \\
        --config.init=runs/sft/model --workdir=runs/dpo \\
        --config.data.comparisons="('runs/collect/comparisons.jsonl',)"

Writes WORKDIR/model and WORKDIR/preference.json: loss, accuracy and margin of the implicit reward
on held-out comparisons. Run again, it resumes.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from instruct_jax import cli
from instruct_jax.data.encoding import encode_comparisons
from instruct_jax.data.sources import DataConfig, open_source
from instruct_jax.models.config import ComputeConfig, check_length
from instruct_jax.models.transformer import language_model
from instruct_jax.stages import preference
from instruct_jax.stages.preference import PreferenceConfig
from instruct_jax.stages.stage import load_trained, save_trained
from instruct_jax.training.mesh import make_mesh
from instruct_jax.training.state import TrainState

# Beside what every run writes; --overwrite replaces these.
WRITES = ("preference.jsonl", "preference.json")


@dataclass(frozen=True)
class Config:
    """`init` is the model folder to start from; it is the reference too."""

    init: str = "runs/sft/model"
    data: DataConfig = DataConfig()
    model: ComputeConfig = ComputeConfig()
    preference: PreferenceConfig = PreferenceConfig()


def main(config: Config, run: cli.Run) -> Path:
    """Trains, reports and returns the model folder."""
    start = load_trained(config.init, kind="language", compute=config.model)
    stage = config.preference
    longest, field = stage.prompt_length + stage.response_length, "prompt_length + response_length"
    check_length(start.config, longest, field=f"config.preference.{field}")
    source = open_source(config.data)
    train_rows, valid_rows = (
        encode_comparisons(
            source.comparisons(split),
            start.tokenizer,
            completions=stage.completions,
            prompt_length=stage.prompt_length,
            response_length=stage.response_length,
        )
        for split in ("train", "valid")
    )
    run.record_data(source.provenance(), source.licences())
    model = language_model(
        dataclasses.replace(start.config, residual_dropout=stage.residual_dropout)
    )
    mesh = make_mesh(run.mesh)

    def evaluate(step: int, state: TrainState) -> dict[str, float]:
        """Metrics of the held-out comparisons."""
        judged = preference.judge_preferences(
            stage, model, state.params, start.params, valid_rows, mesh=mesh
        )
        return {f"valid_{name}": value for name, value in judged.items()}

    params = preference.train(
        stage,
        model,
        start.params,
        train_rows,
        mesh=mesh,
        workdir=run.workdir,
        evaluate=evaluate,
    )
    report = preference.judge_preferences(stage, model, params, start.params, valid_rows, mesh=mesh)
    if run.writes:
        (run.workdir / "preference.json").write_text(json.dumps(report, indent=2) + "\n")
    trained = start._replace(config=model.config, params=params, stage="preference")
    return save_trained(run.workdir / "model", trained, notes=report)


if __name__ == "__main__":
    cli.run(main, Config, default="configs/preference.py", writes=WRITES)
