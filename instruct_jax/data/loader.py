"""Rows to fixed-shape token arrays, and arrays to batches.

Every array has its examples on the first axis. Prompts and responses are tokenised apart, so the
tokens of a prompt are the same in training and in sampling. What does not fit is never dropped or
cut in silence: each `encode_*` logs how many rows it left out or shortened.

A batch is a pure function of (seed, step) (spec R7). Step s takes positions [s*B, (s+1)*B) of an
endless stream of row numbers: the permutation of epoch 0, then that of epoch 1, and so on, each
drawn by Philox from (seed, epoch). No row is left out or met twice within an epoch; when B does
not divide the number of rows, the batch at the border holds the end of one epoch and the start of
the next. There is no state to save: resuming is calling with the next step.

Rows that differ in size can be drawn stratified by it: the permutation is then one whose batches
have nearly the same sum of sizes.
"""

import logging
import math
from collections.abc import Mapping, Sequence

import numpy as np

from instruct_jax.data.rows import Comparison, DataError, Demonstration, Dialogue, Document, Prompt
from instruct_jax.data.templates import CHAT, Template, fit_turns
from instruct_jax.data.tokenizer import Tokenizer
from instruct_jax.data.tokens import token_batches

logger = logging.getLogger(__name__)

Arrays = Mapping[str, np.ndarray]
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
    _report("documents", len(docs), {"tokens past the last whole row": len(stream) - n * length})
    return {"tokens": stream[: n * length].reshape(n, length)}


def encode_demonstrations(
    rows: Sequence[Demonstration],
    tokenizer: Tokenizer,
    *,
    prompt_length: int,
    response_length: int,
) -> dict[str, np.ndarray]:
    """Prompt, response, EOS, then PAD; the loss falls on the response and its EOS (SFT-1).

    tokens int32[N, T], mask bool[N, T] (real tokens), loss_mask bool[N, T], T = prompt_length +
    response_length. Rows whose prompt has more than `prompt_length` tokens are left out (DATA-8);
    a response with its EOS over `response_length` is cut and then has no EOS.
    """
    tokens, mask, loss_mask = _blank(tokenizer, len(rows), prompt_length + response_length)
    long_prompts = cut = n = 0
    for chunk in _chunks(rows):
        prompts = tokenizer.encode_batch([row.prompt for row in chunk])
        responses = tokenizer.encode_batch([row.response for row in chunk])
        for prompt, response in zip(prompts, responses, strict=True):
            if len(prompt) > prompt_length:
                long_prompts += 1
                continue
            response = [*response, tokenizer.eos_id]
            cut += len(response) > response_length
            start, end = _put(tokens[n], mask[n], prompt, response[:response_length])
            loss_mask[n, start:end] = True
            n += 1
    _report("demonstrations", len(rows), {"prompts too long": long_prompts, "responses cut": cut})
    return {"tokens": tokens[:n], "mask": mask[:n], "loss_mask": loss_mask[:n]}


def encode_dialogues(
    rows: Sequence[Dialogue],
    tokenizer: Tokenizer,
    *,
    prompt_length: int,
    response_length: int,
    template: Template = CHAT,
    all_turns: bool = False,
) -> dict[str, np.ndarray]:
    """Chats in the arrays of `encode_demonstrations`; EOS ends every assistant turn (EXT-1).

    The loss falls on the last assistant turn, or on all of them. The oldest exchanges are left out
    until what precedes the last response fits `prompt_length`; a row whose last question alone
    does not fit is dropped.
    """
    tokens, mask, loss_mask = _blank(tokenizer, len(rows), prompt_length + response_length)
    long_prompts = shortened = cut = n = 0
    for row in rows:
        turns = fit_turns(row.turns, tokenizer, template=template, length=prompt_length)
        if turns is None:
            long_prompts += 1
            continue
        shortened += len(turns) < len(row.turns)
        segments = template.segments(turns)
        pieces = [tokenizer.encode(text) + [tokenizer.eos_id] * ours for text, ours in segments]
        cut += len(pieces[-1]) > response_length
        pieces[-1] = pieces[-1][:response_length]
        at = 0
        for i, (piece, (_, ours)) in enumerate(zip(pieces, segments, strict=True), 1):
            here = slice(at, at := at + len(piece))
            tokens[n, here] = piece
            loss_mask[n, here] = ours and (all_turns or i == len(pieces))
        mask[n, :at] = True
        n += 1
    counts = {"questions too long": long_prompts, "lost old turns": shortened, "responses cut": cut}
    _report("dialogues", len(rows), counts)
    return {"tokens": tokens[:n], "mask": mask[:n], "loss_mask": loss_mask[:n]}


