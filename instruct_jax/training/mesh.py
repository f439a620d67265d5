"""One mesh for every machine, and where each array of a model lives on it.

Axes: `data` replicates the model, `fsdp` shards its parameters, optimizer and gradients, `tensor`
splits its matrix products, `sequence` the positions of every row, inside the model alone. Rows of a
batch are spread over `data` and `fsdp` together. One device is a 1 x 1 x 1 x 1 mesh, so no code has
a case for it.

Axis types are Auto: under JAX's default, Explicit, the embedding lookup `table[tokens]` does not
trace.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from instruct_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor", "sequence")
BATCH_AXES = ("data", "fsdp")

# One row: a regular expression searched for in an array's path "a/b/c", and the mesh axis (or axes,
# or None) of each of its dimensions. The first row that matches counts.
PartitionRules = Sequence[tuple[str, Sequence[str | tuple[str, ...] | None]]]


def parse_mesh(spec: str, devices: int) -> dict[str, int]:
    """Sizes of the axes from "auto" or "data:2,fsdp:4"; absent is 1, one may be -1 (the rest).

    "auto" gives every accelerator to `fsdp`, which holds the largest model, and every CPU device to
    `data`, which communicates least. Raises ConfigError.
    """
    if spec == "auto":
        axis = "data" if jax.default_backend() == "cpu" else "fsdp"
        return {name: devices if name == axis else 1 for name in AXES}
    sizes = dict.fromkeys(AXES, 1)
    for part in spec.split(","):
        name, _, size = part.strip().partition(":")
        if name not in AXES or not re.fullmatch(r"-1|[1-9]\d*", size):
            raise ConfigError(
                f"mesh {spec!r}: {part.strip()!r} is not AXIS:SIZE, AXIS of {', '.join(AXES)}"
            )
        sizes[name] = int(size)
    fixed = math.prod(size for size in sizes.values() if size > 0)
    if list(sizes.values()).count(-1) > 1:
        raise ConfigError(f"mesh {spec!r}: only one axis can be -1")
    sizes = {name: devices // fixed if size == -1 else size for name, size in sizes.items()}
    needed = math.prod(sizes.values())
    if not 0 < needed <= devices:
        raise ConfigError(f"mesh {spec!r} needs {max(needed, fixed)} devices, there are {devices}")
    return sizes


def make_mesh(spec: str = "auto", *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `spec` (see `parse_mesh`) over the first devices it needs. Raises ConfigError."""
    devices = jax.devices() if devices is None else devices
    shape = tuple(parse_mesh(spec, len(devices)).values())
    return jax.make_mesh(
        shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[: math.prod(shape)]
    )


def describe(mesh: Mesh) -> str:
    """The spec that makes the same mesh: "data:2,fsdp:4,tensor:1,sequence:1"."""
    return ",".join(f"{name}:{size}" for name, size in mesh.shape.items())


def tree_paths(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of `tree` with their paths "a/b/c"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def match_partition_rules(rules: PartitionRules, tree: Any) -> Any:
    """The PartitionSpec of every leaf of `tree`; scalars are replicated.

    Raises ValueError with every path that no rule matches, or whose rule has too many dimensions: a
    parameter that is replicated by oversight is found when it no longer fits, so nothing is
    replicated by default.
    """
    problems = []

    def spec(path: str, leaf: Any) -> PartitionSpec:
        if not leaf.shape:
            return PartitionSpec()
        for pattern, axes in rules:
            if re.search(pattern, path):
                if len(axes) > len(leaf.shape):
                    problems.append(
                        f"{path} {leaf.shape} has fewer dimensions than its rule {axes}"
                    )
                return PartitionSpec(*axes)
        problems.append(f"{path} {leaf.shape} is matched by no rule")
        return PartitionSpec()

    specs = [spec(path, leaf) for path, leaf in tree_paths(tree)]
    if problems:
        raise ValueError("partition rules: " + "; ".join(problems))
    return jax.tree.unflatten(jax.tree.structure(tree), specs)


def tree_shardings(mesh: Mesh, rules: PartitionRules, tree: Any) -> Any:
    """The NamedSharding of every leaf of `tree` (arrays or ShapeDtypeStructs) on `mesh`.

    A dimension that its axes do not divide stays whole, so that a small model runs on any mesh.
    """

    def place(leaf: Any, spec: PartitionSpec) -> NamedSharding:
        fitted = [
            axes if size % axes_size(mesh, axes) == 0 else None
            for size, axes in zip(leaf.shape, spec, strict=False)
        ]
        return NamedSharding(mesh, PartitionSpec(*fitted))

    return jax.tree.map(place, tree, match_partition_rules(rules, tree))


def axes_size(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    """The number of parts that an entry of a PartitionSpec cuts a dimension into."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[name] for name in names)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows, the first dimension, spread over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def check_batch_size(rows: int, mesh: Mesh, *, micro_batches: int = 1) -> None:
    """Raises ConfigError where `mesh` and `micro_batches` do not divide `rows`."""
    parts = axes_size(mesh, BATCH_AXES) * micro_batches
    if rows % parts:
        split = f"mesh {describe(mesh)}"
        if micro_batches > 1:
            split += f" with {micro_batches} micro-batches"
        raise ConfigError(
            f"a batch of {rows} rows cannot be divided over {split}: use a multiple of {parts},"
            " or another --mesh"
        )


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Spreads the rows of a tree of [B, ...] host arrays. ConfigError where B does not divide."""
    for leaf in jax.tree.leaves(batch):
        check_batch_size(leaf.shape[0], mesh)
    return jax.device_put(batch, batch_sharding(mesh))
