"""The order in which positions are walked over, a chunk at a time.

Rows come in G blocks of N positions. An `Order` brings the positions that are asked for to the
front of their block, in static shapes; chunks behind the last of them are never made.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Order(NamedTuple):
    """The positions of each block, those that are asked for first."""

    positions: jax.Array  # int32[G, N], the position at each place
    places: jax.Array  # int32[G, N], the place of each position
    most: jax.Array  # int32[], how many the fullest block has


def targets_first(where: jax.Array) -> Order:
    """bool[G, N] -> the order that brings the true ones to the front, each kind in its order."""
    true, false = (jnp.cumsum(x, axis=1, dtype=jnp.int32) for x in (where, ~where))
    return Order(
        positions=jnp.argsort(~where, axis=1, stable=True).astype(jnp.int32),
        places=jnp.where(where, true - 1, true[:, -1:] + false - 1),
        most=true[:, -1].max(),
    )


def in_order(x: jax.Array, order: Order | None, chunk: int) -> jax.Array:
    """[G, N, ...] in the order of the chunks, padded with zeros to a multiple of `chunk`."""
    if order is not None:
        index = order.positions.reshape(*order.positions.shape, *[1] * (x.ndim - 2))
        x = jnp.take_along_axis(x, index, axis=1, mode="clip")
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, -x.shape[1] % chunk if x.shape[1] else chunk)
    return jnp.pad(x, padding)


def in_place(x: jax.Array, order: Order | None, length: int) -> jax.Array:
    """The inverse of `in_order`."""
    if order is None:
        return x[:, :length]
    index = order.places.reshape(*order.places.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1, mode="clip")


def part(x: jax.Array, *, i: jax.Array, chunk: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1)


def write(x: jax.Array, new: jax.Array, *, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, new, i * new.shape[1], axis=1)


def live_chunks(order: Order | None, positions: int, chunk: int) -> jax.Array | int:
    """How many chunks hold a position that is asked for."""
    return -(-(positions if order is None else order.most) // chunk)
