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

# Tokens of a block: smaller ones skip more of a tree, larger ones are better products.
BLOCK = 64
# Finite, so that a block in which a query sees nothing weighs nothing once it sees another.
_MASKED = -1e9
_at = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)


class Seen(NamedTuple):
    """What makes the mask of rows of n blocks; negative segments are padding and see nothing."""

    segments: jax.Array  # int32[B n, t]
    branches: jax.Array | None  # int32[B n, t], 0 in the common beginning
    rows: int
    window: int | None

    def keys(self) -> tuple[jax.Array, jax.Array]:
        """The blocks of keys that each block of queries meets: int32[B n, n], of which the first
        int32[B n] count.
        """
        n = len(self.segments) // self.rows
        whole = [None if x is None else x.reshape(self.rows, -1) for x in self[:2]]
        slots = jnp.arange(n * BLOCK)[None]
        mask = self._mask(whole, whole, slots, slots).reshape(self.rows, n, BLOCK, n, BLOCK)
        met = mask.any((2, 4))
        # Those that are met come first, in their order.
        order = jnp.argsort(~met, axis=2) + n * jnp.arange(self.rows)[:, None, None]
        return order.reshape(-1, n), met.sum(2).reshape(-1)

    def between(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """bool[t, s], whether a query of block `a` sees a key of block `b` of its row."""
        n = len(self.segments) // self.rows
        own, other = ([None if x is None else _at(x, i) for x in self[:2]] for i in (a, b))
        slots = jnp.arange(BLOCK)
        return self._mask(own, other, a % n * BLOCK + slots, b % n * BLOCK + slots)

    def _mask(self, own: Any, other: Any, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """bool[..., t, s] of the (segments, branches) of queries and keys in these slots."""
        distance = queries[..., :, None] - keys[..., None, :]
        mask = (own[0][..., :, None] == other[0][..., None, :]) & (own[0] >= 0)[..., None]
        mask &= distance >= 0
        if self.window is not None:
            mask &= distance < self.window
        if self.branches is not None:
            common = (other[1] == 0)[..., None, :]
            mask &= common | (own[1][..., :, None] == other[1][..., None, :])
        return mask


def block_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    branches: jax.Array | None = None,
    *,
    window: int | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """softmax(q k^T) v of q [B, N, T, H], k and v [B, K, T, H] -> [B, N, T, H].

    A token sees no later one, none of another of the `segments` int32[B, T], of its segment's
    `branches` int32[B, T] the beginning 0 and its own, and with a `window` the last so many. What
    is made at padding, of a negative segment, means nothing.
    """
    length = q.shape[2]
    end = (0, -length % BLOCK)
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), end, (0, 0))) for x in (q, k, v))
    grow = functools.partial(jnp.pad, pad_width=((0, 0), end))
    segments = grow(segments, constant_values=-1)
    branches = None if branches is None else grow(branches)
    return _attention(window, softcap, q, k, v, segments, branches)[:, :, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    window: int | None,
    softcap: float | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    branches: jax.Array | None,
) -> jax.Array:
    return _forward(window, softcap, q, k, v, segments, branches)[0]


def _forward(
    window: int | None,
    softcap: float | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    branches: jax.Array | None,
) -> tuple[jax.Array, Any]:
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    queries, keys, values = (_split(x, heads) for x in (q, k, v))
    seen = _seen(segments, branches, window)
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
        sums = jnp.full(lines, _MASKED), nothing, jnp.zeros((*lines, q.shape[-1]))
        largest, total, out = jax.lax.fori_loop(0, counts[a], meet, sums)
        total = jnp.where(total == 0, 1.0, total)  # a block of padding
        return (out / total[..., None]).astype(q.dtype), largest + jnp.log(total)

    outputs, logs = jax.lax.map(of_block, jnp.arange(len(queries)))
    saved = q, k, v, segments, branches, met, counts, outputs, logs
    return _join(outputs, q.shape), saved


def _backward(window: int | None, softcap: float | None, saved: Any, change: jax.Array) -> Any:
    q, k, v, segments, branches, met, counts, outputs, logs = saved
    heads = k.shape[1]
    queries, keys, values, changes = (_split(x, heads) for x in (q, k, v, change))
    seen = _seen(segments, branches, window)
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
    return *grads, None, None


_attention.defvjp(_forward, _backward)

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _scores(
    queries: jax.Array, keys: jax.Array, mask: jax.Array, softcap: float | None
) -> tuple[jax.Array, jax.Array | float]:
    """float32[K, G t, s], `_MASKED` outside of mask bool[t, s], and the slope of their soft cap."""
    scores, slope = _product("kth,ksh->kts", queries, keys), 1.0
    if softcap is not None:
        turned = jnp.tanh(scores / softcap)
        scores, slope = softcap * turned, 1.0 - turned**2
    mask = jnp.tile(mask, (queries.shape[1] // BLOCK, 1))[None]
    return jnp.where(mask, scores, _MASKED), slope


def _seen(segments: jax.Array, branches: jax.Array | None, window: int | None) -> Seen:
    own = None if branches is None else branches.reshape(-1, BLOCK)
    return Seen(segments.reshape(-1, BLOCK), own, len(segments), window)


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
