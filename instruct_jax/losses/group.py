r"""Advantages from several samples a prompt instead of a value model.

Rewards of groups are float[B, K], K completions of each of B prompts; losses see the flat batch,
one row a completion. Which advantage goes with which loss and reduction is in `policy_gradient`.

Length and difficulty bias: dividing by the standard deviation gives prompts of low variance (nearly
always right or wrong) more weight (Liu et al. 2025, section 3.1).
"""

from __future__ import annotations

from typing import Literal

import chex
import jax
import jax.numpy as jnp

from instruct_jax.losses._array import full_precision, mask_like
from instruct_jax.losses.masked import (
    centered,
    masked_mean,
    masked_whiten,
    not_overflown,
    sum_and_count,
)
from instruct_jax.losses.shaping import generalized_advantages


def _deviations(
    rewards: chex.Array, where: chex.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rewards, mask and rewards minus their group's mean, each [B, K]; 0 where masked."""
    (rewards,) = full_precision(rewards, rank=2)
    where = mask_like(jnp.ones(rewards.shape, bool) if where is None else where, rewards)
    rewards = jnp.where(where, rewards, 0.0)
    return rewards, where, centered(rewards, where, axis=1)[1]


def _standard_deviation(deviations: jax.Array, where: jax.Array, axis: int | None) -> jax.Array:
    """Unbiased, 0 for fewer than two entries, with a finite gradient at 0; NaN if it overflows."""
    squares, count = sum_and_count(jnp.square(deviations), where=where, axis=axis)
    variance = not_overflown(squares / jnp.maximum(count - 1.0, 1.0))
    spread = ~(variance <= 0)
    return jnp.where(spread, jnp.sqrt(jnp.where(spread, variance, 1.0)), 0.0)


def _divided(deviations: jax.Array, scale: jax.Array) -> jax.Array:
    """The quotient, 0 where the scale is 0: where there are no deviations."""
    return deviations / jnp.where(scale <= 0, 1.0, scale)


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
      float[B, K]; 0 where masked and in a group whose rewards are all equal; NaN where the
      deviation is too large for the type (of rewards over about 1e19).

    Raises:
      ValueError: an unknown scale.

    >>> print(grpo_advantages(jnp.array([[0.0, 1.0, 2.0]]), epsilon=0.0))
    [[-1.  0.  1.]]
    """
    rewards, where, deviations = _deviations(rewards, where)
    if scale == "none":
        return deviations
    if scale == "group":
        spread = _standard_deviation(deviations, where, 1)[:, None]
        return jnp.where(where, _divided(deviations, spread + epsilon), 0.0)
    if scale == "batch":
        spread = _standard_deviation(centered(rewards, where)[1], where, None)
        return jnp.where(where, _divided(deviations, spread + epsilon), 0.0)
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
    _, where, deviations = _deviations(rewards, where)
    count = jnp.sum(where, axis=1, dtype=deviations.dtype)[:, None]
    return deviations * count / jnp.maximum(count - 1.0, 1.0)


def reinforce_plus_plus_advantages(
    rewards: chex.Array, *, where: chex.Array, discount: chex.Numeric = 1.0
) -> jax.Array:
    r"""Rewards to go, normalised over the whole batch of tokens.

    .. math:: G_t = \sum_{s \geq t} \gamma^{s - t} R_s, \qquad
              A_t = \frac{G_t - \mathrm{mean}}{\mathrm{std}}

    Source: Hu et al. 2025, "REINFORCE++", section 3: the token rewards are those of
    `shaping.kl_shaped_rewards` (KL as k1, the score at the last token). With several completions a
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
