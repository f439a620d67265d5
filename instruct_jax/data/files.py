"""Raw records from files, each with the place it came from.

JSONL, JSON arrays, CSV, TSV and plain text, plain or gzipped, are read here; Parquet files, saved
datasets and hub ids go to `hub`. What cannot be read as a record comes out of the stream as a
DataError in its place, so that the caller decides whether to stop or to go on; damage after which
the rest of a file cannot be trusted (a broken gzip stream, a broken JSON array) is raised.
"""

import csv
import difflib
import glob
import gzip
import hashlib
import io
import json
import math
import os
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from instruct_jax.data import hub
from instruct_jax.data.rows import DataError

Split = Literal["file", "piece", "line", "paragraph"]
# Characters of a piece of a long text, which goes on to the end of its paragraph.
PIECE = 20_000
# A line longer than this is not a row but a mistake, such as a file without line ends.
MAX_LINE_BYTES = 8 * 2**20

# A memo of `hash_files`: a corpus of terabytes is not read again at every start.
_SHA256: dict[tuple[str, int, int], str] = {}

_JSON = (".jsonl", ".ndjson", ".json")
_CSV = {".csv": ",", ".tsv": "\t"}
_TEXT = (".txt", ".text", ".md")
_SUFFIXES = (*_JSON, *_CSV, *_TEXT, ".parquet")


@dataclass(frozen=True)
class Record:
    """One object of a file: its fields, and where it stands (`raw` is its text, when there is one).

    `line` counts from 1; in a dataset without lines it is the row number, also from 1.
    """

    fields: dict[str, Any]
    path: str
    line: int
    column: int = 1
    raw: str = ""

    def error(self, reason: str, *, field: str | None = None, hint: str | None = None) -> DataError:
        """A DataError at this record, or at `field` of it."""
        at = max(self.raw.find(json.dumps(field)), 0) if field else 0
        value = self.fields.get(field) if field else None
        excerpt = json.dumps(value, default=str) if field in self.fields else self.raw or None
        line, column = _position(self.raw, at, self.line, self.column)
        return DataError(
            reason,
            path=self.path,
            line=line,
            column=column if self.raw else None,
            field=field,
            excerpt=value if isinstance(value, str) else excerpt,
            hint=hint,
        )


Stream = Generator[Record | DataError, None, None]


def open_records(
    source: str | os.PathLike[str],
    *,
    split: Split,
    watch: Callable[[BinaryIO], object] | None = None,
) -> Iterator[tuple[str, Stream]]:
    """(name, records) of every file of a path, glob, folder or hub id; DataError when missing.

    A text file is one record {"text"}, or one a piece, line or paragraph (`split`). All but JSON
    arrays, and text files as one record, are read as the records are asked for. `watch` is given
    each file as it is opened, packed as it may be: its position tells how far the reading is.
    """
    name = os.fspath(source)
    if hub.is_hub_id(name):
        yield name, _hub_records(name, hub.load_hub(name))
        return
    for path in find_files(name):
        if path.is_dir():
            yield str(path), _hub_records(str(path), hub.load_saved(path))
        else:
            yield str(path), _file_records(path, split, watch)


def find_files(source: str | os.PathLike[str]) -> list[Path]:
    """The files of a path, glob or folder, sorted; a folder saved by `datasets` stays a folder."""
    name = os.path.expanduser(os.fspath(source))
    path = Path(name)
    if path.is_dir():
        if hub.is_saved(path):
            return [path]
        files = sorted(f for f in path.iterdir() if f.is_file() and _suffix(f) in _SUFFIXES)
        if not files:
            raise DataError("no data file in this folder", path=path, hint=_kinds())
        return files
    if path.is_file():
        return [path]
    if glob.has_magic(name):
        files = sorted(Path(found) for found in glob.glob(name, recursive=True))
        if not files:
            raise DataError("no file matches", path=name)
        return files
    siblings = [f.name for f in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    hint = f'did you mean "{path.with_name(close[0])}"?' if close else None
    raise DataError("no such file", path=name, hint=hint)


def hash_files(source: str | os.PathLike[str]) -> dict[str, str]:
    """sha256 of every file of a path, glob or folder, by its path; a hub id has none to give."""
    if hub.is_hub_id(os.fspath(source)):
        return {os.fspath(source): "hub"}
    hashes = {}
    for path in list_files(source):
        try:
            stat = path.stat()
            known = (str(path), stat.st_size, stat.st_mtime_ns)
            if known not in _SHA256:
                with open(path, "rb") as file:
                    _SHA256[known] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror or error}", path=path) from error
        hashes[str(path)] = _SHA256[known]
    return hashes


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


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return names.get(type(value), "null" if value is None else "a number")


