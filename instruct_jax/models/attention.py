"""Attention, softmax(q k^T) v, in four implementations that compute the same.

    xla      all scores, in a few blocks of queries, under any causal mask; the only one for cached
             decoding and for dropout of the weights
    blocks   for CPUs: the scores block by block, never in memory (`block_attention.py`); like
             cudnn, it does not split the queries of a row over devices
    splash   for TPUs: the same in a Pallas kernel
    cudnn    for NVIDIA cards: the same in cuDNN

The last three are for whole rows, and are told what makes the mask: a query sees nothing later, its
own segment alone, in a local layer the last `window` slots, and of a row of branches its own branch
and the common beginning. Padding is a segment of its own, so that every query sees at least itself;
at padding the implementations differ, and nobody reads it.

Where their hardware is absent they still run, which is how they are tested: splash interpreted,
cudnn as XLA's reading of the same arguments.

Axes: B batch, T/S query/key length, N heads, K key/value heads, G = N/K, H head size. Queries come
scaled.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import NamedSharding, PartitionSpec

from instruct_jax.models.block_attention import block_attention
from instruct_jax.models.config import TransformerConfig
from instruct_jax.models.rows import MASKED, Rows
from instruct_jax.models.sharding import (
    HEADS,
    POSITIONS,
    ROWS,
    WHOLE,
    axes_size,
    partition,
    per_device,
    platform,
)

# Of XLA's attention over whole rows: blocks of queries at least so long, and so many at most.
_LEAST_QUERIES, _MOST_BLOCKS = 64, 8

# Rows are padded to a multiple of the smallest block, and shorter rows are left to XLA.
_BLOCKS = (512, 256, 128)


def implementation(c: TransformerConfig, length: int) -> str:
    """Which one whole rows of `length` tokens go through here.

    "auto" takes that of the platform, of the mesh in use or else of this process, where it can do
    what the model asks for; on accelerators float32 stays with XLA, whose kernels compute in less.
    """
    if length < _BLOCKS[-1]:
        return "xla"
    if c.attention != "auto":
        return c.attention
    if c.attention_dropout:
        return "xla"
    if platform() == "cpu":
        return "blocks" if axes_size(POSITIONS) == 1 else "xla"
    if c.dtype != "bfloat16":
        return "xla"
    if platform() == "tpu":
        return "splash"
    # What every version of cuDNN has of it, forward and backward.
    fits = c.head_size <= 128 and c.head_size % 8 == 0 and length % 2 == 0
    if platform() == "gpu" and fits and c.attention_softcap is None and axes_size(POSITIONS) == 1:
        return "cudnn"
    return "xla"


def attend(
    c: TransformerConfig,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: jax.Array | Rows,
    *,
    is_local: jax.Array | bool | None = None,
    dropout: Callable[[jax.Array], jax.Array] = lambda weights: weights,
) -> jax.Array:
    """q [B, N, T, H], k and v [B, K, S, H] -> [B, N, T, H].

    `seen` is bool[B, 1, 1, T, S], for XLA, or the `Rows` that a kernel makes it of. Rows are told
    `is_local` bool[], whether this layer is, in a model where it can be either. `dropout` acts on
    the weights, under a mask alone.
    """
    if not isinstance(seen, Rows):
        return _causal_blocks(functools.partial(_dense, c, dropout=dropout), q, k, v, seen)
    kernel = {"blocks": _blocks, "splash": _splash, "cudnn": _cudnn}[implementation(c, q.shape[2])]
    k, v = (_shared(x, q.shape[1]) for x in (k, v))
    run = functools.partial(kernel, c, q, k, v, seen)
    if is_local is None:
        return run(window=c.window if any(c.local_layers) else None)
    return jax.lax.cond(is_local, lambda: run(window=c.window), lambda: run(window=None))


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(x / cap): x where it is small, never beyond the cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def _causal_blocks(
    dense: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> jax.Array:
    """`dense(q, k, v, mask)` of whole rows: blocks of queries, each with the keys up to its end.

    What lies right of the diagonal is never computed, and the scores of a block stay in a cache:
    forward and backward take 0.4 of the time at 512 and at 1,280 slots on two CPU cores. It is for
    what no kernel does: dropout of the weights, and on a CPU positions that are split.
    """
    length = q.shape[2]
    size = max(_LEAST_QUERIES, -(-length // _MOST_BLOCKS))
    if length <= size or length != k.shape[2] or axes_size(POSITIONS) > 1:
        return dense(q, k, v, mask)
    blocks = []
    for start in range(0, length, size):
        end = min(start + size, length)
        own, past = slice(start, end), slice(0, end)
        blocks.append(dense(q[:, :, own], k[:, :, past], v[:, :, past], mask[..., own, past]))
    return jnp.concatenate(blocks, axis=2)


def _dense(
    c: TransformerConfig,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    dropout: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    grouped = q.reshape(q.shape[0], k.shape[1], -1, *q.shape[2:])
    scores = jnp.einsum("bkgth,bksh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    scores = soft_cap(scores, c.attention_softcap)
    weights = dropout(_masked_softmax(scores, mask).astype(c.dtype))
    return jnp.einsum("bkgts,bksh->bkgth", weights, v).reshape(q.shape)


def _blocks(
    c: TransformerConfig,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: Rows,
    *,
    window: int | None,
) -> jax.Array:
    run = functools.partial(block_attention, window=window, softcap=c.attention_softcap)
    queries = partition(q.shape, ROWS, HEADS, WHOLE, WHOLE)
    of_rows = jax.tree.map(lambda _: PartitionSpec(queries[0], None), rows)
    return per_device(run, (queries, queries, queries, of_rows), queries)(q, k, v, rows)


def _splash(
    c: TransformerConfig,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: Rows,
    *,
    window: int | None,
) -> jax.Array:
    parts = axes_size(POSITIONS)
    size, padding = q.shape[2], -q.shape[2] % (_BLOCKS[-1] * parts)
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0))) for x in (q, k, v))
    rows, length = rows.padded(padding), size + padding
    block = next(n for n in _BLOCKS if length // parts % n == 0)
    make = functools.partial(
        splash.make_splash_mha,
        block_sizes=splash.BlockSizes(block, block, block, block, block, block, block, block),
        attn_logits_soft_cap=c.attention_softcap,
        head_shards=1,  # all heads have the same mask
        interpret=platform() != "tpu",
    )
    queries = partition(q.shape, ROWS, HEADS, POSITIONS, WHOLE)
    batch, heads, positions, _ = queries
    keys = PartitionSpec(batch, heads, None, None)

    if rows.branches is None:
        shape = length, length
        causal = splash.CausalMask(shape)
        mask = causal if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
        kernel = make(splash.MultiHeadMask([mask]), q_seq_shards=parts)
        mesh = jax.sharding.get_abstract_mesh()
        spec = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, positions)))
        specs = spec, PartitionSpec(batch, positions), PartitionSpec(batch, None)
        arguments = kernel, rows.segments, rows.segments
        run = _splash_segments
    else:
        # A mask of every row's own. The kernel reads it, and skips the blocks where it is empty.
        causal = jnp.tril(jnp.ones((1, length, length), jnp.bool_))
        specs = (PartitionSpec(batch, positions, None),)
        arguments = (causal & rows.meets(rows),)
        run = functools.partial(_splash_masks, make)
    run = per_device(run, (queries, keys, keys, *specs), queries)
    return run(q, k, v, *arguments)[:, :, :size]


def _splash_segments(
    q: jax.Array, k: jax.Array, v: jax.Array, kernel: Any, own: jax.Array, others: jax.Array
) -> jax.Array:
    """The segments int32[B, T] of queries and int32[B, S] of keys on top of the kernel's mask."""
    return jax.vmap(kernel)(q, k, v, splash.SegmentIds(own, others))


