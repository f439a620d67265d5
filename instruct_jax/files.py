"""The one way in which files are written, JSON that bears its own hash, and names of files.

Whatever is not appended to is written beside its place and then moved there (`replacing`): a
killed process leaves the old file or the new one, never a half. A JSON object of ours bears the
sha256 of its other lines in its second one, as `sed 2d FILE | sha256sum` gives it; who means to
change such a file deletes that line.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from instruct_jax.errors import CheckpointError

# Orbax and tensorstore take a backslash for a slash, a component such as "gs:" for a URL, and a
# pair of brackets for a pattern when they look for what they have written.
_UNFIT = re.compile(r"\\|\[[^/]*\]|(?<=/)(gs|gcs|s3|az):(?=/|$)")

SEAL = "sha256"
PARTIAL = ".tmp"  # behind the name of a file that is being written
_SEAL_LINE = re.compile(rb'  "(.{6})": "(.{64})",?')


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

    CheckpointError, of one line, where it is anything else, or not what its hash is of.
    """
    return read_sealed(path, *required)[0]


def read_sealed(path: Path, *required: str) -> tuple[dict[str, Any], bool]:
    """As `read_object`, and whether the file bears its hash."""
    try:
        data = path.read_bytes()
        value = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path} cannot be read ({reason})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, expected an object")
    sealed = unseal(path, data, value)
    if missing := [name for name in required if name not in value]:
        raise CheckpointError(f"{path} has no {', '.join(missing)}")
    return value, sealed


def unseal(path: Path, data: bytes, value: dict[str, Any]) -> bool:
    """Takes the hash out of `value`, which is what `data`, the contents of `path`, say; whether
    there was one. CheckpointError where it is of something else.
    """
    first, _, rest = data.partition(b"\n")
    line, _, rest = rest.partition(b"\n")
    # Looked for loosely: a flipped bit in the name of the line must not hide the line.
    found = _SEAL_LINE.fullmatch(line)
    if found is None and SEAL not in value:
        return False
    digest = hashlib.sha256(first + b"\n" + rest).hexdigest()
    if found is None or found.groups() != (SEAL.encode(), digest.encode()):
        raise CheckpointError(
            f"{path} was changed after it was written: put it back or, if you changed it yourself,"
            f' delete its "{SEAL}"'
        )
    del value[SEAL]
    return True


def json_text(value: Any) -> str:
    """`value` as an indented JSON text, in which a number that is not finite is null: JSON has no
    NaN, and strict readers refuse the whole file for one.
    """
    return json.dumps(finite(value), indent=2, allow_nan=False) + "\n"


def json_line(value: Any) -> str:
    """`value` as one line of JSON, without NaN as in `json_text`."""
    return json.dumps(finite(value), allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """`value` of JSON's types, with None for every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """`value` as `write_text` does, with its hash."""
    text = json_text({SEAL: "0" * 64, **value})
    first, line, rest = text.split("\n", 2)
    digest = hashlib.sha256(f"{first}\n{rest}".encode()).hexdigest()
    write_text(path, "\n".join([first, line.replace("0" * 64, digest), rest]))


def write_text(path: Path, text: str) -> None:
    """Writes `text` in one step."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Writes `data` in one step."""
    with replacing(path) as partial:
        partial.write_bytes(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields the path to write to; what was written there then takes the place of `path`, whole and
    safely on disk. Where writing fails nothing is left of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def hash_of_file(path: Path) -> str:
    """sha256 of the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSONL in one step; a number that is not finite is null."""
    write_text(path, "".join(json_line(row) for row in rows))


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
