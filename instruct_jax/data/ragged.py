"""Rows of different lengths, end to end in memory, that are padded when they are taken.

A `Ragged` stands for an array [N, T] or [N, K, T] with padding: it has its shape and dtype, and
indexing gives that array's rows, to the bit. Of a data set it holds the tokens and where each row
ends, and nothing for the padding, which for real data is most of such an array.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np


class Ragged:
    """Rows that end to end are `values` [V], padded with `fill` to `width`, `left` or right.

    `lengths` int64[N] or [N, K] are those of the rows in `values`, where they begin at `starts`.
    With `heads`, N rows of their own, each of the K rows of n stands behind head n, unless it is
    empty.
    """

    def __init__(
        self,
        values: np.ndarray,
        lengths: np.ndarray,
        *,
        width: int,
        fill: Any,
        left: bool = False,
        heads: "Ragged | None" = None,
    ) -> None:
        self.own = np.asarray(lengths, np.int64)
        self.values, self.fill, self.left, self.heads = values, fill, left, heads
        self.shape = (*self.own.shape, width)
        self.dtype = values.dtype
        self.starts = np.cumsum(self.own).reshape(self.own.shape) - self.own
        if len(values) != self.own.sum():
            raise ValueError(f"{len(values)} values for rows of {self.own.sum()}")

    @property
    def lengths(self) -> np.ndarray:
        """What of every row is no padding, int64[N] or [N, K]."""
        if self.heads is None:
            return self.own
        return np.where(self.own > 0, self.own + self.heads.own[:, None], 0)

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        held = sum(a.nbytes for a in (self.own, self.starts))
        values = self.values
        return held + (values.nbytes if values.strides != (0,) else values.itemsize)

    def marks(self) -> "Ragged":
        """bool, of the same shape: which entries are no padding. It takes no memory of its own."""
        return Ragged(
            np.broadcast_to(np.True_, self.values.shape),
            self.own,
            width=self.shape[-1],
            fill=False,
            left=self.left,
            heads=None if self.heads is None else self.heads.marks(),
        )

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> np.ndarray:
        """Rows by a number, a slice or an array of numbers, padded; `[rows, ...]` of them by
        numbers and slices.
        """
        if isinstance(index, tuple):
            if not all(isinstance(i, int | np.integer | slice) for i in index[1:]):
                raise IndexError("only rows may be taken by an array of numbers")
            rows = self[index[0]]
            whole = () if isinstance(index[0], int | np.integer) else (slice(None),)
            return rows[(*whole, *index[1:])]
        wanted = np.arange(len(self))[index]
        inner = int(np.prod(self.shape[1:-1], dtype=np.int64))
        rows = (wanted.reshape(-1, 1) * inner + np.arange(inner)).ravel()
        own = self.own.reshape(-1)[rows]
        out = np.full((len(rows), self.shape[-1]), self.fill, self.dtype)
        offset = np.zeros(len(rows), np.int64)
        if self.heads is not None:
            n = rows // inner
            offset = np.where(own > 0, self.heads.own[n], 0)
            _place(out, np.zeros(len(rows), np.int64), self.heads, n, offset)
        if self.left:
            offset = self.shape[-1] - own
        _place(out, offset, self, rows, own)
        return out.reshape(*wanted.shape, *self.shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def sum(self, axis: int = -1) -> np.ndarray:
        """Sums of the rows without padding: of a mask their lengths. Of the last axis only."""
        if axis not in (-1, len(self.shape) - 1):
            raise ValueError(f"sums are over the last axis, not {axis}")
        if self.values.strides == (0,):
            return self.lengths * int(self.values[0] if len(self.values) else 0)
        total = np.concatenate([[0], np.cumsum(self.values, dtype=np.int64)])
        sums: np.ndarray = total[self.starts + self.own] - total[self.starts]
        if self.heads is not None:
            sums = sums + np.where(self.own > 0, self.heads.sum()[:, None], 0)
        return sums


Rows = np.ndarray | Ragged


def values_of(rows: Rows, lengths: np.ndarray) -> np.ndarray:
    """The first `lengths` int[N] values of every row of [N, T], end to end."""
    if isinstance(rows, Ragged) and not rows.left and np.array_equal(rows.own, lengths):
        return rows.values
    whole = np.asarray(rows)
    return whole[np.arange(whole.shape[1]) < lengths[:, None]]


def concatenate(parts: Sequence[Rows]) -> Rows:
    """Rows [N, T] one after the other; ragged where all are, and padded alike."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if not all(isinstance(part, Ragged) and part.heads is None for part in parts):
        return np.concatenate([np.asarray(part) for part in parts])
    assert isinstance(first, Ragged)
    values = np.concatenate([part.values for part in parts])
    lengths = np.concatenate([part.own for part in parts])
    width = max(part.shape[-1] for part in parts)
    return Ragged(values, lengths, width=width, fill=first.fill, left=first.left)


class Builder:
    """Collects rows of numbers."""

    def __init__(self, dtype: Any) -> None:
        self._dtype = np.dtype(dtype)
        self._values = [np.zeros(0, self._dtype)]
        self._lengths = [np.zeros(0, np.int64)]
        self._waiting: list[Sequence[Any]] = []

    def __len__(self) -> int:
        return sum(map(len, self._lengths)) + len(self._waiting)

    def add(self, row: Sequence[Any]) -> None:
        """One more row."""
        self._waiting.append(row)
        if len(self._waiting) >= 1024:  # lists take several times the memory of arrays
            self._store()

    def _store(self) -> None:
        lengths = np.fromiter(map(len, self._waiting), np.int64, len(self._waiting))
        flat = itertools.chain.from_iterable(self._waiting)
        self._values.append(np.fromiter(flat, self._dtype, int(lengths.sum())))
        self._lengths.append(lengths)
        self._waiting = []

    def rows(
        self,
        *,
        width: int,
        fill: Any,
        shape: tuple[int, ...] = (-1,),
        left: bool = False,
        heads: Ragged | None = None,
    ) -> Ragged:
        """All rows so far, in an array of `shape` of them."""
        self._store()
        lengths = np.concatenate(self._lengths).reshape(shape)
        values = np.concatenate(self._values)
        return Ragged(values, lengths, width=width, fill=fill, left=left, heads=heads)


def _place(
    out: np.ndarray, at: np.ndarray, source: Ragged, rows: np.ndarray, counts: np.ndarray
) -> None:
    """Writes the first `counts` values of the `rows` of `source` from column `at` of `out` on."""
    total = int(counts.sum())
    within = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    values = source.values[np.repeat(source.starts.ravel()[rows], counts) + within]
    out[np.repeat(np.arange(len(rows)), counts), np.repeat(at, counts) + within] = values
