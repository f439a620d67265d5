"""Picks the SFT epoch whose answers the reward model likes best (SFT-4), not the lowest loss.

    python experiments/select_sft.py --config=configs/select_sft.py:toyworld \\
        --config.epochs=runs/sft/epochs --config.reward_model=runs/reward_model/model \\
        --workdir=runs/sft_selected

Writes WORKDIR/selection.json, every epoch's score and validation loss with the decision, and
WORKDIR/model, the chosen model folder.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jax

from instruct_jax import cli
from instruct_jax.data.sources import DataConfig, open_source
from instruct_jax.errors import ConfigError
from instruct_jax.models.config import ComputeConfig, check_length
from instruct_jax.sampling.complete import complete
from instruct_jax.settings import NEVER
from instruct_jax.stages.record import read_record
from instruct_jax.stages.reward_model import score_answers
from instruct_jax.stages.sft import select_epoch
from instruct_jax.stages.stage import load_trained

# Beside what every run writes; --overwrite replaces these.
WRITES = ("selection.json",)


@dataclass(frozen=True)
class Config:
    """`epochs` holds one model folder an epoch, as `--config.keep_epochs=True` of sft.py wrote."""

    acts_if: ClassVar[Mapping[str, str]] = {"model.remat": NEVER}  # nothing is trained

    epochs: str = "runs/sft/epochs"
    reward_model: str = "runs/reward_model/model"
    data: DataConfig = DataConfig()
    model: ComputeConfig = ComputeConfig()
    prompts: int = 256
    prompt_length: int = 56
    response_length: int = 24
    batch_size: int = 128
    seed: int = 0


def main(config: Config, run: cli.Run) -> Path:
    """Scores every epoch, writes the decision, and returns the chosen model folder."""
    folders = {int(p.name): p for p in Path(config.epochs).glob("*") if p.name.isdecimal()}
    if not folders:
        raise ConfigError(f"{config.epochs}: no epochs here; train with --config.keep_epochs=True")
    longest = config.prompt_length + config.response_length
    field = "config.prompt_length + response_length"
    reward = load_trained(config.reward_model, kind="scalar", compute=config.model)
    check_length(reward.config, longest, field=f"{field}, of config.reward_model")
    prompts = [
        row.text
        for row in open_source(config.data).prompts("valid")
        if len(reward.tokenizer.encode(row.text)) <= config.prompt_length
    ][: config.prompts]
    scores, losses = {}, {}
    for epoch, folder in sorted(folders.items()):
        trained = load_trained(folder, kind="language", compute=config.model)
        check_length(trained.config, longest, field=field)
        answers = complete(
            trained.model,
            trained.params,
            trained.tokenizer,
            prompts,
            # One key for all: the epochs are compared on the same draws.
            key=jax.random.key(config.seed),
            max_new_tokens=config.response_length,
            prompt_length=config.prompt_length,
            batch_size=config.batch_size,
        )
        scored = score_answers(
            reward,
            prompts,
            [answer.text for answer in answers],
            prompt_length=config.prompt_length,
            response_length=config.response_length,
        )
        scores[epoch] = float(scored.mean())
        losses[epoch] = read_record(folder).notes["valid_loss"]
    best = select_epoch(scores, losses=losses, path=run.workdir / "selection.json")
    return Path(shutil.copytree(folders[best], run.workdir / "model", dirs_exist_ok=True))


if __name__ == "__main__":
    cli.run(main, Config, default="configs/select_sft.py", writes=WRITES)
