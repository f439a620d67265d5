r"""PPO's two losses, each held near what the rollout was made with, and how to watch them.

`where` is True on the response's tokens through the stop token. Losses are unreduced: weigh them
with `masked.loss_sum_and_count`. The rewards and advantages that go in are made in `shaping`.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from instruct_jax.losses._array import bounded_exp, full_precision, keep, mask_like, visible
from instruct_jax.losses.masked import centered, masked_mean


def clipped_policy_loss(
    log_probs: chex.Array,
    old_log_probs: chex.Array,
    advantages: chex.Array,
    *,
    where: chex.Array | None = None,
    clip: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> jax.Array:
    r"""The clipped surrogate of PPO as a loss, one value a token.

    .. math:: \max(-A \rho,\; -A\, \mathrm{clip}(\rho, 1 - \epsilon, 1 + \epsilon_{high})),
              \qquad \rho = \exp(\log \pi - \log \pi_{old})

    Source: Schulman et al. 2017, eq. 7. `clip_high`: Yu et al. 2025 (DAPO), section 3.1.
    `dual_clip`: Ye et al. 2020, "Mastering complex control in MOBA games", section on dual-clip
    PPO; for A < 0 the loss is at most :math:`-c A`.

    Stop-gradient on `old_log_probs` and `advantages`. The log-ratio is clamped to ±20.
    Not done: no whitening, no reduction.

    Args:
      log_probs: float[...], under the policy being trained.
      old_log_probs: float[...], under the policy that drew the tokens, same temperature.
      advantages: float[...].
      where: bool[...], the entries that count; elsewhere the result is 0. None counts all.
      clip: epsilon.
      clip_high: epsilon above 1; None takes `clip`.
      dual_clip: c > 1; None leaves negative advantages unbounded.

    Returns:
      float[...].

    >>> loss = clipped_policy_loss(jnp.log(jnp.array([1.3])), jnp.zeros(1), jnp.ones(1))
    >>> print(loss)
    [-1.2]
    """
    arrays = full_precision(log_probs, old_log_probs, advantages)
    log_probs, old_log_probs, advantages = visible(where, *arrays)
    unclipped, clipped = _surrogates(log_probs, old_log_probs, advantages, clip, clip_high)
    loss = jnp.maximum(unclipped, clipped)
    if dual_clip is not None:
        advantages = jax.lax.stop_gradient(advantages)
        loss = jnp.where(advantages < 0, jnp.minimum(loss, -dual_clip * advantages), loss)
    return keep(where, loss)


def policy_clipped(
    log_probs: chex.Array,
    old_log_probs: chex.Array,
    advantages: chex.Array,
    *,
    where: chex.Array | None = None,
    clip: float = 0.2,
    clip_high: float | None = None,
) -> jax.Array:
    """1.0 on tokens whose policy loss is the clipped branch, else 0.0.

    Its masked mean is the clip fraction. A ratio outside of the clip range on the side where the
    unclipped branch is larger keeps its gradient and does not count.

    Args:
      log_probs: float[...].
      old_log_probs: float[...].
      advantages: float[...].
      where: bool[...], the entries that count; elsewhere the result is 0. None counts all.
      clip: epsilon.
      clip_high: epsilon above 1; None takes `clip`.

    Returns:
      float[...].

    >>> log_ratio = jnp.log(jnp.array([1.3, 1.3]))
    >>> print(policy_clipped(log_ratio, jnp.zeros(2), jnp.array([1.0, -1.0])))
    [1. 0.]
    """
    arrays = full_precision(log_probs, old_log_probs, advantages)
    log_probs, old_log_probs, advantages = visible(where, *arrays)
    unclipped, clipped = _surrogates(log_probs, old_log_probs, advantages, clip, clip_high)
    return (clipped > unclipped).astype(unclipped.dtype)


def _surrogates(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    clip: float,
    clip_high: float | None,
) -> tuple[jax.Array, jax.Array]:
    """The unclipped and the clipped branch of the surrogate loss."""
    advantages = jax.lax.stop_gradient(advantages)
    ratio = bounded_exp(log_probs - jax.lax.stop_gradient(old_log_probs))
    high = clip if clip_high is None else clip_high
    return -advantages * ratio, -advantages * jnp.clip(ratio, 1.0 - clip, 1.0 + high)


def clipped_value_loss(
    values: chex.Array,
    old_values: chex.Array,
    returns: chex.Array,
    *,
    where: chex.Array | None = None,
    clip: float = 0.2,
) -> jax.Array:
    r"""Half the squared error of the value function, held near the old values.

    .. math:: \tfrac12 \max\big((V - G)^2,\; (\mathrm{clip}(V, V_{old} - \epsilon,
              V_{old} + \epsilon) - G)^2\big)

    Source: Ziegler et al. 2019, code (`train_policy.py`); OpenAI baselines `ppo2`.

    Stop-gradient on `old_values` and `returns`. Not done: no reduction.

    Args:
      values: float[...], of the value function being trained.
      old_values: float[...], of the value function at rollout time.
      returns: float[...], from *unwhitened* advantages.
      where: bool[...], the entries that count; elsewhere the result is 0. None counts all.
      clip: epsilon, in units of the reward.

    Returns:
      float[...].

    >>> print(clipped_value_loss(jnp.array([2.0]), jnp.array([1.0]), jnp.array([3.0])).round(4))
    [1.62]
    """
    free, held = _value_errors(values, old_values, returns, where, clip)
    return 0.5 * jnp.maximum(free, held)


def value_clipped(
    values: chex.Array,
    old_values: chex.Array,
    returns: chex.Array,
    *,
    where: chex.Array | None = None,
    clip: float = 0.2,
) -> jax.Array:
    """1.0 on entries whose value loss is the clipped branch, else 0.0.

    Args:
      values: float[...].
      old_values: float[...].
      returns: float[...].
      where: bool[...], the entries that count; elsewhere the result is 0. None counts all.
      clip: epsilon.

    Returns:
      float[...].

    >>> print(value_clipped(jnp.array([2.0]), jnp.array([1.0]), jnp.array([3.0])))
    [1.]
    """
    free, held = _value_errors(values, old_values, returns, where, clip)
    return (held > free).astype(free.dtype)


def _value_errors(
    values: chex.Array,
    old_values: chex.Array,
    returns: chex.Array,
    where: chex.Array | None,
    clip: float,
) -> tuple[jax.Array, jax.Array]:
    """Squared errors of the value and of the value clipped to the old one's neighbourhood; of
    what is hidden, 0.
    """
    arrays = full_precision(values, old_values, returns)
    values, old_values, returns = visible(where, *arrays)
    old_values, returns = jax.lax.stop_gradient((old_values, returns))
    held = jnp.clip(values, old_values - clip, old_values + clip)
    return jnp.square(values - returns), jnp.square(held - returns)


def explained_variance(values: chex.Array, returns: chex.Array, *, where: chex.Array) -> jax.Array:
    r"""Share of the variance of the returns that the values explain.

    .. math:: 1 - \mathrm{var}(G - V) / \mathrm{var}(G)

    Args:
      values: float[...].
      returns: float[...].
      where: bool[...].

    Returns:
      float[]: 1 is perfect, 0 is no better than a constant, below 0 is worse; 0 where the
      returns are all equal.

    >>> v = jnp.array([1.0, 2.0, 3.0])
    >>> print(explained_variance(v, v, where=jnp.ones(3, bool)))
    1.0
    """
    values, returns = full_precision(values, returns)
    where = mask_like(where, values)
    values, returns = visible(where, values, returns)

    def variance(x: jax.Array) -> jax.Array:
        return masked_mean(jnp.square(centered(x, where)[1]), where=where)

    spread = variance(returns)
    explained = 1.0 - variance(returns - values) / jnp.where(spread > 0, spread, 1.0)
    return jnp.where(spread > 0, explained, 0.0)
