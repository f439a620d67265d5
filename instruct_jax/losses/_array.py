"""Checks, casts and masks that every loss starts with.

A loss computes in float32 or, where an input is float64, in float64. Integers are refused: a reward
of 0.7 stored in an integer array is 0, and nothing downstream would notice.

A mask is a select, twice: `visible` puts a harmless number in place of what is hidden before
anything is computed, `keep` puts 0 in place of the result. With the second alone a NaN behind the
mask would still reach the gradient, as 0 * NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to this many nats before `exp`; exp(20) is 4.9e8, far past any clip."""


def full_precision(*arrays: chex.Numeric, rank: int | None = None) -> list[jax.Array]:
    """Casts floats to float32, or to float64 where one of them is float64.

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
    return one_precision(*cast)


def one_precision(*arrays: jax.Array) -> list[jax.Array]:
    """The floats as float64 where one of them is, else as float32; shapes may differ."""
    wide = any(x.dtype == jnp.float64 for x in arrays)
    return [x.astype(jnp.float64 if wide else jnp.float32) for x in arrays]


def scalar(value: chex.Numeric, like: jax.Array) -> jax.Array:
    """A hyper-parameter float[] in the dtype of `like`; any other shape is refused."""
    value = jnp.asarray(value)
    chex.assert_rank(value, 0)
    return value.astype(like.dtype)


def mask_like(where: chex.Array | None, x: jax.Array) -> jax.Array:
    """The mask, checked to be bool and shaped like `x`; for None one that is all True."""
    if where is None:
        return jnp.ones(x.shape, bool)
    mask = jnp.asarray(where)
    chex.assert_type(mask, bool)
    chex.assert_equal_shape([mask, x])
    return mask


def visible(
    where: chex.Array | None, *arrays: jax.Array, rank: int | None = None
) -> Sequence[jax.Array]:
    """The arrays with 0 wherever the mask is False; without a mask they are as they were.

    The mask has the shape of each array's first `rank` axes, by default of all.
    """
    if where is None:
        return arrays
    mask = jnp.asarray(where)
    chex.assert_type(mask, bool)
    for x in arrays:
        chex.assert_shape(mask, x.shape[:rank])
    return [
        jnp.where(jnp.expand_dims(mask, tuple(range(mask.ndim, x.ndim))), x, 0.0) for x in arrays
    ]


def keep(where: chex.Array | None, x: jax.Array) -> jax.Array:
    """The result with 0 wherever the mask is False."""
    return x if where is None else jnp.where(jnp.asarray(where), x, 0.0)


def rows_with_any(where: chex.Array | None) -> jax.Array | None:
    """bool[B], which rows of bool[B, T] have an entry; None of None."""
    return None if where is None else jnp.any(jnp.asarray(where), axis=1)


def token_ids(tokens: chex.Array, columns: int) -> tuple[jax.Array, jax.Array]:
    """int32 ids of any integer type, 0 for those outside of [0, columns), and bool, the others.

    The comparison comes before the cast, because an id can wrap in either direction: 300 columns
    are 44 in int8, and 2**32 + 1 is 1 in int32.
    """
    tokens = jnp.asarray(tokens)
    chex.assert_type(tokens, int)
    last = min(columns - 1, int(jnp.iinfo(tokens.dtype).max))
    known = (tokens >= 0) & (tokens <= last)
    return jnp.where(known, tokens, 0).astype(jnp.int32), known


@jax.custom_vjp
def nan_unless(known: jax.Array, x: jax.Array) -> jax.Array:
    """x, and NaN where not `known`, in value and in gradient.

    A plain select would have gradient 0 there, so that training on an impossible id would show in
    the loss and leave no trace in the parameters. A cotangent of exactly 0 stays 0: that is an
    entry which a mask took out later.
    """
    return jnp.where(known, x, jnp.nan)


def _nan_unless_forward(known: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.where(known, x, jnp.nan), known


def _nan_unless_backward(known: jax.Array, cotangent: jax.Array) -> tuple[None, jax.Array]:
    return None, jnp.where(known | (cotangent == 0), cotangent, jnp.nan)


nan_unless.defvjp(_nan_unless_forward, _nan_unless_backward)


def bounded_exp(log_ratio: jax.Array) -> jax.Array:
    """exp of a log-ratio clamped to ±LOG_RATIO_LIMIT; the gradient is 0 outside of the limits."""
    return jnp.exp(jnp.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
