r"""The rules behind `chunked.py`: statistics of positions from hidden states, chunk by chunk, and
the sum of their cross-entropies.

Rows come in G blocks of N positions, hidden states float[G, N, D] and tokens int[G, N], walked over
in the order of `_chunks`. The mathematics of the gradients are in `chunked.py`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from instruct_jax.losses._chunks import (
    Order,
    in_order,
    in_place,
    live_chunks,
    part,
    write,
)
from instruct_jax.losses._mesh import zeros
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
    mean_log_prob: jax.Array


class Statistics(NamedTuple):
    """What the custom rule returns, with or without what was not asked for; each float[G, N].

    softmax(logits) = exp(logits - largest) / exp(log_total): an offset that all logits share is in
    `largest` alone, which counts as a constant, and everything else is made of small numbers.
    """

    log_probs: jax.Array
    largest: jax.Array
    log_total: jax.Array
    moments: Moments | None
    hits: jax.Array | None


def logits_of(hidden: jax.Array, weights: jax.Array, temperature: jax.Array, ask: Ask) -> jax.Array:
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
    largest, log_total = normalizer.largest, jnp.log(normalizer.total)
    # A comparison instead of a gather: it fuses, and works on a sharded vocabulary.
    picked = jnp.sum(jnp.where(columns == tokens[..., None], logits, 0.0), axis=-1)
    moments = hits = None
    if ask.moments:
        below = jnp.where(columns < ask.vocab_size, logits - largest[..., None], 0.0)
        shares = jnp.where(columns < ask.vocab_size, jnp.exp(below), 0.0)
        moments = Moments(
            entropy=log_total - jnp.sum(shares * below, axis=-1) / normalizer.total,
            mean_log_prob=jnp.sum(below, axis=-1) / ask.vocab_size - log_total,
        )
    if ask.hits:
        hits = (picked >= largest).astype(logits.dtype)
    log_probs = (picked - largest) - log_total
    return Statistics(log_probs, largest, log_total, moments, hits)


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
    largest: jax.Array
    log_total: jax.Array
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
    if chunk >= positions:
        logits = logits_of(hidden, weights, temperature, ask)
        statistics = _read(logits, tokens, ask)
    else:
        rows, ids = (in_order(x, order, chunk) for x in (hidden, tokens))

        def one_chunk(i: jax.Array, done: Statistics) -> Statistics:
            of_chunk = partial(part, i=i, chunk=chunk)
            new = _read(logits_of(of_chunk(rows), weights, temperature, ask), of_chunk(ids), ask)
            return jax.tree.map(partial(write, i=i), done, new)

        shapes = jax.eval_shape(lambda: _read(logits_of(rows, weights, temperature, ask), ids, ask))
        nothing = jax.tree.map(lambda s: zeros(s.shape, s.dtype, like=rows), shapes)
        live = live_chunks(order, positions, chunk)
        ordered = jax.lax.fori_loop(0, live, one_chunk, nothing)
        statistics = jax.tree.map(lambda x: in_place(x, order, positions), ordered)
    entropy = None if statistics.moments is None else statistics.moments.entropy
    normalizer = statistics.largest, statistics.log_total
    kept = hidden, head, tokens, temperature, order, *normalizer, entropy, logits
    return statistics, _Residuals(*kept)


def _to_logits(
    logits: jax.Array,
    tokens: jax.Array,
    largest: jax.Array,
    log_total: jax.Array,
    entropy: jax.Array | None,
    cotangents: Statistics,
    *,
    temperature: jax.Array,
    ask: Ask,
) -> jax.Array:
    """float[G, n, V]: the gradient of the products with the head, before cap and temperature."""
    log_p = (logits - largest[..., None]) - log_total[..., None]
    to_log_prob = cotangents.log_probs
    to_p = (cotangents.log_total - to_log_prob)[..., None]
    moments = cotangents.moments
    if moments is not None and entropy is not None:
        to_p -= moments.mean_log_prob[..., None]
        to_p -= moments.entropy[..., None] * (log_p + entropy[..., None])
    gradient = jnp.exp(log_p) * to_p
    if moments is not None:
        gradient += moments.mean_log_prob[..., None] / ask.vocab_size
    gradient = _at_tokens(gradient, tokens, to_log_prob)
    return to_products(logits, gradient, temperature=temperature, ask=ask)


def _at_tokens(gradient: jax.Array, tokens: jax.Array, to_picked: jax.Array) -> jax.Array:
    """The gradient float[G, n, V] with float[G, n] added at the columns of the tokens."""
    hit = _columns(gradient) == tokens[..., None]
    return gradient + jnp.where(hit, to_picked[..., None], 0.0)


def to_products(
    logits: jax.Array, gradient: jax.Array, *, temperature: jax.Array, ask: Ask
) -> jax.Array:
    """The gradient of the logits float[G, n, V] as one of the products with the head."""
    if ask.softcap is not None:
        gradient *= 1.0 - jnp.square(logits * temperature / ask.softcap)
    return jnp.where(_columns(logits) < ask.vocab_size, gradient / temperature, 0.0)


def add_gradient(
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
    return to_head + addend.reshape(to_head.shape), write(to_hidden, of_states, i=i)


def no_gradient(rows: jax.Array, head: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """What `add_gradient` starts from, for all `rows` float[G, N, D]."""
    of_head = zeros((rows.shape[0], *head.shape[::-1]), dtype, like=rows)
    return of_head, zeros(rows.shape, rows.dtype, like=rows)


def _backward(
    ask: Ask, kept: _Residuals, cotangents: Statistics
) -> tuple[jax.Array, jax.Array, None, jax.Array, None]:
    """Gradients of hidden and head, from the logits, which are made once more where there are
    several chunks.
    """
    hidden, head, tokens, temperature, order, largest, log_total, entropy, logits = kept
    weights, positions, chunk = head.astype(hidden.dtype), tokens.shape[1], ask.chunk
    cotangents, unit = within_range(cotangents._replace(hits=None), hidden.dtype)
    by_position = (tokens, largest, log_total, entropy, cotangents)
    rows, *by_position = jax.tree.map(lambda x: in_order(x, order, chunk), (hidden, *by_position))

    def one_chunk(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> Any:
        of_chunk = partial(part, i=i, chunk=chunk)
        states, known = of_chunk(rows), jax.tree.map(of_chunk, by_position)
        made = logits_of(states, weights, temperature, ask) if logits is None else logits
        to_logits = _to_logits(made, *known, temperature=temperature, ask=ask)
        return add_gradient(sums, i, states, weights, to_logits)

    nothing = no_gradient(rows, head, temperature.dtype)
    live = live_chunks(order, positions, chunk)
    to_head, of_hidden = jax.lax.fori_loop(0, live, one_chunk, nothing)
    of_hidden = scaled(in_place(of_hidden, order, positions), unit, hidden.dtype)
    to_head = scaled(to_head.sum(axis=0).T, unit, head.dtype)
    return of_hidden, to_head, None, jnp.zeros_like(temperature), None


def within_range(cotangents: Any, dtype: Any) -> tuple[Any, jax.Array | None]:
    """The cotangents divided by one number, and the number: None where no division is needed.

    The gradient of the logits is cast to the dtype of the hidden states. In float16 that would make
    the factor of a scaled loss infinite past 65,504.
    """
    if dtype != jnp.float16:
        return cotangents, None
    unit = jnp.max(
        jnp.stack([jnp.max(jnp.abs(x), initial=1.0) for x in jax.tree.leaves(cotangents)])
    )
    return jax.tree.map(lambda x: x / unit, cotangents), unit


def scaled(gradient: jax.Array, factor: jax.Array | None, dtype: Any) -> jax.Array:
    """The gradient times the factor, in the end as `dtype`."""
    if factor is not None:
        gradient = gradient.astype(factor.dtype) * factor
    return gradient.astype(dtype)


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
    rows, ids, asked = (in_order(x, order, chunk) for x in (hidden, tokens, where))

    def one_chunk(i: jax.Array, done: Any) -> Any:
        sums, gradients = done
        states, known, here = (part(x, i=i, chunk=chunk) for x in (rows, ids, asked))
        logits, weight = logits_of(states, weights, temperature, ask), here.astype(dtype)
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
            to_logits = _at_tokens(to_logits, known, -weight)
            to_logits = to_products(logits, to_logits, temperature=temperature, ask=ask)
            gradients = add_gradient(gradients, i, states, weights, to_logits)
        return sums, gradients

    none = zeros(hidden.shape[:1], dtype, like=rows)
    nothing = no_gradient(rows, head, dtype) if differentiated else None
    start = CrossEntropySum(none, none if ask.hits else None), nothing
    live = live_chunks(order, positions, chunk)
    sums, gradients = jax.lax.fori_loop(0, live, one_chunk, start)
    if gradients is not None:
        to_head, of_hidden = gradients
        # A sum over positions may be past the range of float16 before it is divided by their count.
        kept_as = dtype if head.dtype == jnp.float16 else head.dtype
        to_head = to_head.sum(axis=0).T.astype(kept_as)
        gradients = in_place(of_hidden, order, positions), to_head
    return jax.tree.map(jnp.sum, sums), gradients


def _sums_forward(
    hidden: jax.Array, head: jax.Array, *arguments: Any
) -> tuple[CrossEntropySum, tuple[jax.Array, jax.Array, jax.Array]]:
    sums, gradients = _summed(hidden, head, *arguments, differentiated=True)
    assert gradients is not None
    return sums, (*gradients, jnp.zeros([], head.dtype))


def _sums_backward(ask: Ask, kept: Any, cotangents: CrossEntropySum) -> tuple[Any, ...]:
    """The gradients are there: the loss is linear in the losses of its positions."""
    of_hidden, to_head, of_head = kept
    of_hidden = scaled(of_hidden, cotangents.loss, of_hidden.dtype)
    return of_hidden, scaled(to_head, cotangents.loss, of_head.dtype), None, None, None


sums_of.defvjp(_sums_forward, _sums_backward)
