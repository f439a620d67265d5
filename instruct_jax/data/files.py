"""Raw records from files, each with the place it came from.

JSONL, JSON arrays, CSV, TSV and plain text, also packed, and Parquet are read by their own modules;
saved datasets and hub ids by `hub`. What cannot be read as a record comes out of the stream as a
DataError in its place, so that the caller decides whether to stop or to go on; damage after which
the rest of a file cannot be trusted (a broken archive, a broken JSON array) is raised.
"""

import datetime
import glob
import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from instruct_jax.data import hub
from instruct_jax.data.jsonrows import json_rows
from instruct_jax.data.packed import PACKED, kind_of_file, open_data
from instruct_jax.data.records import Record, Stream
from instruct_jax.data.rows import HASH_SUFFIX, DataError
from instruct_jax.data.tables import csv_rows, parquet_rows
from instruct_jax.data.texts import Split, text_rows

# A memo of `hash_files`: a corpus of terabytes is not read again at every start.
_LONGEST_HASH = 10_000  # bytes of a file that holds one and a name
_SHA256: dict[tuple[str, int, int], str] = {}

_JSON = (".jsonl", ".ndjson", ".json")
_CSV = {".csv": ",", ".tsv": "\t"}
_TEXT = (".txt", ".text", ".md")
_SUFFIXES = (*_JSON, *_CSV, *_TEXT, ".parquet")
# Files of these names in a folder are about its data.
_ABOUT = (
    "readme", "license", "licence", "manifest", "notice", "changelog", "citation",
    "dataset_info", "dataset_infos",
)  # fmt: skip


def open_records(
    source: str | os.PathLike[str],
    *,
    split: Split,
    watch: Callable[[BinaryIO], object] | None = None,
) -> Iterator[tuple[str, Stream]]:
    """(name, records) of every file of a path, glob, folder or hub id; DataError when missing.

    A text file is one record {"text"}, or one a piece, line or paragraph (`split`). All but text
    files as one record are read as the records are asked for. `watch` is given each file as it is
    opened, packed as it may be: its position tells how far the reading is.
    """
    name = os.fspath(source)
    if hub.is_hub_id(name):
        yield name, _table_records(name, hub.load_hub(name))
        return
    for path in find_files(name):
        if path.is_dir():
            yield str(path), _table_records(str(path), hub.load_saved(path))
        else:
            yield str(path), _file_records(path, split, watch)


def find_files(source: str | os.PathLike[str]) -> list[Path]:
    """The files of a path, glob or folder, sorted; a folder saved by `datasets` stays a folder.

    A folder is searched with those in it. What starts with a dot is left out, and what is about
    the data (README.md). DataError where there is none, or a pipe or device among them.
    """
    name = os.path.expanduser(os.fspath(source))
    try:
        found = _found(name)
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
        raise DataError(reason, path=error.filename or name) from error
    return list(dict.fromkeys(found))


def _found(name: str) -> list[Path]:
    kind = _kind(name)
    if kind == "a folder":
        files = sorted(_walk(name))
        if not files:
            raise DataError("no data file in this folder", path=name, hint=_kinds())
        return files
    if kind == "a file":
        return [Path(name)]
    if kind is not None:
        raise DataError(f"{kind}, not a file", path=name)
    if glob.has_magic(name):
        matches = sorted(glob.glob(name, recursive=True))
        if "**" in name:  # goes round and round where a link leads back up
            matches = list({os.path.realpath(match): match for match in reversed(matches)}.values())
            matches.reverse()
        files = [path for match in matches for path in _matched(match)]
        if not files:
            raise DataError("no file matches", path=name)
        return files
    if os.path.islink(name):
        return _matched(name)
    near = hub.nearest_path(name)
    hint = f'did you mean "{near}"?' if near else None
    raise DataError("no such file", path=name, hint=hint)


def _matched(name: str) -> list[Path]:
    kind = _kind(name)
    if kind == "a folder":
        return sorted(_walk(name))
    if kind == "a file":
        return [Path(name)]
    raise DataError(f"{kind or 'a link that leads nowhere'}, not a file", path=name)


def _walk(name: str) -> Iterator[Path]:
    """The data files in a folder and in those inside it; a link back up is not followed again."""

    def refuse(error: OSError) -> None:
        raise error

    seen = set()
    for root, folders, names in os.walk(name, followlinks=True, onerror=refuse):
        stat = os.stat(root)
        known = (stat.st_dev, stat.st_ino) in seen
        seen.add((stat.st_dev, stat.st_ino))
        if known or hub.is_saved(Path(root)):
            folders.clear()
            if not known:
                yield Path(root)
            continue
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        for path in (Path(root, file) for file in names if not file.startswith(".")):
            if _suffix(path) in _SUFFIXES and path.name.split(".")[0].lower() not in _ABOUT:
                yield from _matched(str(path))


