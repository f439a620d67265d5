r"""Critic-free policy gradients: advantages from several samples a prompt instead of a value model.

An algorithm is an advantage, a loss and a reduction (`masked.reduce_loss`):

==============  ================================  ==============================  ===============
REINFORCE       return minus a baseline           `reinforce_loss`                any
RLOO            `rloo_advantages`                 `reinforce_loss` on sequences   mean over rows
REINFORCE++     `reinforce_plus_plus_...`         `clipped_policy_loss`           token_mean
GRPO            `grpo_advantages`                 `grpo_loss`                     seq_mean
Dr. GRPO        `grpo_advantages`, scale "none"   `grpo_loss`, kl_coef 0          seq_sum_const
DAPO            `grpo_advantages`                 `grpo_loss`, clip_high, KL 0    token_mean
GSPO            `grpo_advantages`                 `gspo_loss`                     mean over rows
==============  ================================  ==============================  ===============

Rewards of groups are float[B, K], K completions of each of B prompts; losses see the flat batch,
one row a completion. Length and difficulty bias: dividing by the standard deviation gives prompts
of low variance (nearly always right or wrong) more weight; `seq_mean` gives long wrong answers
less (Liu et al. 2025, section 3.1).
"""

from __future__ import annotations

from typing import Literal

import chex
import jax
import jax.numpy as jnp

from instruct_jax.losses._array import full_precision, mask_like
from instruct_jax.losses.kl import kl_estimate
from instruct_jax.losses.masked import masked_mean, masked_whiten, sum_and_count
from instruct_jax.losses.ppo import clipped_policy_loss, generalized_advantages


