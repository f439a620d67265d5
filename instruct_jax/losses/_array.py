"""Checks and casts that every loss starts with.

A loss computes in float32 or, where its inputs are float64, in float64. Integers are refused:
a reward of 0.7 stored in an integer array is 0, and nothing downstream would notice.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to this many nats before `exp`; exp(20) is 4.9e8, far past any clip."""


def full_precision(*arrays: chex.Numeric, rank: int | None = None) -> list[jax.Array]:
    """Casts half-precision floats to float32, leaves float32 and float64 alone.

    Args:
      *arrays: float[...], all of one shape.
      rank: the rank all of them must have; None accepts any.

    Raises:
      AssertionError: a non-float dtype, two different shapes, or another rank.
    """
    cast = [jnp.asarray(x) for x in arrays]
    chex.assert_type(cast, float)
    chex.assert_equal_shape(cast)
    if rank is not None:
        chex.assert_rank(cast, rank)
    return [x if x.dtype == jnp.float64 else x.astype(jnp.float32) for x in cast]


def mask_like(where: chex.Array, x: jax.Array) -> jax.Array:
    """Returns the mask as an array after checking that it is bool and shaped like `x`."""
    mask = jnp.asarray(where)
    chex.assert_type(mask, bool)
    chex.assert_equal_shape([mask, x])
    return mask


def bounded_exp(log_ratio: jax.Array) -> jax.Array:
    """exp of a log-ratio clamped to ±LOG_RATIO_LIMIT; the gradient is 0 outside of the limits."""
    return jnp.exp(jnp.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
