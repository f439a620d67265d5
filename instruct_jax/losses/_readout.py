r"""The rules behind `chunked.py`: statistics of positions from hidden states, chunk by chunk, and
the sum of their cross-entropies.

Rows come in G blocks of N positions, hidden states float[G, N, D] and tokens int[G, N]. An `Order`
brings the positions that are asked for to the front of their block; chunks behind the last of them
are never made. The mathematics of the gradients are in `chunked.py`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from instruct_jax.losses.language import MASKED_LOGIT


class Ask(NamedTuple):
    """What is computed, and how; static."""

    chunk: int
    vocab_size: int
    softcap: float | None
    moments: bool
    hits: bool


class Moments(NamedTuple):
    """What costs another pass over the logits of a chunk; each float[G, N]."""

    entropy: jax.Array
    mean_logit: jax.Array


class Statistics(NamedTuple):
    """What the custom rule returns, with or without what was not asked for; each float[G, N]."""

    log_probs: jax.Array
    log_normalizer: jax.Array
    moments: Moments | None
    hits: jax.Array | None


class Order(NamedTuple):
    """The positions of each block, those that are asked for first."""

    positions: jax.Array  # int32[G, N], the position at each place
    places: jax.Array  # int32[G, N], the place of each position
    most: jax.Array  # int32[], how many the fullest block has


def targets_first(where: jax.Array) -> Order:
    """bool[G, N] -> the order that brings the true ones to the front, each kind in its order."""
    true, false = (jnp.cumsum(x, axis=1, dtype=jnp.int32) for x in (where, ~where))
    return Order(
        positions=jnp.argsort(~where, axis=1, stable=True).astype(jnp.int32),
        places=jnp.where(where, true - 1, true[:, -1:] + false - 1),
        most=true[:, -1].max(),
    )


def _in_order(x: jax.Array, order: Order | None, chunk: int) -> jax.Array:
    """[G, N, ...] in the order of the chunks, padded with zeros to a multiple of `chunk`."""
    if order is not None:
        index = order.positions.reshape(*order.positions.shape, *[1] * (x.ndim - 2))
        x = jnp.take_along_axis(x, index, axis=1, mode="clip")
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, -x.shape[1] % chunk)
    return jnp.pad(x, padding)


def _in_place(x: jax.Array, order: Order | None, length: int) -> jax.Array:
    """The inverse of `_in_order`."""
    if order is None:
        return x[:, :length]
    index = order.places.reshape(*order.places.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1, mode="clip")


def _part(x: jax.Array, *, i: jax.Array, chunk: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1)


def _write(x: jax.Array, new: jax.Array, *, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, new, i * new.shape[1], axis=1)


def _live_chunks(order: Order | None, positions: int, chunk: int) -> jax.Array | int:
    """How many chunks hold a position that is asked for."""
    return -(-(positions if order is None else order.most) // chunk)


def _logits(hidden: jax.Array, weights: jax.Array, temperature: jax.Array, ask: Ask) -> jax.Array:
    """float[G, n, V] scaled logits of n positions."""
    logits = jnp.einsum("gnd,dv->gnv", hidden, weights, preferred_element_type=temperature.dtype)
    if ask.softcap is not None:
        logits = ask.softcap * jnp.tanh(logits / ask.softcap)
    return jnp.where(_columns(logits) < ask.vocab_size, logits / temperature, MASKED_LOGIT)


def _columns(logits: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)


class _Normalizer(NamedTuple):
    """softmax(logits) = exp(logits - largest) / total; each float[G, n]."""

    largest: jax.Array  # finite: so is MASKED_LOGIT
    total: jax.Array

    @classmethod
    def of(cls, logits: jax.Array) -> _Normalizer:
        """Of float[G, n, V]."""
        largest = jnp.max(logits, axis=-1)
        return cls(largest, jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1))


def _reduced(logits: jax.Array, normalizer: _Normalizer, tokens: jax.Array, ask: Ask) -> Statistics:
    """The statistics of float[G, n, V] logits and int[G, n] tokens."""
    columns = _columns(logits)
    log_total = jnp.log(normalizer.total)
    log_normalizer = normalizer.largest + log_total
    # A comparison instead of a gather: it fuses, and works on a sharded vocabulary.
    picked = jnp.sum(jnp.where(columns == tokens[..., None], logits, 0.0), axis=-1)
    moments = hits = None
    if ask.moments:
        probabilities = jnp.exp(logits - log_normalizer[..., None])
        real = jnp.where(columns < ask.vocab_size, logits, 0.0)
        moments = Moments(
            entropy=log_normalizer - jnp.sum(probabilities * real, axis=-1),
            mean_logit=jnp.sum(real, axis=-1) / ask.vocab_size,
        )
    if ask.hits:
        hits = (picked >= normalizer.largest).astype(logits.dtype)
    # Two small numbers, where picked - log_normalizer would round two large ones.
    log_probs = (picked - normalizer.largest) - log_total
    return Statistics(log_probs, log_normalizer, moments, hits)


def _read(logits: jax.Array, tokens: jax.Array, ask: Ask) -> Statistics:
    return _reduced(logits, _Normalizer.of(logits), tokens, ask)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def statistics_of(
    hidden: jax.Array,
    head: jax.Array,
    tokens: jax.Array,
    temperature: jax.Array,
    order: Order | None,
    ask: Ask,
) -> Statistics:
    """Checked arguments in blocks of rows [G, N, ...] in, statistics out; `_backward` is the
    gradient. Positions behind the last live chunk get zeros.
    """
    return _forward(hidden, head, tokens, temperature, order, ask)[0]


class _Residuals(NamedTuple):
    """What the backward pass needs. There are logits where one chunk is all there is."""

    hidden: jax.Array
    head: jax.Array
    tokens: jax.Array
    temperature: jax.Array
    order: Order | None
    log_normalizer: jax.Array
    entropy: jax.Array | None
    logits: jax.Array | None


def _forward(
    hidden: jax.Array,
    head: jax.Array,
    tokens: jax.Array,
    temperature: jax.Array,
    order: Order | None,
    ask: Ask,
) -> tuple[Statistics, _Residuals]:
    """The statistics, and what the backward pass needs."""
    weights = head.astype(hidden.dtype)
    positions, chunk = tokens.shape[1], ask.chunk
    logits = None
    if chunk == positions:
        logits = _logits(hidden, weights, temperature, ask)
        statistics = _read(logits, tokens, ask)
    else:
        rows, ids = (_in_order(x, order, chunk) for x in (hidden, tokens))

        def one_chunk(i: jax.Array, done: Statistics) -> Statistics:
            part = partial(_part, i=i, chunk=chunk)
            new = _read(_logits(part(rows), weights, temperature, ask), part(ids), ask)
            return jax.tree.map(partial(_write, i=i), done, new)

        shapes = jax.eval_shape(lambda: _read(_logits(rows, weights, temperature, ask), ids, ask))
        nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        live = _live_chunks(order, positions, chunk)
        ordered = jax.lax.fori_loop(0, live, one_chunk, nothing)
        statistics = jax.tree.map(lambda x: _in_place(x, order, positions), ordered)
    entropy = None if statistics.moments is None else statistics.moments.entropy
    normalizer = statistics.log_normalizer
    kept = hidden, head, tokens, temperature, order, normalizer, entropy, logits
    return statistics, _Residuals(*kept)


def _to_logits(
    logits: jax.Array,
    tokens: jax.Array,
    log_normalizer: jax.Array,
    entropy: jax.Array | None,
    cotangents: Statistics,
    *,
    temperature: jax.Array,
    ask: Ask,
) -> jax.Array:
    """float[G, n, V]: the gradient of the products with the head, before cap and temperature."""
    log_p = logits - log_normalizer[..., None]
    to_log_prob = cotangents.log_probs
    to_p = (cotangents.log_normalizer - to_log_prob)[..., None]
    moments = cotangents.moments
    if moments is not None and entropy is not None:
        to_p -= moments.entropy[..., None] * (log_p + entropy[..., None])
    gradient = jnp.exp(log_p) * to_p
    if moments is not None:
        gradient += moments.mean_logit[..., None] / ask.vocab_size
    return _to_products(logits, tokens, gradient, to_log_prob, temperature=temperature, ask=ask)


def _to_products(
    logits: jax.Array,
    tokens: jax.Array,
    gradient: jax.Array,
    to_picked: jax.Array,
    *,
    temperature: jax.Array,
    ask: Ask,
) -> jax.Array:
    """The gradient float[G, n, V] of the logits, and float[G, n] of those of `tokens` on top of it,
    as one of the products with the head.
    """
    columns = _columns(logits)
    gradient += jnp.where(columns == tokens[..., None], to_picked[..., None], 0.0)
    if ask.softcap is not None:
        gradient *= 1.0 - jnp.square(logits * temperature / ask.softcap)
    return jnp.where(columns < ask.vocab_size, gradient / temperature, 0.0)


def _add_gradient(
    sums: tuple[jax.Array, jax.Array],
    i: jax.Array,
    states: jax.Array,
    weights: jax.Array,
    to_logits: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The gradients of head float[G, V, D] and hidden float[G, N, D] with those of chunk i in them.

    `to_logits` float[G, n, V] is the gradient of the products of `states` with `weights`. The head
    has a sum for each block of rows: they meet once, after the last chunk. It is kept as a table
    of tokens, V rows of D: what most models tie it to, and the faster product on a CPU.
    """
    to_head, to_hidden = sums
    dot = partial(jnp.einsum, preferred_element_type=to_head.dtype)
    to_logits = to_logits.astype(states.dtype)
    # On a CPU a product with a batch axis, even of size 1, runs on one core.
    one = states.shape[0] == 1
    addend = dot("gnv,gnd->vd" if one else "gnv,gnd->gvd", to_logits, states)
    of_states = dot("gnv,dv->gnd", to_logits, weights).astype(to_hidden.dtype)
    return to_head + addend.reshape(to_head.shape), _write(to_hidden, of_states, i=i)


