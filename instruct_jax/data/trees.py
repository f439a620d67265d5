"""Prompts with their completions as trees, several in a row: a prompt is read once, and hardly
anything is padding.

    x x x a a b b b c c  y y d d d e e  .     prompts x and y, completions a, b, c and d, e
    1 1 1 1 1 1 1 1 1 1  2 2 2 2 2 2 2  0     segment_ids
    0 0 0 1 1 2 2 2 3 3  0 0 1 1 1 2 2  0     branches
    0 1 2 3 4 3 4 5 3 4  0 1 2 3 4 2 3  0     positions

A token sees the prompt of its own tree and what stands before it in its own branch, and its
position is the one it would have if its branch were alone: exactly K rows of prompt and completion,
for the work of one.

A batch is a number of prompts, whatever their sizes, in a fixed number of rows, so that one
executable serves a run. `TreeBatches` chooses rows and width for all batches of the run beforehand,
and draws batches that hold nearly the same number of tokens.
"""

import bisect
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from instruct_jax.data.loader import Arrays, Batches
from instruct_jax.data.packing import first_fit
from instruct_jax.data.shares import Shares

# Read into rows; every other array goes into a batch as it is, one element a prompt.
_TEXT = ("tokens", "mask", "prompt_lengths", "index")
_MULTIPLE = 8  # of widths


class RowShape(NamedTuple):
    """The rows that hold every micro-batch."""

    rows: int
    width: int


def completion_sizes(comparisons: Arrays) -> np.ndarray:
    """Tokens of every completion int64[N, K], 0 where there is none."""
    lengths = comparisons["mask"].sum(-1) - comparisons["prompt_lengths"][:, None]
    return np.where(comparisons["where"], lengths, 0)


def tree_sizes(comparisons: Arrays) -> np.ndarray:
    """The tokens of every prompt with its completions, int64[N]; `comparisons` as `pack_trees`."""
    return comparisons["prompt_lengths"] + completion_sizes(comparisons).sum(1)


