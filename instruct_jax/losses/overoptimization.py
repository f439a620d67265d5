r"""How the gold score bends as a policy is optimised against a proxy reward.

With :math:`d = \sqrt{KL(\pi \| \pi_{init})}` (Gao, Schulman and Hilton 2022, section 1):

.. math:: R_{bon}(d) = d (\alpha - \beta d), \qquad R_{rl}(d) = d (\alpha - \beta \log d)

Both start at 0 and are linear in alpha and beta, so the least-squares fit has one solution and
needs no starting point.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from instruct_jax.losses._array import full_precision, mask_like, one_precision, visible
from instruct_jax.losses._mesh import on_auto_axes
from instruct_jax.losses.masked import centered, masked_mean

Kind = Literal["bon", "rl"]


class GoldFit(NamedTuple):
    """Coefficients of a gold-score curve and the share of variance they explain; each float[]."""

    alpha: jax.Array
    beta: jax.Array
    r_squared: jax.Array


def _bend(distances: jax.Array, kind: Kind) -> jax.Array:
    """What beta multiplies: d^2 or d log d, 0 at d = 0."""
    if kind == "bon":
        return jnp.square(distances)
    if kind == "rl":
        positive = distances > 0
        return jnp.where(positive, distances * jnp.log(jnp.where(positive, distances, 1.0)), 0.0)
    raise ValueError(f"kind must be 'bon' or 'rl', got {kind!r}")


def gold_score(
    distances: chex.Array, alpha: chex.Numeric, beta: chex.Numeric, *, kind: Kind
) -> jax.Array:
    r"""Gold score at a distance from the initial policy.

    .. math:: d (\alpha - \beta d) \quad \text{or} \quad d (\alpha - \beta \log d)

    Source: Gao et al. 2022, section 1 (the two forms are fits to their measurements).

    Args:
      distances: float[...], square roots of KL divergences.
      alpha: float[], the slope that the curve would have without beta. Of "bon" it is the slope at
        0; the slope of "rl" grows without bound towards 0.
      beta: float[], how strongly it bends.
      kind: "bon" for best-of-n, "rl" for reinforcement learning.

    Returns:
      float[...], in the units of the gold reward, relative to the initial policy: 0 at distance 0.

    Raises:
      ValueError: an unknown kind.

    >>> print(gold_score(jnp.array([0.0, 1.0, 2.0]), 1.0, 0.25, kind="bon"))
    [0.   0.75 1.  ]
    """
    (distances,) = full_precision(distances)
    alpha, beta = full_precision(alpha, beta, rank=0)
    distances, alpha, beta = one_precision(distances, alpha, beta)
    return alpha * distances - beta * _bend(distances, kind)


def peak_distance(alpha: chex.Numeric, beta: chex.Numeric, *, kind: Kind) -> jax.Array:
    r"""Distance at which the gold score is highest.

    .. math:: d^*_{bon} = \max\Big(0, \frac{\alpha}{2 \beta}\Big), \qquad
              d^*_{rl} = \exp(\alpha / \beta - 1)

    Args:
      alpha: float[].
      beta: float[].
      kind: "bon" or "rl".

    Returns:
      float[]; 0 for a curve that only falls, infinite for one that never bends down (beta below 0,
      or 0 and alpha above it).

    Raises:
      ValueError: an unknown kind.

    >>> print(peak_distance(jnp.float32(1.0), jnp.float32(0.25), kind="bon"))
    2.0
    """
    alpha, beta = full_precision(alpha, beta, rank=0)
    bends = beta > 0
    # An alpha behind the select would overflow exp where beta is not positive.
    ratio = jnp.where(bends, alpha, 0.0) / jnp.where(bends, beta, 1.0)
    if kind == "bon":
        peak = jnp.maximum(ratio / 2.0, 0.0)
    elif kind == "rl":
        peak = jnp.exp(ratio - 1.0)
    else:
        raise ValueError(f"kind must be 'bon' or 'rl', got {kind!r}")
    endless = jnp.where((beta == 0) & (alpha <= 0), 0.0, jnp.inf)
    return jnp.where(bends, peak, endless)


def fit_gold_scores(
    distances: chex.Array, gold: chex.Array, *, kind: Kind, where: chex.Array | None = None
) -> GoldFit:
    """Least-squares fit of alpha and beta to measured gold scores.

    Args:
      distances: float[N], square roots of KL divergences.
      gold: float[N], gold scores, 0 for the initial policy.
      kind: "bon" or "rl".
      where: bool[N], False on points to leave out.

    Returns:
      GoldFit. Fewer than two distinct distances give the solution of least norm.

    Raises:
      ValueError: an unknown kind.

    >>> d = jnp.linspace(0.0, 4.0, 9)
    >>> fit = fit_gold_scores(d, gold_score(d, 1.0, 0.25, kind="rl"), kind="rl")
    >>> print(f"{fit.alpha:.3f} {fit.beta:.3f} {fit.r_squared:.3f}")
    1.000 0.250 1.000
    """
    distances, gold = full_precision(distances, gold, rank=1)
    where = mask_like(where, gold)
    return on_auto_axes(partial(_fit, kind=kind), distances, gold, where)


def _fit(distances: jax.Array, gold: jax.Array, where: jax.Array, *, kind: Kind) -> GoldFit:
    distances, gold = visible(where, distances, gold)
    if not gold.size:
        distances, gold, where = (jnp.pad(x, (0, 1)) for x in (distances, gold, where))
    design = jnp.stack([distances, -_bend(distances, kind)], axis=1)
    (alpha, beta), *_ = jnp.linalg.lstsq(design, gold)
    residual = masked_mean(
        jnp.square(gold - gold_score(distances, alpha, beta, kind=kind)), where=where
    )
    variance = masked_mean(jnp.square(centered(gold, where)[1]), where=where)
    spread = variance > 0
    r_squared = jnp.where(spread, 1.0 - residual / jnp.where(spread, variance, 1.0), 0.0)
    return GoldFit(alpha, beta, r_squared)
