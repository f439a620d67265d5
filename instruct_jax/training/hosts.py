"""Arrays of a mesh that spans several processes, on one host or many.

A jax.Array on such a mesh is one array, of which a process holds the parts that lie on its own
devices. Every process runs the same program; what one reads from it must be the whole, and what one
puts into it must agree. In a run of one process all of this is what `jax.device_put` and
`jax.device_get` do.

Rows never travel: a process reads those of its own devices (`global_batches`), whatever the mesh.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding

from instruct_jax.errors import (
    CheckpointError,
    ConfigError,
    NonFiniteError,
    RewardError,
    RunError,
    StorageError,
    UserError,
)


def several() -> bool:
    """Whether this is one process of several."""
    return jax.process_count() > 1


def place(tree: Any, shardings: Any) -> Any:
    """A copy of `tree` on `shardings` (a tree of them, or one for all), in buffers of its own.

    Leaves of this process alone must be the same in all processes. The result may be donated:
    `jax.device_put` alone shares the buffer where a part of the result lies where the leaf does,
    whatever `may_alias` says.
    """
    if isinstance(shardings, Sharding):
        return jax.tree.map(lambda x: _placed(x, shardings), tree)
    return jax.tree.map(_placed, tree, shardings)


def _placed(x: Any, sharding: Sharding) -> jax.Array:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.jit(jnp.copy, out_shardings=sharding)(x)
    if sharding.is_fully_addressable:
        # A NumPy array could lend its memory as well.
        return jax.device_put(jnp.array(x, copy=True), sharding)
    host = x if isinstance(x, jax.Array) and _is_key(x) else np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def fetch(tree: Any) -> Any:
    """The whole of every leaf as NumPy arrays of their own, in every process; all must ask.

    A copy: `jax.device_get` may give a view of a buffer that a later step is free to overwrite.
    """
    return jax.tree.map(_fetched, tree)


def _fetched(x: Any) -> np.ndarray:
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.array(x)


def spread(batch: Any, sharding: NamedSharding) -> Any:
    """Host arrays that are the same in all processes, on `sharding`; no process sends anything."""
    if not several():
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: _placed(x, sharding), batch)


@runtime_checkable
class RowSource(Protocol):
    """Batches that can be asked for some of their rows, as `data.loader.Batches`."""

    batch_size: int

    def rows(self, step: int) -> np.ndarray:
        """The numbers of the rows of the batch of `step`."""
        ...

    def take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The rows of these numbers."""
        ...


def global_batches(batch_at: Callable[[int], Any], sharding: NamedSharding) -> Callable[[int], Any]:
    """`batch_at`, its batches on `sharding`, whose first dimension is the rows.

    A process reads only the rows that its devices hold where `batch_at` is a RowSource; from
    another it takes them out of the whole batch. In a run of one process batches stay on the host,
    from where a step takes them.
    """
    if not several():
        return batch_at
    if isinstance(batch_at, RowSource):
        source = batch_at
        mine = rows_held(sharding, source.batch_size)

        def of_rows(step: int) -> Any:
            own = source.take(source.rows(step)[mine])
            return jax.tree.map(lambda x: _from_own(x, mine, source.batch_size, sharding), own)

        return of_rows
    return lambda step: spread(batch_at(step), sharding)


def rows_held(sharding: NamedSharding, rows: int) -> np.ndarray:
    """The numbers, in order, of those of `rows` rows that lie on devices of this process."""
    held = np.zeros(rows, bool)
    by_row = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))
    for index in by_row.addressable_devices_indices_map((rows,)).values():
        held[index] = True
    return np.flatnonzero(held)


def _from_own(own: np.ndarray, mine: np.ndarray, rows: int, sharding: NamedSharding) -> jax.Array:
    """The [rows, ...] array of which this process has the rows `mine`."""

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        of_rows, *others = index or (slice(None),)
        start, stop, _ = of_rows.indices(rows)
        first = int(np.searchsorted(mine, start))
        return own[(slice(first, first + stop - start), *others)]

    return jax.make_array_from_callback((rows, *own.shape[1:]), sharding, part)


def first_alone(work: Callable[[], Any]) -> None:
    """Process 0 does `work`; the others wait for it, and fail where it fails: with its exit code,
    and where it is an error of a kind that all processes leave by, in the same good order.
    """
    if not several():
        work()
        return
    error: Exception | None = None
    if jax.process_index() == 0:
        try:
            work()
        except Exception as raised:  # told to the others before it is raised here
            error = raised
    kinds = (NonFiniteError, RewardError, CheckpointError, StorageError, ConfigError, UserError)
    kind = next((i for i, known in enumerate(kinds, 1) if isinstance(error, known)), 0)
    failed, kind = multihost_utils.broadcast_one_to_all(np.array([error is not None, kind]))
    if failed:
        raise error or (RunError, *kinds)[kind]("process 0 failed; its own message says why")


def of_first(work: Callable[[], Any], like: Any) -> Any:
    """What process 0 makes of `work`, NumPy arrays like those of the tree `like`, in every process;
    where it fails all fail.
    """
    made: list[Any] = []
    first_alone(lambda: made.append(work()))
    if not several():
        return made[0]
    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(made[0] if made else like))


def barrier(name: str) -> None:
    """Returns once every process is here."""
    if several():
        multihost_utils.sync_global_devices(name)


class AnyProcess:
    """Whether any process has raised a flag, told to all at the same step, without waiting for it.

    `ask(flag)` starts a reduction over all processes and returns the answer of the one before it,
    which is ready by then. So a flag is heard a step late, and by all at once.
    """

    def __init__(self) -> None:
        self._asked: jax.Array | None = None
        if several():
            mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(AxisType.Auto,))
            self._scope = partial(jax.set_mesh, mesh)
            self._sharding = NamedSharding(mesh, PartitionSpec("all"))
            whole = NamedSharding(mesh, PartitionSpec())
            self._largest = jax.jit(jnp.max, out_shardings=whole)

    def ask(self, flag: bool) -> bool:
        """The flags of all at the last call, or in a run of one process this one."""
        if not several():
            return flag
        before, own = self._asked, np.full(1, flag, np.int32)
        shape = (jax.device_count(),)
        flags = jax.make_array_from_callback(shape, self._sharding, lambda index: own)
        with self._scope():
            self._asked = self._largest(flags)
        return before is not None and bool(before)


def _is_key(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