def _file_records(path: Path, split: Split, watch: Callable[[BinaryIO], object] | None) -> Stream:
    suffix = _suffix(path)
    if suffix not in _SUFFIXES:
        raise DataError("unknown kind of file", path=path, hint=_kinds())
    if suffix == ".parquet":
        yield from _hub_records(str(path), hub.load_parquet(path))
        return
    try:
        with open(path, "rb") as packed, _unpacked(packed, path) as file:
            if watch is not None:
                watch(packed)
            if suffix in _CSV:
                yield from _csv_records(path, file, _CSV[suffix])
            elif suffix in _TEXT:
                yield from _text_records(path, file, split)
            elif file.peek(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
                yield from _array_records(path, file)
            else:
                yield from _line_records(path, file)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"damaged gzip file: {error}", path=path) from error
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", path=path) from error


def _unpacked(file: io.BufferedReader, path: Path) -> io.BufferedReader:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=file))  # type: ignore[arg-type]
    return file


def _line_records(path: Path, file: io.BufferedReader) -> Stream:
    number = 0
    while data := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(data) > MAX_LINE_BYTES:
            while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
            limit = f"line of more than {MAX_LINE_BYTES // 2**20} MiB"
            hint = "put one row on a line, or give long documents as .txt files"
            excerpt = data[:60].decode("utf-8", "replace")
            yield DataError(limit, path=path, line=number, excerpt=excerpt, hint=hint)
            continue
        if number == 1:
            data = data.removeprefix(b"\xef\xbb\xbf")
        try:
            text = _decode(data, path, number).strip("\r\n")
            if text.strip():
                yield _parse(text, path, number)
        except DataError as error:
            yield error


def _array_records(path: Path, file: io.BufferedReader) -> Stream:
    """The elements are found first and then parsed as lines are, each at its own place."""
    text = _decode(file.read(), path, 1).removeprefix("\ufeff")
    decoder = json.JSONDecoder()
    end = text.index("[") + 1
    line, column = _position(text, end, 1, 1)
    while True:
        start = _skip(text, end, " \t\r\n,")
        line, column = _position(text[end:start], start - end, line, column)
        if text[start : start + 1] == "]":
            return
        try:
            _, after = decoder.raw_decode(text, start)
        except (RecursionError, ValueError) as error:
            raise _not_json(error, text, path, 1, hint="nothing after this can be read") from None
        try:
            yield _parse(text[start:after], path, line, column)
        except DataError as error:
            yield error
        line, column = _position(text[start:after], after - start, line, column)
        end = after


def _parse(text: str, path: Path, line: int, column: int = 1) -> Record:
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except _RowError as error:
        raise error.at(text, path, line, column) from None
    except (RecursionError, ValueError) as error:
        raise _not_json(error, text, path, line) from None
    if not isinstance(value, dict):
        reason = f"expected an object, found {kind_of(value)}"
        raise DataError(reason, path=path, line=line, column=column, excerpt=text)
    return Record(value, str(path), line, column, text)


def _not_json(
    error: Exception, text: str, path: Path, line: int, *, hint: str | None = None
) -> DataError:
    """What the library says, at its place in `text`, which starts at `line`."""
    # Deep nesting and numbers of thousands of digits fail without a position.
    at = error.pos if isinstance(error, json.JSONDecodeError) else 0
    if text.startswith("\ufeff"):
        hint = "a byte order mark inside the file: were files joined?"
    elif hint is None and at >= len(text.rstrip()):
        hint = "one whole JSON object a line, or one array of objects a file"
    line, column = _position(text, at, line, 1)
    reason = f"not JSON: {getattr(error, 'msg', error)}"
    near = text[max(0, at - 20) : at + 60]
    return DataError(reason, path=path, line=line, column=column, excerpt=near, hint=hint)


def _csv_records(path: Path, file: io.BufferedReader, delimiter: str) -> Stream:
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, delimiter=delimiter, strict=True)
        try:
            _ = reader.fieldnames  # reads the header, which may have line ends in it
            line = reader.line_num + 1
            for row in reader:
                if None in row:
                    extra = f"{len(row[None])} values more than columns"
                    yield DataError(extra, path=path, line=line)
                elif missing := [name for name, value in row.items() if value is None]:
                    yield DataError("the row has no value", path=path, line=line, field=missing[0])
                else:
                    yield Record(dict(row), str(path), line)
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"not CSV: {error}", path=path, line=reader.line_num) from error
        except UnicodeDecodeError as error:
            reason = f"not UTF-8: {error.reason}"
            raise DataError(reason, path=path, line=reader.line_num + 1) from error


