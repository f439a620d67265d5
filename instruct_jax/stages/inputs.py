"""What a script gives its stage, looked at before the first program is compiled.

A script reads and encodes all of its rows, held-out ones too, asks here whether they will do, and
only then trains: no run ends for want of a row that could have been counted at its start. Without
held-out rows it trains all the same, and has no held-out figure.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from instruct_jax.cli.record import RECORD as RUN_RECORD
from instruct_jax.data.config import ROW_FIELDS, DataConfig
from instruct_jax.data.encoding import Encoded, encode_comparisons, encode_prompts
from instruct_jax.data.rows import Comparison, Prompt
from instruct_jax.data.sources import Source
from instruct_jax.data.tokenizer import Tokenizer
from instruct_jax.errors import ConfigError
from instruct_jax.files import read_object
from instruct_jax.models.config import TransformerConfig, check_length
from instruct_jax.settings import never

Config = TypeVar("Config")

# The fields of `DataConfig` that say something of one kind of row.
_SAY = {
    "documents": ("token_dir", "split_text", "toy_documents"),
    "demonstrations": ("toy_demonstrations",),
    "comparisons": ("completions", "tie_gap", "exclude_datasets"),
    "prompts": ("toy_prompts", "toy_offset"),
    "dialogues": (),
}
_STEP = 8  # of measured lengths: rows of nearly one width share a compiled program
# As prompt_length and response_length of rows that are encoded to be measured.
UNLIMITED = {"prompt_length": 2**40, "response_length": 2**40}


def data_acts(*kinds: str, **conditions: str) -> Mapping[str, str]:
    """`acts_if` of a script that reads rows of these kinds alone, or under a condition.

    >>> acts = data_acts("demonstrations", documents="sft.pretrain_fraction")
    >>> acts["data.comparisons"]
    'never: this script reads data.demonstrations, data.documents'
    >>> acts["data.token_dir"], "data.demonstrations" in acts
    ('sft.pretrain_fraction', False)
    """
    acts = {}
    others = never(f"this script reads {', '.join(f'data.{k}' for k in (*kinds, *conditions))}")
    for kind in ROW_FIELDS:
        if kind in kinds:
            continue
        names = (kind, f"valid.{kind}", f"test.{kind}", *_SAY[kind])
        acts |= dict.fromkeys([f"data.{name}" for name in names], conditions.get(kind, others))
    return acts


def check_held_out(config: DataConfig, hashes: Mapping[str, Any], model: str | Path) -> None:
    """ConfigError where prompts that `config` holds out for evaluation were trained on: the run of
    the model folder `model` had rows of the same files, known by their hashes, and divided them in
    another way.
    """
    record = Path(model).parent / RUN_RECORD
    if config.source != "files" or config.test.prompts or not record.is_file():
        return
    run = read_object(record)
    theirs, read = run.get("config", {}).get("data"), run.get("data", {})
    if not isinstance(theirs, dict) or not set(read.values()) & set(hashes.values()):
        return
    valid, test = config.fractions
    their_valid = theirs.get("valid_fraction", 0.0)
    their_test = theirs.get("test_fraction")
    their_end = their_valid + (their_valid if their_test is None else their_test)
    same = theirs.get("seed") == config.seed
    if not (same and their_valid <= valid and valid + test <= their_end):
        raise ConfigError(
            f"config.models: {model} was trained on rows of these files, divided with data.seed "
            f"{theirs.get('seed')}, valid_fraction {their_valid:g} and test_fraction "
            f"{their_end - their_valid:g}: with others it would be asked what it was trained on; "
            "give the same here, or name files of their own, config.data.test.prompts"
        )


def where_held_out(*kinds: str) -> str:
    """The condition, for `acts_if`, under which rows of one of these kinds are held out at all.

    >>> where_held_out("comparisons")
    'data.source=toyworld or data.valid_fraction or data.valid.comparisons'
    """
    own = [f"data.valid.{kind}" for kind in kinds]
    return " or ".join(["data.source=toyworld", "data.valid_fraction", *own])


class Reader(Protocol):
    """What reads rows: a model's folder in memory."""

    @property
    def config(self) -> TransformerConfig:
        """Its `max_length` are the positions that it has."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """Whose tokens it reads."""
        ...


class Fit(NamedTuple):
    """Lengths in tokens, and how many rows are longer than each."""

    prompt: int
    response: int
    long_prompts: int
    long_responses: int


def fit_lengths(
    prompts: np.ndarray, responses: np.ndarray, *, prompt: int, response: int, limit: int
) -> Fit:
    """The least lengths that hold rows of int[N] prompt and int[M] response tokens.

    In steps of 8, at most `prompt` and `response`, and together at most `limit`, the positions of
    the model; where that is too little, the division that the fewest rows are too long for. Longer
    prompts are left out, and longer responses cut.

    >>> fit_lengths(np.array([9, 30]), np.array([5, 6]), prompt=512, response=512, limit=64)
    Fit(prompt=32, response=8, long_prompts=0, long_responses=0)
    """
    prompts, responses = np.sort(prompts), np.sort(responses)

    def room(lengths: np.ndarray, most: int) -> int:
        longest = int(lengths[-1]) if len(lengths) else 1
        return max(1, min(-(-longest // _STEP) * _STEP, most))

    def longer(lengths: np.ndarray, than: np.ndarray | int) -> Any:
        return len(lengths) - np.searchsorted(lengths, than, side="right")

    p, r = room(prompts, prompt), room(responses, response)
    if p + r > limit:
        choices = np.unique([max(1, limit - r), *range(_STEP, min(p, limit - 1) + 1, _STEP)])
        choices = choices[choices < limit]
        lost = longer(prompts, choices) + longer(responses, np.minimum(r, limit - choices))
        p = int(choices[lost.argmin()])
        r = min(r, limit - p)
    # A prompt that is longer is left out, and then need not have a place.
    p = min(p, room(prompts[prompts <= p], prompt))
    return Fit(p, r, int(longer(prompts, p)), int(longer(responses, r)))


def measured(
    stage: Config, prompts: np.ndarray, responses: np.ndarray, *, limit: int, group: str
) -> tuple[Config, str]:
    """`stage` with its `prompt_length` and `response_length` cut down by `fit_lengths`, and what
    was chosen in words; `group` is how the stage's fields are named from outside.
    """
    given: Any = stage
    most = {"prompt": given.prompt_length, "response": given.response_length}
    fit = fit_lengths(prompts, responses, limit=limit, **most)
    words = (
        f"measured on {len(prompts):,} rows: prompt_length {fit.prompt}, "
        f"response_length {fit.response}, of {limit} positions"
    )
    full = fit.prompt + fit.response >= limit
    for count, what in ((fit.long_prompts, "prompt"), (fit.long_responses, "response")):
        if count:
            more = "" if full else f" (raise {group}.{what}_length, the most that is taken)"
            words += f"; {what}s that are longer: {count:,}{more}"
    lengths = {"prompt_length": fit.prompt, "response_length": fit.response}
    return dataclasses.replace(given, **lengths), words


def lengths_of(rows: Encoded) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of every prompt and of every response of rows encoded without a limit (`UNLIMITED`):
    demonstrations, dialogues, comparisons, or prompts, which have no response.
    """
    sizes = np.asarray(rows["mask"].sum(-1), np.int64)
    if "prompt_lengths" in rows:
        prompts = np.asarray(rows["prompt_lengths"], np.int64)
        return prompts, (sizes - prompts[:, None])[np.asarray(rows["where"])]
    if "loss_mask" not in rows:
        return sizes, np.zeros(0, np.int64)
    responses = np.asarray(rows["loss_mask"].sum(-1), np.int64)
    return sizes - responses, responses


