"""One record of a file: its fields, the place it came from, and how its JSON is read.

What is not JSON by the letter of RFC 8259 is refused, and so is what a row cannot mean: a key that
stands twice, NaN, half of a surrogate pair, numbers and nesting without end. Each refusal says the
line and the column.
"""

import json
import math
import os
import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

from instruct_jax.data.rows import DataError

# A line or a row longer than this is a mistake, such as a file without line ends.
MAX_ROW_BYTES = 8 * 2**20
MAX_DEPTH = 100  # of lists and objects in one another

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


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

    @property
    def in_table(self) -> bool:
        """Whether it is a row of a table, whose lists may be kept as the text of their JSON."""
        return not self.raw

    def error(self, reason: str, *, field: str | None = None, hint: str | None = None) -> DataError:
        """A DataError at this record, or at `field` of it."""
        at = max(self.raw.find(json.dumps(field)), 0) if field else 0
        value = self.fields.get(field) if field else None
        excerpt = json.dumps(value, default=str) if field in self.fields else self.raw or None
        line, column = position(self.raw, at, self.line, self.column)
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


def parse_record(
    text: str, path: str | os.PathLike[str], line: int, column: int = 1, *, hint: str | None = None
) -> Record:
    """The record whose JSON `text` starts at (line, column); DataError when it is none."""
    try:
        value = _DECODER.decode(text)
    except _RowError as error:
        raise error.at(text, path, line, column) from None
    except (RecursionError, ValueError) as error:
        raise not_json(error, text, path, line, column, hint=hint) from None
    if not isinstance(value, dict):
        reason = f"expected an object, found {kind_of(value)}"
        raise DataError(reason, path=path, line=line, column=column, excerpt=text)
    if text.count("{") + text.count("[") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise DataError(_TOO_DEEP, path=path, line=line, column=column, excerpt=text)
    record = Record(value, os.fspath(path), line, column, text)
    if _SURROGATE_ESCAPE.search(text):
        for key, inner in value.items():
            for half in filter(None, map(lone_surrogate, _texts(key, inner))):
                raise record.error(f"lone surrogate {half}", field=key)
    return record


def not_json(
    error: Exception,
    text: str,
    path: str | os.PathLike[str],
    line: int,
    column: int = 1,
    *,
    hint: str | None = None,
) -> DataError:
    """What the library says, at its place in `text`, which starts at (line, column)."""
    # Deep nesting and numbers of thousands of digits fail without a position.
    at = error.pos if isinstance(error, json.JSONDecodeError) else 0
    if text.startswith("\ufeff"):
        hint = "a byte order mark inside the file: were files joined?"
    elif hint is None and at >= len(text.rstrip()):
        hint = "one whole JSON object a line, or one array of objects a file"
    line, column = position(text, at, line, column)
    reason = f"not JSON: {getattr(error, 'msg', 'a number of thousands of digits')}"
    reason = _TOO_DEEP if isinstance(error, RecursionError) else reason
    near = text[max(0, at - 20) : at + 60]
    return DataError(reason, path=path, line=line, column=column, excerpt=near, hint=hint)


def not_utf8(byte: int, *, path: str | os.PathLike[str], line: int, **place: Any) -> DataError:
    """A DataError for a byte that no UTF-8 text has there."""
    reason = f"not UTF-8: byte 0x{byte:02x}"
    hint = "of a Windows file: iconv -f WINDOWS-1252 -t UTF-8"
    return DataError(reason, path=path, line=line, hint=hint, **place)


def decode(data: bytes, path: str | os.PathLike[str], line: int) -> str:
    """`data`, which starts `line`, as text; DataError at the first byte that is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8")
        line, column = position(before, len(before), line, 1)
        excerpt = data[max(0, error.start - 20) : error.start + 40].decode("utf-8", "replace")
        byte = data[error.start]
        raise not_utf8(byte, path=path, line=line, column=column, excerpt=excerpt) from None


def escaped_byte(text: str) -> tuple[int, int] | None:
    """(place, byte) of the first byte that was decoded by "surrogateescape", if any was."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return error.start, ord(text[error.start]) - 0xDC00
    return None


def lone_surrogate(text: str) -> str | None:
    """The first half of a surrogate pair that stands alone in `text`, as "U+D800"."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return f"U+{ord(text[error.start]):04X}"
    return None


def position(text: str, at: int, line: int, column: int) -> tuple[int, int]:
    """(line, column) of `text[at]` when `text[0]` stands at (line, column)."""
    newlines = text.count("\n", 0, at)
    if not newlines:
        return line, column + at
    return line + newlines, at - text.rfind("\n", 0, at)


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return names.get(type(value), "null" if value is None else "a number")


class _RowError(ValueError):
    """A mistake inside an object, found while the library parses it and knows no position."""

    def __init__(self, reason: str, key: str) -> None:
        super().__init__(reason)
        self.reason, self.key = reason, key

    def at(self, text: str, path: str | os.PathLike[str], line: int, column: int) -> DataError:
        """The error at the key, or where the key comes again."""
        first = text.find(self.key)
        found = max(first, text.find(self.key, first + 1), 0)
        line, column = position(text, found, line, column)
        excerpt = text[max(0, found - 20) :]
        return DataError(self.reason, path=path, line=line, column=column, excerpt=excerpt)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        key = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise _RowError(f'duplicate key "{key[:60]}"', json.dumps(key, ensure_ascii=False))
    return values


def _no_constant(name: str) -> float:
    raise _RowError(f"{name} is not a number in JSON", name)


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise _RowError(f"{digits[:30]} is too large for a number", digits)
    return value


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_finite
)
_TOO_DEEP = f"not JSON of a row: nested more than {MAX_DEPTH} deep"


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        inner = (v.values() if isinstance(v, dict) else v for v in level)
        level = [child for v in inner for child in v if isinstance(child, dict | list)]
    return depth


def _texts(*values: Any) -> Iterator[str]:
    """Every string in values that are at most MAX_DEPTH deep, keys too."""
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from _texts(*value, *value.values())
        elif isinstance(value, list):
            yield from _texts(*value)
