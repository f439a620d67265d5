"""The directory of a run: what may be one, whose it is, and how it is left.

A directory belongs to one configuration (record.py): the same one resumes it, another is refused,
so that no run is written over by mistake. It belongs to one run at a time: to one process, or to
the first of several, which writes for all. A folder with anything else in it than a run is refused,
whatever is asked: nothing that a run did not write is written over or deleted.
"""

import dataclasses
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from instruct_jax import __version__
from instruct_jax.cli import processes, replacing
from instruct_jax.cli.config import REPOSITORY
from instruct_jax.cli.finished import finish, stands
from instruct_jax.cli.record import (
    ARTEFACTS,
    RECORD,
    SCHEMA,
    changes,
    read_record,
    unchanged,
)
from instruct_jax.errors import ConfigError, RunError, UserError
from instruct_jax.files import PARTIAL, read_object, unfit_path, write_json
from instruct_jax.paths import expanded, published

# Tokenised documents: after a mistake of the user's they are no reason to keep a work directory.
TOKENS = "tokens"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "qwix", "numpy", "tokenizers")
_PARTS = {"train": "to train on", "valid": "for validation", "test": "for evaluation"}
# What may stand in a folder before its run begins: what a shell or a cluster writes there.
_LOGS = re.compile(r".*\.(log|out|err)|\.(?!git$).*")


@dataclass(frozen=True)
class Run:
    """Where a script works: its directory, and the spec of its mesh (`make_mesh`)."""

    workdir: Path
    mesh: str = "auto"
    said: list[str] = field(default_factory=list)
    """what was shown at its end"""

    @property
    def writes(self) -> bool:
        """Whether this is the process that writes the files of the run: the only or first one."""
        return processes.index() == 0

    def say(self, text: str) -> None:
        """One line of what a script has to show at its end, from the process that writes."""
        if self.writes:
            print(text, flush=True)
        self.said.append(text)

    def say_again(self) -> None:
        """What a run that has ended had to show, and that it has."""
        for text in (read_record(self.workdir) or {}).get("said", ()):
            self.say(expanded(text, self.workdir))
        self.note(f"{self.workdir} is as this run left it, nothing was done; --overwrite: anew")

    def note(self, text: str) -> None:
        """One line, on stderr, of what the run decided for its user."""
        if self.writes:
            print(f"note: {text}", file=sys.stderr, flush=True)

    def record(self, **facts: Any) -> None:
        """Adds JSON values, such as the hashes of the data, to workdir/config.json."""
        if not self.writes:
            return
        path = self.workdir / RECORD
        known = read_object(path) if path.exists() else {}
        write_json(path, known | published(facts, self.workdir))

    def record_data(
        self,
        hashes: dict[str, Any],
        licences: dict[str, str],
        counts: Mapping[str, Mapping[str, int]] = MappingProxyType({}),
    ) -> None:
        """Records what the rows come from, and shows the licences that are stated (DATA-21) and,
        of every kind of row, the `counts` in "train", "valid" and "test".

        ConfigError where the run began with something else in the same place (R20): the hash of
        then stays in the record.
        """
        path = self.workdir / RECORD
        before = read_object(path).get("data", {}) if path.exists() else {}
        for name, found in json.loads(json.dumps(hashes)).items():
            known = published(name, self.workdir)
            # A record of an earlier version has names as they were given.
            old = before.get(known, before.get(name, found))
            if old != found:
                raise ConfigError(
                    f"{name}: not what the run in {self.workdir} began with ({old}, now"
                    f" {found}); put it back, choose another --workdir, or --overwrite"
                )
        for name, licence in licences.items():
            if licence != "not stated" and self.writes:
                print(f"data: {name}: licence {licence}", file=sys.stderr, flush=True)
        for kind, parts in counts.items() if self.writes else ():
            words = [f"{parts[part]:,} {words}" for part, words in _PARTS.items() if part in parts]
            print(f"data: {kind}: {', '.join(words)}", file=sys.stderr, flush=True)
        self.record(data=hashes, licences=licences, rows=dict(counts))