def _splash_masks(
    make: Callable[..., Any], q: jax.Array, k: jax.Array, v: jax.Array, masks: jax.Array
) -> jax.Array:
    """A kernel for every row, of its mask in masks bool[B, T, S]."""

    def attend(row: tuple[jax.Array, jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, k, v, mask = row
        kernel = make(mask[None], q_seq_shards=1)
        # A flag that it reads back, and turns into an array: a tracer here.
        kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
        return kernel(q, k, v)

    return jax.lax.map(attend, (q, k, v, masks))


def _cudnn(
    c: TransformerConfig,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: Rows,
    *,
    window: int | None,
) -> jax.Array:
    mask = rows.meets(rows)
    if window is not None:
        # In the mask: cuDNN does not take a window and a mask together.
        t = jnp.arange(q.shape[2])
        mask &= (t[:, None] - t[None] < window)[None]

    def run(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
        y = jax.nn.dot_product_attention(
            *(x.swapaxes(1, 2) for x in (q, k, v)),
            mask=mask[:, None],
            scale=1.0,
            is_causal=True,
            implementation="cudnn" if platform() == "gpu" else "xla",
        )
        return y.swapaxes(1, 2)

    queries = partition(q.shape, ROWS, HEADS, WHOLE, WHOLE)
    specs = queries, queries, queries, PartitionSpec(queries[0], None, None)
    return per_device(run, specs, queries)(q, k, v, mask)


def _shared(x: jax.Array, heads: int) -> jax.Array:
    """Keys or values [B, K, S, H], repeated for every one of N `heads` where the mesh splits those
    and cannot split K."""
    parts = axes_size(HEADS)
    if heads % parts or x.shape[1] % parts == 0:
        return x
    return jnp.repeat(x, heads // x.shape[1], axis=1)


@jax.custom_vjp
def _masked_softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """softmax(scores) over the last axis, where `mask` is false as good as 0.

    The gradient is p (dp - sum p dp), of the weights p alone: what XLA derives computes the
    exponentials again inside that sum, on one core of a CPU, and asks the mask once more.
    """
    return nn.softmax(jnp.where(mask, scores, MASKED))


def _softmax_forward(scores: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    weights = _masked_softmax(scores, mask)
    return weights, weights


def _softmax_backward(weights: jax.Array, change: jax.Array) -> tuple[jax.Array, None]:
    common = (weights * change).sum(-1, keepdims=True)
    return weights * (change - common), None


_masked_softmax.defvjp(_softmax_forward, _softmax_backward)