def row_shape(groups: Sequence[np.ndarray], *, multiple: int = 1) -> RowShape:
    """Rows, a multiple of `multiple`, and their width, in which the trees of every group fit.

    `groups` are sizes int[n], each of the trees of one micro-batch. What is least is the work, as
    far as it is known here: that of the layers on every slot, and an eighth as much of attention
    where a row is as wide as the longest tree, more where it is wider. So the width is near the
    longest tree's, and more where that leaves less empty.
    """
    groups = sorted(groups, key=np.sum, reverse=True)  # what does not fit is found out early
    longest, total = int(max(g.max(initial=1) for g in groups)), int(groups[0].sum())
    most = max(len(g) for g in groups)
    best, least = RowShape(0, 0), math.inf

    def narrowest(rows: int) -> int:
        return max(longest, -(-total // rows))

    def fits(width: int, rows: int) -> bool:
        return all(len(first_fit(g, width)) <= rows for g in groups)

    def work(rows: int, width: int) -> int:
        return rows * width * (8 * longest + width)

    for rows in sorted(
        range(multiple, most + multiple, multiple), key=lambda rows: work(rows, narrowest(rows))
    ):
        low = narrowest(rows)
        if work(rows, low) >= least:
            break
        widths = range(_up(low), _up(2 * low) + 1, _MULTIPLE)  # in the last, first fit succeeds
        width = widths[bisect.bisect_left(widths, True, key=lambda width: fits(width, rows))]
        if work(rows, width) < least:
            best, least = RowShape(rows, width), work(rows, width)
    return best


def pack_trees(
    comparisons: Arrays, *, pad_id: int, shape: RowShape | None = None, micro_batches: int = 1
) -> dict[str, np.ndarray]:
    """One batch: encoded comparisons (`encode_comparisons`: tokens int32[B, K, T] padded on the
    right, mask, where bool[B, K], prompt_lengths int32[B] ...) as trees in rows.

    tokens int32[R, W], mask bool[R, W], segment_ids int32[R, W] (1 + the number of the prompt; 0 is
    padding), branches int32[R, W] (1 + the number of the completion; 0 is prompt or padding),
    positions int32[R, W], previous int32[R, W] (where in its row the token before stands, which for
    the first of a branch is the prompt's last), ends int32[B, K] (where in the rows, one after the
    other, a completion's last token stands; 0 where it has none); what else there is (`where`,
    ranks ...) as it was.

    R and W are those of `shape`, by default the least. Every micro-batch has rows of its own for
    its own prompts, by which its prompts and rows are counted; it is as `split_rows` takes it,
    every `micro_batches`-th row and prompt. ValueError where the trees do not fit.
    """
    starts, sizes = comparisons["prompt_lengths"], completion_sizes(comparisons)
    trees = starts + sizes.sum(1)
    groups = [trees[m::micro_batches] for m in range(micro_batches)]
    shape = row_shape(groups) if shape is None else shape
    # Of every tree, its row and first column; a micro-batch has strided rows, as it has prompts.
    row, column = np.zeros((2, len(trees)), np.int64)
    for m, group in enumerate(groups):
        bins = first_fit(group, shape.width)
        if len(bins) > shape.rows:
            raise ValueError(f"trees of {group.sum()} tokens do not fit {shape}")
        for r, members in enumerate(bins):
            numbers = np.array(members) * micro_batches + m
            row[numbers] = r * micro_batches + m
            column[numbers] = np.cumsum(trees[numbers]) - trees[numbers]

    # A tree is 1 + K pieces, one after the other; of every token, its piece and its place there.
    lengths = np.concatenate([starts[:, None], sizes], axis=1).astype(np.int64)
    begins = column[:, None] + np.cumsum(lengths, axis=1) - lengths
    piece = np.repeat(np.arange(lengths.size), lengths.ravel())
    offset = np.arange(len(piece)) - np.repeat(
        np.cumsum(lengths.ravel()) - lengths.ravel(), lengths.ravel()
    )
    n, branch = np.divmod(piece, lengths.shape[1])
    position = offset + np.where(branch > 0, starts[n], 0)
    at = begins[n, branch] + offset
    # The prompt is read off the first completion that is there.
    source = np.where(branch > 0, branch - 1, comparisons["where"].argmax(1)[n])
    prompt_end = column + np.maximum(starts, 1) - 1
    fields = {
        "tokens": np.asarray(comparisons["tokens"])[n, source, position],
        "mask": True,
        "segment_ids": n // micro_batches + 1,
        "branches": branch,
        "positions": position,
        "previous": np.where(offset > 0, at - 1, prompt_end[n]),
    }
    blank = (shape.rows * micro_batches, shape.width)
    packed = {name: np.zeros(blank, np.int32) for name in fields}
    packed["mask"] = np.zeros(blank, bool)
    packed["tokens"][:] = pad_id
    for name, values in fields.items():
        packed[name][row[n], at] = values
    last = (row // micro_batches * shape.width)[:, None] + begins[:, 1:] + sizes - 1
    packed["ends"] = np.where(sizes > 0, last, 0).astype(np.int32)
    return packed | {name: x for name, x in comparisons.items() if name not in _TEXT}


class TreeBatches:
    """`batches(step)`: the trees of `batch_size` prompts as `pack_trees` lays them, in rows of one
    shape for all `steps` of a run, by default one epoch.

    Prompts are drawn as by `Batches`, stratified by size, and dealt to micro-batches so that these
    are alike too. The rows of a micro-batch are a multiple of `devices`.
    """

    def __init__(
        self,
        comparisons: Arrays,
        batch_size: int,
        *,
        pad_id: int,
        seed: int = 0,
        steps: int | None = None,
        micro_batches: int = 1,
        devices: int = 1,
        shares: Shares | None = None,
    ) -> None:
        """ValueError where there are no comparisons, or `micro_batches` do not divide a batch."""
        if batch_size % micro_batches:
            raise ValueError(f"{micro_batches} micro-batches do not divide {batch_size} prompts")
        self.batch_size = batch_size
        self._sizes = tree_sizes(comparisons)
        self._batches = Batches(
            comparisons, batch_size, seed=seed, sizes=self._sizes, shares=shares
        )
        self._micro_batches, self._pad_id = micro_batches, pad_id
        self.steps = self.steps_per_epoch if steps is None else steps
        groups = [
            self._sizes[self.prompts(step)][m::micro_batches]
            for step in range(self.steps)
            for m in range(micro_batches)
        ]
        self.shape = row_shape(groups, multiple=devices)

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every prompt was met once (the last may reach into the next epoch)."""
        return self._batches.steps_per_epoch

    def prompts(self, step: int) -> np.ndarray:
        """The numbers of the prompts of the batch of `step`, int64[B]; in an epoch's steps all."""
        numbers = self._batches.rows(step)
        # Longest first, to and fro over the micro-batches.
        falling = numbers[np.argsort(-self._sizes[numbers], kind="stable")]
        dealt = falling.reshape(-1, self._micro_batches)
        dealt[1::2] = dealt[1::2, ::-1]
        return dealt.ravel()

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """The batch of `step`. ValueError for a step past those that the rows were chosen for."""
        if not 0 <= step < self.steps:
            raise ValueError(f"step {step} is outside 0..{self.steps - 1}")
        own = self._batches.take(self.prompts(step))
        return pack_trees(
            own, pad_id=self._pad_id, shape=self.shape, micro_batches=self._micro_batches
        )


def _up(width: int) -> int:
    return -(-width // _MULTIPLE) * _MULTIPLE