def encode_comparisons(
    rows: Sequence[Comparison],
    tokenizer: Tokenizer,
    *,
    completions: int,
    prompt_length: int,
    response_length: int,
) -> dict[str, np.ndarray]:
    """One prompt is one element of the first axis, with all its completions (RM-2, T47).

    tokens int32[N, K, T] (prompt, completion, EOS, PAD), mask bool[N, K, T], ranks int32[N, K],
    where bool[N, K] (a completion is there), prompt_lengths int32[N], index int32[N] (position in
    `rows`); K = `completions`. Rows with a prompt over `prompt_length` are left out; a completion
    with its EOS over `response_length` is cut and has no EOS. ValueError for a row with more than K
    completions: to choose among them is the reader's part.
    """
    width = prompt_length + response_length
    tokens, mask, _ = _blank(tokenizer, len(rows) * completions, width)
    tokens = tokens.reshape(len(rows), completions, width)
    mask = mask.reshape(len(rows), completions, width)
    ranks = np.zeros((len(rows), completions), np.int32)
    where = np.zeros((len(rows), completions), bool)
    prompt_lengths = np.zeros(len(rows), np.int32)
    kept: list[int] = []
    cut = 0
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        prompts = tokenizer.encode_batch([row.prompt for row in chunk])
        flat = iter(tokenizer.encode_batch([text for row in chunk for text in row.completions]))
        for i, (row, prompt) in enumerate(zip(chunk, prompts, strict=True), start):
            responses = [[*next(flat), tokenizer.eos_id] for _ in row.completions]
            if len(responses) > completions:
                raise ValueError(f"row {i} has {len(responses)} completions, over {completions}")
            if len(prompt) > prompt_length:
                continue
            n, count = len(kept), len(responses)
            for k, response in enumerate(responses):
                cut += len(response) > response_length
                _put(tokens[n, k], mask[n, k], prompt, response[:response_length])
            prompt_lengths[n] = len(prompt)
            ranks[n, :count] = row.ranks
            where[n, :count] = True
            kept.append(i)
    n = len(kept)
    _report("comparisons", len(rows), {"prompts too long": len(rows) - n, "completions cut": cut})
    return {
        "tokens": tokens[:n],
        "mask": mask[:n],
        "ranks": ranks[:n],
        "where": where[:n],
        "prompt_lengths": prompt_lengths[:n],
        "index": np.asarray(kept, np.int32),
    }


def encode_prompts(
    rows: Sequence[Prompt], tokenizer: Tokenizer, *, prompt_length: int
) -> dict[str, np.ndarray]:
    """Prompts padded on the left: tokens int32[N, P], mask bool[N, P], index int32[N].

    `index` is the position in `rows`. Prompts over `prompt_length` tokens are left out (DATA-8).
    """
    tokens, mask, _ = _blank(tokenizer, len(rows), prompt_length)
    kept: list[int] = []
    for start in range(0, len(rows), _CHUNK):
        texts = [row.text for row in rows[start : start + _CHUNK]]
        for i, ids in enumerate(tokenizer.encode_batch(texts), start):
            if len(ids) > prompt_length:
                continue
            tokens[len(kept), prompt_length - len(ids) :] = ids
            mask[len(kept), prompt_length - len(ids) :] = True
            kept.append(i)
    n = len(kept)
    _report("prompts", len(rows), {"prompts too long": len(rows) - n})
    return {"tokens": tokens[:n], "mask": mask[:n], "index": np.asarray(kept, np.int32)}


class Batches:
    """`batches(step)`: the rows of one step from arrays with a common first axis (see the top).

    Arrays may be memory maps or `TokenRows`; only the rows of a batch are read. With several
    processes each call gives this process's contiguous slice of the same global batch. A batch
    larger than the data spans several epochs.
    """

    def __init__(
        self,
        arrays: Arrays,
        batch_size: int,
        *,
        seed: int,
        sizes: np.ndarray | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        """`batch_size` is global; ValueError when the processes do not divide it. `sizes` int[N]
        are those of the rows, by which batches are stratified.
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
        self._epoch: tuple[int, np.ndarray] | None = None  # the last permutation: a memo, no state

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every row was met once (the last may reach into the next epoch)."""
        return math.ceil(self._size / self.batch_size)

    def rows(self, step: int) -> np.ndarray:
        """Row numbers int64[B] of the global batch of `step`."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        start = step * self.batch_size
        epochs, at = np.divmod(np.arange(start, start + self.batch_size), self._size)
        rows = np.empty(self.batch_size, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = self._permutation(int(epoch))[at[here]]
        return rows

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """This process's slice of the batch of `step`."""
        share = self.batch_size // self.process_count
        first = self.process_index * share
        return self.take(self.rows(step)[first : first + share])

    def take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The rows with these numbers, copied."""
        return {name: np.asarray(array[rows]) for name, array in self.arrays.items()}

    def _permutation(self, epoch: int) -> np.ndarray:
        memo = self._epoch  # read once: a prefetching thread may replace it meanwhile
        if memo is None or memo[0] != epoch:
            generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            if self._sizes is None:
                order = generator.permutation(self._size)
            else:
                order = stratified_permutation(self._sizes, self.batch_size, generator)
            self._epoch = memo = (epoch, order)
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


def _chunks(rows: Sequence) -> list[Sequence]:
    return [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]


def _blank(tokenizer: Tokenizer, n: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Arrays of `n` rows of padding: tokens int32, mask bool, loss_mask bool."""
    tokens = np.full((n, width), tokenizer.pad_id, np.int32)
    return tokens, np.zeros((n, width), bool), np.zeros((n, width), bool)


def _put(
    tokens: np.ndarray, mask: np.ndarray, prompt: list[int], response: list[int]
) -> tuple[int, int]:
    """Writes one right-padded row in place; where its response starts and ends."""
    start, end = len(prompt), len(prompt) + len(response)
    tokens[:start] = prompt
    tokens[start:end] = response
    mask[:end] = True
    return start, end


def _report(kind: str, total: int, counts: Mapping[str, int]) -> None:
    lost = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    log = logger.warning if lost else logger.info
    log("%d %s encoded: %s", total, kind, lost or "all whole")
