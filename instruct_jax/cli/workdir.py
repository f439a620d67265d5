"""The directory of a run, and its record: config.json.

The record holds the resolved configuration, versions, commit and command. A directory belongs to
one configuration: the same one resumes it, another is refused, so that no run is written over by
mistake.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instruct_jax import __version__
from instruct_jax.cli.config import REPOSITORY, leaves
from instruct_jax.errors import ConfigError

RECORD = "config.json"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers")


@dataclass(frozen=True)
class Run:
    """Where a script works: its directory, and the spec of its mesh (`make_mesh`)."""

    workdir: Path
    mesh: str = "auto"

    def record(self, **facts: Any) -> None:
        """Adds JSON values, such as the hashes of the data, to workdir/config.json."""
        path = self.workdir / RECORD
        known = json.loads(path.read_text()) if path.exists() else {}
        _write_json(path, known | facts)

    def record_data(self, hashes: dict[str, Any], licences: dict[str, str]) -> None:
        """Records what the rows come from, and shows the licences that are stated (DATA-21)."""
        for name, licence in licences.items():
            if licence != "not stated":
                print(f"data: {name}: licence {licence}", file=sys.stderr, flush=True)
        self.record(data=hashes, licences=licences)


def claim(workdir: Path, config: Any, *, overwrite: bool) -> None:
    """Raises ConfigError where `workdir` holds anything but an earlier part of this run.

    With `overwrite` an earlier run is deleted.
    """
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError(f"--workdir={workdir} is not a directory")
    record = workdir / RECORD
    if not _files(workdir):
        return
    if overwrite:
        if not record.exists():
            raise ConfigError(f"--overwrite: no {RECORD} in {workdir}, so it is no run to delete")
        shutil.rmtree(workdir)
    elif record.exists():
        changes = _changes(record, config)
        if changes:
            more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
            raise ConfigError(
                f"{workdir} holds a run with another configuration"
                f" ({', '.join(changes[:3])}{more}); choose another --workdir, or --overwrite"
            )


@contextmanager
def recorded(workdir: Path, record: dict[str, Any]) -> Iterator[None]:
    """Writes the record first; takes it back where the run fails and has written nothing else."""
    path = workdir / RECORD
    made = [p for p in (workdir, *workdir.parents) if not p.exists()]
    fresh = not path.exists()
    _write_json(path, record)
    try:
        yield
    except BaseException:
        if fresh and _files(workdir) == [path]:
            shutil.rmtree(workdir)
            for parent in made[1:]:
                parent.rmdir()
        raise


def describe(config: Any, config_file: str, mesh: str, argv: Sequence[str]) -> dict[str, Any]:
    """The record of a run."""
    versions = {"instruct_jax": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "config": dataclasses.asdict(config),
        "config_file": config_file,
        "command": [sys.argv[0], *argv],
        "mesh": mesh,
        "versions": versions,
        "commit": _commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _commit() -> str | None:
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # not a checkout, or no git
    return done.stdout.strip()


def _files(workdir: Path) -> list[Path]:
    return [path for path in workdir.rglob("*") if not path.is_dir()]


def _changes(record: Path, config: Any) -> list[str]:
    try:
        before = dict(leaves(json.loads(record.read_text()).get("config", {})))
    except ValueError as error:
        raise ConfigError(f"{record} cannot be read: {error}") from error
    after = dict(leaves(json.loads(json.dumps(dataclasses.asdict(config)))))
    return [
        f"{name} was {before.get(name)!r}, is {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    with partial.open("w") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
