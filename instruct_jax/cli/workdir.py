"""The directory of a run, and its record: config.json.

The record holds the resolved configuration, versions, commit and command. A directory belongs to
one configuration: the same one resumes it, another is refused, so that no run is written over by
mistake. It belongs to one run at a time: to one process, or to the first of several, which writes
for all.
"""

import dataclasses
import fcntl
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
from instruct_jax.cli import processes
from instruct_jax.cli.config import REPOSITORY, leaves
from instruct_jax.errors import ConfigError, RunError, UserError

RECORD = "config.json"
# Tokenised documents: after a mistake of the user's they are no reason to keep a work directory.
TOKENS = "tokens"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "qwix", "numpy", "tokenizers")


@dataclass(frozen=True)
class Run:
    """Where a script works: its directory, and the spec of its mesh (`make_mesh`)."""

    workdir: Path
    mesh: str = "auto"

    @property
    def writes(self) -> bool:
        """Whether this is the process that writes the files of the run: the only or first one."""
        return processes.index() == 0

    def record(self, **facts: Any) -> None:
        """Adds JSON values, such as the hashes of the data, to workdir/config.json."""
        if not self.writes:
            return
        path = self.workdir / RECORD
        known = json.loads(path.read_text()) if path.exists() else {}
        _write_json(path, known | facts)

    def record_data(self, hashes: dict[str, Any], licences: dict[str, str]) -> None:
        """Records what the rows come from, and shows the licences that are stated (DATA-21)."""
        for name, licence in licences.items():
            if licence != "not stated" and self.writes:
                print(f"data: {name}: licence {licence}", file=sys.stderr, flush=True)
        self.record(data=hashes, licences=licences)


@contextmanager
def open_workdir(
    workdir: Path, config: Any, record: dict[str, Any], *, overwrite: bool = False
) -> Iterator[None]:
    """Within it `workdir` belongs to this run; the record is written first.

    Raises ConfigError where another run works in it (R6), and where it holds anything but an
    earlier part of this run, which `overwrite` deletes. Where a run fails and has written nothing
    else, the record and the directories made for it are taken back. Of several processes the first
    does this for all; where it fails the others leave with its exit code.
    """
    if processes.index():
        if not processes.agreed(True):
            raise SystemExit(ConfigError.exit_code)
        yield
        return
    told = False
    try:
        with _opened(workdir, config, record, overwrite=overwrite):
            told = processes.agreed(True)
            yield
    except RunError as error:
        if not told:
            error.everywhere = not processes.agreed(False)
        raise


@contextmanager
def _opened(
    workdir: Path, config: Any, record: dict[str, Any], *, overwrite: bool
) -> Iterator[None]:
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError(f"--workdir={workdir} is not a directory")
    made = [p for p in (workdir, *workdir.parents) if not p.exists()]
    workdir.mkdir(parents=True, exist_ok=True)
    with _locked(workdir):
        _claim(workdir, config, overwrite=overwrite)
        path = workdir / RECORD
        fresh = not path.exists()
        _write_json(path, record)
        try:
            yield
        except BaseException as error:
            remade = (TOKENS,) if isinstance(error, UserError) else ()
            if fresh and _files(workdir, without=remade) == [path]:
                shutil.rmtree(workdir)
                for parent in made[1:]:
                    parent.rmdir()
            raise


@contextmanager
def _locked(workdir: Path) -> Iterator[None]:
    # The system lets go of it when the process ends, however it ends: no lock is ever stale.
    descriptor = os.open(workdir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            record = workdir / RECORD
            holder = json.loads(record.read_text()).get("process", "") if record.exists() else ""
            raise ConfigError(
                f"{workdir} is in use by another process{holder and f', {holder}'}; "
                "wait for it, stop it, or choose another --workdir"
            ) from None
        except OSError as error:  # a file system without locks
            print(f"warning: {workdir} cannot be locked ({error.strerror})", file=sys.stderr)
        yield
    finally:
        os.close(descriptor)


def _claim(workdir: Path, config: Any, *, overwrite: bool) -> None:
    record = workdir / RECORD
    if not _files(workdir):
        return
    if overwrite:
        if not record.exists():
            raise ConfigError(f"--overwrite: no {RECORD} in {workdir}, so it is no run to delete")
        for path in workdir.iterdir():  # the directory itself holds the lock
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif record.exists():
        changes = _changes(record, config)
        if changes:
            more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
            raise ConfigError(
                f"{workdir} holds a run with another configuration"
                f" ({', '.join(changes[:3])}{more}); choose another --workdir, or --overwrite"
            )


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
        "process": f"{os.getpid()} on {platform.node()}",
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _commit() -> str | None:
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # not a checkout, or no git
    return done.stdout.strip()


def _files(workdir: Path, *, without: Sequence[str] = ()) -> list[Path]:
    """All files below `workdir` but those in its folders `without`."""
    kept = [path for path in workdir.rglob("*") if not path.is_dir()]
    return [path for path in kept if path.relative_to(workdir).parts[0] not in without]


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