def _no_gradient(rows: jax.Array, head: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """What `_add_gradient` starts from, for all `rows` float[G, N, D]."""
    return jnp.zeros((rows.shape[0], *head.shape[::-1]), dtype), jnp.zeros_like(rows)


def _backward(
    ask: Ask, kept: _Residuals, cotangents: Statistics
) -> tuple[jax.Array, jax.Array, None, jax.Array, None]:
    """Gradients of hidden and head, from the logits, which are made once more where there are
    several chunks.
    """
    hidden, head, tokens, temperature, order, log_normalizer, entropy, logits = kept
    weights, positions, chunk = head.astype(hidden.dtype), tokens.shape[1], ask.chunk
    by_position = (tokens, log_normalizer, entropy, cotangents._replace(hits=None))
    rows, *by_position = jax.tree.map(lambda x: _in_order(x, order, chunk), (hidden, *by_position))

    def one_chunk(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> Any:
        part = partial(_part, i=i, chunk=chunk)
        states, known = part(rows), jax.tree.map(part, by_position)
        made = _logits(states, weights, temperature, ask) if logits is None else logits
        to_logits = _to_logits(made, *known, temperature=temperature, ask=ask)
        return _add_gradient(sums, i, states, weights, to_logits)

    nothing = _no_gradient(rows, head, temperature.dtype)
    live = _live_chunks(order, positions, chunk)
    to_head, of_hidden = jax.lax.fori_loop(0, live, one_chunk, nothing)
    of_hidden = _in_place(of_hidden, order, positions)
    to_head = to_head.sum(axis=0).T.astype(head.dtype)
    return of_hidden, to_head, None, jnp.zeros_like(temperature), None


statistics_of.defvjp(_forward, _backward)


class CrossEntropySum(NamedTuple):
    """Over the positions that were asked for, each float[]; the hits are those of
    `TokenStatistics`.
    """

    loss: jax.Array
    hits: jax.Array | None = None


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def sums_of(
    hidden: jax.Array,
    head: jax.Array,
    tokens: jax.Array,
    where: jax.Array,
    order: Order | None,
    ask: Ask,
) -> CrossEntropySum:
    """The sum of -log p over `where` bool[G, N], and of the hits; no position is kept apart."""
    return _summed(hidden, head, tokens, where, order, ask, differentiated=False)[0]


def _summed(
    hidden: jax.Array,
    head: jax.Array,
    tokens: jax.Array,
    where: jax.Array,
    order: Order | None,
    ask: Ask,
    *,
    differentiated: bool,
) -> tuple[CrossEntropySum, tuple[jax.Array, jax.Array] | None]:
    """The sums and, made of the same logits, their gradients of hidden and head."""
    weights, positions, chunk = head.astype(hidden.dtype), tokens.shape[1], ask.chunk
    dtype = jnp.float64 if hidden.dtype == jnp.float64 else jnp.float32
    temperature = jnp.ones([], dtype)
    rows, ids, asked = (_in_order(x, order, chunk) for x in (hidden, tokens, where))

    def one_chunk(i: jax.Array, done: Any) -> Any:
        sums, gradients = done
        states, known, here = (_part(x, i=i, chunk=chunk) for x in (rows, ids, asked))
        logits, weight = _logits(states, weights, temperature, ask), here.astype(dtype)
        normalizer = _Normalizer.of(logits)
        new = _reduced(logits, normalizer, known, ask)
        sums = CrossEntropySum(
            sums.loss - jnp.where(here, new.log_probs, 0.0).sum(axis=1),
            None if new.hits is None else sums.hits + jnp.where(here, new.hits, 0.0).sum(axis=1),
        )
        if gradients is not None:
            # Not exp(logits - log_normalizer): XLA would take a row's logarithm at every column.
            scale = (weight / normalizer.total)[..., None]
            to_logits = jnp.exp(logits - normalizer.largest[..., None]) * scale
            to_logits = _to_products(
                logits, known, to_logits, -weight, temperature=temperature, ask=ask
            )
            gradients = _add_gradient(gradients, i, states, weights, to_logits)
        return sums, gradients

    zeros = jnp.zeros(hidden.shape[:1], dtype)
    nothing = _no_gradient(rows, head, dtype) if differentiated else None
    start = CrossEntropySum(zeros, zeros if ask.hits else None), nothing
    live = _live_chunks(order, positions, chunk)
    sums, gradients = jax.lax.fori_loop(0, live, one_chunk, start)
    if gradients is not None:
        to_head, of_hidden = gradients
        to_head = to_head.sum(axis=0).T.astype(head.dtype)
        gradients = _in_place(of_hidden, order, positions), to_head
    return jax.tree.map(jnp.sum, sums), gradients


def _sums_forward(*arguments: Any) -> tuple[CrossEntropySum, Any]:
    return _summed(*arguments, differentiated=True)


def _sums_backward(ask: Ask, kept: Any, cotangents: CrossEntropySum) -> tuple[Any, ...]:
    """The gradients are there: the loss is linear in the losses of its positions."""
    of_hidden, to_head = (cotangents.loss.astype(x.dtype) * x for x in kept)
    return of_hidden, to_head, None, None, None


sums_of.defvjp(_sums_forward, _sums_backward)
