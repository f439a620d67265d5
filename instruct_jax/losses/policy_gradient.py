r"""Policy gradients: what becomes of an advantage, a token or a response at a time.

An algorithm is an advantage, a loss and a reduction (`masked.reduce_loss`):

==============  ================================  ==============================  ===============
PPO             `generalized_advantages`          `clipped_policy_loss`           token_mean
REINFORCE       return minus a baseline           `reinforce_loss`                any
RLOO            `rloo_advantages`                 `reinforce_loss` on sequences   mean over rows
REINFORCE++     `reinforce_plus_plus_...`         `clipped_policy_loss`           token_mean
GRPO            `grpo_advantages`                 `grpo_loss`                     seq_mean
Dr. GRPO        `grpo_advantages`, scale "none"   `grpo_loss`, kl_coef 0          seq_sum_const
DAPO            `grpo_advantages`                 `grpo_loss`, clip_high, KL 0    token_mean
GSPO            `grpo_advantages`                 `gspo_loss`                     mean over rows
CISPO           `grpo_advantages`                 `cispo_loss`                    token_mean
SAPO            `grpo_advantages`                 `sapo_loss`                     seq_mean
==============  ================================  ==============================  ===============

What they do with a ratio far from 1 is what tells them apart: PPO and GRPO take its token's
gradient away, CISPO bounds it, SAPO fades it out, GSPO does either to the whole response.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from instruct_jax.losses._array import (
    bounded_exp,
    full_precision,
    keep,
    one_precision,
    rows_with_any,
    scalar,
    visible,
)
from instruct_jax.losses.kl import kl_estimate
from instruct_jax.losses.masked import masked_mean
from instruct_jax.losses.ppo import clipped_policy_loss


def reinforce_loss(
    log_probs: chex.Array,
    returns: chex.Array,
    baselines: chex.Array,
    *,
    where: chex.Array | None = None,
) -> jax.Array:
    r"""Policy gradient with a baseline.

    .. math:: -(G - b) \log \pi(y)

    Source: Williams 1992; on whole sequences, Ahmadian et al. 2024, section 2.2.

    The value means nothing, only its gradient does. Stop-gradient on `returns` and `baselines`.
    Not done: no reduction, no importance ratio.

    Args:
      log_probs: float[...], of tokens [B, R] or of sequences [B].
      returns: float[...].
      baselines: float[...]; zeros, a running mean, or values.
      where: bool[...], the entries that count; elsewhere the result is 0. None counts all.

    Returns:
      float[...].

    >>> print(reinforce_loss(jnp.array([-2.0]), jnp.array([3.0]), jnp.array([1.0])))
    [4.]
    """
    arrays = full_precision(log_probs, returns, baselines)
    log_probs, returns, baselines = visible(where, *arrays)
    return keep(where, -jax.lax.stop_gradient(returns - baselines) * log_probs)


def grpo_loss(
    log_probs: chex.Array,
    old_log_probs: chex.Array,
    ref_log_probs: chex.Array,
    advantages: chex.Array,
    *,
    where: chex.Array | None = None,
    clip: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    kl_coef: chex.Numeric = 0.04,
) -> jax.Array:
    r"""Clipped surrogate with one advantage a completion, and the KL in the loss.

    .. math:: \max(-A \rho_t,\; -A\, \mathrm{clip}(\rho_t, 1 - \epsilon, 1 + \epsilon_{high}))
              + \beta\, k_3(\pi, \pi_{ref})

    Source: Shao et al. 2024 (DeepSeekMath), eqs. 3 and 4. DAPO (Yu et al. 2025, section 3) sets
    `clip_high` to 0.28 and beta to 0.

    Stop-gradient on all but `log_probs` and `kl_coef`. Not done: no reduction.

    Args:
      log_probs: float[B, R], under the policy being trained.
      old_log_probs: float[B, R], under the policy that drew the tokens.
      ref_log_probs: float[B, R], under the reference.
      advantages: float[B].
      where: bool[B, R], the response's tokens; elsewhere the result is 0. None counts all.
      clip: epsilon.
      clip_high: epsilon above 1; None takes `clip`.
      dual_clip: bound of the ratio for negative advantages (TRL's `delta`).
      kl_coef: beta, float[].

    Returns:
      float[B, R].

    >>> lp = jnp.array([[-1.0, -2.0]])
    >>> print(grpo_loss(lp, lp, lp, jnp.array([0.5])))
    [[-0.5 -0.5]]
    """
    log_probs, old_log_probs, ref_log_probs = full_precision(
        log_probs, old_log_probs, ref_log_probs, rank=2
    )
    (advantages,) = full_precision(advantages, rank=1)
    chex.assert_equal_shape_prefix([advantages, log_probs], 1)
    surrogate = clipped_policy_loss(
        log_probs,
        old_log_probs,
        jnp.broadcast_to(advantages[:, None], log_probs.shape),
        where=where,
        clip=clip,
        clip_high=clip_high,
        dual_clip=dual_clip,
    )
    kl = kl_estimate(log_probs, jax.lax.stop_gradient(ref_log_probs), where=where, kind="k3")
    surrogate, kl = one_precision(surrogate, kl)
    return surrogate + scalar(kl_coef, kl) * kl


def gspo_loss(
    log_probs: chex.Array,
    old_log_probs: chex.Array,
    advantages: chex.Array,
    *,
    where: chex.Array,
    clip: float | None = None,
    clip_high: float | None = None,
) -> jax.Array:
    r"""Clipped surrogate with one ratio a completion: the geometric mean of the tokens' ratios.

    .. math:: s = \exp\Big(\frac{1}{|y|} \sum_t \log \frac{\pi(y_t)}{\pi_{old}(y_t)}\Big), \qquad
              \max(-A s,\; -A\, \mathrm{clip}(s, 1 - \epsilon, 1 + \epsilon_{high}))

    Source: Zheng et al. 2025 (GSPO), eqs. 5 and 7; the clip ranges are those of section 5.1.

    Stop-gradient on `old_log_probs` and `advantages`. Not done: no reduction.

    Args:
      log_probs: float[B, R], under the policy being trained.
      old_log_probs: float[B, R].
      advantages: float[B].
      where: bool[B, R].
      clip: epsilon, far smaller than PPO's because the ratio is a mean; None takes the paper's,
        3e-4.
      clip_high: epsilon above 1; None takes `clip`, or the paper's 4e-4 where that is None too.

    Returns:
      float[B], 0 for a row without a valid token.

    >>> lp, where = jnp.array([[-1.0, -2.0]]), jnp.ones((1, 2), bool)
    >>> print(gspo_loss(lp, lp, jnp.array([0.5]), where=where))
    [-0.5]
    """
    log_probs, old_log_probs = full_precision(log_probs, old_log_probs, rank=2)
    mean, old_mean = (masked_mean(x, where=where, axis=1) for x in (log_probs, old_log_probs))
    clip, clip_high = _gspo_clips(clip, clip_high)
    return clipped_policy_loss(
        mean, old_mean, advantages, where=rows_with_any(where), clip=clip, clip_high=clip_high
    )


def _gspo_clips(clip: float | None, clip_high: float | None) -> tuple[float, float | None]:
    """The paper's pair where neither is given; one alone is not mixed with the other's default."""
    if clip is None:
        return 3e-4, 4e-4 if clip_high is None else clip_high
    return clip, clip_high


def gspo_token_loss(
    log_probs: chex.Array,
    old_log_probs: chex.Array,
    advantages: chex.Array,
    *,
    where: chex.Array,
    clip: float | None = None,
    clip_high: float | None = None,
) -> jax.Array:
    r"""`gspo_loss` with an advantage for each token: the response's ratio, the token's gradient.

    .. math:: s_t = \bar s\, \frac{\pi(y_t)}{\overline{\pi(y_t)}}, \qquad
              \max(-A_t s_t,\; -A_t\, \mathrm{clip}(s_t, 1 - \epsilon, 1 + \epsilon_{high}))

    with the ratio s of `gspo_loss`; a bar stops the gradient. With one advantage a response, the
    mean over its tokens has the value and the gradient of `gspo_loss`.

    Source: Zheng et al. 2025 (GSPO), section 4.3 (GSPO-token).

    Stop-gradient on `old_log_probs` and `advantages`. Not done: no reduction.

    Args:
      log_probs: float[B, R], under the policy being trained.
      old_log_probs: float[B, R].
      advantages: float[B, R].
      where: bool[B, R].
      clip: epsilon, far smaller than PPO's because the ratio is a mean; None takes the paper's,
        3e-4.
      clip_high: epsilon above 1; None takes `clip`, or the paper's 4e-4 where that is None too.

    Returns:
      float[B, R], 0 where masked.

    >>> lp, where = jnp.array([[-1.0, -2.0]]), jnp.ones((1, 2), bool)
    >>> print(gspo_token_loss(lp, lp, jnp.array([[0.5, 1.0]]), where=where))
    [[-0.5 -1. ]]
    """
    arrays = full_precision(log_probs, old_log_probs, advantages, rank=2)
    log_probs, old_log_probs, advantages = visible(where, *arrays)
    log_ratio = log_probs - old_log_probs
    of_response = jnp.broadcast_to(
        masked_mean(log_ratio, where=where, axis=1)[:, None], log_ratio.shape
    )
    # What it is compared with makes the ratio that of the response, and the gradient the token's.
    old_log_probs = jax.lax.stop_gradient(log_probs - of_response)
    clip, clip_high = _gspo_clips(clip, clip_high)
    return clipped_policy_loss(
        log_probs, old_log_probs, advantages, where=where, clip=clip, clip_high=clip_high
    )


def cispo_loss(
    log_probs: chex.Array,
    old_log_probs: chex.Array,
    advantages: chex.Array,
    *,
    where: chex.Array | None = None,
    low: float = 0.0,
    high: float = 5.0,
) -> jax.Array:
    r"""REINFORCE with a bounded importance weight: no token loses its gradient.

    .. math:: -\overline{\min(\max(\rho_t, l), h)}\, A_t \log \pi(y_t), \qquad
              \rho_t = \exp(\log \pi - \log \pi_{old})

    where the bar stops the gradient.

    Source: MiniMax 2025 (MiniMax-M1), eqs. 4 and 5, with l and h for their 1 - epsilon and 1 +
    epsilon; they set no lower bound and do not say the upper one. h = 5 is that of Khatri et al.
    2025, "The art of scaling reinforcement learning compute for LLMs".

    The value means nothing, only its gradient does. Stop-gradient on all but the `log_probs` that
    are the factor. The log-ratio is clamped to ±20. Not done: no reduction.

    Args:
      log_probs: float[...], under the policy being trained.
      old_log_probs: float[...], under the policy that drew the tokens.
      advantages: float[...].
      where: bool[...], the entries that count; elsewhere the result is 0. None counts all.
      low: l, the least weight.
      high: h, the largest.

    Returns:
      float[...].

    >>> print(cispo_loss(jnp.array([-1.0]), jnp.array([-3.0]), jnp.array([2.0])))
    [10.]
    """
    arrays = full_precision(log_probs, old_log_probs, advantages)
    log_probs, old_log_probs, advantages = visible(where, *arrays)
    weight = jnp.clip(bounded_exp(log_probs - old_log_probs), low, high)
    return keep(where, -jax.lax.stop_gradient(weight * advantages) * log_probs)


def sapo_loss(
    log_probs: chex.Array,
    old_log_probs: chex.Array,
    advantages: chex.Array,
    *,
    where: chex.Array | None = None,
    sharpness: float = 1.0,
    sharpness_negative: float = 1.05,
) -> jax.Array:
    r"""Soft adaptive policy optimisation: a smooth gate on the ratio in place of a clip.

    .. math:: -\frac{4}{\tau} \sigma(\tau (\rho_t - 1))\, A_t, \qquad
              \tau = \tau_{pos} \text{ for } A_t > 0, \text{ else } \tau_{neg}

    At ratio 1 the gradient is that of the plain policy gradient, and it fades on either side; the
    larger sharpness for negative advantages fades those sooner, which push up many tokens that were
    not drawn.

    Source: Gao et al. 2025, "Soft adaptive policy optimization", section 4 (there tau is called a
    temperature; 1.0 and 1.05).

    Stop-gradient on `old_log_probs` and `advantages`. The log-ratio is clamped to ±20.
    Not done: no reduction.

    Args:
      log_probs: float[...], under the policy being trained.
      old_log_probs: float[...], under the policy that drew the tokens.
      advantages: float[...].
      where: bool[...], the entries that count; elsewhere the result is 0. None counts all.
      sharpness: tau of positive advantages.
      sharpness_negative: tau of all others.

    Returns:
      float[...].

    >>> lp = jnp.array([-1.0])
    >>> print(sapo_loss(lp, lp, jnp.array([0.5])))
    [-1.]
    """
    arrays = full_precision(log_probs, old_log_probs, advantages)
    log_probs, old_log_probs, advantages = visible(where, *arrays)
    old_log_probs, advantages = jax.lax.stop_gradient((old_log_probs, advantages))
    tau = jnp.where(advantages > 0, sharpness, sharpness_negative).astype(log_probs.dtype)
    gate = jax.nn.sigmoid(tau * (bounded_exp(log_probs - old_log_probs) - 1.0))
    return keep(where, -4.0 / tau * gate * advantages)
