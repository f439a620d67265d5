"""Log-probabilities, entropy and cross-entropy of tokens under a language model.

`logits[:, t]` scores `tokens[:, t]`: nothing here shifts, except `next_token_loss`, whose name
says so. Logits go to float32 before anything else, the division by the temperature included.

Columns of a padded vocabulary: either the model has set them to a large negative logit, or pass
`vocab_size` and they are masked here. An id outside of [0, V), of any integer type, has
log-probability NaN and a gradient of NaN, so that a mistake is seen; behind a mask, `where` or one
that is applied later, it costs nothing.

A log-probability is the difference of two small numbers, both relative to the largest logit: an
offset that all logits share, however large, costs no digits.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from instruct_jax.losses._array import (
    full_precision,
    keep,
    nan_unless,
    scalar,
    token_ids,
    visible,
)

MASKED_LOGIT = -1e9
"""The logit of a column that is no token: finite, and exp of it is 0 beside any real logit."""


def prepare_logits(
    logits: chex.Array,
    temperature: chex.Numeric,
    vocab_size: int | None,
    where: chex.Array | None = None,
) -> jax.Array:
    """float[B, T, V] logits in full precision, scaled; real vocabulary and visible positions."""
    (logits,) = full_precision(logits, rank=3)
    (logits,) = visible(where, logits, rank=2)
    if vocab_size is not None:
        chex.assert_scalar_in(vocab_size, 1, logits.shape[-1])
        logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, MASKED_LOGIT)
    return logits / scalar(temperature, logits)


class Normalizer(NamedTuple):
    """softmax(logits) = exp(logits - largest) / exp(log_total); each float[B, T]."""

    largest: jax.Array
    log_total: jax.Array

    @classmethod
    def of(cls, logits: jax.Array) -> Normalizer:
        """Of float[B, T, V]. The largest logit is a constant: what it adds, the total takes off."""
        largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
        largest = jnp.where(jnp.isfinite(largest), largest, 0.0)
        return cls(largest, jnp.log(jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1)))

    def log_prob(self, logit: jax.Array) -> jax.Array:
        """Of logits float[B, T]."""
        return (logit - self.largest) - self.log_total


def _log_prob_of(logits: jax.Array, tokens: chex.Array, normalizer: Normalizer) -> jax.Array:
    """float[B, T] log-probabilities of the tokens; NaN for an id outside of [0, V)."""
    chex.assert_shape(tokens, logits.shape[:-1])
    ids, known = token_ids(tokens, logits.shape[-1])
    picked = jnp.take_along_axis(logits, ids[..., None], axis=-1, mode="clip")[..., 0]
    return nan_unless(known, normalizer.log_prob(picked))


def token_log_probs(
    logits: chex.Array,
    tokens: chex.Array,
    *,
    where: chex.Array | None = None,
    temperature: chex.Numeric = 1.0,
    vocab_size: int | None = None,
) -> jax.Array:
    r"""Log-probability of each token.

    .. math:: \log p_t = z_{t, y_t} / \tau - \log \sum_v \exp(z_{t, v} / \tau)

    Not done: no shift (`logits[:, t]` scores `tokens[:, t]`), no reduction.

    Args:
      logits: float[B, T, V].
      tokens: int[B, T].
      where: bool[B, T], the positions that count; elsewhere the entry is 0. None counts all.
      temperature: tau > 0, float[]. The policy, its old copy and the reference must share the
        temperature of the sampler, or their ratio is not that of the sampled distribution.
      vocab_size: number of real columns; the columns from there on get probability 0.

    Returns:
      float[B, T], at most 0; NaN, and so is its gradient, for an id outside of [0, V).

    >>> logits = jnp.log(jnp.array([[[0.25, 0.75]]]))
    >>> print(jnp.exp(token_log_probs(logits, jnp.array([[1]]))))
    [[0.75]]
    """
    logits = prepare_logits(logits, temperature, vocab_size, where)
    return keep(where, _log_prob_of(logits, tokens, Normalizer.of(logits)))


def token_entropy(
    logits: chex.Array,
    *,
    where: chex.Array | None = None,
    temperature: chex.Numeric = 1.0,
    vocab_size: int | None = None,
) -> jax.Array:
    r"""Entropy of the next-token distribution at each position, in nats.

    .. math:: H_t = -\sum_v p_{t, v} \log p_{t, v}, \qquad p_t = \mathrm{softmax}(z_t / \tau)

    Not done: no reduction. A logit of -inf counts as probability 0.

    Args:
      logits: float[B, T, V].
      where: bool[B, T], the positions that count; elsewhere the entry is 0. None counts all.
      temperature: tau > 0, float[].
      vocab_size: number of real columns.

    Returns:
      float[B, T], between 0 and log V.

    >>> print(jnp.exp(token_entropy(jnp.zeros((1, 1, 8)))).round(4))
    [[8.]]
    """
    logits = prepare_logits(logits, temperature, vocab_size, where)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    possible = log_p > -jnp.inf
    # 0 * -inf is NaN in the value and again in the gradient: two selects, one for each.
    log_p = jnp.where(possible, log_p, 0.0)
    return keep(where, -jnp.sum(jnp.where(possible, jnp.exp(log_p) * log_p, 0.0), axis=-1))


def token_cross_entropy(
    logits: chex.Array,
    tokens: chex.Array,
    *,
    where: chex.Array | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
) -> jax.Array:
    r"""Cross-entropy of each token, with label smoothing and z-loss on request.

    .. math:: -(1 - \epsilon) \log p_{y_t} - \frac{\epsilon}{V} \sum_{v < V} \log p_v
              + \zeta \Big(\log \sum_v \exp z_{t, v}\Big)^2

    Source: label smoothing, Szegedy et al. 2016, section 7; z-loss, Chowdhery et al. 2022
    (PaLM), section 5, with zeta = 1e-4.

    Not done: no shift, no reduction.

    Args:
      logits: float[B, T, V].
      tokens: int[B, T].
      where: bool[B, T], the positions that count; elsewhere the entry is 0. None counts all.
      label_smoothing: epsilon, spread evenly over the real vocabulary. With padded columns pass
        `vocab_size`, or their huge negative logits enter the mean.
      z_loss: zeta, the pull of the log-normaliser towards 0.
      vocab_size: number of real columns.

    Returns:
      float[B, T].

    >>> loss = token_cross_entropy(jnp.zeros((1, 1, 4)), jnp.array([[2]]), label_smoothing=0.1)
    >>> print(jnp.exp(loss).round(4))
    [[4.]]
    """
    logits = prepare_logits(logits, 1.0, vocab_size, where)
    normalizer = Normalizer.of(logits)
    target = _log_prob_of(logits, tokens, normalizer)
    if label_smoothing:
        centered = logits[..., :vocab_size] - normalizer.largest[..., None]
        mean = jnp.mean(centered, axis=-1) - normalizer.log_total
        target = (1.0 - label_smoothing) * target + label_smoothing * mean
    log_normalizer = normalizer.largest + normalizer.log_total
    return keep(where, z_loss * jnp.square(log_normalizer) - target)


def next_token_loss(
    logits: chex.Array,
    tokens: chex.Array,
    *,
    where: chex.Array | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
) -> jax.Array:
    """Cross-entropy of every token after the first, given those before it: the shift is here.

    Entry t is the loss of `tokens[:, t + 1]` under `logits[:, t]`.

    Source: Ouyang et al. 2022, section 3.5 (SFT) and eq. 2 (the pretraining term).

    Not done: no reduction.

    Args:
      logits: float[B, T, V], the model's output on `tokens`.
      tokens: int[B, T].
      where: bool[B, T], the tokens that are targets, cut to `where[:, 1:]`; the loss of any other
        is 0. None counts all.
      label_smoothing: see `token_cross_entropy`.
      z_loss: see `token_cross_entropy`.
      vocab_size: number of real columns.

    Returns:
      float[B, T - 1].

    >>> print(jnp.exp(next_token_loss(jnp.zeros((1, 3, 5)), jnp.array([[0, 1, 2]]))).round(4))
    [[5. 5.]]
    """
    logits, tokens = jnp.asarray(logits), jnp.asarray(tokens)
    chex.assert_equal_shape_prefix([logits, tokens], 2)
    return token_cross_entropy(
        logits[:, :-1],
        tokens[:, 1:],
        where=None if where is None else jnp.asarray(where)[:, 1:],
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        vocab_size=vocab_size,
    )
