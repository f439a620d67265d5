r"""PPO for a language model: shaped rewards, advantages, clipped policy and value losses.

One episode is a prompt and one response :math:`y_0 .. y_{R-1}`. `where` is bool[B, R], True on
the response's tokens through the stop token. :math:`V_t` is the value of the state before
:math:`y_t`. The objective, to be maximised, is (Ouyang et al. 2022, eq. 2)

.. math:: E[r(x, y) - \beta \sum_t (\log \pi(y_t) - \log \pi_{ref}(y_t))]
          + \gamma E_{z \sim pretrain}[\log \pi(z)]

The penalty is part of the reward, token by token; the score enters at the last valid token.
Losses are unreduced: weigh them with `masked.loss_sum_and_count`.
"""

from __future__ import annotations

from typing import Literal

import chex
import jax
import jax.numpy as jnp

from instruct_jax.losses._array import bounded_exp, full_precision, mask_like
from instruct_jax.losses.masked import masked_mean


def missing_eos_scores(
    scores: chex.Array,
    has_eos: chex.Array,
    *,
    rule: Literal["none", "replace", "subtract"] = "none",
    penalty: float = 1.0,
) -> jax.Array:
    """Scores after the rule for responses that ran out of budget without the stop token.

    "none" leaves them (the InstructGPT recipe; the paper states no rule), "replace" sets them to
    `-penalty` (Huang et al. 2024, the TL;DR recipe), "subtract" takes `penalty` off (TRL).

    Args:
      scores: float[B].
      has_eos: bool[B], whether the *response* holds the stop token.
      rule: which rule.
      penalty: a positive number for a punishment.

    Returns:
      float[B].

    Raises:
      ValueError: an unknown rule.

    >>> scores, ended = jnp.array([2.0, 2.0]), jnp.array([True, False])
    >>> print(missing_eos_scores(scores, ended, rule="replace"))
    [ 2. -1.]
    """
    (scores,) = full_precision(scores, rank=1)
    has_eos = mask_like(has_eos, scores)
    if rule == "none":
        return scores
    if rule == "replace":
        return jnp.where(has_eos, scores, -penalty)
    if rule == "subtract":
        return jnp.where(has_eos, scores, scores - penalty)
    raise ValueError(f"rule must be 'none', 'replace' or 'subtract', got {rule!r}")


def clip_scores(scores: chex.Array, *, limit: float | None = None) -> jax.Array:
    """Scores clipped to ±limit; None leaves them. Clip before the KL penalty is added.

    Source: DeepSpeed-Chat (`ppo_trainer.py`, ±5).

    Args:
      scores: float[...].
      limit: a positive number or None.

    Returns:
      float[...].

    >>> print(clip_scores(jnp.array([7.0, -1.0]), limit=5.0))
    [ 5. -1.]
    """
    (scores,) = full_precision(scores)
    return scores if limit is None else jnp.clip(scores, -limit, limit)


def kl_shaped_rewards(
    scores: chex.Array,
    log_probs: chex.Array,
    ref_log_probs: chex.Array,
    *,
    where: chex.Array,
    kl_coef: chex.Numeric,
) -> jax.Array:
    r"""Rewards of the tokens: minus the KL term everywhere, plus the score at the last one.

    .. math:: R_t = -\beta (\log \pi_{old}(y_t) - \log \pi_{ref}(y_t)) + 1[t = E]\, r(x, y)

    Source: Ziegler et al. 2019, section 2.2; Ouyang et al. 2022, section 3.5 and appendix C.4.

    Not done: no stop-gradient; the log-probs are the stored ones of the rollout policy.

    Args:
      scores: float[B], one a response.
      log_probs: float[B, R], of the policy that drew the response.
      ref_log_probs: float[B, R].
      where: bool[B, R]; E is its last True entry.
      kl_coef: beta, float[].

    Returns:
      float[B, R], 0 on masked entries; all 0, without the score, in a row with no valid token.

    >>> lp, ref = jnp.array([[-1.0, -1.0, -9.0]]), jnp.array([[-2.0, -1.0, 0.0]])
    >>> where = jnp.array([[True, True, False]])
    >>> print(kl_shaped_rewards(jnp.array([1.0]), lp, ref, where=where, kl_coef=0.5))
    [[-0.5  1.   0. ]]
    """
    log_probs, ref_log_probs = full_precision(log_probs, ref_log_probs, rank=2)
    (scores,) = full_precision(scores, rank=1)
    where = mask_like(where, log_probs)
    chex.assert_equal_shape_prefix([scores, log_probs], 1)
    remaining = jnp.cumsum(where[:, ::-1], axis=1)[:, ::-1]
    is_last = where & (remaining == 1)
    penalty = kl_coef * (log_probs - ref_log_probs)
    return jnp.where(where, -penalty, 0.0) + jnp.where(is_last, scores[:, None], 0.0)


