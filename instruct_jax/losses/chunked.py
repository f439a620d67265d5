r"""Log-probabilities from hidden states, without ever holding float[B, T, V].

At V = 50,257 the logits of a batch are its largest array by far, and the dense path keeps several
copies of it. Here a scan walks over `chunk` positions at a time: it makes the logits of the chunk,
float[B, chunk, V], reduces them and drops them. The backward pass keeps only the log-normaliser
and the entropy of each position, makes the logits again, and adds up the gradient of the head in
float32. That costs one more product with the head than the dense path, 4 instead of 3, and saves
the passes over float[B, T, V] in memory that is far away.

With :math:`z = h W / \tau` restricted to the real vocabulary, :math:`\ell = \log \sum_v e^{z_v}`,
:math:`p_v = e^{z_v - \ell}`, the gradients behind the custom rule are

.. math:: \partial \log p_y / \partial z_v = 1[v = y] - p_v, \qquad
          \partial \ell / \partial z_v = p_v, \qquad
          \partial H / \partial z_v = -p_v (\log p_v + H)

Positions are chunked, not the vocabulary: the batch axis can stay sharded over data and the
vocabulary axis over tensor, where the reductions over V become all-reduces of [B, chunk].

A longer chunk needs more memory and less time: each chunk reads and writes the gradient of the
head, float32[D, V], once. The entropy and the mean logit are made only where they are asked for.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from instruct_jax.losses.language import MASKED_LOGIT

DEFAULT_CHUNK = 32
"""Positions at a time. At [8, 512, 50257] and D = 256 or 768 this takes less than an eighth of the
dense path's memory. Shorter chunks are slower; tests/losses/test_chunked.py has the limits."""


class TokenStatistics(NamedTuple):
    """What one pass over the logits gives at each position; each float[B, T]."""

    log_probs: jax.Array
    entropy: jax.Array
    log_normalizer: jax.Array
    mean_logit: jax.Array


def chunked_token_statistics(
    hidden: chex.Array,
    head: chex.Array,
    tokens: chex.Array,
    *,
    chunk: int = DEFAULT_CHUNK,
    temperature: chex.Numeric = 1.0,
    vocab_size: int | None = None,
) -> TokenStatistics:
    r"""Log-probability, entropy, log-normaliser and mean logit of each position, chunk by chunk.

    The product with the head runs in the dtype of `hidden` and accumulates in float32; the rest
    is float32 (float64 for float64 inputs). All four outputs are differentiable with respect to
    `hidden` and `head`; the gradient with respect to `temperature` is stopped.

    Not done: no shift, no mask, no reduction.

    Args:
      hidden: float[B, T, D], the states that the head is applied to.
      head: float[D, V]; a tied embedding goes in transposed. Its gradient has its dtype.
      tokens: int[B, T]; `hidden[:, t]` scores `tokens[:, t]`.
      chunk: positions at a time. The peak is about 3 * B * chunk * V * 4 bytes, and in the
        backward pass a quarter of float32[D, V], the addend of the head's gradient.
      temperature: tau > 0, float[].
      vocab_size: number of real columns of the head; None takes all.

    Returns:
      TokenStatistics of float[B, T]; the log-probability is NaN for an id outside of [0, V).

    >>> stats = chunked_token_statistics(
    ...     jnp.ones((1, 3, 2)), jnp.zeros((2, 8)), jnp.array([[0, 1, 2]]), chunk=2)
    >>> print(jnp.exp(stats.entropy).round(4))
    [[8. 8. 8.]]
    """
    log_probs, log_normalizer, moments = _checked(
        hidden,
        head,
        tokens,
        chunk=chunk,
        temperature=temperature,
        vocab_size=vocab_size,
        with_moments=True,
    )
    assert moments is not None
    return TokenStatistics(log_probs, moments.entropy, log_normalizer, moments.mean_logit)


def chunked_token_log_probs(
    hidden: chex.Array,
    head: chex.Array,
    tokens: chex.Array,
    *,
    chunk: int = DEFAULT_CHUNK,
    temperature: chex.Numeric = 1.0,
    vocab_size: int | None = None,
) -> jax.Array:
    r"""`token_log_probs(hidden @ head, tokens)`, chunk by chunk.

    .. math:: \log p_t = z_{t, y_t} - \log \sum_{v < V} \exp z_{t, v}, \qquad
              z_t = h_t W / \tau

    Not done: no shift, no mask, no reduction.

    Args:
      hidden: float[B, T, D].
      head: float[D, V].
      tokens: int[B, T]; `hidden[:, t]` scores `tokens[:, t]`.
      chunk: positions at a time.
      temperature: tau > 0, float[].
      vocab_size: number of real columns of the head.

    Returns:
      float[B, T], at most 0; NaN for an id outside of [0, V).

    >>> log_probs = chunked_token_log_probs(
    ...     jnp.ones((1, 3, 2)), jnp.zeros((2, 8)), jnp.array([[0, 1, 2]]), chunk=2)
    >>> print(jnp.exp(log_probs))
    [[0.125 0.125 0.125]]
    """
    return _checked(
        hidden,
        head,
        tokens,
        chunk=chunk,
        temperature=temperature,
        vocab_size=vocab_size,
        with_moments=False,
    ).log_probs