def _text_records(path: Path, file: io.BufferedReader, split: Split) -> Stream:
    lines = _text_lines(path, file)
    if split in ("file", "piece"):
        for line, text in _blocks(lines, math.inf if split == "file" else PIECE):
            if split == "file" or text.strip():
                yield Record({"text": text}, str(path), line, raw=text)
        return
    for line, text in lines if split == "line" else _blocks(lines, 0):
        if text.strip():
            lead = text[: len(text) - len(text.lstrip("\n"))].count("\n")
            yield Record({"text": text.strip("\n")}, str(path), line + lead, raw=text)


def _text_lines(path: Path, file: io.BufferedReader) -> Iterator[tuple[int, str]]:
    """(number, line with its end as a newline); no line is too long here."""
    for number, data in enumerate(file, 1):
        text = _decode(data, path, number)
        text = text.removeprefix("\ufeff") if number == 1 else text
        yield number, text[:-2] + "\n" if text.endswith("\r\n") else text


def _blocks(lines: Iterator[tuple[int, str]], size: float) -> Iterator[tuple[int, str]]:
    """(number of the first line, text) of blocks, which end with the first empty line that starts
    after `size` characters; the last one ends with the file, and is never empty but in an empty
    file.
    """
    block: list[str] = []
    first, length, number = 1, 0, 0
    for number, line in lines:
        if not block:
            first, length = number, 0
        block.append(line)
        length += len(line)
        if line == "\n" and len(block) > 1 and length - 2 >= size:
            yield first, "".join(block)
            block = []
    if block or number == 0:
        yield first, "".join(block)


def pieces(text: str) -> Iterator[str]:
    """`text` cut at ends of paragraphs into pieces of PIECE characters or a little more; a blank
    piece is left out.
    """
    start = 0
    while start < len(text):
        end = text.find("\n\n", start + PIECE)
        end = len(text) if end < 0 else end + 2
        if not text[start:end].isspace():
            yield text[start:end]
        start = end


def _hub_records(name: str, rows: Iterable[dict[str, Any]]) -> Stream:
    for number, row in enumerate(rows, 1):
        # A dataset has every column in every row; what a row lacks is None.
        fields = {key: value for key, value in row.items() if value is not None}
        yield Record(fields, name, number)


class _RowError(ValueError):
    """A mistake inside an object, found while the library parses it and knows no position."""

    def __init__(self, reason: str, key: str) -> None:
        super().__init__(reason)
        self.reason, self.key = reason, key

    def at(self, text: str, path: Path, line: int, column: int) -> DataError:
        """The error at the key, or where the key comes again."""
        first = text.find(self.key)
        found = max(first, text.find(self.key, first + 1))
        line, column = _position(text, found, line, column)
        excerpt = text[max(0, found - 20) :]
        return DataError(self.reason, path=path, line=line, column=column, excerpt=excerpt)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        key = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise _RowError(f'duplicate key "{key}"', json.dumps(key, ensure_ascii=False))
    return values


def _no_constant(name: str) -> float:
    raise _RowError(f"{name} is not a number in JSON", name)


def _decode(data: bytes, path: Path, line: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8")
        line, column = _position(before, len(before), line, 1)
        utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        raise DataError(
            f"not UTF-8: byte 0x{data[error.start]:02x}",
            path=path,
            line=line,
            column=column,
            excerpt=data[max(0, error.start - 20) : error.start + 40].decode("utf-8", "replace"),
            hint="the file is UTF-16; save it as UTF-8" if utf16 else None,
        ) from None


def _position(text: str, at: int, line: int, column: int) -> tuple[int, int]:
    """(line, column) of `text[at]` when `text[0]` stands at (line, column)."""
    newlines = text.count("\n", 0, at)
    if not newlines:
        return line, column + at
    return line + newlines, at - text.rfind("\n", 0, at)


def _skip(text: str, at: int, characters: str) -> int:
    while at < len(text) and text[at] in characters:
        at += 1
    return at


def _suffix(path: Path) -> str:
    return Path(path.stem if path.suffix == ".gz" else path.name).suffix.lower()


def _kinds() -> str:
    return f"known: {', '.join(_SUFFIXES)}, also with .gz"