def generalized_advantages(
    rewards: chex.Array,
    values: chex.Array,
    *,
    where: chex.Array,
    discount: chex.Numeric = 1.0,
    gae_lambda: chex.Numeric = 0.95,
) -> tuple[jax.Array, jax.Array]:
    r"""Generalised advantage estimates and the returns that the value function is fitted to.

    .. math:: \delta_t = R_t + \gamma V_{t+1} - V_t, \qquad
              A_t = \delta_t + \gamma \lambda A_{t+1}, \qquad G_t = A_t + V_t

    Source: Schulman et al. 2016, eq. 16, in reverse recursion; V past the last token is 0.

    A masked entry is passed over: t + 1 means the next *valid* entry. Padding on either side and
    holes (tokens the policy did not write) add no reward, no value and no discount.

    Not done: no whitening, no stop-gradient (the losses below stop it).

    Args:
      rewards: float[B, R].
      values: float[B, R], `values[:, t]` is of the state before token t.
      where: bool[B, R].
      discount: gamma, float[].
      gae_lambda: lambda, float[].

    Returns:
      Advantages and returns, float[B, R] each, 0 on masked entries.

    >>> rewards, values = jnp.array([[-.02, .01, 1.]]), jnp.array([[.5, .2, -.1]])
    >>> adv, ret = generalized_advantages(rewards, values, where=jnp.ones((1, 3), bool))
    >>> print(adv.round(5), ret.round(5))
    [[0.39725 0.755   1.1    ]] [[0.89725 0.955   1.     ]]
    """
    rewards, values = full_precision(rewards, values, rank=2)
    where = mask_like(where, rewards)

    def step(carry, inputs):
        next_value, next_advantage = carry
        reward, value, valid = inputs
        delta = reward + discount * next_value - value
        advantage = delta + discount * gae_lambda * next_advantage
        carry = jnp.where(valid, value, next_value), jnp.where(valid, advantage, next_advantage)
        return carry, advantage

    zeros = jnp.zeros_like(rewards[:, 0])
    by_time = jax.tree.map(jnp.transpose, (rewards, values, where))
    _, advantages = jax.lax.scan(step, (zeros, zeros), by_time, reverse=True)
    advantages = jnp.where(where, advantages.T, 0.0)
    return advantages, jnp.where(where, advantages + values, 0.0)


