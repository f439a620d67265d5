"""`--overwrite`: the files of a run set aside, put back, or deleted; and nothing but those (R19).

What a run wrote is known by its names: those that every stage writes (COMMON) and those that its
script names (`writes`, kept in the record). Whatever else stands in the folder stays where it is. A
link that stands in the way of the new run is set aside with the rest, is not followed and never
deleted.

The files wait in WORKDIR/replaced-TIME until the new run stands. One file decides which run the
folder belongs to, its record, and that is replaced in one step: the new one says what it
`replaces`. So a process that is killed at any point leaves the one run or the other, and `recover`
ends what it had begun.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from instruct_jax.cli.record import RECORD, is_record
from instruct_jax.files import PARTIAL, write_bytes

_MODEL = (
    "model.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "generation_config.json", "params",
    "params.*-tmp*",
)  # fmt: skip
# "*" is any part of a name, "#" a number; a folder is meant with all that is in it. A name that
# ends in "/" is a folder with a record, or at least the common names, of its own. A file that is
# being written has PARTIAL behind its name.
COMMON = (
    RECORD, "ledger.log",
    "checkpoints/#", "checkpoints/#.deleting", "checkpoints/#.*-tmp*", "checkpoints/pinned.json",
    "damaged/#", "damaged/#.#",
    "tensorboard/*/events.out.tfevents.*",
    "tokens/*-*/plan.json", "tokens/*-*/#.tokens", "tokens/*-*/#.json", "tokens/*-*/#.sums",
    *(f"{folder}/{name}" for folder in ("model", "best") for name in _MODEL),
    "adapter/adapter.json", "adapter/params", "adapter/params.*-tmp*",
)  # fmt: skip
# What a save writes into a folder of arrays; once it is finished its manifest names all of it.
_MANIFEST = "manifest.json"
_STORE = ("manifest.ocdbt", "manifest.ocdbt.__lock", "d/*")
_ITEM = (
    "_METADATA", "_sharding", "commit_success.txt", "array_metadatas/process_#", *_STORE,
    *(f"ocdbt.process_#/{name}" for name in _STORE),
)  # fmt: skip
_ARRAYS = (
    _MANIFEST, "_CHECKPOINT_METADATA", "commit_success.txt",
    "orbax.checkpoint", *(f"*/{name}" for name in _ITEM),
)  # fmt: skip
_HOLDS_ARRAYS = re.compile(r"(.*/)?((checkpoints|damaged)/[^/]*|params(\..*-tmp.*)?)", re.DOTALL)
# Of a run that has yet to save anything: without these it is as if it had not begun.
TRACES = ("ledger.log", "tensorboard", "tokens", RECORD + PARTIAL)
_NO_ARTEFACTS = (RECORD, "ledger.log", "tensorboard", "tokens", "checkpoints", "damaged")
_ASIDE = re.compile(r"replaced-\d{8}T\d{6}Z(\.\d+)?")


def model_files(folder: str) -> tuple[str, ...]:
    """The names of the files of a model folder, for `writes`."""
    return tuple(f"{folder}/{name}" for name in _MODEL)


def written(workdir: Path, writes: Sequence[str]) -> list[Path]:
    """The files and whole folders in `workdir` that a run wrote, and links in their place.

    Relative to it; records come last.
    """
    found = list(_written(workdir, Path(), (*COMMON, *writes)))
    return sorted(found, key=lambda path: (path.name == RECORD, -len(path.parts)))


def artefacts(workdir: Path, writes: Sequence[str]) -> Iterator[Path]:
    """The files in `workdir` that a run wrote and is done with, relative to it.

    Folders of arrays have manifests, tokens their checksums, and a run inside has its own record.
    """
    for path in written(workdir, writes):
        inside = any(is_run(workdir / folder) for folder in path.parents[:-1])
        place = workdir / path
        if path.parts[0] in _NO_ARTEFACTS or inside or place.is_symlink() or not place.is_file():
            continue
        yield path


def _written(root: Path, below: Path, patterns: Sequence[str]) -> Iterator[Path]:
    for entry in sorted((root / below).iterdir()):
        path = below / entry.name
        if any(_matches(path, pattern) for pattern in patterns if not pattern.endswith("/")):
            yield path
        elif entry.is_symlink():
            if any(_matches(path, pattern, whole=False) for pattern in patterns):
                yield path
        elif not entry.is_dir() or _ASIDE.fullmatch(entry.name):
            continue
        elif any(_matches(path, pattern) for pattern in patterns if pattern.endswith("/")):
            inner = filter(None, (_below(path, pattern) for pattern in patterns))
            own = (*COMMON, *_writes_of(_read(entry)), *inner)
            yield from (path / found for found in _written(entry, Path(), own))
        elif any(_matches(path, pattern, whole=False) for pattern in patterns):
            yield from _written(root, path, patterns)


def _below(path: Path, pattern: str) -> str:
    """What `pattern` says of names in the folder `path`; nothing where it is of another folder."""
    *above, rest = pattern.split("/", len(path.parts))
    return rest if len(above) == len(path.parts) and all(map(_fits, path.parts, above)) else ""


def _matches(path: Path, pattern: str, *, whole: bool = True) -> bool:
    """Whether `path` is what `pattern` says, or else a folder on the way to it."""
    wanted = pattern.rstrip("/").split("/")
    if len(path.parts) > len(wanted) or (whole and len(path.parts) < len(wanted)):
        return False
    return all(map(_fits, path.parts, wanted))


def _fits(name: str, pattern: str) -> bool:
    regex = re.escape(pattern).replace(r"\*", ".*").replace(r"\#", r"\d+")
    return re.fullmatch(f"{regex}({re.escape(PARTIAL)})?", name, re.DOTALL) is not None


def _read(workdir: Path) -> Mapping[str, Any]:
    """The record there if it is one, else nothing."""
    try:
        record = json.loads((workdir / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if is_record(record) else {}


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run."""
    return bool(_read(folder))


