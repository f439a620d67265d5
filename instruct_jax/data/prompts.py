"""The paper's prompt pipeline (spec DATA-3 to DATA-8): from raw prompts to disjoint splits.

duplicates by a shared prefix out -> a cap for each contributor -> splits by contributor ->
personal data out of the training split -> long prompts out. Every step is deterministic and does
not depend on the order of the rows: giving the same rows shuffled keeps the same ones.

The paper gives no thresholds for the shared prefix; both are parameters (spec DATA-4 [OPEN]). One
thing is added: prompts that are equal as a whole are duplicates at any length.
"""

import hashlib
import itertools
import json
import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from instruct_jax.data.pii import has_pii
from instruct_jax.data.rows import Comparison, Demonstration, Prompt, plain_text
from instruct_jax.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

T = TypeVar("T", Prompt, Demonstration, Comparison)

SPLITS: Mapping[str, float] = {"train": 0.9, "valid": 0.05, "test": 0.05}


class Lengths(NamedTuple):
    """Prompt lengths in tokens, a line of the paper's Table 9."""

    n: int
    mean: float
    sd: float
    min: int
    q25: float
    q50: float
    q75: float
    max: int


@dataclass(frozen=True)
class Prepared(Generic[T]):
    """The splits; what was left out and why; lengths before the filters and of what is left.

    `lengths` has a line for every split, under "NAME" and "NAME unfiltered": the paper's Table 9
    goes up to 2,048 tokens, so it was made before its filter at 1,000 (spec DATA-8).
    """

    splits: dict[str, list[T]]
    dropped: dict[str, int]
    lengths: dict[str, Lengths]

    def __str__(self) -> str:
        dropped = ", ".join(f"{reason} {n}" for reason, n in self.dropped.items())
        return f"{length_table(self.lengths)}\nleft out: {dropped}"


def prepare_prompts(
    rows: Iterable[T],
    tokenizer: Tokenizer,
    *,
    cap_key: str = "org_id",
    cap: int = 200,
    min_prefix: int = 64,
    min_share: float = 0.5,
    fractions: Mapping[str, float] = SPLITS,
    salt: str = "",
    max_tokens: int = 1000,
    filter_pii: Sequence[str] = ("train",),
) -> Prepared[T]:
    """The whole pipeline on rows whose `meta` names a contributor under `cap_key`.

    A row without one is a contributor of its own. `filter_pii` names the splits that lose prompts
    with personal data: the paper filters the training split only.
    """
    rows = list(rows)
    unique = deduplicate(rows, tokenizer, min_prefix=min_prefix, min_share=min_share)
    capped = cap_contributors(unique, cap_key=cap_key, cap=cap, salt=salt)
    dropped = {"duplicate": len(rows) - len(unique), "over the cap": len(unique) - len(capped)}
    dropped |= {"personal data": 0, "too long": 0}
    splits: dict[str, list[T]] = {}
    lengths: dict[str, Lengths] = {}
    parts = split_contributors(capped, fractions=fractions, cap_key=cap_key, salt=salt)
    for name, part in parts.items():
        counts = [len(ids) for ids in tokenizer.encode_batch([prompt_text(row) for row in part])]
        kept, kept_counts = [], []
        for row, count in zip(part, counts, strict=True):
            if name in filter_pii and has_pii(prompt_text(row)):
                dropped["personal data"] += 1
            elif count > max_tokens:
                dropped["too long"] += 1
            else:
                kept.append(row)
                kept_counts.append(count)
        splits[name] = kept
        lengths[name] = length_statistics(kept_counts)
        lengths[f"{name} unfiltered"] = length_statistics(counts)
    prepared = Prepared(splits, dropped, lengths)
    logger.info("%d prompts:\n%s", len(rows), prepared)
    return prepared


def expand_few_shot(
    instruction: str,
    pairs: Sequence[tuple[str, str]],
    *,
    shots: int | None = None,
    samples: int = 1,
    seed: int = 0,
    query: str = "Input:",
    answer: str = "Output:",
) -> list[Demonstration]:
    """K query/answer pairs give K demonstrations: each pair is once the target (DATA-3).

    The others are its context, or `shots` of them; with `samples` > 1 each target comes that often,
    with different samples of the others (the paper's A.3), K * samples demonstrations in all.
    """
    if len(pairs) < 2:
        raise ValueError(f"{len(pairs)} pairs: one to ask and one to show are needed")
    count = len(pairs) - 1 if shots is None else shots
    if not 0 <= count < len(pairs):
        raise ValueError(f"{shots} shots of {len(pairs)} pairs, of which one is asked")
    draw = random.Random(f"{seed}:{instruction}")
    rows = []
    for i, sample in itertools.product(range(len(pairs)), range(samples)):
        others = [j for j in range(len(pairs)) if j != i]
        if sample or count < len(others):
            others = draw.sample(others, count)
        context = "".join(f"{query} {pairs[j][0]}\n{answer} {pairs[j][1]}\n\n" for j in others)
        prompt = f"{instruction}\n\n{context}{query} {pairs[i][0]}\n{answer}"
        meta = {"prompt_kind": "few_shot", "target": i, "shots": tuple(others)}
        rows.append(Demonstration(prompt, f" {pairs[i][1]}", meta))
    return rows


