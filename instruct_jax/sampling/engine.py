"""Continuous batching: many prompts over few slots; a slot whose row has ended takes the next one.

    while rows wait or live:
        admit    a quarter of the slots: prefill the distinct prompts, copy each to its rows
        advance  until a quarter of the slots is free again (none waits: until all rows have ended)
        harvest  the rows that ended

The decode loop is compiled, and so is each of the other pieces; which of them comes next is decided
here, on the host, between two programs. One program with the queue inside would save those calls,
but its widths would be fixed, and widths are what the cost hangs on: prompts are padded to a
multiple of 16 and not to the longest of all, and the cache is as wide as the live rows need (`move`
cuts it to size when the head reaches its end), so attention reads live tokens and little else.
Measured on two CPU cores with the toy model (0.8M parameters, 400 prompts, 4 samples each, 64
slots): decoding took 60 % of the time, prefills 18 %, admissions 6 %, moves 2 %, and all of the
host's work, tokenizing included, 14 %. Against batches of 256 in one shot: 3.0 times the responses
a second where they are of 6 to 12 tokens, 4.7 times where 1 % has more than 50 (budget 64).

A response depends on its prompt, its key and its limits alone: not on the slot, the arrivals before
it, the number of slots or the rows beside it (JAX-1). It is the one `sampler.generate` would give.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from instruct_jax.models.transformer import Model
from instruct_jax.sampling.choose import Sampling
from instruct_jax.sampling.sampler import check_lengths
from instruct_jax.sampling.slots import (
    Arrivals,
    Slots,
    admit,
    advance,
    empty_slots,
    move,
    prefill,
    spread_rows,
)
from instruct_jax.sampling.weights import decoding_weights
from instruct_jax.training import hosts
from instruct_jax.training.mesh import BATCH_AXES, axes_size, replicated

# Widths are multiples of these (of a quarter of the power of two below, where that is more), which
# bounds the number of compiled programs.
PREFIX_STEP, COLUMNS_STEP = 16, 32
# One arrival of rows fills this part of the slots. Rarer arrivals leave more slots idle, more
# frequent ones cost more calls than they save steps.
ARRIVAL = 4


class Response(NamedTuple):
    """What was sampled for one prompt."""

    tokens: tuple[int, ...]  # through the end token or stop sequence
    log_probs: np.ndarray  # float32[len(tokens)], the sampler's own
    ending: int  # how many tokens are the end token or stop sequence; 0 where the budget ended it

    @property
    def ended(self) -> bool:
        """Whether by an end token or stop sequence, not by the budget."""
        return self.ending > 0


class _Row(NamedTuple):
    number: int
    prompt: tuple[int, ...]
    key: np.ndarray  # the data of its key
    budget: int
    minimum: int


class Engine:
    """Rows wait in the order they are submitted; `step` moves those in the slots on.

    With a `mesh`, where `params` must already live, the slots are spread over its data and fsdp
    axes. `slots` is rounded up to a multiple of those. Where several processes share the mesh, all
    of them submit and step alike, and each has all responses.
    """

    def __init__(
        self, model: Model, params: Any, sampling: Sampling, *, slots: int, mesh: Mesh | None = None
    ) -> None:
        if slots < 1:
            raise ValueError(f"slots must be at least 1, got {slots}")
        sampling.check_vocabulary(model.config.vocab_size)
        self._parts = axes_size(mesh, BATCH_AXES) if mesh else 1
        self._scope = partial(jax.set_mesh, mesh) if mesh else nullcontext
        self._put = partial(hosts.spread, sharding=replicated(mesh)) if mesh else jax.device_put
        self._model, self._sampling = model, sampling
        with self._scope():
            self._params = _weights(params, dtype=model.config.dtype)
        self.slots = -(-slots // self._parts) * self._parts
        self._arrival = -(-self.slots // ARRIVAL)
        self._state: Slots | None = None
        self._rows: list[_Row | None] = [None] * self.slots
        self._first = np.zeros(self.slots, np.int64)  # the column of a row's first response token
        self._length = np.zeros(self.slots, np.int64)  # of its response
        self._head = self._columns = 0
        self._waiting: deque[_Row] = deque()
        self._submitted = 0
        self._key_impl: Any = None
        self.turns = 0  # of the decode loop
        self.drawn = 0  # tokens of the responses that have ended

    @property
    def busy(self) -> bool:
        """Whether a row waits or lives."""
        return bool(self._waiting) or any(self._rows)

    @property
    def occupancy(self) -> float:
        """Drawn tokens a slot and turn: 1 where no slot ever idled."""
        return self.drawn / max(self.turns * self.slots, 1)

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        keys: jax.Array,
        *,
        max_new_tokens: int,
        min_new_tokens: int = 0,
    ) -> list[int]:
        """Queues prompts with one typed key each; returns their numbers.

        Raises ValueError for a prompt that is empty or does not fit the model, and for keys of
        another number or type.
        """
        if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) or keys.shape != (len(prompts),):
            raise ValueError(
                f"keys must be one jax.random.key a prompt, shape [{len(prompts)}], "
                f"got {keys.dtype}{list(keys.shape)}"
            )
        impl = jax.random.key_impl(keys)
        if self._submitted and impl != self._key_impl:
            raise ValueError(f"keys are {impl}, those before them {self._key_impl}")
        self._key_impl = impl
        _check_prompts(self._model, prompts, max_new_tokens, min_new_tokens)
        numbers = list(range(self._submitted, self._submitted + len(prompts)))
        data = np.asarray(jax.random.key_data(keys))
        self._waiting.extend(
            _Row(number, tuple(prompt), key, max_new_tokens, min_new_tokens)
            for number, prompt, key in zip(numbers, prompts, data, strict=True)
        )
        self._submitted += len(prompts)
        return numbers

    def run(self) -> Iterator[tuple[int, Response]]:
        """Steps until nothing waits or lives; yields numbers and responses as they end."""
        while self.busy:
            yield from self.step().items()

    def step(self, turns: int | None = None) -> dict[int, Response]:
        """Fills free slots, decodes until enough are free again, or for `turns` tokens a row; the
        responses that ended.
        """
        with self._scope():
            while self._waiting and self._rows.count(None) >= self._next_arrival():
                self._admit()
            if not any(self._rows):
                return {}
            if self._head == self._columns:
                self._make_room(0)
            until = self.slots - self._next_arrival() if self._waiting else 0
            assert self._state is not None
            # All that there is room for is no limit.
            most = np.int32(self._columns if turns is None else turns)
            self._state = _advance(
                self._model, self._params, self._state, np.int32(until), most,
                sampling=self._sampling,
            )  # fmt: skip
            return self._harvest(self._state)

    def drawn_by(self) -> dict[int, tuple[int, ...]]:
        """The tokens so far of the rows that live, by their numbers."""
        if self._state is None:
            return {}
        tokens = hosts.fetch(self._state.tokens)
        return {
            row.number: tuple(tokens[slot, first : first + length].tolist())
            for slot, (row, first, length) in enumerate(
                zip(self._rows, self._first, self._length, strict=True)
            )
            if row is not None
        }

    def cancel(self, numbers: Iterable[int]) -> None:
        """Gives up rows that wait or live: their slots are free at once."""
        given_up = set(numbers)
        self._waiting = deque(row for row in self._waiting if row.number not in given_up)
        kept = np.ones(self.slots, np.bool_)
        for slot, row in enumerate(self._rows):
            if row is not None and row.number in given_up:
                kept[slot], self._rows[slot] = False, None
        if self._state is not None and not kept.all():
            with self._scope():
                self._state = _keep(self._state, self._put(kept))

    def _next_arrival(self) -> int:
        return min(self._arrival, len(self._waiting))

    def _admit(self) -> None:
        rows = [self._waiting.popleft() for _ in range(self._next_arrival())]
        free = [slot for slot, row in enumerate(self._rows) if row is None][: len(rows)]
        distinct = list(dict.fromkeys(row.prompt for row in rows))
        width = _rounded(max(max(map(len, distinct)) - 1, 1), PREFIX_STEP)
        width = min(width, self._model.config.max_length)  # where every prompt fits
        self._make_room(width)
        count = max(1 << (len(distinct) - 1).bit_length(), self._arrival // 4)
        count = -(-count // self._parts) * self._parts
        prompts, mask = left_padded(distinct, width + 1, pad_id=self._model.config.pad_id)
        # Shapes that recur: prompts nobody has asked for, and the last row over again.
        prompts, mask = (np.resize(x, (count, width + 1)) for x in (prompts, mask))
        again = [*range(len(rows)), *[-1] * (self._arrival - len(rows))]
        where = {prompt: i for i, prompt in enumerate(distinct)}
        of_rows = (
            np.array([where[rows[i].prompt] for i in again], np.int32),
            np.array([free[i] for i in again], np.int32),
            np.array([rows[i].key for i in again]),
            np.array([rows[i].budget for i in again], np.int32),
            np.array([rows[i].minimum for i in again], np.int32),
        )
        arrivals, mask = self._put((Arrivals(prompts, *of_rows), mask))
        prefix = _prefill(self._model, self._params, arrivals.prompts, mask)
        if self._state is None:
            key = jax.random.wrap_key_data(arrivals.keys[0], impl=self._key_impl)
            self._state = _empty(
                prefix, key, np.int32(self._head), rows=self.slots, columns=self._columns
            )
        self._state = _admit(self._state, arrivals, prefix)
        for at, row in zip(free, rows, strict=True):
            self._rows[at] = row
        self._first[free], self._length[free] = self._head + 1, 0

    def _make_room(self, prefix: int) -> None:
        """Sees to it that the head has `prefix` columns before it, and at least one after it."""
        if prefix <= self._head < self._columns:
            return
        spans = [
            len(row.prompt) - 1 + int(length)
            for row, length in zip(self._rows, self._length, strict=True)
            if row is not None
        ]
        head = max([prefix, *spans])
        columns = _rounded(head + max(PREFIX_STEP, head // 8), COLUMNS_STEP)
        if not self._waiting:  # the last rows are not worth a program of their own
            columns = max(columns, self._columns)
        if self._state is not None:
            self._state = _move(self._state, np.int32(head), columns=columns)
        self._first += head - self._head
        self._head, self._columns = head, columns

    def _harvest(self, state: Slots) -> dict[int, Response]:
        head, live, length, tokens, log_probs = hosts.fetch(
            (state.head, state.live, state.length, state.tokens, state.log_probs)
        )
        self.turns += int(head) - self._head
        self._head, self._length = int(head), length.astype(np.int64)
        ended = {}
        for slot, row in enumerate(self._rows):
            if row is None or live[slot]:
                continue
            columns = slice(self._first[slot], self._first[slot] + self._length[slot])
            response = tuple(tokens[slot, columns].tolist())
            self.drawn += len(response)
            ended[row.number] = Response(
                response, log_probs[slot, columns].copy(), self._sampling.ending(response)
            )
            self._rows[slot] = None
        return ended


def respond(
    model: Model,
    params: Any,
    prompts: Sequence[Sequence[int]],
    keys: jax.Array,
    sampling: Sampling,
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    slots: int = 64,
    mesh: Mesh | None = None,
) -> list[Response]:
    """One Response a prompt, in order, of an `Engine` that takes the longest prompts first.

    So prompts of a length share a prefill, equal ones are read once, and the cache only narrows.
    """
    _check_prompts(
        model, prompts, max_new_tokens, min_new_tokens
    )  # before they are in another order
    engine = Engine(model, params, sampling, slots=min(slots, max(len(prompts), 1)), mesh=mesh)
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), tuple(prompts[i])))
    numbers = engine.submit(
        [prompts[i] for i in order],
        keys[np.array(order, np.int32)],
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
    )
    responses = dict(engine.run())
    of_prompts = {i: responses[number] for i, number in zip(order, numbers, strict=True)}
    return [of_prompts[i] for i in range(len(prompts))]


def left_padded(
    prompts: Iterable[Sequence[int]], width: int, *, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Token lists at the right end of rows of `width`: (int32[N, width], bool[N, width])."""
    prompts = list(prompts)
    tokens = np.full((len(prompts), width), pad_id, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[width - len(prompt) :] = prompt
    lengths = np.array([len(prompt) for prompt in prompts])
    return tokens, np.arange(width)[None, :] >= (width - lengths)[:, None]


def _check_prompts(
    model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int, min_new_tokens: int
) -> None:
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty: there is nothing to continue")
        check_lengths(model, len(prompt), max_new_tokens, min_new_tokens)


def _rounded(size: int, step: int) -> int:
    step = max(step, (1 << (size.bit_length() - 1)) // 4)
    return -(-size // step) * step


_weights = jax.jit(decoding_weights, static_argnames="dtype")


@partial(jax.jit, static_argnames="model")
def _prefill(model: Model, params: Any, prompts: jax.Array, mask: jax.Array) -> Any:
    prompts, mask = spread_rows((prompts, mask))
    return prefill(model, params, prompts, mask, columns=prompts.shape[1] - 1)


@partial(jax.jit, static_argnames=("rows", "columns"))
def _empty(prefix: Any, key: jax.Array, head: jax.Array, *, rows: int, columns: int) -> Slots:
    return spread_rows(empty_slots(prefix, rows=rows, columns=columns, head=head, key=key))


@partial(jax.jit, donate_argnames="slots")
def _admit(slots: Slots, arrivals: Arrivals, prefix: Any) -> Slots:
    return spread_rows(admit(slots, arrivals, prefix))


@partial(jax.jit, static_argnames=("model", "sampling"), donate_argnames="slots")
def _advance(
    model: Model,
    params: Any,
    slots: Slots,
    until: jax.Array,
    turns: jax.Array,
    *,
    sampling: Sampling,
) -> Slots:
    return spread_rows(advance(model, params, slots, sampling, until=until, turns=turns))


@partial(jax.jit, donate_argnames="slots")
def _keep(slots: Slots, kept: jax.Array) -> Slots:
    return spread_rows(slots._replace(live=slots.live & kept))


@partial(jax.jit, static_argnames="columns")  # into buffers of another width
def _move(slots: Slots, head: jax.Array, *, columns: int) -> Slots:
    return spread_rows(move(slots, head, columns=columns))
