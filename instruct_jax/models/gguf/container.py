"""The GGUF container: metadata, a table of tensors, the numbers; read without trust in any of it.

    magic "GGUF", u32 version (2 or 3), u64 tensors, u64 keys
    per key     text name, u32 type, value; an array is u32 type of its items, u64 count, items
    per tensor  text name, u32 dimensions, u64 each (the fastest first), u32 type, u64 offset
    numbers     from the next multiple of general.alignment on

A text is u64 length and UTF-8. Every count is held against the bytes that are left before anything
is made of it. The package `gguf` knows the types of numbers and dequantises them; its own reader
believes the counts, and takes seconds for a vocabulary.
"""

import functools
import math
import mmap
import struct
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from instruct_jax.errors import UserError
from instruct_jax.models.hf.container import printable

_SCALARS = dict(enumerate("BbHhIif?")) | dict(zip((10, 11, 12), "Qqd", strict=True))
_TEXT, _ARRAY = 8, 9
# The largest vocabularies with their merges are a million texts in twenty megabytes.
_LONGEST_METADATA, _MOST_TEXTS, _LONGEST_NAME = 200_000_000, 4_000_000, 255
_MOST_DIMENSIONS = 4

Metadata = dict[str, Any]


class Numbers(NamedTuple):
    """One tensor in its file, of which nothing is read yet."""

    path: Path
    type: int
    shape: tuple[int, ...]
    """The slowest dimension first, as NumPy has it."""
    offset: int
    size: int
    """In bytes."""

    def open(self) -> np.ndarray:
        """f32[shape]: mapped where the file holds that, else dequantised."""
        package = gguf_package()
        kind = package.GGMLQuantizationType(self.type)
        if 0 in self.shape:
            return np.zeros(self.shape, np.float32)
        raw = np.asarray(np.memmap(self.path, np.uint8, "r", self.offset, (self.size,)))
        rows = raw.reshape(*self.shape[:-1], -1)
        with np.errstate(over="ignore", invalid="ignore"):  # of scales that the stage refuses
            return package.quants.dequantize(rows, kind).reshape(self.shape)


