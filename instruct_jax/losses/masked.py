"""Reductions over the valid entries of padded arrays.

Everything here reads `where`: bool, the shape of `x`, True on valid entries. Masked entries are
*selected* away, never multiplied by zero, so a NaN in the padding reaches neither the value nor
the gradient. A mean over nothing is 0, with gradient 0.

A batch that is split over micro-batches or devices has one exact mean, the sum of all sums over
the sum of all counts. A mean of means is another number as soon as the parts hold different
numbers of tokens. `sum_and_count` and `loss_sum_and_count` return the two parts for that reason.
"""

from __future__ import annotations

from typing import Literal

import chex
import jax
import jax.numpy as jnp

from instruct_jax.losses._array import full_precision, mask_like

Reduction = Literal["token_mean", "seq_mean", "seq_sum_const"]


def sum_and_count(
    x: chex.Array, *, where: chex.Array, axis: int | tuple[int, ...] | None = None
) -> tuple[jax.Array, jax.Array]:
    """Sum of the valid entries and how many they are.

    Args:
      x: float[...].
      where: bool[...], the shape of `x`.
      axis: the axes to reduce; None reduces all.

    Returns:
      The sum and the count, both float, with `axis` removed. Add the pairs of all micro-batches,
      then divide once.

    >>> batches = [jnp.full(100, 0.5), jnp.full(900, 0.3)]
    >>> parts = [sum_and_count(x, where=jnp.ones(x.shape, bool)) for x in batches]
    >>> total, count = (sum(p) for p in zip(*parts))
    >>> print(f"{total / count:.2f}")
    0.32
    """
    (x,) = full_precision(x)
    where = mask_like(where, x)
    total = jnp.sum(jnp.where(where, x, 0.0), axis=axis)
    return total, jnp.sum(where, axis=axis, dtype=x.dtype)


def masked_mean(
    x: chex.Array, *, where: chex.Array, axis: int | tuple[int, ...] | None = None
) -> jax.Array:
    r"""Mean of the valid entries; 0 where there are none.

    .. math:: \frac{\sum_i m_i x_i}{\max(1, \sum_i m_i)}

    Args:
      x: float[...].
      where: bool[...], the shape of `x`.
      axis: the axes to reduce; None reduces all.

    Returns:
      float with `axis` removed.

    >>> print(masked_mean(jnp.array([1.0, 2.0, jnp.nan]), where=jnp.array([True, True, False])))
    1.5
    """
    total, count = sum_and_count(x, where=where, axis=axis)
    return total / jnp.maximum(count, 1.0)


