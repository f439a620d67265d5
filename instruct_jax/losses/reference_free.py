r"""Direct preference losses without a reference policy.

As in `preference`, all take one log-probability a *sequence*, float[B], made by
`sequence_log_probs` from those of the response's tokens:

==============  =========================================================  ==================
`orpo_loss`     odds ratio plus likelihood                                 means over tokens
`simpo_loss`    margin between mean log-probs                              means over tokens
`cpo_loss`      DPO with a uniform reference, plus likelihood              sums
==============  =========================================================  ==================

Losses are float[B], unreduced.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from instruct_jax.losses._array import full_precision, keep, visible
from instruct_jax.losses.preference_family import smoothed_logistic


def orpo_loss(
    chosen: chex.Array,
    rejected: chex.Array,
    *,
    where: chex.Array | None = None,
    weight: float = 0.1,
) -> jax.Array:
    r"""Odds-ratio preference optimisation: likelihood of the chosen plus a log odds-ratio term.

    .. math:: -\log p_c - \lambda \log \sigma\Big(\log \frac{p_c / (1 - p_c)}
              {p_r / (1 - p_r)}\Big), \qquad \log p = \tfrac{1}{|y|} \sum_t \log \pi(y_t)

    Source: Hong et al. 2024, eqs. 6 and 7. Needs no reference.

    Not done: no reduction. A mean log-prob of 0 (odds without bound) is read as -machine epsilon.

    Args:
      chosen: float[B], *mean* log-probs.
      rejected: float[B].
      where: bool[B], the pairs that count; elsewhere the result is 0. None counts all.
      weight: lambda; 0.0 is supervised fine-tuning on the chosen responses.

    Returns:
      float[B].

    >>> lp = jnp.log(jnp.array([0.5]))
    >>> print(jnp.exp(orpo_loss(lp, lp, weight=1.0)))
    [4.]
    """
    chosen, rejected = visible(where, *full_precision(chosen, rejected, rank=1))

    def log_odds(log_p: jax.Array) -> jax.Array:
        log_p = jnp.minimum(log_p, -jnp.finfo(log_p.dtype).eps)
        return log_p - jnp.log(-jnp.expm1(log_p))

    odds = jax.nn.log_sigmoid(log_odds(chosen) - log_odds(rejected))
    return keep(where, -chosen - weight * odds)


def simpo_loss(
    chosen: chex.Array,
    rejected: chex.Array,
    *,
    where: chex.Array | None = None,
    beta: float = 2.0,
    gamma: float = 1.0,
) -> jax.Array:
    r"""Simple preference optimisation: a margin between length-normalised log-probs.

    .. math:: -\log \sigma(\beta (\log p_c - \log p_r) - \gamma), \qquad
              \log p = \tfrac{1}{|y|} \sum_t \log \pi(y_t)

    Source: Meng et al. 2024, eq. 6. Needs no reference.

    Not done: no reduction.

    Args:
      chosen: float[B], *mean* log-probs.
      rejected: float[B].
      where: bool[B], the pairs that count; elsewhere the result is 0. None counts all.
      beta: scale of the implicit reward.
      gamma: the margin aimed at.

    Returns:
      float[B].

    >>> print(jnp.exp(simpo_loss(jnp.array([-1.0]), jnp.array([-1.5]))))
    [2.]
    """
    chosen, rejected = visible(where, *full_precision(chosen, rejected, rank=1))
    return keep(where, -jax.nn.log_sigmoid(beta * (chosen - rejected) - gamma))


def cpo_loss(
    chosen: chex.Array,
    rejected: chex.Array,
    *,
    where: chex.Array | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    nll_weight: float = 1.0,
) -> jax.Array:
    r"""Contrastive preference optimisation: DPO against a uniform reference, plus likelihood.

    .. math:: -\log \sigma(\beta (\log \pi(y_c) - \log \pi(y_r))) - \alpha \log \pi(y_c)

    Source: Xu et al. 2024, eqs. 3 to 5 (alpha = 1). Needs no reference.

    Not done: no reduction.

    Args:
      chosen: float[B], summed log-probs.
      rejected: float[B].
      where: bool[B], the pairs that count; elsewhere the result is 0. None counts all.
      beta: scale of the margin.
      label_smoothing: as in `dpo_loss`.
      nll_weight: alpha.

    Returns:
      float[B].

    >>> lp = jnp.array([-5.0])
    >>> print(jnp.exp(cpo_loss(lp, lp, nll_weight=0.0)))
    [2.]
    """
    chosen, rejected = visible(where, *full_precision(chosen, rejected, rank=1))
    preference = smoothed_logistic(beta * (chosen - rejected), label_smoothing)
    return keep(where, preference - nll_weight * chosen)