@contextmanager
def open_workdir(
    workdir: Path,
    config: Any,
    record: dict[str, Any],
    *,
    overwrite: bool = False,
    once: bool = False,
) -> Iterator[bool]:
    """Within it `workdir` belongs to this run; the record is written first.

    Given is whether there is nothing to do: with `once`, where this very run has ended and all that
    it left is there to the bit. Nothing is written then.

    Raises ConfigError where another run works in it (R6), where it cannot be a run's directory, and
    where it holds anything but an earlier part of this run. With `overwrite` another run is set
    aside, and deleted when this one is done or has saved its state on a signal (R19). Where a run
    fails and has saved nothing, what was made for it is taken back and what it replaced put back.
    Of several processes the first does this for all; where it fails the others leave with its exit
    code.
    """
    if processes.index():
        if not processes.agreed(True):
            raise SystemExit(ConfigError.exit_code)
        yield processes.agreed(False)
        return
    told = False
    try:
        with _opened(workdir, config, record, overwrite=overwrite, once=once) as done:
            told = processes.agreed(True)
            yield processes.agreed(done)
    except RunError as error:
        if not told:
            error.everywhere = not processes.agreed(False)
        raise


@contextmanager
def _opened(
    workdir: Path, config: Any, record: dict[str, Any], *, overwrite: bool, once: bool
) -> Iterator[bool]:
    check_workdir(workdir, overwrite=overwrite)
    made = [p for p in (workdir, *workdir.parents) if not p.exists()]
    with _at_the_door(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    with _locked(workdir):
        try:
            with _at_the_door(workdir):
                before, replaced = _claim(workdir, config, overwrite=overwrite)
                same = once and before is not None and replaced is None
                done = (
                    same and unchanged(before, config, workdir) and stands(workdir, before, config)
                )
                if not done:
                    shown = published(record, workdir)
                    write_json(workdir / RECORD, _new_record(shown, before, replaced))
        except BaseException:
            _remove(made)
            raise
        if done:
            yield True
            return
        fresh = before is None or replaced is not None
        try:
            yield False
        except SystemExit as end:
            if not end.code:  # stopped by a signal, with everything saved
                _forget_replaced(workdir)
            raise
        except BaseException as error:
            if fresh:
                _take_back(workdir, record, replaced, isinstance(error, UserError))
                _remove(made)
            elif isinstance(error, UserError):
                write_json(workdir / RECORD, before)  # it was not taken up with what may change
            raise
        _forget_replaced(workdir)
        _name_artefacts(workdir, config, record.get("writes", ()))


def check_workdir(workdir: Path, *, overwrite: bool) -> None:
    """ConfigError for what cannot be the directory of a run, whatever is in it."""
    told = f"--workdir={workdir}".encode(errors="backslashreplace").decode()
    with _at_the_door(workdir):
        if (reason := unfit_path(workdir)) is not None:
            raise ConfigError(f"{told}: {reason}; choose another --workdir")
        place = workdir.resolve(strict=False)  # OSError or RuntimeError for links in a ring
        if place.exists() and not place.is_dir():
            raise ConfigError(f"{told} is not a directory")
        if workdir.is_symlink() and not place.exists():
            raise ConfigError(f"{told} is a link to {place}, which does not exist")
        present = next(p for p in (place, *place.parents) if p.exists())
        if not present.is_dir():
            raise ConfigError(f"{told}: {present} is not a directory")
    if not os.access(present, os.W_OK | os.X_OK):
        raise ConfigError(f"{told}: {present} may not be written to; choose another --workdir")
    homes = [Path(os.path.expanduser("~")).resolve(), Path.cwd().resolve()]
    if overwrite and any(place in (home, *home.parents) for home in homes):
        raise ConfigError(
            f"{told} --overwrite: holds the current directory or your home; name the"
            " run's own directory, from outside of it"
        )


@contextmanager
def _at_the_door(workdir: Path) -> Iterator[None]:
    """Within it what the system says against `workdir` is a ConfigError; a full disk is none."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise ConfigError(f"--workdir={workdir}: {reason}; choose another --workdir") from error


def _new_record(record: dict[str, Any], before: Any, replaced: str | None) -> dict[str, Any]:
    """`record` with our mark, and with what else is known of the run that goes on."""
    before = {name: v for name, v in (before or {}).items() if name != ARTEFACTS}
    earlier = replacing.asides(before)
    if replaced is None:
        return {"schema": SCHEMA} | before | record
    return {"schema": SCHEMA} | record | {"replaces": [*earlier, replaced]}


def _take_back(
    workdir: Path, record: dict[str, Any], replaced: str | None, by_mistake: bool
) -> None:
    """After a failure: a run that saved nothing leaves nothing, and what it replaced is back."""
    traces: tuple[str, ...] = (TOKENS,) if by_mistake else ()
    if replaced is not None:
        traces = replacing.TRACES
    writes = record.get("writes", ())
    if all(p.parts[0] in (*traces, RECORD) for p in replacing.written(workdir, writes)):
        if replaced is None:
            replacing.delete(workdir, writes)
            return
        replacing.delete(workdir, writes, among=traces)
        replacing.put_back(workdir, replaced)
    elif replaced is not None:
        _say(f"the run that this one replaces is in {workdir / replaced} until this one is done")


def _forget_replaced(workdir: Path) -> None:
    record = read_record(workdir) or {}
    names = replacing.asides(record)
    for name in names:
        kept = replacing.forget(workdir, name)
        if kept is not None:
            _say(f"{kept} holds what the run that was replaced had not written")
    if names:
        write_json(workdir / RECORD, {k: v for k, v in record.items() if k != "replaces"})


def _name_artefacts(workdir: Path, config: Any, writes: Sequence[str]) -> None:
    """Puts what a finished run has written, and what it was made of, into its record."""
    write_json(workdir / RECORD, (read_record(workdir) or {}) | finish(workdir, config, writes))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _remove(made: Sequence[Path]) -> None:
    """Takes back directories, innermost first, as far as nothing is in them."""
    for path in made:
        try:
            path.rmdir()
        except OSError:
            return


@contextmanager
def _locked(workdir: Path) -> Iterator[None]:
    # The system lets go of it when the process ends, however it ends: no lock is ever stale.
    with _at_the_door(workdir):
        descriptor = os.open(workdir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{workdir} is in use by another process{_holder(workdir)}; "
                "wait for it, stop it, or choose another --workdir"
            ) from None
        except OSError as error:  # a file system without locks
            print(f"warning: {workdir} cannot be locked ({error.strerror})", file=sys.stderr)
        yield
    finally:
        os.close(descriptor)


def _holder(workdir: Path) -> str:
    try:
        record = read_record(workdir) or {}
    except ConfigError:
        return ""
    process = record.get("process")
    if not isinstance(process, dict):
        return ""  # of an earlier version
    where = "this machine" if process.get("machine") == _machine() else "another machine"
    return f", {process.get('id')} on {where}"


def _claim(
    workdir: Path, config: Any, *, overwrite: bool
) -> tuple[dict[str, Any] | None, str | None]:
    """The record of the run in `workdir` if there is one, and where it was set aside to."""
    replacing.recover(workdir, read_record(workdir))
    record = read_record(workdir)
    if record is None:
        half = RECORD + PARTIAL  # of a run that was killed before it had a record
        strangers = sorted(p.name for p in workdir.iterdir() if p.name != half and _is_stranger(p))
        if strangers:
            more = f" and {len(strangers) - 3} more" if len(strangers) > 3 else ""
            raise ConfigError(
                f"{workdir} holds {', '.join(strangers[:3])}{more} and no record of a run"
                f" ({RECORD}); choose another --workdir, or move them away"
            )
        return None, None
    if overwrite:
        return record, replacing.set_aside(workdir, record)
    differences = changes(record, config, workdir)
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        old = replacing.asides(record)
        before = f" (it replaces the run in {workdir / old[-1]})" if old else ""
        raise ConfigError(
            f"{workdir} holds a run with another configuration"
            f" ({', '.join(differences[:3])}{more}){before}; choose another --workdir, or"
            " --overwrite"
        )
    return record, None


def _is_stranger(path: Path) -> bool:
    if path.is_dir() and not path.is_symlink() and path.name != ".git":
        return any(_is_stranger(inner) or not inner.is_dir() for inner in path.iterdir())
    return not _LOGS.fullmatch(path.name)


def describe(
    config: Any, config_file: str, mesh: str, argv: Sequence[str], *, writes: Sequence[str] = ()
) -> dict[str, Any]:
    """The record of a run; `writes` are the files that its script alone writes (replacing.py)."""
    versions = {"instruct_jax": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "config": dataclasses.asdict(config),
        "config_file": config_file,
        "command": [_script(), *argv],
        "mesh": mesh,
        "versions": versions,
        "commit": _commit(),
        # For whom finds the run in use; a machine is told from others, not named.
        "process": {"id": os.getpid(), "machine": _machine()},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "writes": list(writes),
    }


def _script() -> str:
    """The script as it is named in a checkout, wherever that lies."""
    path = Path(os.path.abspath(sys.argv[0]))
    inside = path.is_relative_to(REPOSITORY)
    return str(path.relative_to(REPOSITORY)) if inside else sys.argv[0]


def _machine() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:12]


def _commit() -> str | None:
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # not a checkout, or no git
    return done.stdout.strip()
