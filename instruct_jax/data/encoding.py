"""Rows to token arrays.

Every array has its examples on the first axis. Prompts and responses are tokenised apart, so the
tokens of a prompt are the same in training and in sampling. Rows are kept without their padding
(`ragged`) and padded when a batch takes them. What does not fit is never dropped or cut in silence:
each `encode_*` logs how many rows it dropped or cut, how long they are, and which field to raise to
keep them. `group` is where the configuration has these fields, such as "config.sft", and
`positions` how many tokens of a row the model can read, past which nothing is advised. Where not
one row is left it is a DataError, unless rows are not `required`, as those that are held out.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from instruct_jax.data.ragged import Builder, Ragged
from instruct_jax.data.rows import (
    Comparison,
    DataError,
    Demonstration,
    Dialogue,
    Document,
    Prompt,
    Segment,
)
from instruct_jax.data.templates import (
    CHAT,
    Template,
    encode_segments,
    encode_texts,
    fit_turns,
)
from instruct_jax.data.tokenizer import Tokenizer
from instruct_jax.data.tokens import token_batches

logger = logging.getLogger(__name__)

Encoded = dict[str, np.ndarray | Ragged]
T = TypeVar("T")
_CHUNK = 2048  # rows tokenised at a time: bounds the memory of the library's encodings


def encode_documents(
    docs: Sequence[Document], tokenizer: Tokenizer, *, length: int
) -> dict[str, np.ndarray]:
    """Documents end to end, EOS after each, cut into rows: tokens int32[N, length], no padding.

    All in memory; for text of any size see `corpus`. The tokens of the last, incomplete row are
    left out. DataError when there is no whole row.
    """
    parts = [ids for _, ids in token_batches(docs, tokenizer, np.dtype(np.int32))]
    stream = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    n = len(stream) // length
    if n == 0:
        raise DataError(f"{len(stream)} tokens of text do not fill one row of {length}")
    rest = len(stream) - n * length
    lost = f"{rest} tokens past the last whole row left out"
    _report("documents", len(docs), [lost * (rest > 0)])
    return {"tokens": stream[: n * length].reshape(n, length)}


def encode_demonstrations(
    rows: Sequence[Demonstration],
    tokenizer: Tokenizer,
    *,
    prompt_length: int,
    response_length: int,
    group: str = "",
    positions: int | None = None,
    required: bool = True,
) -> Encoded:
    """Prompt, response, EOS, then PAD; the loss falls on the response and its EOS (SFT-1).

    tokens int32[N, T], mask bool[N, T] (real tokens), loss_mask bool[N, T], T = prompt_length +
    response_length. Rows whose prompt has more than `prompt_length` tokens are left out (DATA-8);
    a response with its EOS over `response_length` is cut and then has no EOS.
    """
    tokens, targets = Builder(np.int32), Builder(bool)
    prompts, responses = _two_parts("response", prompt_length, response_length, group, positions)
    for _, chunk in _chunks(rows):
        pieces = encode_segments(
            [[*_segments(row.prompt), Segment(row.response, ours=True)] for row in chunk], tokenizer
        )
        for *before, response in pieces:
            prompt = [i for ids in before for i in ids]
            if prompts.fit(len(prompt)):
                responses.fit(len(response))
                response = response[:response_length]
                tokens.add([*prompt, *response])
                targets.add([False] * len(prompt) + [True] * len(response))
    lost = [prompts.dropped(), responses.cut()]
    _report("demonstrations", len(rows), lost, left=len(tokens), required=required, group=group)
    return _trained(tokens, targets, tokenizer, width=prompt_length + response_length)


def encode_dialogues(
    rows: Sequence[Dialogue],
    tokenizer: Tokenizer,
    *,
    prompt_length: int,
    response_length: int,
    template: Template = CHAT,
    all_turns: bool = False,
    group: str = "",
    positions: int | None = None,
    required: bool = True,
) -> Encoded:
    """Chats in the arrays of `encode_demonstrations`; EOS ends every assistant turn (EXT-1).

    The loss falls on the last assistant turn, or on all of them, where they are targets. The oldest
    exchanges are left out until what precedes the last response fits `prompt_length`; a row whose
    last question alone does not fit is dropped, and so is one that has no target. ValueError for a
    dialogue that `template` refuses, as the reader of the rows does not let it through.
    """
    tokens, targets = Builder(np.int32), Builder(bool)
    prompts, responses = _two_parts("response", prompt_length, response_length, group, positions)
    dropped = shortened = aimless = 0
    for _, chunk in _chunks(rows):
        dialogues = [template.segments(row.turns) for row in chunk]
        for row, segments, ids in zip(
            chunk, dialogues, encode_segments(dialogues, tokenizer), strict=True
        ):
            prompts.fit(sum(map(len, ids[:-1])))
            fitting = fit_turns(
                row.turns, segments, ids, tokenizer, template=template, length=prompt_length
            )
            if fitting is None:
                dropped += 1
                continue
            kept, pieces = fitting
            learnt = [s.ours and s.target and (all_turns or s is kept[-1]) for s in kept]
            if not any(learnt):
                aimless += 1
                continue
            shortened += len(kept) < len(segments)
            responses.fit(len(pieces[-1]))
            pieces = [*pieces[:-1], pieces[-1][:response_length]]
            tokens.add([i for piece in pieces for i in piece])
            targets.add([t for piece, t in zip(pieces, learnt, strict=True) for _ in piece])
    lost = [
        f"{dropped} dropped, the last question alone too long" * (dropped > 0),
        f"{shortened} without their oldest turns" * (shortened > 0),
        prompts.over(),
        responses.cut(),
        f"{aimless} dropped, whose last answer is of weight 0" * (aimless > 0),
    ]
    _report("dialogues", len(rows), lost, left=len(tokens), required=required, group=group)
    return _trained(tokens, targets, tokenizer, width=prompt_length + response_length)


def encode_comparisons(
    rows: Sequence[Comparison],
    tokenizer: Tokenizer,
    *,
    completions: int,
    prompt_length: int,
    response_length: int,
    group: str = "",
    positions: int | None = None,
    required: bool = True,
) -> Encoded:
    """One prompt is one element of the first axis, with all its completions (RM-2, T47).

    tokens int32[N, K, T] (prompt, completion, EOS, PAD), mask bool[N, K, T], ranks int32[N, K],
    where bool[N, K] (a completion is there), prompt_lengths int32[N], index int32[N] (position in
    `rows`); K = `completions`. Where any row has a label also labels int32[N, K]: 1 approved of, -1
    not, 0 neither; of ranked ones, whether they beat more of their row than they lose to.

    Rows with a prompt over `prompt_length` are left out; a completion with its EOS over
    `response_length` is cut and has no EOS. Completions that are then equal though their ranks are
    not are left out, and rows with less than two others. DataError for a row with more than K: to
    choose among them is the reader's part.
    """
    heads, tails = Builder(np.int32), Builder(np.int32)
    prompts, responses = _two_parts("completion", prompt_length, response_length, group, positions)
    found: list[_Ranked] = []
    equal = 0
    for start, chunk in _chunks(rows):
        asked = encode_texts([row.prompt for row in chunk], tokenizer)
        answers = encode_segments(
            [[Segment(text, ours=True) for text in row.completions] for row in chunk], tokenizer
        )
        for i, (row, prompt, ids) in enumerate(zip(chunk, asked, answers, strict=True), start):
            if len(ids) > completions:
                raise DataError(
                    f"row {i} has {len(ids)} completions, over {completions}",
                    hint=f"raise {_field('completions', group)}, or lower config.data.completions",
                )
            if not prompts.fit(len(prompt)):
                continue
            for each in ids:
                responses.fit(len(each))
            ids = [each[:response_length] for each in ids]
            kept = _distinct(ids, row.ranks)
            equal += len(ids) - len(kept)
            if len(kept) < min(2, len(ids)):
                continue
            heads.add(prompt)
            for k in range(completions):
                tails.add(ids[k] if k in kept else [])
            found.append(_Ranked(i, row.ranks, row.label, kept))
    lost = [prompts.dropped(), responses.cut()]
    if equal:
        longer = f"raise {_field('response_length', group)} where they were cut"
        lost.append(f"{equal} completions dropped, equal to one of another rank ({longer})")
    _report("comparisons", len(rows), lost, left=len(found), required=required, group=group)
    width = prompt_length + response_length
    tokens = tails.rows(
        width=width,
        fill=tokenizer.pad_id,
        shape=(-1, completions),
        heads=heads.rows(width=prompt_length, fill=tokenizer.pad_id),
    )
    assert tokens.heads is not None
    encoded: Encoded = {"tokens": tokens, "mask": tokens.marks()}
    encoded |= _rankings(found, completions)
    encoded["prompt_lengths"] = tokens.heads.own.astype(np.int32)
    encoded["index"] = np.array([row.index for row in found], np.int32)
    return encoded


def encode_prompts(
    rows: Sequence[Prompt],
    tokenizer: Tokenizer,
    *,
    prompt_length: int,
    group: str = "",
    positions: int | None = None,
    required: bool = True,
) -> Encoded:
    """Prompts padded on the left: tokens int32[N, P], mask bool[N, P], index int32[N].

    `index` is the position in `rows`. Prompts over `prompt_length` tokens are left out (DATA-8);
    `positions` are those that a response leaves.
    """
    tokens, kept = Builder(np.int32), []
    prompts = _Lengths("prompt", "prompt_length", prompt_length, group, positions)
    for start, chunk in _chunks(rows):
        for i, ids in enumerate(encode_texts([row.text for row in chunk], tokenizer), start):
            if prompts.fit(len(ids)):
                tokens.add(ids)
                kept.append(i)
    _report(
        "prompts", len(rows), [prompts.dropped()], left=len(kept), required=required, group=group
    )
    made = tokens.rows(width=prompt_length, fill=tokenizer.pad_id, left=True)
    return {"tokens": made, "mask": made.marks(), "index": np.asarray(kept, np.int32)}


class _Ranked(NamedTuple):
    """A row of comparisons: its position, and which completions are `kept`."""

    index: int
    ranks: tuple[int, ...]
    label: bool | None
    kept: set[int]


def _distinct(ids: Sequence[list[int]], ranks: Sequence[int]) -> set[int]:
    """The completions that are equal to none of another rank."""
    by_ids: dict[tuple[int, ...], set[int]] = {}
    for each, rank in zip(ids, ranks, strict=True):
        by_ids.setdefault(tuple(each), set()).add(rank)
    return {k for k, each in enumerate(ids) if len(by_ids[tuple(each)]) == 1}


def _rankings(rows: Sequence[_Ranked], completions: int) -> Encoded:
    """ranks, where and, if any row has one, labels, as in `encode_comparisons`."""
    ranks = np.zeros((len(rows), completions), np.int32)
    where = np.zeros((len(rows), completions), bool)
    for n, row in enumerate(rows):
        kept = sorted(row.kept)
        ranks[n, kept] = np.asarray(row.ranks)[kept]
        where[n, kept] = True
    arrays: Encoded = {"ranks": ranks, "where": where}
    if any(row.label is not None for row in rows):
        both = where[:, :, None] & where[:, None, :]
        above = both & (ranks[:, :, None] < ranks[:, None, :])
        labels = np.sign(above.sum(2) - above.sum(1)).astype(np.int32)
        for n, row in enumerate(rows):
            if row.label is not None:
                labels[n, 0] = 1 if row.label else -1
        arrays["labels"] = labels
    return arrays


def _trained(tokens: Builder, targets: Builder, tokenizer: Tokenizer, *, width: int) -> Encoded:
    made = tokens.rows(width=width, fill=tokenizer.pad_id)
    loss_mask = targets.rows(width=width, fill=False)
    return {"tokens": made, "mask": made.marks(), "loss_mask": loss_mask}


def _segments(prompt: Any) -> Sequence[Segment]:
    return (Segment(prompt),) if isinstance(prompt, str) else prompt


def _chunks(rows: Sequence[T]) -> Iterator[tuple[int, Sequence[T]]]:
    """The rows, _CHUNK at a time, each time with the position of the first."""
    return ((start, rows[start : start + _CHUNK]) for start in range(0, len(rows), _CHUNK))


# --- what does not fit ---------------------------------------------------------------------------


def _field(name: str, group: str) -> str:
    return f"{group}.{name}" if group else name


def _two_parts(
    what: str, prompt: int, response: int, group: str, positions: int | None
) -> "tuple[_Lengths, _Lengths]":
    """The lengths of prompts and of what follows them."""
    room = [None if positions is None else positions - beside for beside in (response, prompt)]
    return (
        _Lengths("prompt", "prompt_length", prompt, group, room[0]),
        _Lengths(what, "response_length", response, group, room[1]),
    )


class _Lengths:
    """The lengths that were met of one part of the rows, against their limit."""

    def __init__(self, what: str, field: str, limit: int, group: str, room: int | None) -> None:
        """`room` is what the other part leaves of the model's positions."""
        self._what, self._limit = what, limit
        self._field, self._group = field, group
        self._room = room
        self._met: list[int] = []

    def fit(self, length: int) -> bool:
        """Whether a part of `length` tokens fits; it is counted."""
        self._met.append(length)
        return length <= self._limit

    def dropped(self) -> str:
        """What to say of rows that did not fit; empty where there are none."""
        return self._say(f"dropped, the {self._what} over")

    def over(self) -> str:
        """The same of rows of which only a part may have gone."""
        return self._say(f"{self._what}s over")

    def cut(self) -> str:
        """The same of parts that were cut."""
        return self._say(f"{self._what}s cut to")

    def _say(self, what: str) -> str:
        count = sum(length > self._limit for length in self._met)
        if not count:
            return ""
        return f"{count} {what} {self._field} {self._limit} ({self._advice()})"

    def _advice(self) -> str:
        most, longest = int(np.ceil(np.percentile(self._met, 95))), max(self._met)
        field, room = _field(self._field, self._group), self._room
        if room is not None and room <= self._limit < longest:
            return f"the model has no position left for more; {longest} is the longest"
        if room is not None and room < longest:
            divide = "config.measure_lengths=true divides its positions as the rows need"
            return f"raise {field}: the model has {room} for it, {longest} is the longest; {divide}"
        enough = f"{longest} is enough for all"
        if self._limit < most < longest:  # less would be no raise
            enough = f"{most} is enough for 95 %, {longest} for all"
        return f"raise {field}: {enough}"


def _report(
    kind: str,
    total: int,
    lost: Sequence[str],
    *,
    group: str = "",
    left: int | None = None,
    required: bool = True,
) -> None:
    said = "; ".join(filter(None, lost))
    if left == 0 and total and required:
        preset = group.removeprefix("config.")
        hint = f"--config=configs/{preset}.py:files measures the rows" if preset != group else None
        raise DataError(f"none of {total} {kind} is left: {said}", hint=hint)
    log = logger.warning if said else logger.info
    log("%d %s%s encoded: %s", total, "" if required else "held-out ", kind, said or "all whole")