def chunked_next_token_loss(
    hidden: chex.Array,
    head: chex.Array,
    tokens: chex.Array,
    *,
    chunk: int = DEFAULT_CHUNK,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
) -> jax.Array:
    """`next_token_loss(hidden @ head, tokens)`, chunk by chunk: the shift by one is here.

    Entry t is the loss of `tokens[:, t + 1]` given `hidden[:, t]`.

    Not done: no mask, no reduction.

    Args:
      hidden: float[B, T, D], of the whole sequence; the last position predicts nothing.
      head: float[D, V].
      tokens: int[B, T].
      chunk: positions at a time.
      label_smoothing: see `token_cross_entropy`.
      z_loss: see `token_cross_entropy`.
      vocab_size: number of real columns of the head.

    Returns:
      float[B, T - 1].

    >>> loss = chunked_next_token_loss(
    ...     jnp.ones((1, 3, 2)), jnp.zeros((2, 8)), jnp.array([[0, 1, 2]]), chunk=2)
    >>> print(jnp.exp(loss).round(4))
    [[8. 8.]]
    """
    hidden, tokens = jnp.asarray(hidden), jnp.asarray(tokens)
    chex.assert_equal_shape_prefix([hidden, tokens], 2)
    log_probs, log_normalizer, moments = _checked(
        hidden[:, :-1],
        head,
        tokens[:, 1:],
        chunk=chunk,
        temperature=1.0,
        vocab_size=vocab_size,
        with_moments=label_smoothing != 0.0,
    )
    target = log_probs
    if moments is not None:
        mean_log_prob = moments.mean_logit - log_normalizer
        target = (1.0 - label_smoothing) * log_probs + label_smoothing * mean_log_prob
    return z_loss * jnp.square(log_normalizer) - target


class _Moments(NamedTuple):
    """What costs another pass over the logits of a chunk; each float[B, T]."""

    entropy: jax.Array
    mean_logit: jax.Array


class _Statistics(NamedTuple):
    """What the custom rule returns, with or without the moments; each float[B, T]."""

    log_probs: jax.Array
    log_normalizer: jax.Array
    moments: _Moments | None


def _checked(
    hidden: chex.Array,
    head: chex.Array,
    tokens: chex.Array,
    *,
    chunk: int,
    temperature: chex.Numeric,
    vocab_size: int | None,
    with_moments: bool,
) -> _Statistics:
    """Checks the arguments of a public function, and computes what it asks for."""
    hidden, head, tokens = jnp.asarray(hidden), jnp.asarray(head), jnp.asarray(tokens)
    chex.assert_type([hidden, head, tokens], [float, float, int])
    chex.assert_rank([hidden, head, tokens], [3, 2, 2])
    chex.assert_shape(tokens, hidden.shape[:2])
    chex.assert_axis_dimension(head, 0, hidden.shape[2])
    vocab_size = head.shape[1] if vocab_size is None else vocab_size
    chex.assert_scalar_in(vocab_size, 1, head.shape[1])
    chex.assert_scalar_positive(chunk)
    accumulator = jnp.float64 if hidden.dtype == jnp.float64 else jnp.float32
    temperature = jax.lax.stop_gradient(jnp.asarray(temperature, accumulator))
    chunk = min(chunk, tokens.shape[1])
    statistics = _statistics(hidden, head, tokens, temperature, chunk, vocab_size, with_moments)
    known = (tokens >= 0) & (tokens < head.shape[1])
    return statistics._replace(log_probs=jnp.where(known, statistics.log_probs, jnp.nan))


