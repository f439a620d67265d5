"""Quantised weights, through Qwix: smaller models for inference, and a frozen base for QLoRA.

    W ~ scale * q        one scale for every output column, and for every tile of `tile` input rows

Matrices of the layers become `qwix.QArray`s inside the ordinary parameter tree, quantised layer by
layer (a stack is quantised under vmap, so every layer has scales of its own). `quantized(model)`
computes with such a tree in training, scoring and cached decoding. Without `activations` the
products are exact in the quantised weights; with them each row of the input is rounded to int8 as
well, and products and sums are integers where the hardware has them.

The token table and an untied unembedding are int8 with one scale a token, at every kind: the
read-out of a 4-bit table costs more accuracy than it saves memory. They are expanded at the entry
of a function. Norms, biases, positions and heads stay as they are.

The keys and values of decoding can be kept in int8 as well (`with_int8_cache`).

int8 is symmetric round-to-nearest; "int4" the same in 16 steps; "nf4" takes the quantiles of a
normal distribution for its 16 values (Dettmers et al. 2023); "fp8" is float8_e4m3. Rounding has no
gradient: train adapters over weight-only kinds.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import qwix
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from instruct_jax.models.config import Quantization
from instruct_jax.models.matrices import (
    Multiply,
    matrices,
    replace_leaves,
    with_dense_rule,
)
from instruct_jax.models.transformer import Cache, Model, Params

# The numbers Qwix calls by these names, and how many input rows share a scale (None: all of them).
_KINDS: dict[Quantization, tuple[str, int | None]] = {
    "int8": ("int8", None),
    "int4": ("int4", 32),
    "nf4": ("nf4", 32),
    "fp8": ("float8_e4m3fn", None),
}
# Tables by path, and the axis that keeps a scale for each of its tokens.
_TABLES = {"embedder/tokens": 0, "unembedding/kernel": 1}


def quantize_params(params: Params, kind: Quantization) -> Params:
    """`params` with its matrices in `kind` and its vocabulary tables in int8.

    A tile that does not divide D_in is lengthened to the next divisor.
    """
    qtype, tile = _KINDS[kind]

    def quantize(kernel: jax.Array) -> Any:
        tiles = None if tile is None else {0: _divisor(kernel.shape[1], at_least=tile)}
        how = functools.partial(qwix.quantize, qtype=qtype, channelwise_axes=(1,), tiled_axes=tiles)
        return jax.vmap(how)(jnp.asarray(kernel))

    changed = {path: quantize(kernel) for path, kernel in matrices(params).items()}
    flat = flatten_dict(params, sep="/")
    for path, axis in _TABLES.items():
        if path in flat:
            table = jnp.asarray(flat[path])
            changed[path] = qwix.quantize(table, "int8", channelwise_axes=(axis,))
    return replace_leaves(params, changed)


def dequantize_params(params: Params) -> Params:
    """Plain fp32 parameters: the values that a quantised model computes with."""
    flat = flatten_dict(params, sep="/")
    return unflatten_dict({path: _expand(leaf) for path, leaf in flat.items()}, sep="/")


@functools.cache
def quantized(model: Model, *, activations: bool = False) -> Model:
    """`model` for parameters from `quantize_params`, plain ones included; equal arguments give the
    same functions. `activations` rounds the inputs of the quantised matrices to int8, row by row.
    """

    def rule(multiply: Multiply, layer: nn.Dense, x: jax.Array) -> jax.Array:
        kernel = layer.get_variable("params", "kernel")
        if not isinstance(kernel, qwix.QArray):
            return multiply(x)
        x = x.astype(layer.dtype)
        rows = tuple(range(x.ndim - 1))
        inputs = qwix.quantize(x, "int8", channelwise_axes=rows) if activations else x
        contraction = (((x.ndim - 1,), (0,)), ((), ()))
        with jax.numpy_dtype_promotion("standard"):  # Qwix multiplies integer sums by scales
            y = qwix.dot_general(inputs, kernel.astype(x.dtype), contraction).astype(x.dtype)
        bias = layer.get_variable("params", "bias")
        return y if bias is None else y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)

    return with_dense_rule(model, rule, prepare=_expand_tables)


class QuantizedCache(NamedTuple):
    """A `Cache` with int8 keys and values and one fp32 scale for each token and head."""

    keys: tuple[qwix.QArray, ...]  # L times [B, K, S, H]
    values: tuple[qwix.QArray, ...]
    mask: jax.Array
    index: jax.Array


@functools.cache
def with_int8_cache(model: Model) -> Model:
    """`model` whose `decode` keeps its cache in int8; equal arguments give the same function.

    An ordinary `Cache` comes back as a `QuantizedCache`, which is what later calls are given; so a
    loop over tokens starts after a prefill. A token is rounded once, when it is written, and reads
    itself unrounded. Layers are expanded one at a time for their attention.
    """

    @functools.wraps(model.decode)
    def decode(params: Params, tokens: jax.Array, cache: Any, **options: Any) -> Any:
        if isinstance(cache, Cache):
            keys, values = (tuple(map(_round, x)) for x in (cache.keys, cache.values))
            cache = QuantizedCache(keys, values, cache.mask, cache.index)
        keys, values = (
            tuple(qwix.dequantize(x).astype(model.config.dtype) for x in stored)
            for stored in (cache.keys, cache.values)
        )
        expanded = Cache(keys, values, cache.mask, cache.index)
        logits, after = model.decode(params, tokens, expanded, **options)

        def written(stored: qwix.QArray, buffer: jax.Array) -> qwix.QArray:
            new = jax.lax.dynamic_slice_in_dim(buffer, cache.index, tokens.shape[1], axis=2)
            write = functools.partial(
                jax.lax.dynamic_update_slice_in_dim, start_index=cache.index, axis=2
            )
            return jax.tree.map(write, stored, _round(new))

        return logits, QuantizedCache(
            tuple(map(written, cache.keys, after.keys)),
            tuple(map(written, cache.values, after.values)),
            after.mask,
            after.index,
        )

    return model._replace(decode=decode)


def _round(x: jax.Array) -> qwix.QArray:
    return qwix.quantize(x.astype(jnp.float32), "int8", channelwise_axes=(0, 1, 2))


def _divisor(size: int, *, at_least: int) -> int:
    return next(n for n in range(min(at_least, size), size + 1) if size % n == 0)


def _expand(leaf: Any) -> Any:
    return qwix.dequantize(leaf) if isinstance(leaf, qwix.QArray) else leaf


def _expand_tables(params: Params) -> Params:
    return {
        name: dequantize_params(tree) if name in ("embedder", "unembedding") else tree
        for name, tree in params.items()
    }
