r"""The rule behind `chunked.py`: statistics of positions from hidden states, chunk by chunk.

Rows come in G blocks of N positions, hidden states float[G, N, D] and tokens int[G, N]. An `Order`
brings the positions that are asked for to the front of their block; chunks behind the last of them
are never made. The mathematics of the gradient are in `chunked.py`.
"""

from __future__ import annotations

import math
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


def _reduced(logits: jax.Array, tokens: jax.Array, ask: Ask) -> Statistics:
    """The statistics of float[G, n, V] logits and int[G, n] tokens."""
    columns = _columns(logits)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
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
        hits = (jnp.argmax(logits, axis=-1) == tokens).astype(logits.dtype)
    return Statistics(picked - log_normalizer, log_normalizer, moments, hits)


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
        statistics = _reduced(logits, tokens, ask)
    else:
        rows, ids = (_in_order(x, order, chunk) for x in (hidden, tokens))

        def one_chunk(i: jax.Array, done: Statistics) -> Statistics:
            part = partial(_part, i=i, chunk=chunk)
            new = _reduced(_logits(part(rows), weights, temperature, ask), part(ids), ask)
            return jax.tree.map(partial(_write, i=i), done, new)

        shapes = jax.eval_shape(
            lambda: _reduced(_logits(rows, weights, temperature, ask), ids, ask)
        )
        nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        live = _live_chunks(order, positions, chunk)
        ordered = jax.lax.fori_loop(0, live, one_chunk, nothing)
        statistics = jax.tree.map(lambda x: _in_place(x, order, positions), ordered)
    entropy = None if statistics.moments is None else statistics.moments.entropy
    normalizer = statistics.log_normalizer
    kept = hidden, head, tokens, temperature, order, normalizer, entropy, logits
    return statistics, _Residuals(*kept)


def _part(x: jax.Array, *, i: jax.Array, chunk: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1)


def _write(x: jax.Array, new: jax.Array, *, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, new, i * new.shape[1], axis=1)


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
    columns = _columns(logits)
    log_p = logits - log_normalizer[..., None]
    to_log_prob = cotangents.log_probs[..., None]
    to_p = cotangents.log_normalizer[..., None] - to_log_prob
    moments = cotangents.moments
    if moments is not None and entropy is not None:
        to_p -= moments.entropy[..., None] * (log_p + entropy[..., None])
    gradient = jnp.exp(log_p) * to_p
    if moments is not None:
        gradient += moments.mean_logit[..., None] / ask.vocab_size
    gradient += jnp.where(columns == tokens[..., None], to_log_prob, 0.0)
    if ask.softcap is not None:
        gradient *= 1.0 - jnp.square(logits * temperature / ask.softcap)
    return jnp.where(columns < ask.vocab_size, gradient / temperature, 0.0)


def _backward(
    ask: Ask, kept: _Residuals, cotangents: Statistics
) -> tuple[jax.Array, jax.Array, None, jax.Array, None]:
    """Gradients of hidden and head, from the logits, which are made once more where there are
    several chunks.
    """
    hidden, head, tokens, temperature, order, log_normalizer, entropy, logits = kept
    weights, accumulator = head.astype(hidden.dtype), temperature.dtype
    dot = partial(jnp.einsum, preferred_element_type=accumulator)
    by_position = (tokens, log_normalizer, entropy, cotangents._replace(hits=None))

    def to_hidden(to_logits: jax.Array) -> jax.Array:
        return dot("gnv,dv->gnd", to_logits, weights).astype(hidden.dtype)

    def from_logits(logits: jax.Array, known: Any) -> jax.Array:
        return _to_logits(logits, *known, temperature=temperature, ask=ask).astype(hidden.dtype)

    if logits is not None:
        to_logits = from_logits(logits, by_position)
        to_head = dot("gnd,gnv->dv", hidden, to_logits)
        of_hidden = to_hidden(to_logits)
    else:
        positions, chunk = tokens.shape[1], ask.chunk
        rows = _in_order(hidden, order, chunk)
        by_position = jax.tree.map(lambda x: _in_order(x, order, chunk), by_position)
        blocks, width = hidden.shape[0], head.shape[0]
        # What is added to the gradient of the head is as large as its rows: a few at a time.
        groups = math.gcd(width, 4)
        # On a CPU a product with a batch axis, even of size 1, runs on one core.
        products = "gnd,gnv->dv" if blocks == 1 else "gnd,gnv->gdv"

        def one_chunk(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> Any:
            to_head, of_hidden = sums
            part = partial(_part, i=i, chunk=chunk)
            states, known = part(rows), jax.tree.map(part, by_position)
            to_logits = from_logits(_logits(states, weights, temperature, ask), known)
            states = states.reshape(blocks, chunk, groups, -1)

            def add(group: jax.Array, total: jax.Array) -> jax.Array:
                addend = dot(products, states[:, :, group], to_logits)
                return total.at[group].add(addend.reshape(total.shape[1:]))

            to_head = jax.lax.fori_loop(0, groups, add, to_head)
            return to_head, _write(of_hidden, to_hidden(to_logits), i=i)

        # A sum for each block of rows: they meet once, after the last chunk.
        nothing = jnp.zeros((groups, blocks, width // groups, head.shape[1]), accumulator)
        live = _live_chunks(order, positions, chunk)
        sums = jax.lax.fori_loop(0, live, one_chunk, (nothing, jnp.zeros_like(rows)))
        to_head = sums[0].sum(axis=1).reshape(head.shape)
        of_hidden = _in_place(sums[1], order, positions)
    return of_hidden, to_head.astype(head.dtype), None, jnp.zeros_like(temperature), None


statistics_of.defvjp(_forward, _backward)
