"""Fine-tunes a language model on demonstrations: the SFT model (M1), or the start of PPO (M3).

    python experiments/sft.py --config=configs/sft.py:toyworld \\
        --config.init=runs/pretrain/model --workdir=runs/sft
    python experiments/sft.py --config=configs/sft.py:toyworld_rlhf_init \\
        --config.init=runs/pretrain/model --workdir=runs/rlhf_init

Writes WORKDIR/model and, with `--config.keep_epochs=True`, WORKDIR/epochs/N, from which
`experiments/select_sft.py` picks by reward-model score (SFT-4). Run again, it resumes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from instruct_jax import cli
from instruct_jax.cli.replacing import model_files
from instruct_jax.data.config import DataConfig
from instruct_jax.data.encoding import Encoded, encode_demonstrations, encode_dialogues
from instruct_jax.data.packing import pack
from instruct_jax.data.ragged import concatenate
from instruct_jax.data.rows import Demonstration, Dialogue
from instruct_jax.data.shares import Shares
from instruct_jax.data.sources import Source, Split, open_source
from instruct_jax.data.templates import CHAT, Template
from instruct_jax.data.tokenizer import Tokenizer
from instruct_jax.errors import ConfigError
from instruct_jax.evaluation.language import held_out_loss
from instruct_jax.models.config import ComputeConfig, check_length
from instruct_jax.models.transformer import TransformerConfig
from instruct_jax.settings import Settings, setting
from instruct_jax.stages import sft
from instruct_jax.stages.evaluations import (
    evaluate_with,
    keeping_best,
    users_evaluation,
    with_users,
)
from instruct_jax.stages.inputs import (
    UNLIMITED,
    check_batch,
    data_acts,
    held_out_loss_of,
    lengths_of,
    measured,
    no_held_out,
    where_held_out,
)
from instruct_jax.stages.sft import SFTConfig
from instruct_jax.stages.text import training_text
from instruct_jax.stages.trained import TrainedModel, load_trained, save_trained
from instruct_jax.training.mesh import check_batch_size, make_mesh
from instruct_jax.training.state import TrainState

# Beside what every run writes; --overwrite replaces these.
WRITES = ("sft.jsonl", *model_files("epochs/#"))

# What is drawn by weights, where its files have any.
WEIGHED = ("demonstrations", "documents")


@dataclass(frozen=True)
class Config(Settings):
    """A run from the model in `init`."""

    acts_if: ClassVar[Mapping[str, str]] = {
        **data_acts("demonstrations", "dialogues", documents="sft.pretrain_fraction"),
        "sft.all_turns": "data.dialogues",
        "sft.eval_every": f"{where_held_out('demonstrations', 'dialogues')} or evaluate_with",
    }

    init: str = setting("runs/pretrain/model", "model folder to start from")
    data: DataConfig = DataConfig()
    model: ComputeConfig = ComputeConfig()
    sft: SFTConfig = SFTConfig()
    evaluate_with: str | None = evaluate_with()
    measure_lengths: bool = setting(
        False,
        "whether prompt_length and response_length are cut to what the training rows need, and "
        "pack_length is made to hold the longest and to fill a batch",
    )
    keep_epochs: bool = setting(False, "whether every epoch's model is kept, in WORKDIR/epochs")


class Chats(NamedTuple):
    """What is read for a split: demonstrations, and dialogues where there are any; their form."""

    demonstrations: Sequence[Demonstration]
    dialogues: Sequence[Dialogue]
    template: Template


def main(config: Config, run: cli.Run) -> Path:
    """Trains and returns the model folder of the last epoch."""
    stage, mesh = config.sft, make_mesh(run.mesh)
    check_batch_size(stage.batch_size, mesh, micro_batches=stage.micro_batches)
    check_weights(config)
    config.data.find()  # before the model is read
    users = users_evaluation(config.evaluate_with)
    start = load_trained(config.init, kind="language", compute=config.model, field="config.init")
    if not config.measure_lengths:
        check_lengths(stage, start.config)
    source = open_source(config.data, template=start.template, model=config.init, weighed=WEIGHED)
    stage, rows, shares, valid, template = prepare(config, run, source, start)
    pretraining = text_shares = None
    if stage.pretrain_fraction > 0:
        folder, width = config.data.token_folder(run.workdir), rows["tokens"].shape[1]
        form = {"length": width, "folder": folder}
        pretraining, text_shares = training_text(source, start.tokenizer, **form)
        kind = f"rows of {width} tokens of text"
        check_batch(len(pretraining), stage.mixed, kind=kind, field="sft.pretrain_fraction")
    run.record_data(source.provenance(), source.licences(), source.counts())
    count = len(valid["tokens"])
    if not count:
        run.note(no_held_out("demonstrations"))

    model, seen = start.model, Judged()
    trained = start._replace(stage="sft", template=template.name)

    def judge(params: Any) -> dict[str, float]:
        """The loss of the rows that are held out, where there are any."""
        if count and seen.params is not params:
            seen.params = params
            seen.figures = {"valid_loss": held_out_loss(model, params, **valid, mesh=mesh)}
        return seen.figures

    def keep(epoch: int, params: Any) -> None:
        """SFT-4: every epoch's model, with its validation loss, for the choice by reward-model
        score.
        """
        folder = run.workdir / "epochs" / str(epoch)
        save_trained(
            folder, trained._replace(params=params), notes={"epoch": epoch, **judge(params)}
        )

    def evaluate(step: int, state: TrainState) -> dict[str, float]:
        """As metrics of a step."""
        return judge(state.params)

    params = sft.train(
        stage,
        model,
        start.params,
        rows,
        pretraining=pretraining,
        shares=shares,
        text_shares=text_shares,
        mesh=mesh,
        workdir=run.workdir,
        evaluate=with_users(evaluate if count else None, users, trained, mesh),
        on_best=keeping_best(run.workdir, trained, run.say),
        on_epoch=keep if config.keep_epochs else None,
    )
    notes = judge(params)
    folder = save_trained(run.workdir / "model", trained._replace(params=params), notes=notes)
    run.say(f"model: {folder}{held_out_loss_of(notes, count)}")
    if config.keep_epochs:
        run.say(f"every epoch's model: {run.workdir / 'epochs'}")
    return folder


class Prepared(NamedTuple):
    """The stage with its lengths measured where they are to be, and rows as it trains on them."""

    stage: SFTConfig
    rows: Encoded
    shares: Shares | None
    valid: Encoded
    template: Template


def prepare(config: Config, run: cli.Run, source: Source, start: TrainedModel) -> Prepared:
    """Reads, measures and encodes the rows. Raises ConfigError and DataError."""
    stage, tokenizer = config.sft, start.tokenizer
    chats, held_out = (read(config.data, source, split) for split in ("train", "valid"))
    if config.measure_lengths:
        lengths = lengths_of(encode(chats, tokenizer, **UNLIMITED))
        form = {"limit": start.config.max_length, "group": "config.sft"}
        stage, words = measured(stage, *lengths, **form)
        run.note(words)
    options = {name: getattr(stage, name) for name in (*UNLIMITED, "all_turns")}
    options["positions"] = start.config.max_length
    rows, shares = encode_shares(source, chats, tokenizer, **options)
    if config.measure_lengths:
        stage = packable(stage, rows, run)
        check_lengths(stage, start.config)
    valid = encode(held_out, tokenizer, required=False, **options)
    rows = batched(stage, rows, pad_id=tokenizer.pad_id)
    return Prepared(stage, rows, shares, valid, chats.template)


@dataclass
class Judged:
    """The parameters that were judged last, and what came of it: an epoch's are judged once."""

    params: Any = None
    figures: dict[str, float] = field(default_factory=dict)


