"""Reward-model losses and pair metrics: what a ranking says about scalar scores.

A prompt is one row and holds K completions, so that all pairs of a prompt enter one gradient
step (Ouyang et al. 2022, section 3.5: as separate examples they overfit in one epoch). Ranks
are integers, 0 is best, equal ranks are ties, and a tie makes no pair. All losses here depend
on differences of scores: the zero point is free until it is fixed after training.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from instruct_jax.losses._array import full_precision, mask_like


class PairCounts(NamedTuple):
    """How many pairs of each prompt the scores order as the labels do; each float[B]."""

    correct: jax.Array
    tied: jax.Array
    total: jax.Array


def _scores_and_mask(scores: chex.Array, where: chex.Array | None) -> tuple[jax.Array, jax.Array]:
    """float[B, K] scores with 0 on absent completions, and bool[B, K]."""
    (scores,) = full_precision(scores, rank=2)
    where = mask_like(jnp.ones(scores.shape, bool) if where is None else where, scores)
    return jnp.where(where, scores, 0.0), where


def _differences(
    scores: jax.Array, ranks: chex.Array, where: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """[B, K, K]: score of i minus score of j, and whether i is labelled better than j."""
    ranks = jnp.asarray(ranks)
    chex.assert_type(ranks, int)
    chex.assert_equal_shape([scores, ranks])
    better = ranks[:, :, None] < ranks[:, None, :]
    both = where[:, :, None] & where[:, None, :]
    return scores[:, :, None] - scores[:, None, :], better & both


def ranking_loss(
    scores: chex.Array,
    ranks: chex.Array,
    *,
    where: chex.Array | None = None,
    pair_norm: Literal["valid", "comb"] = "valid",
) -> jax.Array:
    r"""Mean pairwise logistic loss over all pairs of a ranking, one value a prompt.

    .. math:: -\frac{1}{Z} \sum_{(w, l):\, rank_w < rank_l} \log \sigma(r_w - r_l)

    Source: Ouyang et al. 2022, eq. 1, where Z is C(K, 2). With ties there are fewer pairs than
    that; `valid` divides by the pairs there are, so every prompt weighs the same.

    Not done: no mean over prompts. A prompt without a pair has loss 0 and still counts in a
    plain mean; leave it out with `masked_mean` where that matters.

    Args:
      scores: float[B, K].
      ranks: int[B, K], 0 is best, ties are equal.
      where: bool[B, K], False on absent completions; None means all are there.
      pair_norm: "valid", Z is the number of pairs with different ranks; "comb", Z is C(k, 2) for
        the k completions present.

    Returns:
      float[B].

    Raises:
      ValueError: an unknown `pair_norm`.

    >>> print(ranking_loss(jnp.array([[2.0, 1.0, 0.0]]), jnp.array([[0, 1, 2]])).round(6))
    [0.25115]
    """
    scores, where = _scores_and_mask(scores, where)
    difference, pair = _differences(scores, ranks, where)
    total = jnp.sum(jnp.where(pair, -jax.nn.log_sigmoid(difference), 0.0), axis=(1, 2))
    if pair_norm == "valid":
        pairs = jnp.sum(pair, axis=(1, 2), dtype=scores.dtype)
    elif pair_norm == "comb":
        present = jnp.sum(where, axis=1, dtype=scores.dtype)
        pairs = present * (present - 1.0) / 2.0
    else:
        raise ValueError(f"pair_norm must be 'valid' or 'comb', got {pair_norm!r}")
    return total / jnp.maximum(pairs, 1.0)


def pairwise_loss(
    chosen: chex.Array, rejected: chex.Array, *, margin: chex.Numeric = 0.0
) -> jax.Array:
    r"""Logistic loss of one comparison, with an optional margin.

    .. math:: -\log \sigma(r_c - r_r - \mu)

    Source: Stiennon et al. 2020, section 3.4; the margin, Touvron et al. 2023 (Llama 2), eq. 2.

    Not done: no reduction.

    Args:
      chosen: float[...], scores of the preferred completions.
      rejected: float[...], the same shape.
      margin: mu, float[] or float[...], by how much the preferred one should win.

    Returns:
      float[...].

    >>> print(jnp.exp(pairwise_loss(jnp.array([1.0]), jnp.array([1.0]))))
    [2.]
    """
    chosen, rejected = full_precision(chosen, rejected)
    return -jax.nn.log_sigmoid(chosen - rejected - margin)


def best_of_k_loss(
    scores: chex.Array, best: chex.Array, *, where: chex.Array | None = None
) -> jax.Array:
    r"""Softmax cross-entropy of the completion a labeler picked out of K.

    .. math:: -r_b + \log \sum_k \exp r_k

    Source: Ziegler et al. 2019, eq. 1 (K = 4).

    Not done: no reduction.

    Args:
      scores: float[B, K].
      best: int[B], index of the picked completion, which must be a present one.
      where: bool[B, K], False on absent completions.

    Returns:
      float[B]; NaN where `best` is outside of [0, K).

    >>> print(jnp.exp(best_of_k_loss(jnp.zeros((1, 4)), jnp.array([2]))).round(4))
    [4.]
    """
    scores, where = _scores_and_mask(scores, where)
    best = jnp.asarray(best)
    chex.assert_type(best, int)
    chex.assert_shape(best, scores.shape[:1])
    index = jnp.where(best < 0, scores.shape[1], best)[:, None]
    picked = jnp.take_along_axis(scores, index, axis=1, mode="fill")[:, 0]
    # An empty row has no normaliser; its one fake entry keeps value and gradient finite.
    where = where | ~jnp.any(where, axis=1, keepdims=True)
    return jax.nn.logsumexp(jnp.where(where, scores, -jnp.inf), axis=1) - picked


def centering_loss(chosen: chex.Array, rejected: chex.Array) -> jax.Array:
    r"""Penalty that pulls the two scores of a pair to opposite values, hence the mean to 0.

    .. math:: (r_c + r_r)^2

    Source: Eisenstein et al. 2023, "Helping or herding?", section 2 (weight 0.01 there). Added
    to `pairwise_loss` it fixes the zero point during training.

    Not done: no weight, no reduction.

    Args:
      chosen: float[...].
      rejected: float[...], the same shape.

    Returns:
      float[...].

    >>> print(centering_loss(jnp.array([1.5]), jnp.array([-0.5])))
    [1.]
    """
    chosen, rejected = full_precision(chosen, rejected)
    return jnp.square(chosen + rejected)


def pair_counts(
    scores: chex.Array, ranks: chex.Array, *, where: chex.Array | None = None
) -> PairCounts:
    """Pairs ordered rightly (strictly), pairs with exactly equal scores, and all pairs.

    Accuracy is `correct / total`. Equal scores count as wrong and are told apart, because a
    collapsed reward model (all scores equal) would otherwise look like one that errs.

    Args:
      scores: float[B, K].
      ranks: int[B, K], 0 is best; equal ranks make no pair.
      where: bool[B, K], False on absent completions.

    Returns:
      PairCounts of float[B], to be summed over the data set before dividing.

    >>> counts = pair_counts(jnp.array([[2.0, 2.0, 3.0]]), jnp.array([[0, 1, 1]]))
    >>> print(counts.correct, counts.tied, counts.total)
    [0.] [1.] [2.]
    """
    scores, where = _scores_and_mask(scores, where)
    difference, pair = _differences(scores, ranks, where)

    def count(hit: jax.Array) -> jax.Array:
        return jnp.sum(hit & pair, axis=(1, 2), dtype=scores.dtype)

    return PairCounts(count(difference > 0), count(difference == 0), count(pair))
