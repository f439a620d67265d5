"""Fine-tunes a language model on demonstrations: the SFT model (M1), or the start of PPO (M3).

    python experiments/sft.py --config=configs/sft.py:toyworld \\
        --config.init=runs/pretrain/model --workdir=runs/sft
    python experiments/sft.py --config=configs/sft.py:toyworld_rlhf_init \\
        --config.init=runs/pretrain/model --workdir=runs/rlhf_init

Writes WORKDIR/model and, with `--config.keep_epochs=True`, WORKDIR/epochs/N, from which
`experiments/select_sft.py` picks by reward-model score (SFT-4). Run again, it resumes.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from instruct_jax import cli
from instruct_jax.cli.replacing import model_files
from instruct_jax.data.encoding import encode_demonstrations, encode_dialogues
from instruct_jax.data.packing import pack
from instruct_jax.data.sources import DataConfig, Source, Split, open_source
from instruct_jax.data.tokenizer import Tokenizer
from instruct_jax.evaluation.language import held_out_loss
from instruct_jax.models.config import ComputeConfig, check_length
from instruct_jax.models.transformer import TransformerConfig, language_model
from instruct_jax.stages import sft
from instruct_jax.stages.sft import SFTConfig
from instruct_jax.stages.stage import load_trained, save_trained
from instruct_jax.stages.text import text_rows
from instruct_jax.training.mesh import make_mesh

# Beside what every run writes; --overwrite replaces these.
WRITES = ("sft.jsonl", *model_files("epochs/#"))


@dataclass(frozen=True)
class Config:
    """`init` is the model folder to start from."""

    init: str = "runs/pretrain/model"
    data: DataConfig = DataConfig()
    model: ComputeConfig = ComputeConfig()
    sft: SFTConfig = SFTConfig()
    keep_epochs: bool = False


def main(config: Config, run: cli.Run) -> Path:
    """Trains and returns the model folder of the last epoch."""
    start = load_trained(config.init, kind="language", compute=config.model)
    check_lengths(config, start.config)
    source = open_source(config.data)
    mesh = make_mesh(run.mesh)
    rows, valid = (encode(config, source, start.tokenizer, split) for split in ("train", "valid"))
    if config.sft.pack_length is not None:
        rows = pack(rows, length=config.sft.pack_length, pad_id=start.tokenizer.pad_id)
    pretraining = None
    if config.sft.pretrain_fraction > 0:
        folder, width = config.data.token_folder(run.workdir), rows["tokens"].shape[1]
        pretraining = text_rows(source, "train", start.tokenizer, length=width, folder=folder)
    run.record_data(source.provenance(), source.licences())

    model_config = dataclasses.replace(start.config, residual_dropout=config.sft.residual_dropout)
    model = language_model(model_config)
    losses: dict[int, float] = {}

    def keep(epoch: int, params: Any) -> None:
        """SFT-4: every epoch's model, with its validation loss, for the choice by reward-model
        score.
        """
        losses[epoch] = held_out_loss(model, params, **valid, mesh=mesh)
        if config.keep_epochs:
            kept = start._replace(config=model_config, params=params, stage="sft")
            notes = {"epoch": epoch, "valid_loss": losses[epoch]}
            save_trained(run.workdir / "epochs" / str(epoch), kept, notes=notes)

    params = sft.train(
        config.sft,
        model,
        start.params,
        rows,
        pretraining=pretraining,
        mesh=mesh,
        workdir=run.workdir,
        on_epoch=keep,
    )
    trained = start._replace(config=model_config, params=params, stage="sft")
    # A run resumed at its end has met no epoch.
    last = losses[max(losses)] if losses else held_out_loss(model, params, **valid, mesh=mesh)
    notes = {"valid_loss": last}
    return save_trained(run.workdir / "model", trained, notes=notes)


def check_lengths(config: Config, model: TransformerConfig) -> None:
    """ConfigError where a row has positions that the model has not."""
    stage = config.sft
    text, field = stage.prompt_length + stage.response_length, "prompt_length + response_length"
    check_length(model, text, field=f"config.sft.{field}")
    if stage.pack_length is not None and stage.pretrain_fraction > 0:
        # Demonstrations in a row begin anew, the text beside them fills one.
        check_length(model, stage.pack_length, field="config.sft.pack_length of pretraining text")


def encode(
    config: Config, source: Source, tokenizer: Tokenizer, split: Split
) -> dict[str, np.ndarray]:
    """Demonstrations, and dialogues where there are any, as rows of one width."""
    lengths = {
        "prompt_length": config.sft.prompt_length,
        "response_length": config.sft.response_length,
    }
    parts = []
    if config.data.dialogues:
        parts.append(
            encode_dialogues(
                source.dialogues(split), tokenizer, all_turns=config.sft.all_turns, **lengths
            )
        )
    if config.data.demonstrations or not parts:
        parts.append(encode_demonstrations(source.demonstrations(split), tokenizer, **lengths))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


if __name__ == "__main__":
    cli.run(main, Config, default="configs/sft.py", writes=WRITES)
