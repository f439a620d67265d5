"""Low-rank adapters: LoRA (Hu et al. 2021); over a quantised base, QLoRA (Dettmers et al. 2023).

    y = x W + (alpha / r) (x A) B       A [L, D_in, r] uniform in +-1/sqrt(D_in), B [L, r, D_out] 0

W is frozen; only A and B are trained, and for a scalar model its head. An adapter is a nested dict
that mirrors the parameters and holds just those leaves (`kernel_lora_a`, `kernel_lora_b` beside
where the base has `kernel`, and `head`), so whatever is made of it, the training state, Adam's
moments, the average, a checkpoint, is small by construction:

    params = join(base, adapter)        the adapted model, for the functions of `adapt(model, c)`
    params = join(base, {})             the adapter off: the reference policy, with no second copy
    params = merge(base, adapter, c)    one plain tree, for the functions of the plain model

Joining copies nothing. The base stays an argument of the compiled step, and any number of adapters
(policy, value, reward) share it: PPO's four models in the memory of one and a little.

Why not Qwix's LoraProvider: it finds the products by replacing functions of jax for the whole
process while a wrapped module runs, and the wrapped module is one class; the layers that `decode`
unrolls are another, which it does not reach. The product is one line, so it stands here. Names and
formula are Qwix's, so its adapters load here as they are; a test holds the two to each other. What
Qwix is used for is the base: quantised matrices and products with them (`quantization.py`).
"""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from instruct_jax.errors import ConfigError
from instruct_jax.models.config import Quantization
from instruct_jax.models.matrices import (
    MATRICES,
    Multiply,
    PartitionRules,
    join,
    matrices,
    replace_leaves,
    with_dense_rule,
)
from instruct_jax.models.transformer import Model, Params
from instruct_jax.settings import Settings, setting

_A, _B = "_lora_a", "_lora_b"
# Trained whole beside the adapters: the read-out of a reward or value model starts at random.
_WHOLE = r"^head/"


@dataclasses.dataclass(frozen=True)
class LoraConfig(Settings):
    """An adapter; `targets` are searched for in paths such as "layers/attention/query/kernel"."""

    rank: int = setting(0, "rank of the adapter; 0 makes none and trains all parameters", low=0)
    alpha: float = setting(
        16.0, "how much the adapter counts: alpha / rank", above=0.0, needs="rank"
    )
    targets: tuple[str, ...] = setting(
        MATRICES, "regular expressions for the matrices that it stands beside", needs="rank"
    )
    base: Quantization | None = setting(
        None, "what the frozen weights are quantised to (QLoRA)", needs="rank"
    )

    def __post_init__(self) -> None:
        """ConfigError for values that make no adapter."""
        super().__post_init__()
        if self.base is not None and self.rank == 0:
            raise ConfigError(f"base {self.base!r} is frozen: give a rank above 0")
        if not self.targets:
            raise ConfigError("targets is empty: name a matrix, such as query/kernel")
        for pattern in self.targets:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(
                    f"targets: {pattern!r} is no regular expression ({error})"
                ) from None

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank


def init_adapter(key: jax.Array, params: Params, config: LoraConfig) -> Params:
    """An adapter of `params` that changes nothing yet: B is 0, a head is as it was.

    Raises ConfigError for a target that no matrix has, or a rank that saves nothing on one.
    """
    leaves = {
        path: leaf
        for path, leaf in flatten_dict(params, sep="/").items()
        if re.search(_WHOLE, path)
    }
    for i, (path, kernel) in enumerate(sorted(matrices(params, config.targets).items())):
        layers, wide_in, wide_out = kernel.shape
        if not 0 < config.rank < min(wide_in, wide_out):
            raise ConfigError(
                f"lora.rank {config.rank} on {path} ({wide_in} by {wide_out}): give a rank from 1 "
                f"to {min(wide_in, wide_out) - 1}"
            )
        bound = wide_in**-0.5
        shape = (layers, wide_in, config.rank)
        leaves[path + _A] = jax.random.uniform(
            jax.random.fold_in(key, i), shape, jnp.float32, -bound, bound
        )
        leaves[path + _B] = jnp.zeros((layers, config.rank, wide_out), jnp.float32)
    return unflatten_dict(leaves, sep="/")


