"""Checkpoints: named trees of arrays and a JSON record, written atomically and in the background.

A step is a directory that Orbax renames into place once everything in it is on disk, so a killed
run leaves its previous step. What is restored follows the abstract tree given, not the mesh that
wrote it: any mesh can take up any checkpoint. Keys of jax.random come back as keys.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from jax.sharding import NamedSharding, SingleDeviceSharding

from instruct_jax.errors import CheckpointError

FORMAT = 1

Items = dict[str, Any]
Metadata = dict[str, Any]


class Checkpointer:
    """The steps of one run: the newest `keep` stay, and every multiple of `keep_every`."""

    def __init__(
        self, directory: str | Path, *, keep: int = 2, keep_every: int | None = None
    ) -> None:
        policies = ocp.training.preservation_policies
        preserve: list[Any] = [policies.LatestN(keep)]
        if keep_every is not None:
            preserve.append(policies.EveryNSteps(keep_every))
        self.directory = Path(directory).absolute()
        preservation: Any = policies.AnyPreservationPolicy(preserve)
        self._steps = ocp.training.Checkpointer(
            str(self.directory),
            preservation_policy=preservation,
            cleanup_tmp_directories=True,
        )

    @property
    def steps(self) -> list[int]:
        """The steps that can be restored, oldest first."""
        return [checkpoint.step for checkpoint in self._steps.checkpoints]

    @property
    def latest_step(self) -> int | None:
        """The newest step, or None in a fresh directory."""
        return max(self.steps, default=None)

    def save(self, step: int, items: Items, metadata: Metadata | None = None) -> None:
        """Copies `items` to the host and returns; they are written in the background.

        The caller may donate the arrays at once. A step that exists is left as it is. An error of
        an earlier background write is raised here, or by `wait`.
        """
        if step not in self.steps:
            self._steps.save_checkpointables_async(
                step, items, force=True, custom_metadata=_record(metadata)
            )

    def restore(self, abstract_items: Items, *, step: int | None = None) -> tuple[Items, Metadata]:
        """The items named in `abstract_items` at `step` (the newest by default), and the metadata.

        Leaves are arrays or ShapeDtypeStructs. One with a NamedSharding is restored onto its mesh;
        another comes back uncommitted on the default device. Raises CheckpointError.
        """
        step = self.latest_step if step is None else step
        if step is None or step not in self.steps:
            raise CheckpointError(f"{self.directory}: no checkpoint of step {step}")
        return _load(
            self.directory / str(step),
            abstract_items,
            lambda items: self._steps.load_checkpointables(step, items),
        )

    def wait(self) -> None:
        """Returns once every save is on disk."""
        self._steps.wait()

    def close(self) -> None:
        """Waits, and ends the background threads."""
        self._steps.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def save_model(directory: str | Path, params: Any, metadata: Metadata) -> None:
    """Writes the final parameters of a stage, over an earlier model in `directory`."""
    ocp.save_checkpointables(
        str(Path(directory).absolute()),
        {"params": params},
        overwrite=True,
        custom_metadata=_record(metadata),
    )


def load_model(directory: str | Path, abstract: Any = None) -> tuple[Any, Metadata]:
    """Parameters written by `save_model`, placed and cast like `abstract`, and their metadata.

    Without `abstract`: as they were saved, uncommitted on the default device. Raises
    CheckpointError.
    """
    path = Path(directory).absolute()
    if not path.is_dir():
        raise CheckpointError(f"{path}: no model here")
    if abstract is None:
        stored = _guarded(path, lambda: ocp.checkpointables_metadata(str(path)).metadata["params"])
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), stored)
    items, metadata = _load(
        path, {"params": abstract}, lambda items: ocp.load_checkpointables(str(path), items)
    )
    return items["params"], metadata


def _record(metadata: Metadata | None) -> Metadata:
    return {"format": FORMAT, "metadata": metadata or {}}


def _load(
    path: Path, abstract_items: Items, load: Callable[[Items], Mapping[str, Any]]
) -> tuple[Items, Metadata]:
    record = _guarded(path, lambda: ocp.checkpointables_metadata(str(path)).custom_metadata)
    if record.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: checkpoint format {record.get('format')}, this version reads {FORMAT}"
        )
    targets = jax.tree.map(_target, abstract_items)
    items = _guarded(path, lambda: dict(load(targets)))
    return jax.tree.map(_place, abstract_items, items), record["metadata"]


def _guarded(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:  # whatever the many layers below raise: the step is of no use
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path}: {type(error).__name__}: {reason}") from error


def _on_mesh(leaf: Any) -> bool:
    return isinstance(getattr(leaf, "sharding", None), NamedSharding)


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding if _on_mesh(leaf) else SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _place(abstract: Any, leaf: jax.Array) -> jax.Array:
    # A restored array is committed to its device; on a mesh that is meant, elsewhere it would clash
    # with arrays of a mesh in the next jit.
    if _on_mesh(abstract):
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = np.asarray(jax.random.key_data(leaf))
        return jax.random.wrap_key_data(jnp.asarray(data), impl=jax.random.key_impl(leaf))
    return jnp.asarray(np.asarray(leaf))