def _writes_of(record: Mapping[str, Any]) -> list[str]:
    writes = record.get("writes", [])
    return [name for name in writes if isinstance(name, str)] if isinstance(writes, list) else []


def asides(record: Mapping[str, Any]) -> list[str]:
    """The folders of the runs that the run of `record` replaces."""
    names = record.get("replaces", [])
    names = names if isinstance(names, list) else []
    return [name for name in names if isinstance(name, str) and _ASIDE.fullmatch(name)]


def set_aside(workdir: Path, record: Mapping[str, Any]) -> str:
    """Moves what the run of `record` wrote into a folder of `workdir`, and returns its name.

    The record itself is there too, and still here: until it is replaced this is that run.
    """
    stamp = time.strftime("replaced-%Y%m%dT%H%M%SZ", time.gmtime())
    names = [stamp, *(f"{stamp}.{i}" for i in range(1, 100))]
    aside = next(workdir / name for name in names if not os.path.lexists(workdir / name))
    paths = [path for path in written(workdir, _writes_of(record)) if path != Path(RECORD)]
    aside.mkdir()
    try:
        write_bytes(aside / RECORD, (workdir / RECORD).read_bytes())
        for path in paths:
            (aside / path).parent.mkdir(parents=True, exist_ok=True)
            os.rename(workdir / path, aside / path)
            _leave_if_empty(workdir, path.parent)
    except BaseException:
        put_back(workdir, aside.name)
        raise
    return aside.name


def put_back(workdir: Path, name: str) -> None:
    """Undoes `set_aside`: the run that it moved is the one in `workdir` again."""
    aside = workdir / name
    if (aside / RECORD).exists():
        os.replace(aside / RECORD, workdir / RECORD)
    _merge(aside, workdir)


def _merge(source: Path, target: Path) -> None:
    for entry in list(source.iterdir()):
        place = target / entry.name
        if not os.path.lexists(place):
            os.rename(entry, place)
        elif entry.is_dir() and not entry.is_symlink() and place.is_dir():
            _merge(entry, place)
    if not any(source.iterdir()):
        source.rmdir()


def recover(workdir: Path, record: Mapping[str, Any] | None) -> None:
    """Puts back what a process that was killed had set aside before its own record stood."""
    named = asides(record or {})
    for entry in list(workdir.iterdir()):
        ours = _ASIDE.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink()
        if ours and entry.name not in named:
            put_back(workdir, entry.name)


def forget(workdir: Path, name: str) -> Path | None:
    """Deletes a run that was set aside; where more than it is in the folder, what is left."""
    aside = workdir / name
    if not aside.is_dir() or aside.is_symlink():
        return None
    delete(aside, _writes_of(_read(aside)))
    if not any(aside.iterdir()):
        aside.rmdir()
        return None
    kept = aside.with_name(f"kept-{name.removeprefix('replaced-')}")
    os.rename(aside, kept)
    return kept


def delete(workdir: Path, writes: Sequence[str], *, among: Sequence[str] = ()) -> None:
    """Deletes what a run wrote, or of it what is `among` these; no link and no stranger."""
    for path in written(workdir, writes):
        place = workdir / path
        if place.is_symlink() or (among and path.parts[0] not in among):
            continue
        if not place.is_dir():
            place.unlink()
        elif _HOLDS_ARRAYS.fullmatch(str(path)):
            _delete_arrays(place)
        else:
            shutil.rmtree(place)
        _leave_if_empty(workdir, path.parent)
    _sweep(workdir, Path(), (*COMMON, *writes))


def _delete_arrays(folder: Path) -> None:
    """Deletes what was saved there: what its manifest names, or without one what a save writes."""
    listed = _listed(folder)
    above = {str(parent) for name in listed for parent in Path(name).parents}

    def ours(path: Path, *, whole: bool) -> bool:
        if listed:
            return str(path) in (listed if whole else above)
        return any(_matches(path, pattern, whole=whole) for pattern in _ARRAYS)

    for root, folders, names in os.walk(folder, topdown=False):  # the manifest is among the last
        for name in (*names, *folders):
            place = Path(root, name)
            path = place.relative_to(folder)
            if place.is_symlink():
                continue
            if not place.is_dir():
                if ours(path, whole=True):
                    place.unlink()
            elif ours(path, whole=False) and not any(place.iterdir()):
                place.rmdir()
    if not any(folder.iterdir()):
        folder.rmdir()


def _listed(folder: Path) -> set[str]:
    """The files that the manifest of a saved folder names, and itself; none where there is none."""
    try:
        sums = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return set()
    return {_MANIFEST, _MANIFEST + PARTIAL, *sums} if isinstance(sums, dict) else set()


def _sweep(root: Path, below: Path, patterns: Sequence[str]) -> None:
    """Removes the empty folders that a run makes."""
    for entry in list((root / below).iterdir()):
        path = below / entry.name
        ours = any(_matches(path, pattern, whole=False) for pattern in patterns)
        if ours and entry.is_dir() and not entry.is_symlink():
            _sweep(root, path, patterns)
            if not any(entry.iterdir()):
                entry.rmdir()


def _leave_if_empty(workdir: Path, folder: Path) -> None:
    while folder != Path() and not any((workdir / folder).iterdir()):
        (workdir / folder).rmdir()
        folder = folder.parent
