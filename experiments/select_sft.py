"""Picks the SFT epoch whose answers the reward model likes best (SFT-4), not the lowest loss.

    python experiments/select_sft.py --config=configs/select_sft.py:toyworld \\
        --config.epochs=runs/sft/epochs --config.reward_model=runs/reward_model/model \\
        --workdir=runs/sft_selected

Writes WORKDIR/selection.json, every epoch's score and validation loss with the decision, and
WORKDIR/model, the chosen model folder.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jax

from instruct_jax import cli
from instruct_jax.data.config import DataConfig
from instruct_jax.data.sources import open_source
from instruct_jax.errors import ConfigError
from instruct_jax.models.config import ComputeConfig, check_length
from instruct_jax.sampling.complete import complete
from instruct_jax.settings import Settings, never, setting
from instruct_jax.stages.inputs import data_acts, left_out, prompt_tokens
from instruct_jax.stages.record import read_record
from instruct_jax.stages.reward_model import score_answers
from instruct_jax.stages.sft import select_epoch
from instruct_jax.stages.trained import load_trained, save_trained

# Beside what every run writes; --overwrite replaces these.
WRITES = ("selection.json",)


@dataclass(frozen=True)
class Config(Settings):
    """What is chosen from, and by whom."""

    acts_if: ClassVar[Mapping[str, str]] = {
        **data_acts("prompts"),
        **dict.fromkeys(
            ["data.toy_prompts", "data.toy_offset"], never("held-out prompts alone are read")
        ),
        "model.remat": never("nothing is trained"),
    }

    epochs: str = setting(
        "runs/sft/epochs", "folder of a model an epoch, as keep_epochs of sft.py leaves it"
    )
    reward_model: str = setting("runs/reward_model/model", "model folder of the reward model")
    data: DataConfig = DataConfig()
    model: ComputeConfig = ComputeConfig()
    prompts: int = setting(256, "validation prompts that are answered, at most", low=1)
    prompt_length: int = setting(56, "of the longest prompt", low=1, unit="tokens")
    response_length: int = setting(24, "of the longest answer", low=1, unit="tokens")
    batch_size: int = setting(128, "answers that are sampled together", low=1)
    seed: int = setting(0, "of all that is drawn", low=0, high=2**32 - 1)


def main(config: Config, run: cli.Run) -> Path:
    """Scores every epoch, writes the decision, and returns the chosen model folder."""
    folders = {int(p.name): p for p in Path(config.epochs).glob("*") if p.name.isdecimal()}
    if not folders:
        raise ConfigError(f"{config.epochs}: no epochs here; train with --config.keep_epochs=True")
    longest = config.prompt_length + config.response_length
    field = "config.prompt_length + response_length"
    reward = load_trained(
        config.reward_model, kind="scalar", compute=config.model, field="config.reward_model"
    )
    check_length(reward.config, longest, field=f"{field}, of config.reward_model")
    source = open_source(config.data, template=reward.template, model=config.reward_model)
    rows = source.prompts("valid")
    counts = prompt_tokens(rows, reward.tokenizer)
    prompts = [
        row.text for row, n in zip(rows, counts, strict=True) if 0 < n <= config.prompt_length
    ]
    told = left_out(counts, len(prompts), limit=config.prompt_length)
    prompts = prompts[: config.prompts]
    if not prompts:
        longest = f", of at most {config.prompt_length} tokens (config.prompt_length)"
        raise ConfigError(
            f"no prompts are held out to choose by{longest * bool(rows)}: raise "
            f"config.{'prompt_length' if rows else 'data.valid_fraction'}"
        )
    if told:
        run.note(told)
    run.record_data(source.provenance(), source.licences(), source.counts())
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
            trained.tokenizer,
            prompts,
            answers,
            prompt_length=config.prompt_length,
            response_length=config.response_length,
        )
        scores[epoch] = float(scored.mean())
        losses[epoch] = read_record(folder).notes.get("valid_loss")
    best = select_epoch(scores, losses=losses, path=run.workdir / "selection.json")
    chosen, notes = load_trained(folders[best]), read_record(folders[best]).notes
    chosen = chosen._replace(history=chosen.history[:-1])  # it goes through no stage here
    save_trained(run.workdir / "model", chosen, notes=notes)
    run.say(
        f"model: {run.workdir / 'model'} (epoch {best} of {max(folders)}, mean reward "
        f"{scores[best]:.3f} on {len(prompts):,} held-out prompts)"
    )
    return run.workdir / "model"


if __name__ == "__main__":
    cli.run(main, Config, default="configs/select_sft.py", writes=WRITES, once=True)
