r"""Weights that correct for a sampler whose probabilities are not quite the trainer's.

A sampler in other precision or with other kernels draws from another distribution than the one
whose `old_log_probs` the policy's ratio uses. The policy loss is multiplied by these weights.
"""

from __future__ import annotations

from typing import Literal

import chex
import jax
import jax.numpy as jnp

from instruct_jax.losses._array import (
    bounded_exp,
    full_precision,
    keep,
    visible,
)


def sampler_mismatch_weights(
    log_probs: chex.Array,
    sampler_log_probs: chex.Array,
    *,
    where: chex.Array | None = None,
    level: Literal["token", "sequence"] = "token",
    outside: Literal["truncate", "mask"] = "truncate",
    low: float = 0.0,
    high: float = 2.0,
) -> jax.Array:
    r"""Importance weights of trainer over sampler, held between two bounds.

    .. math:: \rho_t = \frac{\pi_{trainer}(y_t)}{\pi_{sampler}(y_t)} \quad \text{or} \quad
              \rho = \prod_t \rho_t, \qquad
              w = \min(\max(\rho, l), h) \quad \text{or} \quad w = \rho\, 1[l \le \rho \le h]

    "token" leaves a bias that grows with the length and has little variance; "sequence" has no bias
    inside of its bounds and a variance that grows with the length. "truncate" keeps every token;
    "mask" drops what the trainer would hardly have drawn, or the whole response with it.

    Source: "truncate", Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy
    RL training" (TIS, h = 2, no lower bound). "mask", Liu et al. 2025, "When speed kills
    stability" (MIS, on sequences); with two bounds on tokens, Ling team 2025 (IcePop).

    Stop-gradient on the result. The log-ratio, of a token or of a response, is clamped to ±20.
    Not done: no normalisation to mean 1.

    Args:
      log_probs: float[B, R], of the rollout policy, by the training forward (the old ones). With
        "token" the shape is free.
      sampler_log_probs: float[B, R], of the same tokens, as the sampler reports them.
      where: bool[B, R], the response's tokens; elsewhere the weight is 0. None counts all.
      level: whose ratio it is; that of a sequence is the weight of each of its tokens.
      outside: what becomes of a ratio outside of the bounds.
      low: l, not negative.
      high: h, which bounds the variance.

    Returns:
      float[B, R].

    Raises:
      ValueError: an unknown `level` or `outside`, or bounds that are not 0 <= low <= high.

    >>> old, sampler = jnp.array([[0.0, 0.0]]), jnp.array([[0.0, -3.0]])
    >>> print(sampler_mismatch_weights(old, sampler))
    [[1. 2.]]
    >>> print(sampler_mismatch_weights(old, sampler, outside="mask"))
    [[1. 0.]]
    """
    if not 0.0 <= low <= high:
        raise ValueError(f"expected 0 <= low <= high, got low {low} and high {high}")
    rank = 2 if level == "sequence" else None
    arrays = full_precision(log_probs, sampler_log_probs, rank=rank)
    log_probs, sampler_log_probs = visible(where, *arrays)
    log_ratio = log_probs - sampler_log_probs
    if level == "sequence":
        log_ratio = jnp.broadcast_to(jnp.sum(log_ratio, axis=1, keepdims=True), log_ratio.shape)
    elif level != "token":
        raise ValueError(f"level must be 'token' or 'sequence', got {level!r}")
    ratio = bounded_exp(log_ratio)
    if outside == "truncate":
        weights = jnp.clip(ratio, low, high)
    elif outside == "mask":
        weights = jnp.where((ratio >= low) & (ratio <= high), ratio, 0.0)
    else:
        raise ValueError(f"outside must be 'truncate' or 'mask', got {outside!r}")
    return jax.lax.stop_gradient(keep(where, weights))
