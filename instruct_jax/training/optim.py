"""Schedules, Adam in both of its forms, decoupled weight decay, and the average of the weights.

A schedule is a function of the optimizer's own count of updates, never of the data's: a skipped
update does not move it (T33).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

Schedule = Callable[[ArrayLike], Array]

# Layers are stacked, so a bias is [L, D] and rank does not tell it from a matrix: its name does.
UNDECAYED = ("bias", "scale")


def cosine_schedule(peak: float, *, steps: int, final: float = 0.1, warmup: int = 0) -> Schedule:
    """lr(s) = peak * (final + (1 - final) * (1 + cos(pi * s / S)) / 2), constant after S (SFT-2).

    With warm-up, `warmup` updates rise linearly to the peak first, and S = steps - warmup counts
    from there.
    """

    def schedule(count: ArrayLike) -> Array:
        s = jnp.asarray(count, jnp.float32)
        rise = jnp.minimum(1.0, (s + 1.0) / (warmup + 1.0))
        progress = jnp.clip((s - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        return peak * rise * (final + (1.0 - final) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress)))

    return schedule


def warmup_constant_schedule(peak: float, *, warmup: int, start: float = 0.1) -> Schedule:
    """lr(i) = peak * min(1, start + (1 - start) * i / warmup) (PPO-3)."""

    def schedule(count: ArrayLike) -> Array:
        progress = jnp.asarray(count, jnp.float32) / max(warmup, 1)
        fraction = start + (1.0 - start) * progress if warmup else jnp.float32(1.0)
        return peak * jnp.minimum(1.0, fraction)

    return schedule


def is_matrix(params: Any) -> Any:
    """True for the leaves that weight decay applies to: all but biases and norm scales."""

    def decayed(path: tuple[Any, ...], leaf: Array) -> bool:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return leaf.ndim >= 2 and name not in UNDECAYED

    return jax.tree_util.tree_map_with_path(decayed, params)


def adamw(
    schedule: Schedule | float,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
) -> optax.GradientTransformation:
    """Clip by the global norm, Adam m_hat / (sqrt(v_hat) + eps), decay of matrices, schedule."""
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    return _descent(adam, schedule, weight_decay=weight_decay, clip=clip)


def adam_tf_style(
    schedule: Schedule | float,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
) -> optax.GradientTransformation:
    """`adamw` with Adam in TensorFlow's form, which the 2019 results were made with (JAX-6)."""
    adam = scale_by_adam_tf_style(b1=b1, b2=b2, eps=eps)
    return _descent(adam, schedule, weight_decay=weight_decay, clip=clip)


def _descent(
    adam: optax.GradientTransformation,
    schedule: Schedule | float,
    *,
    weight_decay: float,
    clip: float | None,
) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        adam,
        optax.add_decayed_weights(weight_decay, mask=is_matrix)
        if weight_decay
        else optax.identity(),
        optax.scale_by_learning_rate(schedule),
    )


class AdamState(NamedTuple):
    """count int32[]; mu and nu, the first and second moments, shaped like the parameters."""

    count: Array
    mu: Any
    nu: Any


def scale_by_adam_tf_style(*, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam as TensorFlow computes it: eps is added before the bias correction of v.

    m / (sqrt(v) + eps) * sqrt(1 - b2^t) / (1 - b1^t)
        = m_hat / (sqrt(v_hat) + eps / sqrt(1 - b2^t)):
    the first updates are damped by an eps up to 1 / sqrt(1 - b2) times as large.
    """

    def init(params: Any) -> AdamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return AdamState(jnp.zeros([], jnp.int32), zeros, jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AdamState]:
        del params
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1.0 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1.0 - b2) * jnp.square(g), state.nu, updates)
        t = count.astype(jnp.float32)
        correction = jnp.sqrt(1.0 - b2**t) / (1.0 - b1**t)
        updates = jax.tree.map(
            lambda m, v: m / (jnp.sqrt(v) + eps) * correction.astype(m.dtype), mu, nu
        )
        return updates, AdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def ema_update(ema: Any, params: Any, decay: float) -> Any:
    """ema <- decay * ema + (1 - decay) * params, in float32 (PPO-14, NUM-2)."""
    return jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p.astype(jnp.float32), ema, params)