def deduplicate(
    rows: Sequence[T], tokenizer: Tokenizer, *, min_prefix: int = 64, min_share: float = 0.5
) -> list[T]:
    """Rows without those that share a long prefix with a kept one, in the order given (DATA-4).

    Whitespace is normalised and the token sequences are sorted; a row goes when its common prefix
    with an earlier kept one has at least `min_prefix` tokens and at least `min_share` of the
    shorter of the two. No two kept rows are duplicates, so doing it again changes nothing.
    """
    texts = [" ".join(prompt_text(row).split()) for row in rows]
    tokens = tokenizer.encode_batch(texts)
    order = sorted(range(len(rows)), key=lambda i: (tokens[i], _identity(rows[i])))
    keep = set()
    # Of each kept row, in sorted order: its length and its common prefix with the one before it.
    # The common prefix with a row further back is the smallest one on the way there.
    kept: list[tuple[int, int]] = []
    last: list[int] = []
    for i in order:
        ids = tokens[i]
        shared = to_last = _common_prefix(last, ids)
        duplicate = bool(kept) and ids == last
        for length, before in reversed(kept):
            if duplicate or shared < min_prefix:
                break
            duplicate = shared >= min_share * min(length, len(ids))
            shared = min(shared, before)
        if not duplicate:
            keep.add(i)
            kept.append((len(ids), to_last))
            last = ids
    return [row for i, row in enumerate(rows) if i in keep]


def cap_contributors(
    rows: Sequence[T], *, cap_key: str = "org_id", cap: int = 200, salt: str = ""
) -> list[T]:
    """At most `cap` rows of each contributor, in the order given (DATA-5).

    Which ones is decided by a salted hash of their text, not by their place in the file.
    """
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(contributor(row, cap_key), []).append(i)
    keep: set[int] = set()
    for group in groups.values():
        keep.update(sorted(group, key=lambda i: _hash(salt, _identity(rows[i])))[:cap])
    return [row for i, row in enumerate(rows) if i in keep]


def split_contributors(
    rows: Sequence[T],
    *,
    fractions: Mapping[str, float] = SPLITS,
    cap_key: str = "org_id",
    salt: str = "",
) -> dict[str, list[T]]:
    """Rows by split; all rows of a contributor are in one (DATA-6).

    The split of a contributor is a salted hash of its key, so new data moves no one.
    """
    splits: dict[str, list[T]] = {name: [] for name in fractions}
    for row in rows:
        splits[split_of(contributor(row, cap_key), fractions=fractions, salt=salt)].append(row)
    return splits


def split_of(key: str, *, fractions: Mapping[str, float] = SPLITS, salt: str = "") -> str:
    """The split of one contributor; ValueError when the fractions do not add up to 1."""
    if abs(sum(fractions.values()) - 1) > 1e-9 or min(fractions.values()) < 0:
        raise ValueError(f"the fractions {dict(fractions)} do not add up to 1")
    point = _hash(salt, key) / 2**64
    for name, edge in zip(fractions, itertools.accumulate(fractions.values()), strict=True):
        if point < edge:
            return name
    return next(reversed(list(fractions)))


def contributor(row: Prompt | Demonstration | Comparison, cap_key: str) -> str:
    """Who a row is from; a row that does not say so is a contributor of its own."""
    value = row.meta.get(cap_key)
    return f"text {prompt_text(row)}" if value is None else f"{cap_key} {value}"


def prompt_text(row: Prompt | Demonstration | Comparison) -> str:
    """The prompt of a row of any kind, as people read it."""
    return plain_text(row.text if isinstance(row, Prompt) else row.prompt)


def length_statistics(lengths: Sequence[int]) -> Lengths:
    """One line of Table 9; all zero for no prompts."""
    if not lengths:
        return Lengths(0, 0.0, 0.0, 0, 0.0, 0.0, 0.0, 0)
    values = np.asarray(lengths)
    q25, q50, q75 = (float(q) for q in np.percentile(values, (25, 50, 75)))
    low, high = int(values.min()), int(values.max())
    return Lengths(len(values), float(values.mean()), float(values.std()), low, q25, q50, q75, high)


def length_table(lines: Mapping[str, Lengths]) -> str:
    """The lines as a text table, one a split."""
    width = max(map(len, lines), default=0)
    head = " ".join(f"{name:>7}" for name in Lengths._fields)
    body = [
        f"{name:<{width}} " + " ".join(f"{value:7.0f}" for value in line)
        for name, line in lines.items()
    ]
    return "\n".join([f"{'':<{width}} {head}", *body])


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading items agree; halving, so that the comparing is done by slices."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _identity(row: Prompt | Demonstration | Comparison) -> str:
    """All of a row, to put rows of equal prompts in an order that is not that of the file."""
    return json.dumps(vars(row), sort_keys=True, default=str)


def _hash(salt: str, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{salt}\n{key}".encode()).digest()[:8], "big")
