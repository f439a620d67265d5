"""Attention block by block in plain XLA, without the blocks in which no query sees a key.

Flash attention (Dao et al. 2022, algorithm 1; the backward pass of Dao 2023, algorithm 2): a block
of queries meets one block of keys after another, and keeps of their scores the largest, the sum of
the exponentials and the sum of the values they weigh. Which blocks it meets is read off the rows,
so that segments and trees cost what their tokens see: every block has a list of its own, and a loop
as long as the list. The backward pass computes the scores again, from the log of the sum.

For CPUs, where the scores of a block stay in the cache; an accelerator would wait for every block.

Axes: B rows, n blocks of a row, N heads, K key/value heads, G = N/K, t and s queries and keys of
a block, H head size.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from instruct_jax.models.rows import MASKED, PADDING, Rows

# Tokens of a block: smaller ones skip more of a tree, larger ones are better products.
BLOCK = 64
_at = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)


class Seen(NamedTuple):
    """What makes the mask of rows of n blocks; padding sees nothing."""

    blocks: Rows  # of int32[B n, t]
    rows: int
    window: int | None

    @classmethod
    def of(cls, rows: Rows, window: int | None) -> "Seen":
        """Of whole rows."""
        blocks = jax.tree.map(lambda x: x.reshape(-1, BLOCK), rows)
        return cls(blocks, len(rows.segments), window)

    def keys(self) -> tuple[jax.Array, jax.Array]:
        """The blocks of keys that each block of queries meets: int32[B n, n], of which the first
        int32[B n] count.
        """
        whole = jax.tree.map(lambda x: x.reshape(self.rows, -1), self.blocks)
        n, slots = len(self.blocks.segments) // self.rows, jnp.arange(whole.segments.shape[1])
        mask = self._mask(whole, whole, slots, slots).reshape(self.rows, n, BLOCK, n, BLOCK)
        met = mask.any((2, 4))
        # Those that are met come first, in their order.
        order = jnp.argsort(~met, axis=2) + n * jnp.arange(self.rows)[:, None, None]
        return order.reshape(-1, n), met.sum(2).reshape(-1)

    def between(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """bool[t, s], whether a query of block `a` sees a key of block `b` of its row."""
        n, slots = len(self.blocks.segments) // self.rows, jnp.arange(BLOCK)
        own, other = (jax.tree.map(lambda x, i=i: _at(x, i), self.blocks) for i in (a, b))
        return self._mask(own, other, a % n * BLOCK + slots, b % n * BLOCK + slots)

    def _mask(self, own: Rows, other: Rows, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """bool[..., t, s] of queries and keys in the slots int32[t] and int32[s]."""
        distance = queries[:, None] - keys[None]
        near = distance >= 0
        if self.window is not None:
            near &= distance < self.window
        mask = own.meets(other) & (own.segments != PADDING)[..., None]
        return mask & jnp.expand_dims(near, range(mask.ndim - 2))


def block_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: Rows,
    *,
    window: int | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """softmax(q k^T) v of q [B, N, T, H], k and v [B, K, T, H] -> [B, N, T, H].

    A token sees what `rows` lets it meet, none that is later, and with a `window` the last so many.
    What is made at padding means nothing.
    """
    length = q.shape[2]
    end = -length % BLOCK
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, end), (0, 0))) for x in (q, k, v))
    return _attention(window, softcap, q, k, v, rows.padded(end))[:, :, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    window: int | None,
    softcap: float | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: Rows,
) -> jax.Array:
    return _forward(window, softcap, q, k, v, rows)[0]


def _forward(
    window: int | None,
    softcap: float | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: Rows,
) -> tuple[jax.Array, Any]:
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    queries, keys, values = (_split(x, heads) for x in (q, k, v))
    seen = Seen.of(rows, window)
    met, counts = seen.keys()

    def of_block(a: jax.Array) -> tuple[jax.Array, jax.Array]:
        own = _at(queries, a)

        def meet(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            largest, total, out = sums
            b = met[a, i]
            scores, _ = _scores(own, _at(keys, b), seen.between(a, b), softcap)
            new = jnp.maximum(largest, scores.max(-1))
            weights, kept = jnp.exp(scores - new[..., None]), jnp.exp(largest - new)
            weighed = _product("kts,ksh->kth", weights.astype(v.dtype), _at(values, b))
            return new, total * kept + weights.sum(-1), out * kept[..., None] + weighed

        lines = heads, group * BLOCK
        nothing = jnp.zeros(lines)
        sums = jnp.full(lines, MASKED), nothing, jnp.zeros((*lines, q.shape[-1]))
        largest, total, out = jax.lax.fori_loop(0, counts[a], meet, sums)
        total = jnp.where(total == 0, 1.0, total)  # a block of padding
        return (out / total[..., None]).astype(q.dtype), largest + jnp.log(total)

    outputs, logs = jax.lax.map(of_block, jnp.arange(len(queries)))
    saved = q, k, v, rows, met, counts, outputs, logs
    return _join(outputs, q.shape), saved


def _backward(window: int | None, softcap: float | None, saved: Any, change: jax.Array) -> Any:
    q, k, v, rows, met, counts, outputs, logs = saved
    heads = k.shape[1]
    queries, keys, values, changes = (_split(x, heads) for x in (q, k, v, change))
    seen = Seen.of(rows, window)
    # sum_s p_s dp_s of a query, whatever its keys.
    common = _product("akth,akth->akt", changes, outputs)

    def of_block(a: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        own, own_change = _at(queries, a), _at(changes, a)

        def meet(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dq, dk, dv = sums
            b = met[a, i]
            key = _at(keys, b)
            scores, slope = _scores(own, key, seen.between(a, b), softcap)
            weights = jnp.exp(scores - _at(logs, a)[..., None])
            ds = _product("kth,ksh->kts", own_change, _at(values, b)) - _at(common, a)[..., None]
            ds = (weights * ds * slope).astype(q.dtype)
            weights = weights.astype(q.dtype)
            dq += _product("kts,ksh->kth", ds, key)
            dk = _add(dk, b, _product("kts,kth->ksh", ds, own))
            dv = _add(dv, b, _product("kts,kth->ksh", weights, own_change))
            return dq, dk, dv

        dq, dk, dv = sums
        nothing = jnp.zeros(own.shape)
        own_dq, dk, dv = jax.lax.fori_loop(0, counts[a], meet, (nothing, dk, dv))
        return jax.lax.dynamic_update_index_in_dim(dq, own_dq, a, 0), dk, dv

    sums = tuple(jnp.zeros(x.shape) for x in (queries, keys, values))
    sums = jax.lax.fori_loop(0, len(queries), of_block, sums)
    grads = (_join(x, y.shape).astype(y.dtype) for x, y in zip(sums, (q, k, v), strict=True))
    return *grads, None


_attention.defvjp(_forward, _backward)

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _scores(
    queries: jax.Array, keys: jax.Array, mask: jax.Array, softcap: float | None
) -> tuple[jax.Array, jax.Array | float]:
    """float32[K, G t, s], `MASKED` outside of mask bool[t, s], and the slope of their soft cap."""
    scores, slope = _product("kth,ksh->kts", queries, keys), 1.0
    if softcap is not None:
        turned = jnp.tanh(scores / softcap)
        scores, slope = softcap * turned, 1.0 - turned**2
    mask = jnp.tile(mask, (queries.shape[1] // BLOCK, 1))[None]
    return jnp.where(mask, scores, MASKED), slope


def _split(x: jax.Array, heads: int) -> jax.Array:
    """[B, N, T, H] -> [B n, K, G t, H]: the query heads of one key head are more of its queries."""
    rows, _, length, size = x.shape
    x = x.reshape(rows, heads, -1, length // BLOCK, BLOCK, size)
    return x.transpose(0, 3, 1, 2, 4, 5).reshape(-1, heads, x.shape[2] * BLOCK, size)


def _join(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_split`."""
    rows, _, length, size = shape
    x = x.reshape(rows, length // BLOCK, x.shape[1], -1, BLOCK, size)
    return x.transpose(0, 2, 3, 1, 4, 5).reshape(shape)


def _add(x: jax.Array, index: jax.Array, change: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, _at(x, index) + change, index, 0)