def _deviations(
    rewards: chex.Array, where: chex.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rewards, mask and rewards minus their group's mean, each [B, K]; 0 where masked."""
    (rewards,) = full_precision(rewards, rank=2)
    where = mask_like(jnp.ones(rewards.shape, bool) if where is None else where, rewards)
    rewards = jnp.where(where, rewards, 0.0)
    mean = masked_mean(rewards, where=where, axis=1)[:, None]
    return rewards, where, jnp.where(where, rewards - mean, 0.0)


def _standard_deviation(centered: jax.Array, where: jax.Array, axis: int | None) -> jax.Array:
    """Unbiased, 0 for fewer than two entries, with a finite gradient at 0."""
    squares, count = sum_and_count(jnp.square(centered), where=where, axis=axis)
    variance = squares / jnp.maximum(count - 1.0, 1.0)
    spread = variance > 0
    return jnp.where(spread, jnp.sqrt(jnp.where(spread, variance, 1.0)), 0.0)


def grpo_advantages(
    rewards: chex.Array,
    *,
    where: chex.Array | None = None,
    scale: Literal["group", "batch", "none"] = "group",
    epsilon: float = 1e-4,
) -> jax.Array:
    r"""Rewards relative to their group: centred, and scaled by a standard deviation.

    .. math:: A_{ik} = \frac{r_{ik} - \mathrm{mean}_k\, r_{ik}}{\mathrm{std} + \epsilon}

    Source: Shao et al. 2024 (DeepSeekMath), section 4.1.2: "group", the group's own deviation.
    "none": Liu et al. 2025 (Dr. GRPO), section 3.2. "batch", the deviation of all rewards: Liu
    et al. 2025, "Tricks or traps?". Deviations are unbiased (K - 1), as in TRL and verl.

    Not done: no stop-gradient (the losses stop it).

    Args:
      rewards: float[B, K].
      where: bool[B, K], False on completions without a reward.
      scale: what to divide by.
      epsilon: added to the deviation.

    Returns:
      float[B, K]; 0 where masked and in a group whose rewards are all equal.

    Raises:
      ValueError: an unknown scale.

    >>> print(grpo_advantages(jnp.array([[0.0, 1.0, 2.0]]), epsilon=0.0))
    [[-1.  0.  1.]]
    """
    rewards, where, centered = _deviations(rewards, where)
    if scale == "none":
        return centered
    if scale == "group":
        return centered / (_standard_deviation(centered, where, 1)[:, None] + epsilon)
    if scale == "batch":
        around_mean = rewards - masked_mean(rewards, where=where)
        return centered / (_standard_deviation(around_mean, where, None) + epsilon)
    raise ValueError(f"scale must be 'group', 'batch' or 'none', got {scale!r}")


def rloo_advantages(rewards: chex.Array, *, where: chex.Array | None = None) -> jax.Array:
    r"""Reward minus the mean reward of the *other* completions of the prompt.

    .. math:: A_{ik} = r_{ik} - \frac{1}{K - 1} \sum_{j \neq k} r_{ij}

    Source: Kool et al. 2019; Ahmadian et al. 2024, "Back to basics", section 2.2. The baseline
    does not depend on the completion, so the gradient stays unbiased.

    Args:
      rewards: float[B, K], the KL penalty already taken off.
      where: bool[B, K], False on completions without a reward.

    Returns:
      float[B, K]; 0 where masked, and for a lone completion, which has no baseline.

    >>> print(rloo_advantages(jnp.array([[0.0, 1.0, 5.0]])))
    [[-3.  -1.5  4.5]]
    """
    _, where, centered = _deviations(rewards, where)
    count = jnp.sum(where, axis=1, dtype=centered.dtype)[:, None]
    return centered * count / jnp.maximum(count - 1.0, 1.0)


def reinforce_plus_plus_advantages(
    rewards: chex.Array, *, where: chex.Array, discount: chex.Numeric = 1.0
) -> jax.Array:
    r"""Rewards to go, normalised over the whole batch of tokens.

    .. math:: G_t = \sum_{s \geq t} \gamma^{s - t} R_s, \qquad
              A_t = \frac{G_t - \mathrm{mean}}{\mathrm{std}}

    Source: Hu et al. 2025, "REINFORCE++", section 3: the token rewards are those of
    `ppo.kl_shaped_rewards` (KL as k1, the score at the last token). With several completions a
    prompt, subtract the group's mean from the scores first (its "-baseline" form).

    Args:
      rewards: float[B, R].
      where: bool[B, R].
      discount: gamma, float[].

    Returns:
      float[B, R], 0 where masked.

    >>> where = jnp.ones((2, 2), bool)
    >>> rewards = jnp.array([[0.0, 1.0], [0.0, -1.0]])
    >>> print(reinforce_plus_plus_advantages(rewards, where=where))
    [[ 1.  1.]
     [-1. -1.]]
    """
    (rewards,) = full_precision(rewards, rank=2)
    to_go, _ = generalized_advantages(
        rewards, jnp.zeros_like(rewards), where=where, discount=discount, gae_lambda=1.0
    )
    return masked_whiten(to_go, where=where)


def critic_free_advantages(
    rewards: chex.Array,
    *,
    where: chex.Array,
    samples: int,
    estimator: Literal["rloo", "grpo", "reinforce++"],
    scale: Literal["group", "batch", "none"] = "group",
    discount: chex.Numeric = 1.0,
) -> jax.Array:
    """Advantages of the tokens of B responses, K to a prompt, without a value model.

    Rows i*K to (i+1)*K are the K samples of one prompt. "rloo" and "grpo" give all tokens of a
    response its one advantage, from the sum of its rewards; "reinforce++" gives each token its
    reward to go, less the mean reward of the group where there are several samples.

    Source: those of the three advantages above.

    Args:
      rewards: float[B, R], shaped (`kl_shaped_rewards`).
      where: bool[B, R].
      samples: K, which divides B.
      estimator: which advantages.
      scale: what "grpo" divides by.
      discount: gamma of "reinforce++", float[].

    Returns:
      float[B, R], 0 where masked.

    Raises:
      ValueError: K does not divide B, or an unknown estimator or scale.

    >>> where = jnp.array([[True, True], [True, False]])
    >>> rewards = jnp.array([[0.0, 3.0], [1.0, 0.0]])
    >>> print(critic_free_advantages(rewards, where=where, samples=2, estimator="rloo"))
    [[ 2.  2.]
     [-2.  0.]]
    """
    (rewards,) = full_precision(rewards, rank=2)
    where = mask_like(where, rewards)
    if rewards.shape[0] % samples:
        raise ValueError(f"{samples} samples a prompt do not divide {rewards.shape[0]} rows")
    rewards = jnp.where(where, rewards, 0.0)
    groups = jnp.sum(rewards, axis=1).reshape(-1, samples)
    present = jnp.any(where, axis=1).reshape(-1, samples)
    if estimator == "reinforce++":
        if samples > 1:
            baseline = jnp.repeat(masked_mean(groups, where=present, axis=1), samples)
            last = where & (jnp.cumsum(where, axis=1) == jnp.sum(where, axis=1)[:, None])
            rewards = jnp.where(last, rewards - baseline[:, None], rewards)
        return reinforce_plus_plus_advantages(rewards, where=where, discount=discount)
    if estimator == "rloo":
        advantages = rloo_advantages(groups, where=present)
    elif estimator == "grpo":
        advantages = grpo_advantages(groups, where=present, scale=scale)
    else:
        raise ValueError(f"estimator must be 'rloo', 'grpo' or 'reinforce++', got {estimator!r}")
    return jnp.where(where, advantages.reshape(-1)[:, None], 0.0)


def reinforce_loss(log_probs: chex.Array, returns: chex.Array, baselines: chex.Array) -> jax.Array:
    r"""Policy gradient with a baseline.

    .. math:: -(G - b) \log \pi(y)

    Source: Williams 1992; on whole sequences, Ahmadian et al. 2024, section 2.2.

    The value means nothing, only its gradient does. Stop-gradient on `returns` and `baselines`.
    Not done: no mask, no reduction, no importance ratio.

    Args:
      log_probs: float[...], of tokens [B, R] or of sequences [B].
      returns: float[...].
      baselines: float[...]; zeros, a running mean, or values.

    Returns:
      float[...].

    >>> print(reinforce_loss(jnp.array([-2.0]), jnp.array([3.0]), jnp.array([1.0])))
    [4.]
    """
    log_probs, returns, baselines = full_precision(log_probs, returns, baselines)
    return -jax.lax.stop_gradient(returns - baselines) * log_probs


def grpo_loss(
    log_probs: chex.Array,
    old_log_probs: chex.Array,
    ref_log_probs: chex.Array,
    advantages: chex.Array,
    *,
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

    Stop-gradient on all but `log_probs`. Not done: no mask, no reduction.

    Args:
      log_probs: float[B, R], under the policy being trained.
      old_log_probs: float[B, R], under the policy that drew the tokens.
      ref_log_probs: float[B, R], under the reference.
      advantages: float[B].
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
        clip=clip,
        clip_high=clip_high,
        dual_clip=dual_clip,
    )
    kl = kl_estimate(log_probs, jax.lax.stop_gradient(ref_log_probs), kind="k3")
    return surrogate + kl_coef * kl


def gspo_loss(
    log_probs: chex.Array,
    old_log_probs: chex.Array,
    advantages: chex.Array,
    *,
    where: chex.Array,
    clip: float = 3e-4,
    clip_high: float | None = 4e-4,
) -> jax.Array:
    r"""Clipped surrogate with one ratio a completion: the geometric mean of the tokens' ratios.

    .. math:: s = \exp\Big(\frac{1}{|y|} \sum_t \log \frac{\pi(y_t)}{\pi_{old}(y_t)}\Big), \qquad
              \max(-A s,\; -A\, \mathrm{clip}(s, 1 - \epsilon, 1 + \epsilon_{high}))

    Source: Zheng et al. 2025 (GSPO), eqs. 5 and 7; the clip ranges are those of section 5.1.

    Stop-gradient on `old_log_probs` and `advantages`. Not done: no reduction; a row without a
    valid token has the constant loss -A.

    Args:
      log_probs: float[B, R], under the policy being trained.
      old_log_probs: float[B, R].
      advantages: float[B].
      where: bool[B, R].
      clip: epsilon, far smaller than PPO's because the ratio is a mean.
      clip_high: epsilon above 1; None takes `clip`.

    Returns:
      float[B].

    >>> lp, where = jnp.array([[-1.0, -2.0]]), jnp.ones((1, 2), bool)
    >>> print(gspo_loss(lp, lp, jnp.array([0.5]), where=where))
    [-0.5]
    """
    log_probs, old_log_probs = full_precision(log_probs, old_log_probs, rank=2)
    mean_log_probs = masked_mean(log_probs, where=where, axis=1)
    old_mean = masked_mean(old_log_probs, where=where, axis=1)
    return clipped_policy_loss(mean_log_probs, old_mean, advantages, clip=clip, clip_high=clip_high)
