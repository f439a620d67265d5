"""Documents of plain text: whole files, pieces, lines or paragraphs."""

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from instruct_jax.data import records
from instruct_jax.data.records import Record, Stream, decode
from instruct_jax.data.rows import DataError

Split = Literal["file", "piece", "line", "paragraph"]
# Characters of a piece of a long text, which goes on to the end of its paragraph.
PIECE = 20_000


def text_rows(path: Path, file: io.BufferedReader, split: Split) -> Stream:
    """Records {"text"}; a byte that is not UTF-8 spoils the one it stands in.

    But for `split` "file", neither a line nor what has no empty line in it is held in memory past
    `records.MAX_ROW_BYTES`: a longer one is cut there, at a space where there is one.
    """
    lines = _lines(path, file, math.inf if split == "file" else records.MAX_ROW_BYTES)
    size = {"file": math.inf, "piece": PIECE, "paragraph": 0, "line": -1}[split]
    for line, text in _blocks(lines, size):
        if isinstance(text, DataError):
            yield text
        elif split in ("file", "piece"):
            if split == "file" or text.strip():
                yield Record({"text": text}, str(path), line, raw=text)
        elif text.strip():
            lead = text[: len(text) - len(text.lstrip("\n"))].count("\n")
            yield Record({"text": text.strip("\n")}, str(path), line + lead, raw=text)


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


def _lines(
    path: Path, file: io.BufferedReader, limit: float
) -> Iterator[tuple[int, str | DataError]]:
    """(number, line with its end as a newline); a longer line comes in parts."""
    number, rest = 1, b""
    size = -1 if math.isinf(limit) else int(limit)
    while data := rest + file.readline(size):
        rest = b""
        if not data.endswith(b"\n") and len(data) >= limit:
            data, rest = _cut(data)
        try:
            text = decode(data, path, number)
            text = text.removeprefix("\ufeff") if number == 1 else text
            yield number, text[:-2] + "\n" if text.endswith("\r\n") else text
        except DataError as error:
            yield number, error
        number += data.endswith(b"\n")


def _cut(data: bytes) -> tuple[bytes, bytes]:
    """In two: behind the last space of the second half, else between two characters."""
    at = data.rfind(b" ", len(data) // 2) + 1
    if not at:
        at = len(data) - 1
        while at > len(data) - 4 and data[at] & 0xC0 == 0x80:  # inside a character of UTF-8
            at -= 1
    return data[:at], data[at:]


def _blocks(
    lines: Iterator[tuple[int, str | DataError]], size: float
) -> Iterator[tuple[int, str | DataError]]:
    """(number of the first line, text) of blocks, which end with the first empty line that starts
    after `size` characters (-1: with every line); the last one ends with the file, and is never
    empty but in an empty file. A block with a bad line in it is that line's error.
    """
    block: list[str] = []
    bad: DataError | None = None
    first, length, number = 1, 0, 0
    for number, line in lines:
        if not block:
            first, length = number, 0
        if isinstance(line, DataError):
            bad = bad or line
            line = "\ufffd\n"
        block.append(line)
        length += len(line)
        empty = line == "\n" and len(block) > 1 and length - 2 >= size
        full = length >= records.MAX_ROW_BYTES and size < math.inf
        if empty or full or (size < 0 and line.endswith("\n")):
            yield first, bad or "".join(block)
            block, bad = [], None
    if block or number == 0:
        yield first, bad or "".join(block)