def centered(
    x: jax.Array, where: jax.Array, axis: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """The mean, with `axis` kept at size 1, and the deviations from it, 0 where masked.

    Of entries that are all equal the mean is that number to the bit and the deviations are 0: a sum
    of n copies divided by n need not be, and whoever divides by a deviation would divide rounding
    by rounding.
    """
    mean = masked_mean(x, where=where, axis=axis)
    low = jnp.min(jnp.where(where, x, jnp.inf), axis=axis, initial=jnp.inf)
    high = jnp.max(jnp.where(where, x, -jnp.inf), axis=axis, initial=-jnp.inf)
    equal = (low == high) & jnp.isfinite(low)
    mean += jax.lax.stop_gradient(jnp.where(equal, jnp.where(equal, low, 0.0) - mean, 0.0))
    mean = jnp.expand_dims(mean, tuple(range(x.ndim)) if axis is None else axis)
    # The select comes before any square, so that padding stays out of the gradient as well.
    return mean, jnp.where(where, x - mean, 0.0)


def not_overflown(scale: jax.Array) -> jax.Array:
    """`scale`, NaN where it is infinite: what is divided by that would be 0, as if there were
    nothing to learn, and an update of NaN is noticed.
    """
    return jnp.where(jnp.isinf(scale), jnp.nan, scale)


def masked_whiten(x: chex.Array, *, where: chex.Array, shift_mean: bool = True) -> jax.Array:
    r"""Scales the valid entries to unit variance and, with `shift_mean`, to mean zero.

    .. math:: w = (x - \mu) / \sqrt{\sigma^2 + 10^{-8}}, \qquad w \mathrel{+}= \mu
              \text{ unless shift\_mean}

    The mean and the biased variance run over all valid entries of the array that is passed. For
    whitening over a whole rollout, pass the whole rollout.

    Source: Ziegler et al. 2019, code (`utils/core.py`, `whiten`); Huang et al. 2023, "The N
    implementation details of RLHF with PPO", detail 9 (the variance is biased).

    Args:
      x: float[...].
      where: bool[...], the shape of `x`.
      shift_mean: False keeps the mean, as for rewards, whose sign carries meaning.

    Returns:
      float[...], 0 on masked entries, and everywhere (or the mean) where the valid ones are all
      equal; NaN where the variance is too large for the type (of entries over about 1e19). The
      gradient flows through the statistics; stop it outside when it should not.

    >>> x = jnp.array([[1.0, 3.0, 99.0]])
    >>> print(masked_whiten(x, where=jnp.array([[True, True, False]])))
    [[-1.  1.  0.]]
    """
    (x,) = full_precision(x)
    where = mask_like(where, x)
    mean, deviations = centered(x, where)
    variance = not_overflown(masked_mean(jnp.square(deviations), where=where))
    white = deviations * jax.lax.rsqrt(variance + 1e-8)
    return jnp.where(where, white if shift_mean else white + mean, 0.0)


def loss_sum_and_count(
    losses: chex.Array,
    *,
    where: chex.Array,
    reduction: Reduction = "token_mean",
    length: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    r"""Numerator and denominator of a batch loss, to be added over micro-batches.

    ================  ==================================  ==========================
    reduction         sum                                 count
    ================  ==================================  ==========================
    `token_mean`      :math:`\sum_{bt} m_{bt} x_{bt}`     number of valid tokens
    `seq_mean`        :math:`\sum_b \bar x_b`             rows with a valid token
    `seq_sum_const`   :math:`\sum_{bt} m_{bt} x_{bt}/L`   rows with a valid token
    ================  ==================================  ==========================

    Length bias: `seq_mean` gives a token of a short response more weight than one of a long
    response, so a policy is pushed less per token for being wrong at length. The other two weigh
    all tokens of a batch alike, hence long responses more. `token_mean` divides by the number of
    tokens, so that what a token weighs depends on how long the other responses of its batch are;
    `seq_sum_const` divides by the number of responses times a constant `length`, and it does not
    (Liu et al. 2025, "Understanding R1-Zero-like training", section 3.1).

    Args:
      losses: float[B, T], one loss a token.
      where: bool[B, T].
      reduction: see the table.
      length: L of `seq_sum_const`; None takes T. Pass it when T depends on the batch.

    Returns:
      Two float[].

    Raises:
      ValueError: an unknown reduction.

    >>> x, m = jnp.array([[1.0, 1.0], [4.0, 0.0]]), jnp.array([[True, True], [True, False]])
    >>> for mode in ("token_mean", "seq_mean", "seq_sum_const"):
    ...     total, count = loss_sum_and_count(x, where=m, reduction=mode)
    ...     print(mode, total / count)
    token_mean 2.0
    seq_mean 2.5
    seq_sum_const 1.5
    """
    (losses,) = full_precision(losses, rank=2)
    where = mask_like(where, losses)
    if reduction == "token_mean":
        return sum_and_count(losses, where=where)
    rows = jnp.sum(jnp.any(where, axis=-1), dtype=losses.dtype)
    if reduction == "seq_mean":
        return jnp.sum(masked_mean(losses, where=where, axis=-1)), rows
    if reduction == "seq_sum_const":
        total, _ = sum_and_count(losses, where=where)
        return total / (losses.shape[-1] if length is None else length), rows
    raise ValueError(
        f"reduction must be 'token_mean', 'seq_mean' or 'seq_sum_const', got {reduction!r}"
    )


def reduce_loss(
    losses: chex.Array,
    *,
    where: chex.Array,
    reduction: Reduction = "token_mean",
    length: int | None = None,
) -> jax.Array:
    """The batch loss of `loss_sum_and_count`: sum over count, 0 for an empty batch.

    Right for a batch that is whole. Over micro-batches add sums and counts instead.

    Args:
      losses: float[B, T], one loss a token.
      where: bool[B, T].
      reduction: `token_mean`, `seq_mean` or `seq_sum_const`.
      length: the constant of `seq_sum_const`; None takes T.

    Returns:
      float[].

    >>> print(reduce_loss(jnp.array([[1.0, 5.0]]), where=jnp.array([[True, False]])))
    1.0
    """
    total, count = loss_sum_and_count(losses, where=where, reduction=reduction, length=length)
    return total / jnp.maximum(count, 1.0)