def prompt_tokens(rows: Sequence[Prompt], tokenizer: Tokenizer) -> np.ndarray:
    """int64[N], the tokens of every prompt."""
    length = UNLIMITED["prompt_length"]
    return lengths_of(encode_prompts(rows, tokenizer, prompt_length=length, required=False))[0]


class Rankings(NamedTuple):
    """The comparisons of a run: its stage with lengths that hold them, both parts as arrays, and
    the held-out rows.
    """

    stage: Any
    train: Encoded
    valid: Encoded
    held_out: Sequence[Comparison]


def read_rankings(
    stage: Any,
    source: Source,
    start: Reader,
    *,
    group: str,
    measure: bool,
    note: Callable[[str], None],
    labels: bool = False,
) -> Rankings:
    """The comparisons that a `stage` with the fields `group` trains on, from the model `start`.

    With `measure` its lengths are cut to what the training rows need, and what was chosen is
    noted. ConfigError or DataError where they will not do: for `labels` see `paired`.
    """
    limit = start.config.max_length
    if not measure:
        longest = stage.prompt_length + stage.response_length
        check_length(start.config, longest, field=f"{group}.prompt_length + response_length")
    most = (stage.completions, f"{group}.completions")
    comparisons, held_out = (source.comparisons(split, most=most) for split in ("train", "valid"))
    form: dict[str, Any] = {"completions": stage.completions, "group": group}
    if measure:
        lengths = lengths_of(encode_comparisons(comparisons, start.tokenizer, **form, **UNLIMITED))
        stage, words = measured(stage, *lengths, limit=limit, group=group)
        note(words)
    form |= {name: getattr(stage, name) for name in UNLIMITED} | {"positions": limit}
    rows = encode_comparisons(comparisons, start.tokenizer, **form)
    valid = encode_comparisons(held_out, start.tokenizer, required=False, **form)
    field = f"{group.removeprefix('config.')}.batch_size"
    check_batch(len(rows["tokens"]), stage.batch_size, kind="comparisons", field=field)
    check_pairs(rows, labels=labels)
    return Rankings(stage, rows, valid, held_out)


