"""The weight matrices of a parameter tree: what adapters, quantisation and pruning act on.

A matrix is the `kernel` of a dense layer inside the stack, float[L, D_in, D_out], named by its path
"layers/mlp/up/kernel". How a dense layer multiplies is changed from the outside, by a Flax method
interceptor that is active while the model's functions are traced. It reaches the scanned layers of
training and the unstacked ones of decoding alike, without a second definition of the model.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from instruct_jax.errors import ConfigError
from instruct_jax.models.transformer import Model, Params

MATRICES = (r"^layers/.*/kernel$",)

Multiply = Callable[[jax.Array], jax.Array]
# (the product as it was, the layer, its input [..., D_in]) -> [..., D_out]
DenseRule = Callable[[Multiply, nn.Dense, jax.Array], jax.Array]
PartitionRules = Sequence[tuple[str, tuple[str | None, ...]]]


def matrices(params: Params, targets: Sequence[str] = MATRICES) -> dict[str, Any]:
    """The matrices whose path one of the regular expressions `targets` is found in, by path.

    Raises ConfigError for a pattern that finds none.
    """
    leaves: dict[str, Any] = flatten_dict(params, sep="/")
    found = {
        path: leaf
        for path, leaf in leaves.items()
        if re.search(MATRICES[0], path) and leaf.ndim == 3
    }
    for pattern in targets:
        if not any(re.search(pattern, path) for path in found):
            raise ConfigError(
                f"target {pattern!r} is found in the path of no matrix; there are "
                + ", ".join(sorted(found))
            )
    return {
        path: leaf
        for path, leaf in found.items()
        if any(re.search(pattern, path) for pattern in targets)
    }


def join(frozen: Params, trained: Params) -> Params:
    """The two nested dicts as one, `trained` where both have a leaf; no array is copied.

    With an adapter for `trained`: the adapted model. With nothing: the base alone, its reference.
    With all parameters and nothing frozen: full fine-tuning. So one code path serves the three.
    """
    both = frozen.keys() & trained.keys()
    merged = {
        name: join(frozen[name], trained[name])
        if isinstance(trained[name], dict)
        else trained[name]
        for name in both
    }
    return {**frozen, **trained, **merged}


def replace_leaves(params: Params, leaves: dict[str, Any]) -> Params:
    """`params` with the leaves at these paths replaced or added."""
    return unflatten_dict(flatten_dict(params, sep="/") | leaves, sep="/")


def tree_bytes(tree: Any) -> int:
    """Bytes that the arrays of `tree` (or their shapes) take when stored; 4-bit ones take half."""

    def bits(leaf: Any) -> int:
        dtype = jnp.dtype(leaf.dtype)
        width = 8 * dtype.itemsize
        if jnp.issubdtype(dtype, jnp.integer):
            width = jnp.iinfo(dtype).bits
        return leaf.size * width

    return sum(bits(leaf) for leaf in jax.tree.leaves(tree)) // 8


def parameter_total(tree: Any) -> int:
    """Elements of all arrays of `tree`, or of their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def with_dense_rule(
    model: Model, rule: DenseRule, *, prepare: Callable[[Params], Params] = lambda params: params
) -> Model:
    """`model` with its dense layers multiplied by `rule`, and its parameters first prepared.

    Rules nest: the rule of the outer model sees the product of the inner one.
    """

    def intercept(
        following: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
            return rule(following, context.module, *args)
        return following(*args, **kwargs)

    def within(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(params: Params, *args: Any, **kwargs: Any) -> Any:
            with nn.intercept_methods(intercept):
                return function(prepare(params), *args, **kwargs)

        return call

    return model._replace(
        apply=within(model.apply),
        hidden=within(model.hidden),
        readout=within(model.readout),
        head=within(model.head),
        decode=within(model.decode),
    )
