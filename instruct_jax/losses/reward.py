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

from instruct_jax.losses._array import (
    full_precision,
    keep,
    mask_like,
    nan_unless,
    one_precision,
    scalar,
    token_ids,
    visible,
)
from instruct_jax.losses.masked import masked_mean


class PairCounts(NamedTuple):
    """How many pairs of each prompt the scores order as the labels do; each float[B]."""

    correct: jax.Array
    tied: jax.Array
    total: jax.Array


def _scores_and_mask(scores: chex.Array, where: chex.Array | None) -> tuple[jax.Array, jax.Array]:
    """float[B, K] scores with 0 on absent completions, and bool[B, K]."""
    (scores,) = full_precision(scores, rank=2)
    where = mask_like(where, scores)
    return jnp.where(where, scores, 0.0), where


def _differences(
    scores: jax.Array, ranks: chex.Array, where: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """[B, K, K]: score of i minus score of j, and whether i is labelled better than j.

    0 where it is not: an infinite score less itself is no number.
    """
    ranks = jnp.asarray(ranks)
    chex.assert_type(ranks, int)
    chex.assert_equal_shape([scores, ranks])
    better = ranks[:, :, None] < ranks[:, None, :]
    pair = better & where[:, :, None] & where[:, None, :]
    return jnp.where(pair, scores[:, :, None] - scores[:, None, :], 0.0), pair


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
    chosen: chex.Array,
    rejected: chex.Array,
    *,
    where: chex.Array | None = None,
    margin: chex.Numeric = 0.0,
) -> jax.Array:
    r"""Logistic loss of one comparison, with an optional margin.

    .. math:: -\log \sigma(r_c - r_r - \mu)

    Source: Stiennon et al. 2020, section 3.4; the margin, Touvron et al. 2023 (Llama 2), eq. 2.

    Not done: no reduction.

    Args:
      chosen: float[...], scores of the preferred completions.
      rejected: float[...], the same shape.
      where: bool[...], the pairs that count; elsewhere the result is 0. None counts all.
      margin: mu, float[] or float[...] of the same shape, by how much the preferred one should win.

    Returns:
      float[...].

    >>> print(jnp.exp(pairwise_loss(jnp.array([1.0]), jnp.array([1.0]))))
    [2.]
    """
    margin = jnp.asarray(margin)
    arrays = full_precision(chosen, rejected, *([margin] if margin.ndim else []))
    chosen, rejected, *of_pairs = visible(where, *arrays)
    margin = of_pairs[0] if of_pairs else scalar(margin, chosen)
    return keep(where, -jax.nn.log_sigmoid(chosen - rejected - margin))


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
      float[B]; NaN, and so is its gradient, where `best` is outside of [0, K); 0 for a row without
      a completion.

    >>> print(jnp.exp(best_of_k_loss(jnp.zeros((1, 4)), jnp.array([2]))).round(4))
    [4.]
    """
    scores, where = _scores_and_mask(scores, where)
    chex.assert_shape(best, scores.shape[:1])
    picks, known = token_ids(best, scores.shape[1])
    picked = jnp.arange(scores.shape[1], dtype=picks.dtype)[None] == picks[:, None]
    # Relative to the picked one: log(1 + sum_k exp(r_k - r_b)), k the others there.
    chosen = jnp.sum(jnp.where(picked, scores, 0.0), axis=1, keepdims=True)
    exponents = jnp.where(where & ~picked, scores - chosen, -jnp.inf)
    exponents = jnp.pad(exponents, [(0, 0), (1, 0)])
    losses = nan_unless(known, jax.nn.logsumexp(exponents, axis=1))
    return jnp.where(jnp.any(where, axis=1), losses, 0.0)


def plackett_luce_loss(
    scores: chex.Array, ranks: chex.Array, *, where: chex.Array | None = None
) -> jax.Array:
    r"""Negative log-likelihood of a ranking that is drawn best first, without replacement.

    .. math:: -\sum_i \Big(r_i - \log \big(e^{r_i} + \sum_{j:\, rank_j > rank_i} e^{r_j}\big)\Big)

    Source: Plackett 1975; Luce 1959; for language models Rafailov et al. 2023, eq. 18. Completions
    of equal rank are not compared with each other, only with worse ones.

    Not done: not divided by the number of choices, so a longer ranking weighs more.

    Args:
      scores: float[B, K].
      ranks: int[B, K], 0 is best, ties are equal.
      where: bool[B, K], False on absent completions.

    Returns:
      float[B].

    >>> print(jnp.exp(plackett_luce_loss(jnp.zeros((1, 3)), jnp.array([[1, 0, 2]]))).round(4))
    [6.]
    """
    scores, where = _scores_and_mask(scores, where)
    difference, better = _differences(scores, ranks, where)
    # log(1 + sum_j exp(r_j - r_i)): the 1 is the completion itself.
    exponents = jnp.where(better, -difference, -jnp.inf)
    exponents = jnp.pad(exponents, [(0, 0), (0, 0), (1, 0)])
    return jnp.sum(jax.nn.logsumexp(exponents, axis=2), axis=1)


def labeler_ranking_loss(
    scores: chex.Array,
    ranks: chex.Array,
    labeler_weights: chex.Array,
    *,
    where: chex.Array | None = None,
    pair_norm: Literal["valid", "comb"] = "valid",
) -> jax.Array:
    r"""Ranking loss when several labelers ranked the same completions, weighted by trust in each.

    .. math:: \frac{\sum_j w_j\, \ell(r, rank_j)}{\sum_j w_j}

    with the `ranking_loss` :math:`\ell`. Disagreeing labelers give a soft target: two of equal
    weight and opposite opinion ask for equal scores.

    Not done: no mean over prompts. Weights are not estimated here.

    Args:
      scores: float[B, K].
      ranks: int[B, J, K], one ranking a labeler.
      labeler_weights: float[B, J], not negative; 0 for a labeler who did not see the prompt, as it
        is for one who ranked none of its completions.
      where: bool[B, J, K], False on completions that a labeler did not rank.
      pair_norm: as in `ranking_loss`.

    Returns:
      float[B], 0 where all weights are 0.

    >>> ranks = jnp.array([[[0, 1], [1, 0]]])
    >>> trust = jnp.array([[1.0, 0.0]])
    >>> print(jnp.exp(labeler_ranking_loss(jnp.zeros((1, 2)), ranks, trust)).round(4))
    [2.]
    """
    (labeler_weights,) = full_precision(labeler_weights, rank=2)
    ranks = jnp.asarray(ranks)
    chex.assert_rank(ranks, 3)
    where = mask_like(where, ranks)
    chex.assert_shape(labeler_weights, ranks.shape[:2])
    labeler_weights = jnp.where(jnp.any(where, axis=2), labeler_weights, 0.0)

    def one_labeler(ranks: jax.Array, where: jax.Array) -> jax.Array:
        return ranking_loss(scores, ranks, where=where, pair_norm=pair_norm)

    losses = jax.vmap(one_labeler, in_axes=1, out_axes=1)(ranks, where)
    losses, labeler_weights = one_precision(losses, labeler_weights)
    # A loss may be infinite where nobody looks.
    weighted = jnp.where(labeler_weights > 0, losses, 0.0) * labeler_weights
    weight = jnp.sum(labeler_weights, axis=1)
    return jnp.sum(weighted, axis=1) / jnp.where(weight > 0, weight, 1.0)


def diverging_pairwise_loss(
    chosen: chex.Array,
    rejected: chex.Array,
    chosen_tokens: chex.Array,
    rejected_tokens: chex.Array,
    *,
    where: chex.Array,
) -> jax.Array:
    r"""Pairwise loss averaged over all positions from the first token where the two differ.

    .. math:: \frac{1}{|D|} \sum_{t \in D} -\log \sigma(r_{c,t} - r_{r,t}), \qquad
              D = \{t \geq t_0: m_t\}, \quad t_0 = \min\{t: y_{c,t} \neq y_{r,t}\}

    Source: DeepSpeed-Chat (`reward_model.py`). An option, not the paper's loss: it trains the
    score of every prefix, which helps a value function that starts from the reward model.

    Not done: no mean over pairs.

    Args:
      chosen: float[B, T], the score head at every position.
      rejected: float[B, T].
      chosen_tokens: int[B, T], prompt and completion, right-padded.
      rejected_tokens: int[B, T].
      where: bool[B, T], True up to the end of the longer of the two.

    Returns:
      float[B], 0 where the two are equal.

    >>> chosen, rejected = jnp.array([[9.0, 1.0, 1.0]]), jnp.array([[0.0, 1.0, 1.0]])
    >>> tokens, others = jnp.array([[7, 1, 2]]), jnp.array([[7, 3, 2]])
    >>> where = jnp.ones((1, 3), bool)
    >>> print(jnp.exp(diverging_pairwise_loss(chosen, rejected, tokens, others, where=where)))
    [2.]
    """
    chosen, rejected = full_precision(chosen, rejected, rank=2)
    chosen_tokens, rejected_tokens = jnp.asarray(chosen_tokens), jnp.asarray(rejected_tokens)
    chex.assert_type([chosen_tokens, rejected_tokens], int)
    chosen_tokens, rejected_tokens = (x.astype(int) for x in (chosen_tokens, rejected_tokens))
    chex.assert_equal_shape([chosen, chosen_tokens, rejected_tokens])
    where = mask_like(where, chosen)
    differs = where & (chosen_tokens != rejected_tokens)
    diverged = where & (jnp.cumsum(differs, axis=1) > 0)
    difference = jnp.where(diverged, chosen - rejected, 0.0)
    return masked_mean(-jax.nn.log_sigmoid(difference), where=diverged, axis=1)


def centering_loss(
    chosen: chex.Array, rejected: chex.Array, *, where: chex.Array | None = None
) -> jax.Array:
    r"""Penalty that pulls the two scores of a pair to opposite values, hence the mean to 0.

    .. math:: (r_c + r_r)^2

    Source: Eisenstein et al. 2023, "Helping or herding?", section 2 (weight 0.01 there). Added
    to `pairwise_loss` it fixes the zero point during training.

    Not done: no weight, no reduction.

    Args:
      chosen: float[...].
      rejected: float[...], the same shape.
      where: bool[...], the pairs that count; elsewhere the result is 0. None counts all.

    Returns:
      float[...].

    >>> print(centering_loss(jnp.array([1.5]), jnp.array([-0.5])))
    [1.]
    """
    chosen, rejected = visible(where, *full_precision(chosen, rejected))
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