def read(data: DataConfig, source: Source, split: Split) -> Chats:
    """Demonstrations, and dialogues where the configuration names any."""
    dialogues = source.dialogues(split) if data.dialogues else []
    other = not data.dialogues or data.demonstrations
    demonstrations = source.demonstrations(split) if other else []
    return Chats(demonstrations, dialogues, source.template or CHAT)


def check_lengths(stage: SFTConfig, model: TransformerConfig) -> None:
    """ConfigError where a row has positions that the model has not."""
    text = stage.prompt_length + stage.response_length
    check_length(model, text, field="config.sft.prompt_length + response_length")
    if stage.pack_length is not None and stage.pretrain_fraction > 0:
        # Demonstrations in a row begin anew, the text beside them fills one.
        check_length(model, stage.pack_length, field="config.sft.pack_length of pretraining text")


def check_weights(config: Config) -> None:
    """ConfigError where demonstrations have weights and a row of a batch is not one of them."""
    if config.data.weights("demonstrations") is None:
        return
    if config.data.dialogues:
        raise ConfigError(
            "config.data.demonstrations: weights say nothing of the rows of config.data.dialogues "
            "beside them; leave out the weights, or the dialogues"
        )
    if config.sft.pack_length is not None:
        raise ConfigError(
            "config.data.demonstrations: weights count rows, and with config.sft.pack_length one "
            "row holds several demonstrations; leave out the weights, or give pack_length none"
        )


