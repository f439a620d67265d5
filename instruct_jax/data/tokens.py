"""Documents to ids, a few megabytes of text at a time, and rows of ids out of files."""

import bisect
import itertools
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from instruct_jax.data.rows import DataError, Document
from instruct_jax.data.tokenizer import Tokenizer

BATCH_CHARACTERS = 4 * 2**20  # of text tokenised at a time: bounds the library's memory


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


class TokenRows:
    """int32[N, length] that lies in files; indexed by a number, a slice or an array, as NumPy's.

    The tokens of all parts run on from one into the next; those of the last, incomplete row are
    left out. Rows are read from the files as they are asked for, from any thread. A memory map
    would do the same, but count every page it ever met as memory of the process.
    """

    def __init__(
        self, paths: Sequence[Path], counts: Sequence[int], dtype: np.dtype, length: int
    ) -> None:
        """The files and their numbers of tokens."""
        self.dtype = np.dtype(np.int32)
        self.shape = (sum(counts) // length, length)
        self._stored = dtype
        self._starts = [0, *itertools.accumulate(counts)]
        self._files = [os.open(path, os.O_RDONLY) for path in paths]
        for path, count, descriptor in zip(paths, counts, self._files, strict=True):
            weakref.finalize(self, os.close, descriptor)
            if os.fstat(descriptor).st_size < count * dtype.itemsize:
                raise DataError("shorter than its journal says", path=path)

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

    def _fill(self, row: np.ndarray, start: int) -> None:
        """The tokens from `start` on, which may reach over the end of a part."""
        part, at = bisect.bisect_right(self._starts, start) - 1, 0
        while at < len(row):
            offset = start + at - self._starts[part]
            count = min(len(row) - at, self._starts[part + 1] - self._starts[part] - offset)
            size = self._stored.itemsize
            data = os.pread(self._files[part], count * size, offset * size)
            row[at : at + count] = np.frombuffer(data, self._stored)
            part, at = part + 1, at + count
