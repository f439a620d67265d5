"""Log-probabilities, entropy and cross-entropy of tokens under a language model.

`logits[:, t]` scores `tokens[:, t]`: nothing here shifts, except `next_token_loss`, whose name
says so. Logits go to float32 before anything else, the division by the temperature included.

Columns of a padded vocabulary: either the model has set them to a large negative logit, or pass
`vocab_size` and they are masked here. An id outside of [0, V) has log-probability NaN, as in
`jnp.take_along_axis`, so that a mistake is seen; behind a mask it costs nothing.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from instruct_jax.losses._array import full_precision

MASKED_LOGIT = -1e9
"""The logit of a column that is no token: finite, and exp of it is 0 beside any real logit."""


def prepare_logits(
    logits: chex.Array, temperature: chex.Numeric, vocab_size: int | None
) -> jax.Array:
    """float[B, T, V] logits in full precision, scaled, real vocabulary only."""
    (logits,) = full_precision(logits, rank=3)
    logits = logits / temperature
    if vocab_size is None:
        return logits
    chex.assert_scalar_in(vocab_size, 1, logits.shape[-1])
    return jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, MASKED_LOGIT)


def _pick(logits: jax.Array, tokens: chex.Array) -> jax.Array:
    """float[B, T] logits of the tokens; NaN for an id outside of [0, V)."""
    tokens = jnp.asarray(tokens)
    chex.assert_rank(tokens, 2)
    chex.assert_type(tokens, int)
    chex.assert_shape(tokens, logits.shape[:-1])
    # A negative id would count from the end of the vocabulary; send it out of range instead.
    ids = jnp.where(tokens < 0, logits.shape[-1], tokens)
    return jnp.take_along_axis(logits, ids[..., None], axis=-1, mode="fill")[..., 0]


def token_log_probs(
    logits: chex.Array,
    tokens: chex.Array,
    *,
    temperature: chex.Numeric = 1.0,
    vocab_size: int | None = None,
) -> jax.Array:
    r"""Log-probability of each token.

    .. math:: \log p_t = z_{t, y_t} / \tau - \log \sum_v \exp(z_{t, v} / \tau)

    Not done: no shift (`logits[:, t]` scores `tokens[:, t]`), no mask, no reduction.

    Args:
      logits: float[B, T, V].
      tokens: int[B, T].
      temperature: tau > 0, float[]. The policy, its old copy and the reference must share the
        temperature of the sampler, or their ratio is not that of the sampled distribution.
      vocab_size: number of real columns; the columns from there on get probability 0.

    Returns:
      float[B, T], at most 0; NaN for an id outside of [0, V).

    >>> logits = jnp.log(jnp.array([[[0.25, 0.75]]]))
    >>> print(jnp.exp(token_log_probs(logits, jnp.array([[1]]))))
    [[0.75]]
    """
    logits = prepare_logits(logits, temperature, vocab_size)
    return _pick(logits, tokens) - jax.nn.logsumexp(logits, axis=-1)


def token_entropy(
    logits: chex.Array, *, temperature: chex.Numeric = 1.0, vocab_size: int | None = None
) -> jax.Array:
    r"""Entropy of the next-token distribution at each position, in nats.

    .. math:: H_t = -\sum_v p_{t, v} \log p_{t, v}, \qquad p_t = \mathrm{softmax}(z_t / \tau)

    Not done: no mask, no reduction. A logit of -inf counts as probability 0.

    Args:
      logits: float[B, T, V].
      temperature: tau > 0, float[].
      vocab_size: number of real columns.

    Returns:
      float[B, T], between 0 and log V.

    >>> print(jnp.exp(token_entropy(jnp.zeros((1, 1, 8)))).round(4))
    [[8.]]
    """
    log_p = jax.nn.log_softmax(prepare_logits(logits, temperature, vocab_size), axis=-1)
    possible = log_p > -jnp.inf
    # 0 * -inf is NaN in the value and again in the gradient: two selects, one for each.
    log_p = jnp.where(possible, log_p, 0.0)
    return -jnp.sum(jnp.where(possible, jnp.exp(log_p) * log_p, 0.0), axis=-1)


def token_cross_entropy(
    logits: chex.Array,
    tokens: chex.Array,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
) -> jax.Array:
    r"""Cross-entropy of each token, with label smoothing and z-loss on request.

    .. math:: -(1 - \epsilon) \log p_{y_t} - \frac{\epsilon}{V} \sum_{v < V} \log p_v
              + \zeta \Big(\log \sum_v \exp z_{t, v}\Big)^2

    Source: label smoothing, Szegedy et al. 2016, section 7; z-loss, Chowdhery et al. 2022
    (PaLM), section 5, with zeta = 1e-4.

    Not done: no shift, no mask, no reduction.

    Args:
      logits: float[B, T, V].
      tokens: int[B, T].
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
    logits = prepare_logits(logits, 1.0, vocab_size)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    target = _pick(logits, tokens)
    if label_smoothing:
        mean_logit = jnp.mean(logits[..., :vocab_size], axis=-1)
        target = (1.0 - label_smoothing) * target + label_smoothing * mean_logit
    return log_normalizer - target + z_loss * jnp.square(log_normalizer)


def next_token_loss(
    logits: chex.Array,
    tokens: chex.Array,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
) -> jax.Array:
    """Cross-entropy of every token after the first, given those before it: the shift is here.

    Entry t is the loss of `tokens[:, t + 1]` under `logits[:, t]`. A mask over tokens is cut to
    `mask[:, 1:]` to match.

    Source: Ouyang et al. 2022, section 3.5 (SFT) and eq. 2 (the pretraining term).

    Not done: no mask, no reduction.

    Args:
      logits: float[B, T, V], the model's output on `tokens`.
      tokens: int[B, T].
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
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        vocab_size=vocab_size,
    )
