"""Documents to ids, a few megabytes of text at a time, and rows of ids out of files."""

import array
import bisect
import itertools
import os
import sys
import weakref
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from instruct_jax.data.rows import DataError, Document
from instruct_jax.data.tokenizer import Tokenizer
from instruct_jax.errors import CheckpointError

BATCH_CHARACTERS = 4 * 2**20  # of text tokenised at a time: bounds the library's memory
BLOCK = 4096  # tokens that share a checksum; what is read for a row is whole blocks


def token_batches(
    documents: Iterable[Document], tokenizer: Tokenizer, dtype: np.dtype
) -> Iterator[tuple[int, np.ndarray]]:
    """(number of documents, their ids with EOS after each), some megabytes of text at a time.

    The next text is read while the last is tokenised, on all cores.
    """

    def encode(texts: list[str]) -> tuple[int, np.ndarray]:
        encoded = tokenizer.encode_batch(texts)
        ids, at = np.full(sum(map(len, encoded)) + len(encoded), tokenizer.eos_id, dtype), 0
        for each in encoded:
            ids[at : at + len(each)] = each
            at += len(each) + 1
        return len(texts), ids

    with ThreadPoolExecutor(max_workers=1) as pool:
        upcoming = None
        for texts in _batches(documents):
            last, upcoming = upcoming, pool.submit(encode, texts)
            if last is not None:
                yield last.result()
        if upcoming is not None:
            yield upcoming.result()


def _batches(documents: Iterable[Document]) -> Iterator[list[str]]:
    texts, size = [], 0
    for document in documents:
        texts.append(document.text)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def block_sums(path: Path, dtype: np.dtype) -> bytes:
    """The CRC-32 of every BLOCK tokens of a file, the last ones too, as uint32 in little-endian."""
    sums = array.array("I")
    with path.open("rb") as file:
        while block := file.read(BLOCK * dtype.itemsize):
            sums.append(zlib.crc32(block))
    if sys.byteorder == "big":
        sums.byteswap()
    return sums.tobytes()


class Part(NamedTuple):
    """A file of so many tokens, with its `block_sums`; None where it has none."""

    path: Path
    tokens: int
    sums: Path | None = None


class TokenRows:
    """int32[N, length] that lies in files; indexed by a number, a slice or an array, as NumPy's.

    The tokens of all parts run on from one into the next; those of the last, incomplete row are
    left out. Rows are read from the files as they are asked for, from any thread, in whole blocks,
    whose checksums are compared: CheckpointError where one is wrong, or where an id is past the
    vocabulary. A memory map would do without the reading, but count every page it ever met as
    memory of the process.
    """

    def __init__(
        self, parts: Sequence[Part], dtype: np.dtype, length: int, *, vocab_size: int
    ) -> None:
        """The files, in order, and how large an id may be."""
        self.dtype = np.dtype(np.int32)
        self.shape = (sum(part.tokens for part in parts) // length, length)
        self._stored, self._limit, self._parts = dtype, vocab_size, parts
        self._starts = [0, *itertools.accumulate(part.tokens for part in parts)]
        self._files = [self._open(part.path) for part in parts]
        self._sums = [part.sums and self._open(part.sums) for part in parts]
        for part, descriptor in zip(parts, self._files, strict=True):
            size, wanted = os.fstat(descriptor).st_size, part.tokens * dtype.itemsize
            if size < wanted or (part.sums and size > wanted):
                told = "shorter" if size < wanted else "longer"
                raise DataError(f"{told} than its journal says", path=part.path)

    def _open(self, path: Path) -> int:
        descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        n, length = self.shape
        wanted = np.arange(*index.indices(n)) if isinstance(index, slice) else np.asarray(index)
        if not np.issubdtype(wanted.dtype, np.integer) or ((wanted < 0) | (wanted >= n)).any():
            raise IndexError(f"{index} is no row or rows of 0..{n - 1}")
        rows = np.empty((wanted.size, length), self.dtype)
        for row, number in zip(rows, wanted.ravel().tolist(), strict=True):
            self._fill(row, number * length)
        return rows.reshape(*wanted.shape, length)

    def forget(self) -> None:
        """Asks the system to drop what it holds of the files in memory, for a measurement."""
        for descriptor in self._files:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def _part_of(self, token: int) -> int:
        return bisect.bisect_right(self._starts, token) - 1

    def _fill(self, row: np.ndarray, start: int) -> None:
        """The tokens from `start` on, which may reach over the end of a part."""
        part, at = self._part_of(start), 0
        while at < len(row):
            offset = start + at - self._starts[part]
            count = min(len(row) - at, self._starts[part + 1] - self._starts[part] - offset)
            row[at : at + count] = self._read(part, offset, count)
            part, at = part + 1, at + count
        if row.max(initial=0) >= self._limit:
            path = self._parts[self._part_of(start)].path
            raise _damaged(path, f"token {row.max()} is past the vocabulary of {self._limit}")

    def _read(self, part: int, offset: int, count: int) -> np.ndarray:
        """`count` tokens of a part from `offset` on, out of whole blocks that are as written."""
        size, sums = self._stored.itemsize, self._sums[part]
        first, last = offset // BLOCK, (offset + count - 1) // BLOCK
        if sums is None:
            return np.frombuffer(
                os.pread(self._files[part], count * size, offset * size), self._stored
            )
        data = os.pread(self._files[part], (last + 1 - first) * BLOCK * size, first * BLOCK * size)
        wanted = np.frombuffer(os.pread(sums, (last + 1 - first) * 4, first * 4), "<u4").tolist()
        blocks = memoryview(data)
        for i, crc in enumerate(wanted):
            if zlib.crc32(blocks[i * BLOCK * size : (i + 1) * BLOCK * size]) != crc:
                raise _damaged(
                    self._parts[part].path, f"block {first + i} is not as it was written"
                )
        return np.frombuffer(data, self._stored)[offset - first * BLOCK :][:count]


class JoinedRows:
    """The rows of several `TokenRows` of one length, one after the other, as one."""

    def __init__(self, parts: Sequence[TokenRows]) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *map(len, parts)])
        self.dtype = parts[0].dtype
        self.shape = (int(self._starts[-1]), parts[0].shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        wanted = np.arange(len(self))[index]
        rows = np.empty((*wanted.shape, self.shape[1]), self.dtype)
        of = np.searchsorted(self._starts, wanted, side="right") - 1
        for i in np.unique(of):
            rows[of == i] = self._parts[i][wanted[of == i] - self._starts[i]]
        return rows


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {reason}; delete {path.parent}: the tokens are made again from the text"
    )
