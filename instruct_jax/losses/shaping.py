r"""Rewards of the tokens and the advantages made of them, with a value model.

One episode is a prompt and one response :math:`y_0 .. y_{R-1}`. `where` is bool[B, R], True on
the response's tokens through the stop token. :math:`V_t` is the value of the state before
:math:`y_t`. The objective, to be maximised, is (Ouyang et al. 2022, eq. 2)

.. math:: E[r(x, y) - \beta \sum_t (\log \pi(y_t) - \log \pi_{ref}(y_t))]
          + \gamma E_{z \sim pretrain}[\log \pi(z)]

The penalty is part of the reward, token by token; the score enters at the last valid token. The
advantages that need no value model are in `group`.
"""

from __future__ import annotations

from typing import Literal

import chex
import jax
import jax.numpy as jnp

from instruct_jax.losses._array import (
    full_precision,
    keep,
    mask_like,
    one_precision,
    rows_with_any,
    scalar,
    visible,
)


def missing_eos_scores(
    scores: chex.Array,
    has_eos: chex.Array,
    *,
    where: chex.Array | None = None,
    rule: Literal["none", "replace", "subtract"] = "none",
    penalty: float = 1.0,
) -> jax.Array:
    """Scores after the rule for responses that ran out of budget without the stop token.

    "none" leaves them (the InstructGPT recipe; the paper states no rule), "replace" sets them to
    `-penalty` (Huang et al. 2024, the TL;DR recipe), "subtract" takes `penalty` off (TRL).

    Args:
      scores: float[B].
      has_eos: bool[B], whether the *response* holds the stop token.
      where: bool[B], the rows that count; elsewhere the result is 0. None counts all.
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
    (scores,) = visible(where, *full_precision(scores, rank=1))
    has_eos = mask_like(has_eos, scores)
    if rule == "none":
        return scores
    if rule == "replace":
        return keep(where, jnp.where(has_eos, scores, -penalty))
    if rule == "subtract":
        return keep(where, jnp.where(has_eos, scores, scores - penalty))
    raise ValueError(f"rule must be 'none', 'replace' or 'subtract', got {rule!r}")


def clip_scores(
    scores: chex.Array, *, where: chex.Array | None = None, limit: float | None = None
) -> jax.Array:
    """Scores clipped to ±limit; None leaves them. Clip before the KL penalty is added.

    Source: DeepSpeed-Chat (`ppo_trainer.py`, ±5).

    Args:
      scores: float[...].
      where: bool[...], the entries that count; elsewhere the result is 0. None counts all.
      limit: a positive number or None.

    Returns:
      float[...].

    >>> print(clip_scores(jnp.array([7.0, -1.0]), limit=5.0))
    [ 5. -1.]
    """
    (scores,) = visible(where, *full_precision(scores))
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
    scores, log_probs, ref_log_probs = one_precision(scores, log_probs, ref_log_probs)
    where = mask_like(where, log_probs)
    chex.assert_equal_shape_prefix([scores, log_probs], 1)
    log_probs, ref_log_probs = visible(where, log_probs, ref_log_probs)
    remaining = jnp.cumsum(where[:, ::-1], axis=1)[:, ::-1]
    is_last = where & (remaining == 1)
    penalty = scalar(kl_coef, log_probs) * (log_probs - ref_log_probs)
    return jnp.where(where, -penalty, 0.0) + jnp.where(is_last, scores[:, None], 0.0)


def generalized_advantages(
    rewards: chex.Array,
    values: chex.Array,
    *,
    where: chex.Array,
    bootstrap: chex.Array | None = None,
    discount: chex.Numeric = 1.0,
    gae_lambda: chex.Numeric = 0.95,
) -> tuple[jax.Array, jax.Array]:
    r"""Generalised advantage estimates and the returns that the value function is fitted to.

    .. math:: \delta_t = R_t + \gamma_t V_{t+1} - V_t, \qquad
              A_t = \delta_t + \gamma_t \lambda_t A_{t+1}, \qquad G_t = A_t + V_t

    Source: Schulman et al. 2016, eq. 16, in reverse recursion. V past the last token is that of the
    state in which the episode was cut off (Pardo et al. 2018, "Time limits in reinforcement
    learning", section 3), and 0 for an episode that has ended.

    A masked entry is passed over: t + 1 means the next *valid* entry. Padding on either side and
    holes (tokens the policy did not write) add no reward, no value and no discount.

    Not done: no whitening, no stop-gradient (the losses stop it).

    Args:
      rewards: float[B, R].
      values: float[B, R], `values[:, t]` is of the state before token t.
      where: bool[B, R].
      bootstrap: float[B], the value of the state after the last valid token of an episode that ran
        out of budget, 0 for one that ended. None is 0 for all: a budget that is part of the task.
      discount: gamma, float[], or float[B, R] for the step from t to the next entry; 0 at an entry
        ends an episode there, so that one row may hold several.
      gae_lambda: lambda, float[] or float[B, R].

    Returns:
      Advantages and returns, float[B, R] each, 0 on masked entries.

    >>> rewards, values = jnp.array([[-.02, .01, 1.]]), jnp.array([[.5, .2, -.1]])
    >>> adv, ret = generalized_advantages(rewards, values, where=jnp.ones((1, 3), bool))
    >>> print(adv.round(5), ret.round(5))
    [[0.39725 0.755   1.1    ]] [[0.89725 0.955   1.     ]]
    """
    rewards, values = full_precision(rewards, values, rank=2)
    where = mask_like(where, rewards)
    # Zeros that live where the rewards do, on a mesh as well.
    last = jnp.sum(rewards[:, :0], axis=1)
    if bootstrap is not None:
        last, bootstrap = one_precision(*full_precision(last, bootstrap, rank=1))
        last += bootstrap
    rewards, values, last = one_precision(rewards, values, last)
    discount, gae_lambda = (_of_steps(x, rewards) for x in (discount, gae_lambda))
    rewards, values, discount, gae_lambda = visible(where, rewards, values, discount, gae_lambda)
    (last,) = visible(rows_with_any(where), last)

    def step(carry, inputs):
        next_value, next_advantage = carry
        reward, value, gamma, lam, valid = inputs
        delta = reward + gamma * next_value - value
        advantage = delta + gamma * lam * next_advantage
        carry = jnp.where(valid, value, next_value), jnp.where(valid, advantage, next_advantage)
        return carry, advantage

    by_time = jax.tree.map(jnp.transpose, (rewards, values, discount, gae_lambda, where))
    _, advantages = jax.lax.scan(step, (last, jnp.zeros_like(last)), by_time, reverse=True)
    advantages = jnp.where(where, advantages.T, 0.0)
    return advantages, jnp.where(where, advantages + values, 0.0)


def _of_steps(x: chex.Numeric, rewards: jax.Array) -> jax.Array:
    """A number float[] for all entries float[B, R], or one for each."""
    x = jnp.asarray(x)
    if x.ndim:
        chex.assert_type(x, float)
        chex.assert_equal_shape([x, rewards])
        return x.astype(rewards.dtype)
    return jnp.broadcast_to(x.astype(rewards.dtype), rewards.shape)
