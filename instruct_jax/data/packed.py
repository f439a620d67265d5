"""Files opened for reading, packed or not, at a cost that is known beforehand.

Only regular files are opened, so that no pipe or device is waited for. What a small packed file
may unpack to is bounded, for no text is packed a thousandfold; all of it is read in pieces, so the
memory is bounded too. A file that is not what its name says is told from its first bytes.
"""

import bz2
import gzip
import io
import lzma
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from instruct_jax.data.rows import DataError

# Text and tables are packed three- to tenfold, repetitive logs perhaps fiftyfold.
MAX_RATIO = 100
ALWAYS_FINE = 64 * 2**20  # bytes

MAX_RUN = 2**20  # bytes of one value and nothing else

_BUFFER = 2**18
_SIGNATURES = (
    (rb"\x1f\x8b", "gzip", ".gz"),
    (rb"BZh[1-9]1AY&SY", "bzip2", ".bz2"),
    (rb"\xfd7zXZ\0", "xz", ".xz"),
    (rb"\x28\xb5\x2f\xfd", "Zstandard", ".zst"),
    (rb"PAR1\x15", "Parquet", ".parquet"),
)


def _zstandard(file: BinaryIO) -> Any:
    import pyarrow  # comes with `datasets`, and with it this codec, which Python has from 3.14 on

    return pyarrow.CompressedInputStream(file, "zstd")


class _Streams:
    """The bytes of packed streams, one after the other. What follows them is an error, as it is in
    gzip; Python's own readers of these two pass over it.
    """

    def __init__(self, file: BinaryIO, unpacker: Callable[[], Any]) -> None:
        self._file, self._unpacker, self._stream = file, unpacker, unpacker()

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end."""
        while True:
            if self._stream.eof:
                rest = self._stream.unused_data.lstrip(b"\0")  # zeros fill up blocks
                while not rest:
                    more = self._file.read(_BUFFER)
                    if not more:
                        return b""
                    rest = more.lstrip(b"\0")
                self._stream = self._unpacker()
                data = self._stream.decompress(rest, size)
            else:
                packed = self._file.read(_BUFFER) if self._stream.needs_input else b""
                if self._stream.needs_input and not packed:
                    raise EOFError("it ends before its end-of-stream marker")
                data = self._stream.decompress(packed, size)
            if data:
                return bytes(data)

    def close(self) -> None:
        self._file.close()


# By the last suffix: its name, and what unpacks it.
PACKED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    ".gz": ("gzip", lambda file: gzip.GzipFile(fileobj=file)),
    ".bz2": ("bzip2", lambda file: _Streams(file, bz2.BZ2Decompressor)),
    ".xz": ("xz", lambda file: _Streams(file, lzma.LZMADecompressor)),
    ".zst": ("Zstandard", _zstandard),
}


@contextmanager
def open_data(
    path: Path, watch: Callable[[BinaryIO], object] | None = None
) -> Iterator[io.BufferedReader]:
    """The bytes of a file, unpacked. DataError for what is no file, damaged, or not UTF-8 at all.

    `watch` is given the file as it is, whose position tells how far the reading is.
    """
    kind, unpack = PACKED.get(path.suffix.lower(), ("", None))
    try:
        check_regular(path)
        with open(path, "rb", opener=_at_once) as packed:
            if watch is not None:
                watch(packed)
            if unpack is None:
                plain = packed
            else:
                limit = unpacked_limit(os.fstat(packed.fileno()).st_size)
                plain = io.BufferedReader(_Bounded(unpack(packed), limit, path), _BUFFER)
            with plain:
                _check_start(plain.peek(64), path)
                yield plain
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"damaged {kind} file: {error}", path=path) from error
    except OSError as error:
        if error.errno is None and kind:  # said by a library, not by the system
            raise DataError(f"damaged {kind} file: {error}", path=path) from error
        raise DataError(f"cannot be read: {error.strerror or error}", path=path) from error


def check_regular(path: Path) -> None:
    """DataError for a folder, a pipe, a socket or a device; OSError for what is not there."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise DataError(f"{kind_of_file(mode)}, not a file", path=path)


def kind_of_file(mode: int) -> str:
    """What stands behind a mode of os.stat, in words."""
    names = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFREG: "a file",
    }
    return names.get(stat.S_IFMT(mode), "a device")


def unpacked_limit(size: int) -> int:
    """Bytes that a packed file of `size` bytes may unpack to."""
    return ALWAYS_FINE + MAX_RATIO * size


def bomb(path: Path, reason: str = f"unpacks to more than {MAX_RATIO} times its size") -> DataError:
    """What is said of a file that unpacks to what no text is."""
    return DataError(reason, path=path, hint="if it is good, unpack it and name what comes out")


class _Bounded(io.RawIOBase):
    """The bytes of `plain`, and a DataError where they are more than `limit`, or where one byte is
    repeated without end: millions of empty lines take their time.
    """

    def __init__(self, plain: Any, limit: int, path: Path) -> None:
        self._plain, self._left, self._path = plain, limit, path
        self._run = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._plain.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise bomb(self._path)
        self._run = self._run + len(data) if data.count(data[:1]) == len(data) else 0
        if self._run > MAX_RUN:
            raise bomb(self._path, f"unpacks to more than {MAX_RUN // 2**20} MiB of one byte")
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._plain.close()
        super().close()


def _at_once(path: str, flags: int) -> int:
    """An opener that does not wait for a writer, should a pipe have taken the file's place."""
    return os.open(path, flags | os.O_NONBLOCK)


def _check_start(start: bytes, path: Path) -> None:
    for signature, kind, suffix in _SIGNATURES:
        if re.match(signature, start):
            hint = f"name it {path.name}{suffix}" if suffix != ".parquet" else "name it .parquet"
            raise DataError(f"its first bytes are those of {kind}", path=path, hint=hint)
    if start.startswith(b"version https://git-lfs.github.com/"):
        raise DataError("a Git LFS pointer, not the data", path=path, hint="git lfs pull")
    if start.startswith(b"PK\x03\x04"):
        raise DataError("its first bytes are those of zip", path=path, hint="unzip it")
    every_other_is_zero = {start[:8:2].count(0), start[1:8:2].count(0)} == {0, 4}
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or every_other_is_zero:
        hint = "the file is UTF-16; save it as UTF-8: iconv -f UTF-16 -t UTF-8"
        raise DataError("not UTF-8", path=path, line=1, hint=hint)