def encode_shares(
    source: Source, chats: Chats, tokenizer: Tokenizer, **options: Any
) -> tuple[Encoded, Shares | None]:
    """`encode` of training rows, and where their files have weights of which each row is."""
    shares = source.shares("demonstrations")
    if shares is None:
        return encode(chats, tokenizer, **options), None
    parts = []
    for i in range(len(shares.weights)):
        own = [chats.demonstrations[n] for n in np.flatnonzero(shares.source == i)]
        parts.append(encode(chats._replace(demonstrations=own), tokenizer, **options))
    rows = {name: concatenate([part[name] for part in parts]) for name in parts[0]}
    return rows, shares.counted([len(part["tokens"]) for part in parts])


def encode(
    chats: Chats, tokenizer: Tokenizer, *, all_turns: bool = False, **options: Any
) -> Encoded:
    """All of them as rows of one width."""
    options |= {"group": "config.sft"}
    parts = []
    if chats.dialogues:
        form = {"template": chats.template, "all_turns": all_turns}
        parts.append(encode_dialogues(chats.dialogues, tokenizer, **form, **options))
    if chats.demonstrations or not parts:
        parts.append(encode_demonstrations(chats.demonstrations, tokenizer, **options))
    return {name: concatenate([part[name] for part in parts]) for name in parts[0]}


def packable(stage: SFTConfig, rows: Encoded, run: cli.Run) -> SFTConfig:
    """`stage` with a pack_length that holds the longest row, and of which all fill a batch."""
    if stage.pack_length is None:
        return stage
    sizes = rows["mask"].sum(1)
    most = int(sizes.sum()) // (stage.batch_size - stage.mixed)
    length = max(int(sizes.max()), min(stage.pack_length, most))
    if length != stage.pack_length:
        run.note(f"pack_length {length} and not {stage.pack_length}, as these rows need")
    return dataclasses.replace(stage, pack_length=length)


def batched(stage: SFTConfig, rows: Encoded, *, pad_id: int) -> Encoded:
    """The rows, packed where the stage says so. ConfigError where they do not fill a batch."""
    kind, own = "demonstrations", stage.batch_size - stage.mixed
    if stage.pack_length is not None:
        sizes = rows["mask"].sum(1)
        longest, total = int(sizes.max()), int(sizes.sum())
        if longest > stage.pack_length:
            raise ConfigError(
                f"config.sft.pack_length={stage.pack_length}: the longest demonstration has "
                f"{longest} tokens; give as many or more"
            )
        if stage.pack_length > total:
            raise ConfigError(
                f"config.sft.pack_length={stage.pack_length}: all demonstrations together have "
                f"{total:,} tokens; give as many or fewer"
            )
        rows = dict(pack(rows, length=stage.pack_length, pad_id=pad_id))
        kind = f"packed rows of {stage.pack_length} tokens"
    check_batch(len(rows["tokens"]), own, kind=kind, field="sft.batch_size")
    return rows


if __name__ == "__main__":
    cli.run(main, Config, default="configs/sft.py", writes=WRITES, once=True)
