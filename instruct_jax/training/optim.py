"""Optimizers and schedules, put together of optax's parts, and the average of the weights.

Every optimizer is: clip the gradient by the norm of all leaves together, scale it (which is where
they differ), add the decay of matrices, multiply by the rate.

    adamw       m_hat / (sqrt(v_hat) + eps)                      Loshchilov and Hutter 2019
    adafactor   g / sqrt(v), of a matrix only the means of v by row and by column are kept, cut to a
                root mean square                                 Shazeer and Stern 2018
    lion        sign(b1 m + (1 - b1) g)                          Chen et al. 2023
    muon        the matrices of the layers: momentum with its singular values set to about 1, times
                rms sqrt(max(D_in, D_out)); the rest: adamw      Jordan 2024, Liu et al. 2025

Layers are stacked, [L, D_in, D_out], and what is said of a matrix is meant of each layer's own.
A schedule is a function of the optimizer's own count of updates, never of the data's: a skipped
update does not move it (T33).
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike
from optax.contrib import MuonDimensionNumbers, scale_by_muon

Schedule = Callable[[ArrayLike], Array]
Shape = Literal["cosine", "linear", "constant", "warmup_stable_decay"]

# Layers are stacked, so a bias is [L, D] and rank does not tell it from a matrix: its name does.
UNDECAYED = ("bias", "scale")
# The parameters whose first axis counts layers are below this name.
STACK = "layers"


def schedule(
    peak: float,
    shape: Shape = "constant",
    *,
    steps: int = 0,
    warmup: int = 0,
    start: float | None = None,
    final: float = 0.1,
    decay: float = 0.2,
) -> Schedule:
    """The rate lr(s) of update s, from 0.

    `warmup` updates rise linearly from `start` (in parts of the peak; None: as if from 0 one update
    earlier, 1 / (warmup + 1)) to the peak, at s = warmup. From there, with S = steps - warmup and s
    counted anew, in parts of the peak, and constant after S:

        cosine                f + (1 - f) (1 + cos(pi s / S)) / 2          (SFT-2), f = `final`
        linear                1 - (1 - f) s / S
        constant              1                                            (PPO-3)
        warmup_stable_decay   1, and over the last `decay` of all `steps` linear to f
                              (Hu et al. 2024, Haegele et al. 2024)
    """
    left = max(steps - warmup, 1)
    if shape == "cosine":
        after: Any = optax.cosine_decay_schedule(peak, left, alpha=final)
    elif shape == "linear":
        after = optax.linear_schedule(peak, peak * final, left)
    elif shape == "constant":
        after = optax.constant_schedule(peak)
    else:
        falling = min(max(1, round(decay * steps)), left)
        after = optax.linear_schedule(peak, peak * final, falling, left - falling)
    if warmup:
        first = peak / (warmup + 1) if start is None else peak * start
        rise = optax.linear_schedule(first, peak, warmup)
        after = optax.join_schedules([rise, after], [warmup])

    def rate(count: ArrayLike) -> Array:
        with jax.numpy_dtype_promotion("standard"):  # optax divides a count by a count
            return jnp.asarray(after(jnp.asarray(count)), jnp.float32)

    return rate


def is_matrix(params: Any) -> Any:
    """True for the leaves that weight decay applies to: all but biases and norm scales."""

    def decayed(path: tuple[Any, ...], leaf: Array) -> bool:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return leaf.ndim >= 2 and name not in UNDECAYED

    return jax.tree_util.tree_map_with_path(decayed, params)


def _in_stack(path: tuple[Any, ...]) -> bool:
    return any(getattr(key, "key", None) == STACK for key in path)


def _labels(of: Callable[[tuple[Any, ...], Array], str]) -> Callable[[Any], Any]:
    return lambda params: jax.tree_util.tree_map_with_path(of, params)


def adamw(
    rate: Schedule | float,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    tf_style: bool = False,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
) -> optax.GradientTransformation:
    """AdamW; `tf_style` is the form of TensorFlow, and so of the 2019 results (JAX-6)."""
    return _descent(_adam(b1, b2, eps, tf_style), rate, weight_decay, clip)


def adafactor(
    rate: Schedule | float,
    *,
    decay_rate: float = 0.8,
    clip_rms: float = 1.0,
    relative: bool = True,
    min_factored: int = 128,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
) -> optax.GradientTransformation:
    """Adafactor without momentum: v of an update t decays by 1 - t^-decay_rate, an update is cut to
    a root mean square of `clip_rms`, and with `relative` it counts in parts of the parameter's own
    (0.001 at least). A matrix of a side shorter than `min_factored` has its v whole.
    """
    parts = [
        optax.scale_by_factored_rms(decay_rate=decay_rate, min_dim_size_to_factor=min_factored),
        optax.clip_by_block_rms(clip_rms),
    ]
    if relative:
        parts.append(optax.scale_by_param_block_rms())
    return _descent(_each_layer(optax.chain(*parts)), rate, weight_decay, clip)


def lion(
    rate: Schedule | float,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
) -> optax.GradientTransformation:
    """Lion; its rate is usually a third to a tenth of Adam's, its decay as much larger."""
    return _descent(optax.scale_by_lion(b1=b1, b2=b2), rate, weight_decay, clip)


def muon(
    rate: Schedule | float,
    *,
    momentum: float = 0.95,
    iterations: int = 5,
    rms: float = 0.2,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    tf_style: bool = False,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
) -> optax.GradientTransformation:
    """Muon of each layer's matrices (adapters' too), of tables, heads, biases and norms AdamW.

    An orthogonal update has elements of root mean square `rms` after scaling, Adam's being about
    0.2: so one rate serves both (Liu et al. 2025, section 2.2).
    """

    def dimensions(updates: Any) -> Any:
        return jax.tree.map(lambda _: MuonDimensionNumbers(-2, -1), updates)

    def sized(updates: Any, params: Any) -> Any:
        del params
        return jax.tree.map(lambda u: (rms * max(u.shape[-2:]) ** 0.5) * u, updates)

    orthogonal = optax.chain(
        scale_by_muon(beta=momentum, ns_steps=iterations, weight_dimension_numbers=dimensions),
        optax.stateless(sized),
    )
    scale = optax.partition(
        {"muon": orthogonal, "adam": _adam(b1, b2, eps, tf_style)},
        _labels(lambda path, leaf: "muon" if leaf.ndim == 3 and _in_stack(path) else "adam"),
    )
    return _descent(scale, rate, weight_decay, clip)


def _adam(b1: float, b2: float, eps: float, tf_style: bool) -> optax.GradientTransformation:
    make = scale_by_adam_tf_style if tf_style else optax.scale_by_adam
    return make(b1=b1, b2=b2, eps=eps)


def _each_layer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx`, which looks at whole leaves, of every layer of the stack by itself."""

    def init(params: Any) -> Any:
        return jax.vmap(tx.init)(params) if jax.tree.leaves(params) else tx.init(params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if not jax.tree.leaves(updates):
            return tx.update(updates, state, params)
        return jax.vmap(tx.update)(updates, state, params)

    return optax.partition(
        {"layers": optax.GradientTransformation(init, update), "others": tx},
        _labels(lambda path, leaf: "layers" if _in_stack(path) else "others"),
    )


def _descent(
    scale: optax.GradientTransformation,
    rate: Schedule | float,
    weight_decay: float,
    clip: float | None,
) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        scale,
        optax.add_decayed_weights(weight_decay, mask=is_matrix)
        if weight_decay
        else optax.identity(),
        optax.scale_by_learning_rate(rate),
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