def _chunks(x: jax.Array, chunk: int) -> jax.Array:
    """[B, T, ...] -> [ceil(T / chunk), B, chunk, ...], padded with zeros."""
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, -x.shape[1] % chunk)
    x = jnp.pad(x, padding)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _joined(x: jax.Array, length: int) -> jax.Array:
    """The inverse of `_chunks`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _logits(
    hidden: jax.Array, head: jax.Array, temperature: jax.Array, vocab_size: int
) -> tuple[jax.Array, jax.Array]:
    """float[B, chunk, V] scaled logits of a chunk, and int[B, chunk, V] their column numbers."""
    logits = jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=temperature.dtype)
    columns = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    return jnp.where(columns < vocab_size, logits / temperature, MASKED_LOGIT), columns


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _statistics(
    hidden: jax.Array,
    head: jax.Array,
    tokens: jax.Array,
    temperature: jax.Array,
    chunk: int,
    vocab_size: int,
    with_moments: bool,
) -> _Statistics:
    """Checked arguments in, statistics out; the gradient is `_backward`."""
    return _forward(hidden, head, tokens, temperature, chunk, vocab_size, with_moments)[0]


def _forward(
    hidden: jax.Array,
    head: jax.Array,
    tokens: jax.Array,
    temperature: jax.Array,
    chunk: int,
    vocab_size: int,
    with_moments: bool,
) -> tuple[_Statistics, tuple[jax.Array | None, ...]]:
    """The statistics, and what the backward pass needs: nothing that has a vocabulary axis."""
    weights = head.astype(hidden.dtype)

    def one_chunk(inputs: tuple[jax.Array, jax.Array]) -> _Statistics:
        hidden, tokens = inputs
        logits, columns = _logits(hidden, weights, temperature, vocab_size)
        log_normalizer = jax.nn.logsumexp(logits, axis=-1)
        # A comparison instead of a gather: it fuses, and works on a sharded vocabulary.
        picked = jnp.sum(jnp.where(columns == tokens[..., None], logits, 0.0), axis=-1)
        if not with_moments:
            return _Statistics(picked - log_normalizer, log_normalizer, None)
        probabilities = jnp.exp(logits - log_normalizer[..., None])
        real = jnp.where(columns < vocab_size, logits, 0.0)
        moments = _Moments(
            entropy=log_normalizer - jnp.sum(probabilities * real, axis=-1),
            mean_logit=jnp.sum(real, axis=-1) / vocab_size,
        )
        return _Statistics(picked - log_normalizer, log_normalizer, moments)

    stacked = jax.lax.map(one_chunk, (_chunks(hidden, chunk), _chunks(tokens, chunk)))
    statistics = jax.tree.map(lambda x: _joined(x, tokens.shape[1]), stacked)
    entropy = statistics.moments.entropy if with_moments else None
    residuals = (hidden, head, tokens, temperature, statistics.log_normalizer, entropy)
    return statistics, residuals


def _backward(
    chunk: int,
    vocab_size: int,
    with_moments: bool,
    residuals: tuple[jax.Array, ...],
    cotangents: _Statistics,
) -> tuple[jax.Array, jax.Array, None, jax.Array]:
    """Gradients of hidden and head, from logits that are made once more."""
    hidden, head, tokens, temperature, log_normalizer, entropy = residuals
    weights = head.astype(hidden.dtype)
    accumulator = temperature.dtype
    # The product that is added to the head's gradient is as large as its rows: a few at a time.
    groups = math.gcd(head.shape[0], 4)

    def one_chunk(head_gradient, inputs):
        hidden, tokens, log_normalizer, entropy, cotangents = inputs
        logits, columns = _logits(hidden, weights, temperature, vocab_size)
        log_p = logits - log_normalizer[..., None]
        to_log_prob, to_normalizer, to_moments = jax.tree.map(lambda c: c[..., None], cotangents)
        to_p = to_normalizer - to_log_prob
        if with_moments:
            to_p -= to_moments.entropy * (log_p + entropy[..., None])
        to_logits = jnp.exp(log_p) * to_p
        if with_moments:
            to_logits += to_moments.mean_logit / vocab_size
        to_logits += jnp.where(columns == tokens[..., None], to_log_prob, 0.0)
        to_logits = jnp.where(columns < vocab_size, to_logits / temperature, 0.0)
        to_logits = to_logits.astype(hidden.dtype)
        to_hidden = jnp.einsum(
            "btv,dv->btd", to_logits, weights, preferred_element_type=accumulator
        )
        blocks = hidden.reshape(*hidden.shape[:2], groups, -1)

        def add(group: jax.Array, total: jax.Array) -> jax.Array:
            addend = jnp.einsum(
                "btd,btv->dv",
                blocks[:, :, group],
                to_logits,
                preferred_element_type=accumulator,
            )
            return total.at[group].add(addend)

        head_gradient = jax.lax.fori_loop(0, groups, add, head_gradient)
        return head_gradient, to_hidden.astype(hidden.dtype)

    by_position = (hidden, tokens, log_normalizer, entropy, cotangents)
    head_gradient, to_hidden = jax.lax.scan(
        one_chunk,
        jnp.zeros((groups, head.shape[0] // groups, head.shape[1]), accumulator),
        jax.tree.map(lambda x: _chunks(x, chunk), by_position),
    )
    to_hidden = _joined(to_hidden, tokens.shape[1])
    head_gradient = head_gradient.reshape(head.shape).astype(head.dtype)
    return to_hidden, head_gradient, None, jnp.zeros_like(temperature)


_statistics.defvjp(_forward, _backward)