def gguf_package() -> ModuleType:
    """The package `gguf`; UserError with the remedy where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            f"GGUF files need the package gguf ({error}): pip install -e '.[gguf]'"
        ) from error
    return gguf


def read_container(path: Path) -> tuple[Metadata, dict[str, Numbers]]:
    """Metadata (arrays of numbers as NumPy arrays) and tensors by name, the numbers unread.

    Raises UserError for a file that is not whole and well formed, for a name that is there twice,
    and for a type of numbers that the package cannot read.
    """
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        with path.open("rb") as file:
            if path.stat().st_size < 24:
                raise UserError(f"{path}: not a GGUF file (too short)")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data).read()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


class _Reader:
    """A position in the mapped file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at, self.texts = path, data, 0, 0
        self.end = min(len(data), _LONGEST_METADATA)

    def broken(self, why: str) -> UserError:
        return UserError(f"{self.path}: not a readable GGUF file ({why})")

    def read(self) -> tuple[Metadata, dict[str, Numbers]]:
        if self.data[:4] != b"GGUF":
            raise self.broken("it does not begin with GGUF")
        self.at = 4
        version, tensors, keys = self.take("I"), self.take("Q"), self.take("Q")
        if version not in (2, 3):
            told = "big-endian" if version % 65536 == 0 and version else f"version {version}"
            raise self.broken(f"{told}; version 2 and 3 are read, little-endian")
        # A key takes 13 bytes at least, a tensor 24.
        if keys * 13 > self.left() or tensors * 24 > self.left():
            raise self.broken(
                f"it claims {keys} keys and {tensors} tensors in {len(self.data)} bytes"
            )
        metadata: Metadata = {}
        for _ in range(keys):
            name = self.text(_LONGEST_NAME * 256)
            if name in metadata:
                raise self.broken(f"the key {printable(name)} is there twice")
            metadata[name] = self.value(self.take("I"), name)
        return metadata, self.tensors(tensors, _alignment(self, metadata))

    def left(self) -> int:
        return self.end - self.at

    def take(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        if size > self.left():
            raise self.broken(f"it ends at byte {self.end} within its header")
        self.at += size
        return struct.unpack_from("<" + code, self.data, self.at - size)[0]

    def text(self, longest: int = _LONGEST_METADATA) -> str:
        length = self.take("Q")
        if length > min(self.left(), longest):
            raise self.broken(f"a text of {length} bytes at byte {self.at}")
        self.at += length
        try:
            return self.data[self.at - length : self.at].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.broken(f"the text at byte {self.at - length} is not UTF-8") from error

    def value(self, kind: int, name: str) -> Any:
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            raise self.broken(f"{printable(name)} has the unknown type {kind}")
        inner, count = self.take("I"), self.take("Q")
        if inner == _TEXT:
            self.texts += count
            if count * 8 > self.left() or self.texts > _MOST_TEXTS:
                raise self.broken(f"{printable(name)} claims {count} texts")
            return [self.text() for _ in range(count)]
        if inner not in _SCALARS:
            raise self.broken(f"{printable(name)} is an array of the type {inner}")
        dtype = np.dtype("<" + _SCALARS[inner])
        if count * dtype.itemsize > self.left():
            raise self.broken(f"{printable(name)} claims {count} values")
        self.at += count * dtype.itemsize
        return np.frombuffer(self.data[self.at - count * dtype.itemsize : self.at], dtype)

    def tensors(self, count: int, alignment: int) -> dict[str, Numbers]:
        table = [self.entry() for _ in range(count)]
        start = -(-self.at // alignment) * alignment
        tensors: dict[str, Numbers] = {}
        for name, found in table:
            if name in tensors:
                raise self.broken(f"the tensor {printable(name)} is there twice")
            tensors[name] = found._replace(offset=start + found.offset)
            if found.offset % alignment or start + found.offset + found.size > len(self.data):
                raise self.broken(
                    f"{printable(name)} does not fit the file: {found.size} bytes at {found.offset}"
                )
        end, last = 0, ""
        for name, found in sorted(tensors.items(), key=lambda item: item[1].offset):
            if found.offset < end and found.size:
                raise self.broken(f"{printable(name)} overlaps {printable(last)}")
            end, last = found.offset + found.size, name
        return tensors

    def entry(self) -> tuple[str, Numbers]:
        name = self.text(_LONGEST_NAME)
        dimensions = self.take("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise self.broken(f"{printable(name)} has {dimensions} dimensions")
        shape = tuple(self.take("Q") for _ in range(dimensions))[::-1]
        kind, offset = self.take("I"), self.take("Q")
        if max(shape) >= 2**63 or math.prod(shape) >= 2**63:
            raise self.broken(f"{printable(name)} has the shape {list(shape)}")
        per_block, size_of_block = self.block_of(name, kind)
        if shape[-1] % per_block:
            raise self.broken(f"{printable(name)}: rows of {shape[-1]}, blocks of {per_block}")
        size = math.prod(shape) // per_block * size_of_block
        return name, Numbers(self.path, kind, shape, offset, size)

    def block_of(self, name: str, kind: int) -> tuple[int, int]:
        """Numbers and bytes of a block."""
        package = gguf_package()
        try:
            known = package.GGMLQuantizationType(kind)
        except ValueError as error:
            raise self.broken(f"{printable(name)} has the unknown type {kind}") from error
        if not _is_read(kind):
            raise UserError(
                f"{self.path}: {printable(name)} is {known.name}, which this version of the "
                "package gguf cannot dequantise; take a file of another quantisation"
            )
        return package.GGML_QUANT_SIZES[known]


def _alignment(reader: _Reader, metadata: Metadata) -> int:
    value = metadata.get("general.alignment", 32)
    if type(value) is not int or not 0 < value <= 65536 or value & (value - 1):
        raise reader.broken(f"general.alignment={str(value)[:20]} is no power of two")
    return value


@functools.cache
def _is_read(kind: int) -> bool:
    package = gguf_package()
    known = package.GGMLQuantizationType(kind)
    _, size = package.GGML_QUANT_SIZES[known]
    try:
        package.quants.dequantize(np.zeros((1, size), np.uint8), known)
    except NotImplementedError:
        return False
    return True