def _kind(name: str) -> str | None:
    """What is there, in words; None for nothing."""
    try:
        return kind_of_file(os.stat(name).st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        return None


def hash_files(source: str | os.PathLike[str]) -> dict[str, str]:
    """sha256 of every file of a path, glob or folder, by its path; a hub id has none to give."""
    if hub.is_hub_id(os.fspath(source)):
        return {os.fspath(source): "hub"}
    return {str(path): _hash(path) for path in list_files(source)}


def same_file(one: str, other: str) -> tuple[str, str] | None:
    """(name, name) of a file of the source `one` that is a file of `other` as well, or a copy."""
    if hub.is_hub_id(one) or hub.is_hub_id(other):
        return (one, other) if one == other else None
    others = list_files(other)
    sizes = {path: path.stat().st_size for path in others}
    for path in list_files(one):
        size = path.stat().st_size
        for beside in (beside for beside in others if sizes[beside] == size):
            if os.path.samefile(path, beside) or _hash(path) == _hash(beside):
                return str(path), str(beside)
    return None


def _hash(path: Path) -> str:
    try:
        stat = path.stat()
        known = (str(path), stat.st_size, stat.st_mtime_ns)
        if known not in _SHA256:
            with open(path, "rb") as file:
                _SHA256[known] = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", path=path) from error
    return _SHA256[known]


def check_hash(path: Path) -> None:
    """DataError for a file that is not the one whose sha256 stands beside it (`write_rows`)."""
    beside = path.with_name(path.name + HASH_SUFFIX)
    if beside.is_file():
        said = re.search(rb"\b[0-9a-f]{64}\b", beside.read_bytes()[:_LONGEST_HASH])
        if said is None or said[0].decode() != _hash(path):
            reason = f"not the file that {beside.name} is of: cut short, or changed since"
            hint = f"if you changed it, delete {beside.name}; else copy both again"
            raise DataError(reason, path=path, hint=hint)


def remember_hashes(plan: Mapping[str, Mapping[str, Any]]) -> None:
    """Spares `hash_files` the reading of files that are as they were when these were written down:
    {path: {"size": bytes, "mtime_ns": time of change, "sha256"}}.
    """
    for path, stat in plan.items():
        _SHA256[path, stat["size"], stat["mtime_ns"]] = stat["sha256"]


def list_files(source: str | os.PathLike[str]) -> list[Path]:
    """The files of a path, glob or folder, also those inside a folder saved by `datasets`."""
    return [
        path
        for found in find_files(source)
        for path in ([found] if found.is_file() else sorted(found.rglob("*")))
        if path.is_file()
    ]


def _file_records(path: Path, split: Split, watch: Callable[[BinaryIO], object] | None) -> Stream:
    suffix = _suffix(path)
    if suffix not in _SUFFIXES:
        raise DataError("unknown kind of file", path=path, hint=_kinds())
    check_hash(path)
    if suffix == ".parquet":
        if path.suffix.lower() in PACKED:
            raise DataError("Parquet is packed in itself", path=path, hint="unpack it")
        yield from _table_records(str(path), parquet_rows(path))
        return
    with open_data(path, watch) as file:
        if suffix in _CSV:
            yield from csv_rows(path, file, _CSV[suffix])
            return
        start = file.peek(64)
        if b"\r" in start and b"\n" not in start:
            hint = "tr '\\r' '\\n' < FILE > NEW"
            raise DataError("its lines end with CR alone", path=path, line=1, hint=hint)
        if suffix in _TEXT:
            yield from text_rows(path, file, split)
        else:
            yield from json_rows(path, file)


def _table_records(name: str, rows: Iterable[dict[str, Any]]) -> Stream:
    """A dataset has every column in every row; what a row lacks is None, or NaN."""
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            fields = {}
            try:
                for key, value in row.items():
                    fields[key] = _plain(value)
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                reason = f"bytes that are not UTF-8: 0x{byte:02x}"
                hint = "a column of texts is expected: leave others out"
                yield DataError(reason, path=name, line=number, field=key, hint=hint)
                continue
            yield Record({k: v for k, v in fields.items() if v is not None}, name, number)
    except DataError:
        raise
    except Exception as error:  # of `datasets`, which raises many kinds
        reason = f"cannot be read after row {number}: {(str(error).splitlines() or ['?'])[0]}"
        raise DataError(reason, path=name) from error


def _plain(value: Any) -> Any:
    """A value of a table as one of JSON: no NaN, a time as text, and bytes, which are UTF-8."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else str(value)


def _suffix(path: Path) -> str:
    return Path(path.stem if path.suffix.lower() in PACKED else path.name).suffix.lower()


def _kinds() -> str:
    return f"known: {', '.join(_SUFFIXES)}, also packed ({', '.join(PACKED)})"
