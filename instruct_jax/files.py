"""Small files of JSON, and the names that files may have; any room may write and read them so."""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from instruct_jax.errors import CheckpointError

# Orbax and tensorstore take a backslash for a slash, a component such as "gs:" for a URL, and a
# pair of brackets for a pattern when they look for what they have written.
_UNFIT = re.compile(r"\\|\[[^/]*\]|(?<=/)(gs|gcs|s3|az):(?=/|$)")


def unfit_path(path: str | os.PathLike[str]) -> str | None:
    """Why arrays saved below `path` could not be read again, or None."""
    text = os.path.abspath(path)
    try:
        text.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8"
    found = _UNFIT.search(text)
    return f"arrays cannot be kept below a folder with {found[0]!r} in its name" if found else None


def user_path(text: str) -> Path:
    """A path of a command line; a tilde is the user's home, after an "=" too, where no shell reads
    it so.
    """
    return Path(text).expanduser()


def read_object(path: Path, *required: str) -> dict[str, Any]:
    """The JSON object in a file that a run has written, with at least the keys `required`.

    CheckpointError, of one line, where it is anything else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path} cannot be read ({reason})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, expected an object")
    if missing := [name for name in required if name not in value]:
        raise CheckpointError(f"{path} has no {', '.join(missing)}")
    return value


def json_text(value: Any) -> str:
    """`value` as an indented JSON text, in which a number that is not finite is null: JSON has no
    NaN, and strict readers refuse the whole file for one.
    """
    return json.dumps(_finite(value), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """`value` as `write_text` does."""
    write_text(path, json_text(value))


def write_text(path: Path, text: str) -> None:
    """Writes in one step: a killed process leaves the old file or the new one, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in a file of one a line; none where there is no file.

    What is no such line is left out: half a line, as a full disk or a loss of power leaves, and
    bytes that are not UTF-8.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
