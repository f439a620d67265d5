"""The safetensors container: eight bytes of header length, a JSON header, the numbers.

Read with nothing but this page: the header is checked against the file before anything is
allocated, and a tensor is a window of the file that is mapped when it is asked for. Written one
tensor at a time, in files of a bounded size with an index beside them.
"""

import json
import math
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from instruct_jax.errors import UserError
from instruct_jax.files import json_text, replacing, write_text

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
}
_OTHER_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2,
                "U32": 4, "I32": 4, "U64": 8, "I64": 8}  # fmt: skip
_LENGTH = struct.Struct("<Q")
# A thousand tensors take a tenth of a megabyte; of what JSON may hold, values cost more than bytes.
_LONGEST_JSON, _MOST_VALUES = 64_000_000, 2_000_000


class Source(Protocol):
    """A tensor of which nothing is read yet; `kind` is one of `FLOATS`, or is refused."""

    @property
    def path(self) -> Path:
        """The file that it is in."""
        ...

    @property
    def kind(self) -> str:
        """What `open` gives, as safetensors calls it."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what `open` gives."""
        ...

    def open(self) -> np.ndarray:
        """The tensor."""
        ...


class Stored(NamedTuple):
    """One tensor in its file, of which nothing is read yet."""

    path: Path
    kind: str
    shape: tuple[int, ...]
    offset: int

    def open(self) -> np.ndarray:
        """The tensor, mapped: pages are read as they are touched, and freed with the array."""
        dtype = FLOATS[self.kind]
        if 0 in self.shape:
            return np.zeros(self.shape, dtype)
        raw = np.memmap(
            self.path, np.uint8, "r", self.offset, (math.prod(self.shape) * dtype.itemsize,)
        )
        return np.asarray(raw).view(dtype).reshape(self.shape)


def read_json(path: Path, *, longest: int = _LONGEST_JSON) -> dict[str, Any]:
    """The object in a JSON file; UserError for anything else, and for a name given twice."""
    try:
        size = path.stat().st_size
        if size > longest or not path.is_file():
            raise UserError(f"{path}: not a file of at most {longest} bytes")
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    return _parse(path, text)


def printable(text: str, longest: int = 80) -> str:
    """The beginning of a text of a folder, on one line and in ASCII."""
    return json.dumps(text[:longest])[1:-1]


def open_weights(directory: Path) -> dict[str, Stored]:
    """Every tensor of a folder by name, from one file or from the files that its index names.

    Raises UserError for files that are missing, damaged, outside the folder or not as indexed.
    """
    index = directory / INDEX
    if not index.exists():
        path = directory / WEIGHTS
        if not path.is_file():
            raise UserError(f"{path}: no such file ({_instead(directory)})")
        return read_header(path)
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise UserError(f"{index}: weight_map must name files of its own folder")
    for file in named.values():
        if not isinstance(file, str) or not re.fullmatch(r"\w[\w.-]*", file):
            raise UserError(
                f"{index}: weight_map must name files of its own folder, not {str(file)[:80]!r}"
            )
        if not file.endswith(".safetensors"):
            raise UserError(f"{index}: weight_map names {file[:80]!r}; {_instead(directory)}")
    stored: dict[str, Stored] = {}
    for path in (directory / file for file in sorted(set(named.values()))):
        if not path.is_file():
            raise UserError(f"{path}: no such file ({_instead(directory)})")
        for name, tensor in read_header(path).items():
            if name in stored:
                raise UserError(f"{path}: the tensor {name!r} is there twice")
            stored[name] = tensor
    lost = sorted(name for name, file in named.items() if _file_of(stored, name) != file)
    if lost:
        told = ", ".join(map(printable, lost[:8]))
        raise UserError(f"{index}: not in the file it names: {told}")
    return stored


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one file; UserError unless they fill it without gap or overlap."""

    def broken(why: str) -> UserError:
        return UserError(f"{path}: not a readable safetensors file ({why})")

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(_LENGTH.size)
            if len(start) < _LENGTH.size:
                raise broken(f"{size} bytes are too few")
            length = _LENGTH.unpack(start)[0]
            if length > min(size - _LENGTH.size, _LONGEST_JSON):
                raise broken(f"its header claims {length} bytes, the file has {size}")
            header = _parse(path, file.read(length))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    header.pop("__metadata__", None)
    first = _LENGTH.size + length
    tensors, spans = {}, []
    for name, entry in header.items():
        try:
            kind, shape, (begin, end) = str(entry["dtype"]), entry["shape"], entry["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise broken(f"the entry of {name[:80]!r} is not one") from error
        numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
        if not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise broken(f"{name[:80]!r} has a size that is none")
        width = FLOATS[kind].itemsize if kind in FLOATS else _OTHER_SIZES.get(kind)
        if width is None:
            raise broken(f"{name[:80]!r} has the unknown dtype {kind[:20]!r}")
        if end - begin != math.prod(shape) * width or end > size - first:
            raise broken(f"{name[:80]!r} does not fit the file: {kind}{shape} at {begin}..{end}")
        spans.append((begin, end))
        tensors[name] = Stored(path, kind, tuple(shape), first + begin)
    end = 0
    for begin, stop in sorted(spans):
        if begin != end:
            raise broken(f"its tensors leave a gap or overlap at byte {begin}")
        end = stop
    if end != size - first:
        raise broken(f"{size - first} bytes of numbers, its header describes {end}")
    return tensors


class ToWrite(NamedTuple):
    """One tensor that is made when its turn comes."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def write_weights(
    directory: Path, tensors: list[ToWrite], dtype: np.dtype, *, max_bytes: int
) -> list[str]:
    """Writes files of at most `max_bytes` of numbers (one tensor may be more); their names."""
    groups: list[list[ToWrite]] = [[]]
    filled = 0
    for tensor in tensors:
        size = math.prod(tensor.shape) * dtype.itemsize
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += size
    count = len(groups)
    if count == 1:
        write_file(directory / WEIGHTS, groups[0], dtype)
        return [WEIGHTS]
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for name, group in zip(names, groups, strict=True):
        write_file(directory / name, group, dtype)
    total = sum(math.prod(t.shape) for t in tensors) * dtype.itemsize
    where = {t.name: name for name, group in zip(names, groups, strict=True) for t in group}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    write_text(directory / INDEX, json_text(index))
    return [*names, INDEX]


def write_file(path: Path, tensors: list[ToWrite], dtype: np.dtype) -> None:
    """One safetensors file, on disk when this returns."""
    kind = next(kind for kind, known in FLOATS.items() if known == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + math.prod(tensor.shape) * dtype.itemsize
        header[tensor.name] = {
            "dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(_LENGTH.pack(len(text)) + text)
        for tensor in tensors:
            value = np.ascontiguousarray(tensor.make(), dtype)
            if value.shape != tensor.shape:
                raise ValueError(f"{tensor.name} is {value.shape}, not {tensor.shape}")
            file.write(value.reshape(-1).view(np.uint8).data)


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{path}: the name {twice[:80]!r} is there twice")
        return value

    if text.count(b",") > _MOST_VALUES:
        raise UserError(f"{path}: more than {_MOST_VALUES:,} values; no model has so many tensors")
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _file_of(stored: dict[str, Stored], name: str) -> str | None:
    return stored[name].path.name if name in stored else None


def _pickles(directory: Path) -> Iterator[str]:
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
            yield path.name


def _instead(directory: Path) -> str:
    found = next(_pickles(directory), None)
    hint = f"; {found} may be a pickle, which can run code: convert it first" if found else ""
    return f"only safetensors weights are read{hint}"