def left_out(counts: np.ndarray, fitting: int, *, limit: int) -> str | None:
    """What a run says once of prompts of int[N] tokens of which so many have at most the `limit`,
    config.prompt_length; None where all do.

    >>> left_out(np.array([3, 9, 12]), 1, limit=8)
    '2 of 3 prompts are longer than config.prompt_length=8 and left out; the longest has 12 tokens'
    """
    lost = len(counts) - fitting
    if not lost:
        return None
    return (
        f"{lost:,} of {len(counts):,} prompts are longer than config.prompt_length={limit} and "
        f"left out; the longest has {counts.max()} tokens"
    )


def paired(comparisons: Encoded, *, labels: bool = False) -> int:
    """How many prompts of encoded comparisons have two completions of different rank, or with
    `labels` a completion that has a label.
    """
    ranks, where = np.asarray(comparisons["ranks"]), np.asarray(comparisons["where"])
    worst = np.where(where, ranks, -1).max(1, initial=-1)
    best = np.where(where, ranks, worst[:, None]).min(1, initial=np.iinfo(np.int32).max)
    counted = best < worst
    if labels and "labels" in comparisons:
        counted |= (np.asarray(comparisons["labels"]) != 0).any(1)
    return int(counted.sum())


def check_batch(count: int, batch: int, *, kind: str, field: str) -> None:
    """ConfigError where `count` rows to train on are less than the `batch` of config.`field`."""
    if count < batch:
        raise ConfigError(
            f"config.{field}={batch}: there are {count:,} {kind} to train on, less than one batch; "
            f"take {count} or less, or give more of them"
        )


def check_pairs(comparisons: Encoded, *, labels: bool = False) -> None:
    """ConfigError where no prompt has a better and a worse completion, or a label that counts."""
    if not paired(comparisons, labels=labels):
        hint = "" if labels or "labels" not in comparisons else "; labels are for the loss kto"
        raise ConfigError(f"no comparisons to train on: each is a tie or a single completion{hint}")


def no_held_out(kind: str) -> str:
    """What a run without held-out rows says once, at its start."""
    return (
        f"no {kind} are held out: it trains on all of them and writes no held-out figure "
        "(config.data.valid_fraction, or files of their own: config.data.valid)"
    )


def held_out_loss_of(notes: Mapping[str, float], rows: int) -> str:
    """The held-out loss of a model's `notes` on so many rows, to stand behind its folder in the
    last line of a run; empty where there is none.
    """
    if "valid_loss" not in notes:
        return ""
    return f" (held-out loss {notes['valid_loss']:.3f} on {rows:,} rows)"
