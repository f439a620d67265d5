"""Checkpoints: named trees of arrays and a JSON record, written atomically and in the background.

A step is a directory that Orbax renames into place once everything in it is on disk; then it gets
its manifest (`integrity.py`), without which it is not finished. So a killed run leaves its previous
step, and a damaged step is seen: opening a directory sets the newest steps aside, into DAMAGED
beside it, until one is intact. What is restored follows the abstract tree given, not the mesh that
wrote it: any mesh, and any number of processes, can take up any checkpoint. Keys of jax.random come
back as keys. Several processes save and restore together: each writes and reads its own parts, on a
file system that all of them see, and the first of them does the rest.
"""

import itertools
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from instruct_jax.errors import CheckpointError, ConfigError, StorageError
from instruct_jax.files import unfit_path, write_text
from instruct_jax.training import hosts, ocp
from instruct_jax.training.integrity import UNFINISHED, strangers, write_manifest
from instruct_jax.training.keeping import damage_of, pinned_steps, step_numbers
from instruct_jax.training.signals import hold_signals

# 1 had no manifests.
FORMAT = 2
DAMAGED = "damaged"

logger = logging.getLogger(__name__)

Items = dict[str, Any]
Metadata = dict[str, Any]


class Checkpointer:
    """The steps of one run: the newest `keep` stay, every multiple of `keep_every`, pinned ones,
    and the best.

    Opening it checks the newest step; one that is damaged is moved aside, with a warning that says
    why, and the next older is checked. Raises CheckpointError where steps are left but none intact.
    """

    def __init__(
        self, directory: str | Path, *, keep: int = 2, keep_every: int | None = None
    ) -> None:
        policies = ocp.training.preservation_policies
        self._stay = _Staying(pinned_steps(Path(directory)))
        preserve: list[Any] = [policies.LatestN(keep), self._stay]
        if keep_every is not None:
            preserve.append(policies.EveryNSteps(keep_every))
        self.directory = Path(directory).absolute()
        _check_name(self.directory)
        hosts.first_alone(lambda: set_damaged_aside(self.directory))
        preservation: Any = policies.AnyPreservationPolicy(preserve)
        with _writing(self.directory):
            self._steps = ocp.training.Checkpointer(
                str(self.directory),
                preservation_policy=preservation,
                cleanup_tmp_directories=True,
            )
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._manifest: Future[None] | None = None
        self._bytes = 0

    @property
    def steps(self) -> list[int]:
        """The steps that can be restored, oldest first."""
        return [checkpoint.step for checkpoint in self._steps.checkpoints]

    @property
    def latest_step(self) -> int | None:
        """The newest step, or None in a fresh directory."""
        return max(self.steps, default=None)

    def save(
        self,
        step: int,
        items: Items,
        metadata: Metadata | None = None,
        *,
        best: int | None = None,
    ) -> None:
        """Copies `items` to the host and returns; they are written in the background.

        `best` is a step that stays as long as it is named by every save, and one save longer: until
        the step that says what took its place is finished.

        The caller may donate the arrays at once: the writer holds a copy, or on a CPU a view of a
        buffer, which the runtime then does not give away. A step that exists is left as it is. An
        error of an earlier background write is raised here, or by `wait`: a StorageError, after
        which the step before stands.
        """
        if step in self.steps:
            return
        self._finish()  # an older step is only deleted once this one is finished
        self._stay.best = (*self._stay.best[-1:], best)
        self._bytes = sum(x.nbytes for x in jax.tree.leaves(items) if hasattr(x, "nbytes"))
        with _writing(self.directory / str(step), self._bytes):
            response = self._steps.save_checkpointables_async(
                step, _shared(items), force=True, custom_metadata=_record(metadata, step)
            )

        def complete() -> None:
            if response is not None:
                response.result()
            if jax.process_index() == 0:
                _conclude(self.directory / str(step))

        self._manifest = self._pool.submit(complete)

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
        """Returns once every save is on disk. Raises StorageError where one is not."""
        try:
            with _writing(self.directory, self._bytes):
                self._steps.wait()
        finally:
            self._finish()
        hosts.barrier("checkpoint")

    def close(self) -> None:
        """Waits, and ends the background threads."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            # Waited for above; what it could not write it would tell again.
            with suppress(Exception):
                self._steps.close()

    def _finish(self) -> None:
        manifest, self._manifest = self._manifest, None
        if manifest is not None:
            with _writing(self.directory, self._bytes):
                manifest.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None or not hosts.several():
            self.close()
            return
        # The others may be gone: nothing to wait for.
        self._pool.shutdown(wait=False)


@dataclass
class _Staying:
    """Which steps stay whatever their age, as Orbax asks."""

    pinned: set[int]
    best: tuple[int | None, ...] = ()

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """For each of them."""
        del context
        return [c.step in self.pinned or c.step in self.best for c in checkpoints]


def set_damaged_aside(directory: Path) -> dict[int, str]:
    """Moves the newest steps of `directory` to DAMAGED beside it until one is intact; why, by step.

    Raises CheckpointError, and moves nothing, where a step is damaged and none is intact.
    """
    reasons: dict[int, str] = {}
    for step in reversed(step_numbers(directory)):
        reason = damage_of(directory / str(step))
        if reason is None:
            break
        reasons[step] = reason
    else:
        if set(reasons.values()) - {UNFINISHED}:
            told = "; ".join(f"step {step}: {reason}" for step, reason in reasons.items())
            raise CheckpointError(
                f"{directory}: no step is intact ({told}); --overwrite starts anew"
            )
    for step, reason in reasons.items():
        aside = directory.with_name(DAMAGED)
        aside.mkdir(exist_ok=True)
        earlier = sum(1 for _ in aside.glob(f"{step}*"))
        os.replace(directory / str(step), aside / (f"{step}.{earlier}" if earlier else str(step)))
        logger.warning("%s: step %d: %s; set aside in %s", directory, step, reason, aside)
    return reasons


def save_model(directory: str | Path, params: Any, metadata: Metadata) -> None:
    """Writes the final parameters of a stage, over an earlier model in `directory`.

    What else was put there is moved to a folder beside it: Orbax empties the one that it writes.
    """
    directory = Path(directory).absolute()
    _check_name(directory)
    hosts.first_alone(lambda: _keep_strangers(directory))
    with _writing(directory, sum(x.nbytes for x in jax.tree.leaves(params))):
        ocp.save_checkpointables(
            str(directory),
            _shared({"params": params}),
            overwrite=True,
            custom_metadata=_record(metadata),
        )
        hosts.first_alone(lambda: _conclude(directory))


def _conclude(directory: Path) -> None:
    """Writes the manifest of what is all on disk. Orbax notes in each part where it was written:
    what a run is published with is no path of the machine.
    """
    for path in directory.rglob("commit_success.txt"):
        write_text(path, "committed\n")
    write_manifest(directory)


def _keep_strangers(directory: Path) -> None:
    names = (directory.with_name(f"{directory.name}.kept{n or ''}") for n in itertools.count())
    folder = next(folder for folder in names if not folder.exists())
    for path in strangers(directory):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(directory / path, folder / path)
        logger.warning("%s: not of this model; moved to %s", directory / path, folder / path)


def load_model(directory: str | Path, abstract: Any = None) -> tuple[Any, Metadata]:
    """Parameters written by `save_model`, placed and cast like `abstract`, and their metadata.

    Without `abstract`: as they were saved, uncommitted on the default device. Raises
    CheckpointError.
    """
    path = Path(directory).absolute()
    _check_name(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no model here")
    if (reason := damage_of(path)) is not None:
        raise CheckpointError(f"{path}: {reason}")
    if abstract is None:
        abstract = _as_stored(path, "params")
    items, metadata = _load(
        path, {"params": abstract}, lambda items: ocp.load_checkpointables(str(path), items)
    )
    return items["params"], metadata


def load_item(directory: str | Path, name: str) -> Any:
    """One item of a saved step as nested dicts, as it was saved, on the default device.

    Raises CheckpointError.
    """
    path = Path(directory).absolute()
    items, _ = _load(
        path,
        {name: _as_stored(path, name)},
        lambda items: ocp.load_checkpointables(str(path), items),
    )
    return items[name]


def unreadable(directory: str | Path) -> str | None:
    """Why the arrays of a saved step or model cannot be read, each of them; None where they can."""
    path = Path(directory).absolute()
    try:
        names = _guarded(path, lambda: list(ocp.checkpointables_metadata(str(path)).metadata))
        for name in names:
            load_item(path, name)
    except (CheckpointError, ConfigError) as error:
        return str(error)
    return None


def _as_stored(path: Path, name: str) -> Any:
    stored = _guarded(path, lambda: ocp.checkpointables_metadata(str(path)).metadata[name])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), stored)


def _record(metadata: Metadata | None, step: int | None = None) -> Metadata:
    return {"format": FORMAT, "metadata": metadata or {}} | ({} if step is None else {"step": step})


def _load(
    path: Path, abstract_items: Items, load: Callable[[Items], Mapping[str, Any]]
) -> tuple[Items, Metadata]:
    record = _guarded(path, lambda: ocp.checkpointables_metadata(str(path)).custom_metadata)
    if record.get("format") not in range(1, FORMAT + 1):
        raise CheckpointError(
            f"{path}: checkpoint format {record.get('format')}, this version reads 1 to {FORMAT}"
        )
    targets = jax.tree.map(_target, abstract_items)
    items = _guarded(path, lambda: dict(load(targets)))
    return jax.tree.map(_place, abstract_items, items), record["metadata"]


def _check_name(path: Path) -> None:
    """ConfigError where Orbax would write a folder that it cannot read."""
    if (reason := unfit_path(path)) is not None:
        raise ConfigError(f"{path}: {reason}; move it, or choose another name")


def _guarded(path: Path, read: Callable[[], Any]) -> Any:
    _check_name(path)
    try:
        with hold_signals():
            return read()
    except Exception as error:  # whatever the many layers below raise: the step is of no use
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path}: {type(error).__name__}: {reason}") from error


@contextmanager
def _writing(path: Path, size: int = 0) -> Iterator[None]:
    """Turns whatever goes wrong while `size` bytes are written to `path` into a StorageError."""
    try:
        with hold_signals():
            yield
    except (CheckpointError, StorageError):
        raise
    except Exception as error:  # of the many layers below; what they say is one line here
        reason = " ".join(str(error).split())[:300]
        present = next(p for p in (path, *path.parents) if p.exists())
        free = shutil.disk_usage(present).free
        raise StorageError(
            f"{path}: not written ({type(error).__name__}: {reason}); {size:,} bytes are needed,"
            f" {free:,} are free; the step before it stands: make room, or mend the permissions,"
            " and run the same command again"
        ) from error


def _on_mesh(leaf: Any) -> bool:
    return isinstance(getattr(leaf, "sharding", None), NamedSharding)


def _anywhere() -> Sharding:
    """Where an array that is on no mesh is read to: one copy for each process."""
    if not hosts.several():
        return SingleDeviceSharding(jax.local_devices()[0])
    mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec())


def _shared(items: Items) -> Items:
    """`items` as arrays of all processes: Orbax writes no array that one process has to itself."""
    if not hosts.several():
        return items

    def share(leaf: Any) -> Any:
        own = isinstance(leaf, jax.Array) and leaf.is_fully_addressable
        return hosts.place(leaf, _anywhere()) if own else leaf

    return jax.tree.map(share, items)


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding if _on_mesh(leaf) else _anywhere()
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
