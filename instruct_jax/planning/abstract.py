"""Arrays that are only shapes and shardings, and programs of them, ready to be compiled."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from instruct_jax.models.costs import Cost, Kind
from instruct_jax.models.transformer import TransformerConfig, language_model, scalar_model
from instruct_jax.stages.stage import RULES
from instruct_jax.training.mesh import replicated, tree_shardings

Shapes = dict[str, tuple[tuple[int, ...], Any]]


@dataclass(frozen=True)
class Program:
    """`lower()` is the stage's program at its shapes; `cost` is of one run of it, on all devices.

    `arguments` are what it reads, by role; `trips` how often a loop turns whose end is not known.
    """

    name: str
    lower: Callable[[], Any]
    arguments: dict[str, Any]
    cost: tuple[Cost, ...]
    trips: int = 1


def placed(tree: Any, shardings: Any) -> Any:
    """Shapes with their shardings."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def device_bytes(tree: Any) -> int:
    """Bytes of one device's part of shapes with shardings; what its host keeps does not count."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        if leaf.sharding.memory_kind == "pinned_host":
            continue
        shape = leaf.sharding.shard_shape(leaf.shape)
        size = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        for n in shape:
            size *= n
        total += size
    return total


@functools.cache
def abstract_params(config: TransformerConfig, kind: Kind) -> Any:
    """The shapes of a model's parameters."""
    model = (language_model if kind == "language" else scalar_model)(config)
    return jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)))


def on_mesh(mesh: Mesh, tree: Any) -> Any:
    """Shapes of parameters, placed by the models' partition rules."""
    return placed(tree, tree_shardings(mesh, RULES, tree))


def abstract_key(mesh: Mesh) -> Any:
    """A random key, whole on every device."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh))


def abstract_rows(sharding: NamedSharding, shapes: Shapes) -> dict[str, Any]:
    """Arrays of one sharding, by name."""
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, (shape, dtype) in shapes.items()
    }
