r"""Direct preference losses: a policy from comparisons, without a reward model or sampling.

All take one log-probability a *sequence*, float[B], made by `sequence_log_probs` from those of
the response's tokens (prompt tokens masked). With :math:`h = \log \frac{\pi(y_c)}{\pi_{ref}(y_c)}
- \log \frac{\pi(y_r)}{\pi_{ref}(y_r)}` for the chosen and the rejected response of a prompt:

==============  =========================================================  ==================
`dpo_loss`      :math:`-\log \sigma(\beta h)`; smoothed labels: cDPO       sums
`robust_...`    the same, unbiased under flipped labels                    sums
`dpo_sft_loss`  DPO plus the likelihood of the chosen response             sums
`ipo_loss`      :math:`(h - 1 / 2\beta)^2`                                 sums (TRL: means)
`kto_loss`      one response with a thumb up or down                       sums
==============  =========================================================  ==================

Losses are float[B], unreduced. Gradients are stopped on all reference log-probabilities. DPO and
IPO are two of the family in `preference_family`; the losses that need no reference are in
`reference_free`.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from instruct_jax.losses._array import (
    full_precision,
    keep,
    mask_like,
    one_precision,
    visible,
)
from instruct_jax.losses.masked import masked_mean, sum_and_count
from instruct_jax.losses.preference_family import log_ratio, preference_loss


def sequence_log_probs(
    log_probs: chex.Array, *, where: chex.Array, mean: bool = False
) -> jax.Array:
    r"""Log-probability of each response: the sum over its tokens, or with `mean` the average.

    .. math:: \sum_t m_t \log p_t \quad \text{or} \quad
              \frac{1}{|y|} \sum_t m_t \log p_t

    Args:
      log_probs: float[B, T], from `token_log_probs`.
      where: bool[B, T], True on the response's tokens, the stop token included.
      mean: divide by the number of tokens.

    Returns:
      float[B], 0 for a row without a valid token.

    >>> lp, where = jnp.array([[-1.0, -2.0, -9.0]]), jnp.array([[True, True, False]])
    >>> print(*(sequence_log_probs(lp, where=where, mean=mean) for mean in (False, True)))
    [-3.] [-1.5]
    """
    (log_probs,) = full_precision(log_probs, rank=2)
    if mean:
        return masked_mean(log_probs, where=where, axis=1)
    return sum_and_count(log_probs, where=where, axis=1)[0]


def dpo_loss(
    chosen: chex.Array,
    rejected: chex.Array,
    ref_chosen: chex.Array,
    ref_rejected: chex.Array,
    *,
    where: chex.Array | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> jax.Array:
    r"""Direct preference optimisation; with `label_smoothing`, conservative DPO.

    .. math:: -(1 - \epsilon) \log \sigma(\beta h) - \epsilon \log \sigma(-\beta h)

    Source: Rafailov et al. 2023, eq. 7; cDPO, Mitchell 2023, "A note on DPO with noisy
    preferences". cDPO has its minimum at a finite margin, where :math:`\sigma(\beta h) =
    1 - \epsilon`.

    Not done: no reduction, no length normalisation.

    Args:
      chosen: float[B], summed log-probs of the chosen responses under the policy.
      rejected: float[B], of the rejected ones.
      ref_chosen: float[B], of the chosen ones under the reference.
      ref_rejected: float[B].
      where: bool[B], the pairs that count; elsewhere the result is 0. None counts all.
      beta: strength of the pull to the reference.
      label_smoothing: epsilon, the share of labels believed to be flipped.

    Returns:
      float[B].

    >>> lp = jnp.array([-5.0])
    >>> print(jnp.exp(dpo_loss(lp, lp, lp, lp)))
    [2.]
    """
    four = chosen, rejected, ref_chosen, ref_rejected
    return preference_loss(*four, where=where, beta=beta, label_smoothing=label_smoothing)


def robust_dpo_loss(
    chosen: chex.Array,
    rejected: chex.Array,
    ref_chosen: chex.Array,
    ref_rejected: chex.Array,
    *,
    where: chex.Array | None = None,
    beta: float = 0.1,
    flip_rate: float = 0.1,
) -> jax.Array:
    r"""DPO that is unbiased when a known share of the labels is flipped at random.

    .. math:: \frac{-(1 - \epsilon) \log \sigma(\beta h) + \epsilon \log \sigma(-\beta h)}
              {1 - 2 \epsilon}

    Its mean over labels flipped with probability epsilon is the DPO loss of the true labels.
    Unlike cDPO it is not bounded below.

    Source: Chowdhury et al. 2024, "Provably robust DPO", eq. 12.

    Not done: no reduction.

    Args:
      chosen: float[B], summed log-probs.
      rejected: float[B].
      ref_chosen: float[B].
      ref_rejected: float[B].
      where: bool[B], the pairs that count; elsewhere the result is 0. None counts all.
      beta: strength of the pull to the reference.
      flip_rate: epsilon, below 1/2.

    Returns:
      float[B].

    Raises:
      ValueError: `flip_rate` outside of [0, 1/2).

    >>> lp = jnp.array([-5.0])
    >>> print(jnp.exp(robust_dpo_loss(lp, lp, lp, lp, flip_rate=0.25)))
    [2.]
    """
    if not 0.0 <= flip_rate < 0.5:
        raise ValueError(f"flip_rate must lie in [0, 0.5), got {flip_rate}")
    of_chosen, of_rejected = one_precision(
        log_ratio(chosen, ref_chosen, where), log_ratio(rejected, ref_rejected, where)
    )
    chex.assert_equal_shape([of_chosen, of_rejected])
    logit = beta * (of_chosen - of_rejected)
    kept, flipped = jax.nn.log_sigmoid(logit), jax.nn.log_sigmoid(-logit)
    losses = (-(1.0 - flip_rate) * kept + flip_rate * flipped) / (1.0 - 2.0 * flip_rate)
    return keep(where, losses)


def ipo_loss(
    chosen: chex.Array,
    rejected: chex.Array,
    ref_chosen: chex.Array,
    ref_rejected: chex.Array,
    *,
    where: chex.Array | None = None,
    beta: float = 0.1,
) -> jax.Array:
    r"""Identity preference optimisation: regression of the log-ratio gap to a fixed margin.

    .. math:: \Big(h - \frac{1}{2 \beta}\Big)^2

    Source: Azar et al. 2023, eq. 17, with beta for the paper's tau. The paper writes sums over
    tokens; TRL passes means, which its authors report to be what the experiments used. Either
    goes in here; beta means something else in each.

    Not done: no reduction.

    Args:
      chosen: float[B], summed or mean log-probs, all four alike.
      rejected: float[B].
      ref_chosen: float[B].
      ref_rejected: float[B].
      where: bool[B], the pairs that count; elsewhere the result is 0. None counts all.
      beta: half the inverse of the margin aimed at.

    Returns:
      float[B].

    >>> lp = jnp.array([-5.0])
    >>> print(ipo_loss(lp, lp, lp, lp, beta=0.5))
    [1.]
    """
    four = chosen, rejected, ref_chosen, ref_rejected
    return preference_loss(*four, where=where, form="square", beta=beta)


def kto_reference_kl(
    log_probs: chex.Array, ref_log_probs: chex.Array, *, where: chex.Array | None = None
) -> jax.Array:
    r"""The reference point of KTO: the mean log-ratio of mismatched pairs, not below 0.

    .. math:: z_0 = \max\Big(0, \frac1B \sum_i \log
              \frac{\pi(y_{i+1} | x_i)}{\pi_{ref}(y_{i+1} | x_i)}\Big)

    Source: Ethayarajh et al. 2024, section 4.2. Score each prompt with the response of another
    prompt; over devices or micro-batches it is one number, from all of them.

    Stop-gradient on the result.

    Args:
      log_probs: float[B], summed log-probs of the mismatched responses.
      ref_log_probs: float[B].
      where: bool[B], False on rows that only fill the batch.

    Returns:
      float[].

    >>> print(kto_reference_kl(jnp.array([-1.0, -4.0]), jnp.array([-2.0, -4.0])))
    0.5
    """
    ratio = log_ratio(log_probs, ref_log_probs, where)
    where = mask_like(where, ratio)
    return jax.lax.stop_gradient(jnp.maximum(masked_mean(ratio, where=where), 0.0))


def kto_loss(
    log_probs: chex.Array,
    ref_log_probs: chex.Array,
    desirable: chex.Array,
    kl: chex.Numeric,
    *,
    where: chex.Array | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> jax.Array:
    r"""Kahneman-Tversky optimisation: single responses with a thumb up or down.

    .. math:: \lambda_D (1 - \sigma(\beta (\log \tfrac{\pi}{\pi_{ref}} - z_0))), \qquad
              \lambda_U (1 - \sigma(\beta (z_0 - \log \tfrac{\pi}{\pi_{ref}})))

    for desirable and undesirable responses.

    Source: Ethayarajh et al. 2024, eq. 8. With unequal classes choose the weights so that
    :math:`\lambda_D n_D / (\lambda_U n_U)` lies in [1, 4/3].

    Stop-gradient on `ref_log_probs` and `kl`. Not done: no reduction.

    Args:
      log_probs: float[B], summed log-probs.
      ref_log_probs: float[B].
      desirable: bool[B].
      kl: z_0, float[], from `kto_reference_kl`.
      where: bool[B], the rows that count; elsewhere the result is 0. None counts all.
      beta: sharpness of the value function.
      desirable_weight: lambda_D.
      undesirable_weight: lambda_U.

    Returns:
      float[B], between 0 and the weight.

    >>> lp, good = jnp.array([-5.0, -5.0]), jnp.array([True, False])
    >>> print(kto_loss(lp, lp, good, jnp.float32(0.0)))
    [0.5 0.5]
    """
    ratio = log_ratio(log_probs, ref_log_probs, where)
    desirable = mask_like(desirable, ratio)
    ratio, kl = one_precision(ratio, *full_precision(kl, rank=0))
    gain = beta * (ratio - jax.lax.stop_gradient(kl))
    losses = jnp.where(
        desirable,
        desirable_weight * jax.nn.sigmoid(-gain),
        undesirable_weight * jax.nn.sigmoid(gain),
    )
    return keep(where, losses)


def dpo_sft_loss(
    chosen: chex.Array,
    rejected: chex.Array,
    ref_chosen: chex.Array,
    ref_rejected: chex.Array,
    chosen_lengths: chex.Array,
    *,
    where: chex.Array | None = None,
    beta: float = 0.1,
    sft_weight: float = 1.0,
) -> jax.Array:
    r"""DPO plus the likelihood of the chosen response, which plain DPO is free to lower.

    .. math:: -\log \sigma(\beta h) - \alpha \frac{\log \pi(y_c)}{|y_c|}

    Source: Pang et al. 2024, "Iterative reasoning preference optimization", eq. 1 (alpha = 1).

    Not done: no reduction.

    Args:
      chosen: float[B], summed log-probs.
      rejected: float[B].
      ref_chosen: float[B].
      ref_rejected: float[B].
      chosen_lengths: int[B] or float[B], tokens of the chosen responses.
      where: bool[B], the pairs that count; elsewhere the result is 0. None counts all.
      beta: strength of the pull to the reference.
      sft_weight: alpha.

    Returns:
      float[B].

    >>> lp, lengths = jnp.array([0.0]), jnp.array([4])
    >>> print(jnp.exp(dpo_sft_loss(lp, lp, lp, lp, lengths)))
    [2.]
    """
    preference = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, where=where, beta=beta)
    lengths = jnp.asarray(chosen_lengths)
    if jnp.issubdtype(lengths.dtype, jnp.integer):
        lengths = lengths.astype(preference.dtype)
    chosen, lengths = visible(where, *full_precision(chosen, lengths, rank=1))
    preference, chosen, lengths = one_precision(preference, chosen, lengths)
    return preference - sft_weight * chosen / jnp.maximum(lengths, 1.0)
