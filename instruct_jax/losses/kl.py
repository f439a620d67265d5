"""KL divergence: estimates from samples, that of best-of-n, and controllers of its coefficient.

The KL of a response is the sum over its tokens; all logarithms are natural.
"""

from __future__ import annotations

from typing import Literal

import chex
import jax
import jax.numpy as jnp

from instruct_jax.losses._array import LOG_RATIO_LIMIT, full_precision, visible


def kl_estimate(
    log_probs: chex.Array,
    ref_log_probs: chex.Array,
    *,
    where: chex.Array | None = None,
    kind: Literal["k1", "k2", "k3"] = "k1",
) -> jax.Array:
    r"""Estimate, from samples of the policy, of KL(policy || reference), one value a token.

    With :math:`d = \log \pi - \log \pi_{ref}`:

    .. math:: k_1 = d, \qquad k_2 = d^2 / 2, \qquad k_3 = e^{-d} - 1 + d

    k1 and k3 are unbiased, k2 is not; k2 and k3 are never negative. As *losses* they differ:
    over samples of the policy the gradient of k1 has mean 0, that of k2 has the mean of the true
    KL gradient, and that of k3 has the mean of the gradient of KL(reference || policy). Use k1
    in the reward, k3 to watch.

    Source: Schulman 2020, "Approximating KL divergence"; the gradients, Tang and Munos 2025,
    "On a few pitfalls in KL divergence gradient estimation for RL".

    Not done: no reduction, no stop-gradient. In k3, d is not let below -20: the estimate stays at
    4.9e8 there and its gradient is 0.

    Args:
      log_probs: float[...], under the policy that drew the tokens.
      ref_log_probs: float[...], the same tokens under the reference.
      where: bool[...], the tokens that count; elsewhere the entry is 0. None counts all.
      kind: "k1", "k2" or "k3".

    Returns:
      float[...].

    Raises:
      ValueError: an unknown kind.

    >>> lp, ref = jnp.array([-1.0]), jnp.array([-1.1])
    >>> print([f"{kl_estimate(lp, ref, kind=k)[0]:.6f}" for k in ("k1", "k2", "k3")])
    ['0.100000', '0.005000', '0.004837']
    """
    log_probs, ref_log_probs = visible(where, *full_precision(log_probs, ref_log_probs))
    log_ratio = log_probs - ref_log_probs
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * jnp.square(log_ratio)
    if kind == "k3":
        # Clamped as a whole: with the exponent alone, the gradient beyond would be that of +d.
        log_ratio = jnp.maximum(log_ratio, -LOG_RATIO_LIMIT)
        # expm1 where its argument is small: exp(-d) - 1 would lose every digit of d^2 / 2.
        return jnp.expm1(-log_ratio) + log_ratio
    raise ValueError(f"kind must be 'k1', 'k2' or 'k3', got {kind!r}")


def best_of_n_kl(n: chex.Numeric) -> jax.Array:
    r"""KL of the best of n samples from the policy that drew them.

    .. math:: \log n - \frac{n - 1}{n}

    Exact for continuous scores without ties, an upper bound otherwise (Beirami et al. 2024).

    Source: Stiennon et al. 2020, appendix G.3; Gao et al. 2022, section 2.

    Args:
      n: float[...] or int[...], at least 1.

    Returns:
      float[...].

    >>> print([f"{best_of_n_kl(n):.4f}" for n in (1, 4, 64)])
    ['0.0000', '0.6363', '3.1745']
    """
    n = jnp.asarray(n)
    (n,) = full_precision(n if jnp.issubdtype(n.dtype, jnp.floating) else n.astype(float))
    return jnp.log(n) - (n - 1.0) / n


def fixed_kl_update(
    kl_coef: chex.Numeric,
    kl: chex.Numeric,
    *,
    target: float | None = None,
    horizon: float | None = None,
    batch_size: int | None = None,
) -> jax.Array:
    """The KL coefficient as it was; takes what `adaptive_kl_update` takes, to stand in for it.

    Source: Ouyang et al. 2022, appendix C.4 (beta = 0.02 throughout).

    Args:
      kl_coef: beta, float[].
      kl: float[], ignored.
      target: ignored.
      horizon: ignored.
      batch_size: ignored.

    Returns:
      float[].

    >>> print(fixed_kl_update(jnp.float32(0.02), jnp.float32(30.0)))
    0.02
    """
    del target, horizon, batch_size
    kl_coef, _ = full_precision(kl_coef, kl, rank=0)
    return kl_coef


def adaptive_kl_update(
    kl_coef: chex.Numeric,
    kl: chex.Numeric,
    *,
    target: float,
    horizon: float,
    batch_size: int,
) -> jax.Array:
    r"""Proportional controller in log-space that steers the KL to a target.

    .. math:: e = \mathrm{clip}(KL / KL_{target} - 1, -0.2, 0.2), \qquad
              \beta \leftarrow \beta (1 + e \cdot n / horizon)

    Source: Ziegler et al. 2019, section 2.2, with the horizon of their code.

    Args:
      kl_coef: beta, float[].
      kl: float[], mean over the rollout of the KL summed over a response's tokens.
      target: the KL wanted, in nats a response.
      horizon: episodes over which a full error changes beta by 20 %.
      batch_size: n, episodes since the last update.

    Returns:
      float[]; `kl_coef` itself where `kl` is not finite, which says nothing of where the policy is.

    >>> beta = adaptive_kl_update(jnp.float32(.15), jnp.float32(12.), target=6., horizon=1e4,
    ...                           batch_size=512)
    >>> print(f"{beta:.6f}")
    0.151536
    """
    kl_coef, kl = full_precision(kl_coef, kl, rank=0)
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return jnp.where(jnp.isfinite(kl), kl_coef * (1.0 + error * batch_size / horizon), kl_coef)