@functools.cache
def adapt(model: Model, config: LoraConfig) -> Model:
    """`model` for parameters joined with an adapter; where they hold none, its results are
    `model`'s. Equal arguments give the same functions, and rank 0 gives `model`.
    """
    if config.rank == 0:
        return model
    if config.base is not None:
        from instruct_jax.models.quantization import quantized

        model = quantized(model)

    def rule(multiply: Multiply, layer: nn.Dense, x: jax.Array) -> jax.Array:
        y = multiply(x)
        a, b = (layer.get_variable("params", "kernel" + side) for side in (_A, _B))
        if a is None:
            return y
        low = jnp.dot(x.astype(y.dtype), a.astype(y.dtype))
        return y + config.scale * jnp.dot(low, b.astype(y.dtype))

    return with_dense_rule(model, rule)


def split(key: jax.Array, params: Params, config: LoraConfig) -> tuple[Params, Params]:
    """What is frozen and what is trained of `params`, to be joined again: the base, quantised where
    `config.base` says so, and a fresh adapter; nothing and everything at rank 0.
    """
    if config.rank == 0:
        return {}, params
    return freeze(params, config), init_adapter(key, params, config)


def freeze(params: Params, config: LoraConfig) -> Params:
    """The base of an adapter: `params`, quantised where `config.base` says so."""
    if config.base is None:
        return params
    from instruct_jax.models.quantization import quantize_params

    return quantize_params(params, config.base)


def merge(base: Params, adapter: Params, config: LoraConfig) -> Params:
    """Plain parameters W + (alpha / r) A B of what `split` gave, heads included, for the functions
    of the plain model; a quantised base is expanded. At rank 0 all is in `adapter`.
    """
    if config.rank == 0:
        return adapter
    if config.base is not None:
        from instruct_jax.models.quantization import dequantize_params

        base = dequantize_params(base)
    return _shifted(base, adapter, config, sign=1.0)


def unmerge(merged: Params, adapter: Params, config: LoraConfig) -> Params:
    """The base that `merge` was given, up to rounding; heads stay the adapter's."""
    return _shifted(merged, adapter, config, sign=-1.0)


def adapter_rules(rules: PartitionRules) -> PartitionRules:
    """`rules` and those of adapters and of a quantised base. A is split on D_in and B on D_out as
    their matrix is, the rank never; quantised values and scales are split as their matrix is (a
    scale that an axis does not divide stays whole).
    """
    added: list[tuple[str, tuple[str | None, ...]]] = []
    for pattern, axes in rules:
        if pattern.endswith("/kernel$") and len(axes) == 3:
            stem = pattern.removesuffix("$")
            added += [
                (f"{stem}{_A}$", (axes[0], axes[1], None)),
                (f"{stem}{_B}$", (axes[0], None, axes[2])),
            ]
        if pattern.endswith(("kernel$", "tokens$")):
            added.append((pattern.removesuffix("$") + "/(qvalue|scale)$", axes))
    return (*rules, *added)


def _shifted(params: Params, adapter: Params, config: LoraConfig, *, sign: float) -> Params:
    leaves: dict[str, Any] = flatten_dict(adapter, sep="/")
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    changed = {}
    for path, a in leaves.items():
        if path.endswith(_A):
            kernel = path.removesuffix(_A)
            delta = jnp.einsum("ldr,lrf->ldf", a, leaves[kernel + _B])
            changed[kernel] = flat[kernel] + sign * config.scale * delta
    whole = {path: leaf for path, leaf in leaves.items() if re.search(_WHOLE, path)}
    return replace_leaves(join(params, {}), changed | whole)
