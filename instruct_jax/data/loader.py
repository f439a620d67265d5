"""Batches of arrays, as a pure function of (seed, step) (spec R7).

Step s takes positions [s*B, (s+1)*B) of an endless stream of row numbers: the permutation of epoch
0, then that of epoch 1, and so on, each drawn by Philox from (seed, epoch). No row is left out or
met twice within an epoch; when B does not divide the number of rows, the batch at the border holds
the end of one epoch and the start of the next. There is no state to save: resuming is calling with
the next step.

Of several sources with weights (`shares`) each walks through its own epochs, and each position of
the stream is the turn of one of them. An epoch then counts as many rows as there are in all: those
of a source with more than its size's share are met more than once in it, others not all.

Rows that differ in size can be drawn stratified by it: the permutation is then one whose batches
have nearly the same sum of sizes.
"""

import math
from collections.abc import Mapping

import numpy as np

from instruct_jax.data.ragged import Ragged
from instruct_jax.data.shares import Shares, Turns
from instruct_jax.data.tokens import JoinedRows, TokenRows

Arrays = Mapping[str, np.ndarray | Ragged | TokenRows | JoinedRows]


class Batches:
    """`batches(step)`: the rows of one step from arrays with a common first axis (see the top).

    Arrays may be memory maps, `Ragged` or `TokenRows`; only the rows of a batch are read, and
    padded. With several processes each call gives this process's contiguous slice of the same
    global batch. A batch larger than the data spans several epochs.
    """

    def __init__(
        self,
        arrays: Arrays,
        batch_size: int,
        *,
        seed: int,
        sizes: np.ndarray | None = None,
        shares: Shares | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        """`batch_size` is global; ValueError when the processes do not divide it. `sizes` int[N]
        are those of the rows, by which batches are stratified; `shares` says of which source each
        row is.
        """
        counts = {name: len(array) for name, array in arrays.items()}
        if len(set(counts.values())) != 1:
            raise ValueError(f"the arrays do not have one common first axis: {counts}")
        if 0 in counts.values():
            raise ValueError("there are no rows to make batches of")
        if batch_size < 1 or seed < 0:
            raise ValueError(f"batch_size {batch_size} must be positive, seed {seed} not negative")
        _check_processes(batch_size, process_index, process_count)
        self.arrays = dict(arrays)
        self.batch_size = batch_size
        self.seed = seed
        self.process_index = process_index
        self.process_count = process_count
        self._size = next(iter(counts.values()))
        self._sizes = sizes
        weights = (1,) if shares is None else shares.weights
        self._turns = Turns(weights)
        self._own = [np.arange(self._size)]
        if shares is not None:
            if len(shares.source) != self._size:
                raise ValueError(f"sources of {len(shares.source)} rows for {self._size}")
            self._own = [np.flatnonzero(shares.source == i) for i in range(len(weights))]
        # How many rows of a batch are of each source.
        self._strata = [max(1, round(batch_size * w / sum(weights))) for w in weights]
        self._epochs: dict[int, tuple[int, np.ndarray]] = {}  # the last permutations: no state

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every row was met once (the last may reach into the next epoch)."""
        return math.ceil(self._size / self.batch_size)

    def rows(self, step: int) -> np.ndarray:
        """Row numbers int64[B] of the global batch of `step`."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        start = step * self.batch_size
        sources, turns = self._turns.at(np.arange(start, start + self.batch_size))
        rows = np.empty(self.batch_size, np.int64)
        for source in np.unique(sources):
            own = self._own[source]
            epochs, at = np.divmod(turns, len(own))
            for epoch in np.unique(epochs[sources == source]):
                here = (sources == source) & (epochs == epoch)
                rows[here] = own[self._permutation(int(source), int(epoch))[at[here]]]
        return rows

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """This process's slice of the batch of `step`."""
        share = self.batch_size // self.process_count
        first = self.process_index * share
        return self.take(self.rows(step)[first : first + share])

    def take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The rows with these numbers, copied."""
        return {name: np.asarray(array[rows]) for name, array in self.arrays.items()}

    def _permutation(self, source: int, epoch: int) -> np.ndarray:
        memo = self._epochs.get(source)  # read once: a prefetching thread may replace it meanwhile
        if memo is None or memo[0] != epoch:
            generator = np.random.Generator(
                np.random.Philox(key=[self.seed, epoch + (source << 32)])
            )
            own = self._own[source]
            if self._sizes is None:
                order = generator.permutation(len(own))
            else:
                strata = self._strata[source]
                order = stratified_permutation(self._sizes[own], strata, generator)
            self._epochs[source] = memo = (epoch, order)
        return memo[1]


class Mixture:
    """Every batch holds a fixed number of rows of each part, in the order of the parts (SFT-5).

    The parts have the same arrays, of the same shapes beside the first axis; each walks through
    its own epochs, which need not be equally long. `steps_per_epoch` is that of the first part.
    """

    def __init__(self, *parts: Batches, process_index: int = 0, process_count: int = 1) -> None:
        """The parts give global batches; this process's slice is cut here, from the whole."""
        if not parts:
            raise ValueError("a mixture needs at least one part")
        if any(part.process_count != 1 for part in parts):
            raise ValueError("give process_index and process_count to the mixture, not its parts")
        shapes = [{k: (a.shape[1:], a.dtype) for k, a in part.arrays.items()} for part in parts]
        for other in shapes[1:]:
            if other != shapes[0]:
                raise ValueError(f"rows of different shapes cannot be mixed: {shapes[0]}, {other}")
        self.parts = parts
        self.batch_size = sum(part.batch_size for part in parts)
        _check_processes(self.batch_size, process_index, process_count)
        self.process_index = process_index
        self.process_count = process_count

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every row of the first part was met once."""
        return self.parts[0].steps_per_epoch

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """This process's slice of the batch of `step`."""
        share = self.batch_size // self.process_count
        start = self.process_index * share
        pieces = []
        for part in self.parts:
            first, last = max(start, 0), min(start + share, part.batch_size)
            pieces.append(part.take(part.rows(step)[first : max(first, last)]))
            start -= part.batch_size
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def stratified_permutation(
    sizes: np.ndarray, batch_size: int, rng: np.random.Generator
) -> np.ndarray:
    """A random order int64[N] of rows of `sizes` int[N], in which any `batch_size` consecutive ones
    have nearly the same sum.

    The rows in order of size are cut into `batch_size` strata; in turn, one of each stratum comes
    at random, always in the same order of strata. So a batch has one of nearly each, wherever it
    starts. Golden steps make that order: strata near each other in it are far apart in size, so
    that the two parts of a batch across two epochs are also of all sizes. Rows of one size come in
    an order drawn from all.
    """
    count = len(sizes)
    rising = np.lexsort((rng.permutation(count), sizes))
    stratum = np.arange(count) * batch_size // count
    turn = np.empty(count, np.int64)
    turn[np.lexsort((rng.random(count), stratum))] = np.arange(count)
    turn -= np.searchsorted(stratum, stratum)  # within its stratum
    place = np.argsort(np.arange(batch_size) * (math.sqrt(5) - 1) / 2 % 1)
    return rising[np.lexsort((place[stratum], turn))]


def _check_processes(batch_size: int, index: int, count: int) -> None:
    if not 0 <= index < count:
        raise ValueError(f"process_index {index} is outside 0..{count - 1}")
    if batch_size % count:
        raise ValueError(f"{count} processes do not divide a batch of {batch_size}")
