"""Loops inside of a loss, on meshes whose axes are Manual or Explicit.

Inside of `shard_map` every array says which mesh axes it differs over, and what a loop carries must
say so from its first step. On Explicit axes, which `jax.make_mesh` makes by default, every reshape
would have to say how its result is sharded; there the loops run as they do on Auto axes, where the
compiler finds out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec


def _varying(x: jax.Array) -> frozenset[str]:
    """The Manual axes that the array differs over."""
    return jax.typeof(x).manual_axis_type.varying


def alike(*arrays: jax.Array) -> list[jax.Array]:
    """The arrays, each as one that differs over every Manual axis that one of them differs over.

    The gradient of one that did not is summed over those axes.
    """
    axes = frozenset().union(*map(_varying, arrays))
    return [
        jax.lax.pcast(x, tuple(sorted(axes - _varying(x))), to="varying") if axes else x
        for x in arrays
    ]


def zeros(shape: tuple[int, ...], dtype: Any, like: jax.Array) -> jax.Array:
    """Zeros to start a loop with, which differ over the Manual axes that `like` differs over."""
    return jax.lax.pcast(jnp.zeros(shape, dtype), tuple(sorted(_varying(like))), to="varying")


def on_auto_axes(
    function: Callable[..., Any], *arguments: jax.Array | None, rows: jax.Array | None = None
) -> Any:
    """function(*arguments), with Explicit axes of their mesh as Auto axes while it runs.

    All results are sharded as `rows` is, or replicated.
    """
    shardings = [jax.typeof(x).sharding for x in arguments if x is not None]
    meshes = [s.mesh for s in shardings if s.mesh.explicit_axes]
    if not meshes:
        return function(*arguments)
    spec = PartitionSpec() if rows is None else jax.typeof(rows).sharding.spec
    axes, out = meshes[0].explicit_axes, NamedSharding(meshes[0], spec)
    return jax.sharding.auto_axes(function, axes=axes, out_sharding=out)(*arguments)