def clipped_policy_loss(
    log_probs: chex.Array,
    old_log_probs: chex.Array,
    advantages: chex.Array,
    *,
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
    Not done: no mask, no whitening, no reduction.

    Args:
      log_probs: float[...], under the policy being trained.
      old_log_probs: float[...], under the policy that drew the tokens, same temperature.
      advantages: float[...].
      clip: epsilon.
      clip_high: epsilon above 1; None takes `clip`.
      dual_clip: c > 1; None leaves negative advantages unbounded.

    Returns:
      float[...].

    >>> loss = clipped_policy_loss(jnp.log(jnp.array([1.3])), jnp.zeros(1), jnp.ones(1))
    >>> print(loss)
    [-1.2]
    """
    unclipped, clipped = _surrogates(log_probs, old_log_probs, advantages, clip, clip_high)
    loss = jnp.maximum(unclipped, clipped)
    if dual_clip is None:
        return loss
    advantages = jax.lax.stop_gradient(full_precision(advantages)[0])
    return jnp.where(advantages < 0, jnp.minimum(loss, -dual_clip * advantages), loss)


def policy_clipped(
    log_probs: chex.Array,
    old_log_probs: chex.Array,
    advantages: chex.Array,
    *,
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
      clip: epsilon.
      clip_high: epsilon above 1; None takes `clip`.

    Returns:
      float[...].

    >>> log_ratio = jnp.log(jnp.array([1.3, 1.3]))
    >>> print(policy_clipped(log_ratio, jnp.zeros(2), jnp.array([1.0, -1.0])))
    [1. 0.]
    """
    unclipped, clipped = _surrogates(log_probs, old_log_probs, advantages, clip, clip_high)
    return (clipped > unclipped).astype(unclipped.dtype)


def _surrogates(
    log_probs: chex.Array,
    old_log_probs: chex.Array,
    advantages: chex.Array,
    clip: float,
    clip_high: float | None,
) -> tuple[jax.Array, jax.Array]:
    """The unclipped and the clipped branch of the surrogate loss."""
    log_probs, old_log_probs, advantages = full_precision(log_probs, old_log_probs, advantages)
    advantages = jax.lax.stop_gradient(advantages)
    ratio = bounded_exp(log_probs - jax.lax.stop_gradient(old_log_probs))
    high = clip if clip_high is None else clip_high
    return -advantages * ratio, -advantages * jnp.clip(ratio, 1.0 - clip, 1.0 + high)


def clipped_value_loss(
    values: chex.Array, old_values: chex.Array, returns: chex.Array, *, clip: float = 0.2
) -> jax.Array:
    r"""Half the squared error of the value function, held near the old values.

    .. math:: \tfrac12 \max\big((V - G)^2,\; (\mathrm{clip}(V, V_{old} - \epsilon,
              V_{old} + \epsilon) - G)^2\big)

    Source: Ziegler et al. 2019, code (`train_policy.py`); OpenAI baselines `ppo2`.

    Stop-gradient on `old_values` and `returns`. Not done: no mask, no reduction.

    Args:
      values: float[...], of the value function being trained.
      old_values: float[...], of the value function at rollout time.
      returns: float[...], from *unwhitened* advantages.
      clip: epsilon, in units of the reward.

    Returns:
      float[...].

    >>> print(clipped_value_loss(jnp.array([2.0]), jnp.array([1.0]), jnp.array([3.0])).round(4))
    [1.62]
    """
    free, held = _value_errors(values, old_values, returns, clip)
    return 0.5 * jnp.maximum(free, held)


def value_clipped(
    values: chex.Array, old_values: chex.Array, returns: chex.Array, *, clip: float = 0.2
) -> jax.Array:
    """1.0 on entries whose value loss is the clipped branch, else 0.0.

    Args:
      values: float[...].
      old_values: float[...].
      returns: float[...].
      clip: epsilon.

    Returns:
      float[...].

    >>> print(value_clipped(jnp.array([2.0]), jnp.array([1.0]), jnp.array([3.0])))
    [1.]
    """
    free, held = _value_errors(values, old_values, returns, clip)
    return (held > free).astype(free.dtype)


def _value_errors(
    values: chex.Array, old_values: chex.Array, returns: chex.Array, clip: float
) -> tuple[jax.Array, jax.Array]:
    """Squared errors of the value and of the value clipped to the old one's neighbourhood."""
    values, old_values, returns = full_precision(values, old_values, returns)
    old_values, returns = jax.lax.stop_gradient((old_values, returns))
    held = jnp.clip(values, old_values - clip, old_values + clip)
    return jnp.square(values - returns), jnp.square(held - returns)


def truncated_importance_weights(
    log_probs: chex.Array, sampler_log_probs: chex.Array, *, cap: float = 2.0
) -> jax.Array:
    r"""Weights that correct for a sampler whose probabilities are not quite the trainer's.

    .. math:: \min(\pi_{trainer} / \pi_{sampler},\; c)

    A sampler in other precision or with other kernels draws from another distribution than the
    one whose `old_log_probs` the ratio uses. Multiply the policy loss by these weights.

    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training"; TRL (`vllm_importance_sampling_cap`).

    Stop-gradient on the result. Not done: no mask, no normalisation.

    Args:
      log_probs: float[...], of the rollout policy, by the training forward (the old ones).
      sampler_log_probs: float[...], of the same tokens, as the sampler reports them.
      cap: c, which bounds the variance.

    Returns:
      float[...], in (0, c].

    >>> print(truncated_importance_weights(jnp.array([0.0, 0.0]), jnp.array([0.0, -3.0])))
    [1. 2.]
    """
    log_probs, sampler_log_probs = full_precision(log_probs, sampler_log_probs)
    weights = jnp.minimum(bounded_exp(log_probs - sampler_log_probs), cap)
    return jax.lax.stop_gradient(weights)


def explained_variance(values: chex.Array, returns: chex.Array, *, where: chex.Array) -> jax.Array:
    r"""Share of the variance of the returns that the values explain.

    .. math:: 1 - \mathrm{var}(G - V) / \mathrm{var}(G)

    Args:
      values: float[...].
      returns: float[...].
      where: bool[...].

    Returns:
      float[]: 1 is perfect, 0 is no better than a constant, below 0 is worse; 0 where the
      returns have no variance.

    >>> v = jnp.array([1.0, 2.0, 3.0])
    >>> print(explained_variance(v, v, where=jnp.ones(3, bool)))
    1.0
    """
    values, returns = full_precision(values, returns)
    where = mask_like(where, values)

    def variance(x: jax.Array) -> jax.Array:
        centered = jnp.where(where, x - masked_mean(x, where=where), 0.0)
        return masked_mean(jnp.square(centered), where=where)

    spread = variance(returns)
    explained = 1.0 - variance(returns - values) / jnp.where(spread > 0, spread, 1.0)
    return jnp.where(spread > 0, explained, 0.0)
