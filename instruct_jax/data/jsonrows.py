"""Rows of JSON: one object a line, or one array of objects a file, a row in memory at a time."""

import codecs
import io
import json
from pathlib import Path

from instruct_jax.data import records
from instruct_jax.data.records import (
    Record,
    Stream,
    decode,
    escaped_byte,
    not_json,
    not_utf8,
    parse_record,
    position,
)
from instruct_jax.data.rows import DataError

_CHUNK = 2**16
# Only where a row ends is asked of this one, so it need not make numbers of the digits.
_ENDS = json.JSONDecoder(parse_int=len, parse_float=len)
_STOPS = "nothing after this can be read"
_BLANK = " \t\r\n"


def json_rows(path: Path, file: io.BufferedReader) -> Stream:
    """The rows of either kind of file, told apart by its first character."""
    first = file.peek(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    return _array_rows(path, file) if first == b"[" else _line_rows(path, file)


def _line_rows(path: Path, file: io.BufferedReader) -> Stream:
    number = 0
    limit = records.MAX_ROW_BYTES
    while data := file.readline(limit + 1):
        number += 1
        if len(data) > limit:
            while not data.endswith(b"\n") and (rest := file.readline(limit)):
                data = data[:60] + rest[-1:]
            yield _too_long("line", data.decode("utf-8", "replace")[:60], path, number)
            continue
        if number == 1:
            data = data.removeprefix(codecs.BOM_UTF8)
        try:
            text = decode(data, path, number).strip("\r\n")
            if text.strip(_BLANK):
                yield parse_record(text, path, number)
        except DataError as error:
            yield error


def _array_rows(path: Path, file: io.BufferedReader) -> Stream:
    """The end of each row is found first; then it is parsed as a line is, at its own place.

    What stands between the rows is a comma and nothing else; where it is not, nothing after it can
    be trusted, and the error is raised.
    """
    text = _Window(path, file)
    text.skip_blank()
    text.drop(1)  # the bracket
    text.skip_blank()
    while not text.startswith("]"):
        line, column = text.line, text.column
        row = text.take(text.row_end())
        try:
            yield _row(row, path, line, column)
        except DataError as error:
            yield error
        text.skip_blank()
        if text.startswith(","):
            text.drop(1)
            text.skip_blank()
            if text.startswith("]"):
                raise text.error("a comma after the last row")
        elif not text.startswith("]"):
            end = "the array has no end: was the file cut?"
            raise text.error("expected ',' or ']' after a row" if text.text else end)
    text.drop(1)
    text.skip_blank()
    if text.text:
        raise text.error("text after the end of the array", "were files joined?")


def _row(text: str, path: Path, line: int, column: int) -> Record:
    found = escaped_byte(text)
    if found is not None:
        at, byte = found
        line, column = position(text, at, line, column)
        excerpt = text[max(0, at - 20) : at + 40].encode("utf-8", "replace").decode()
        raise not_utf8(byte, path=path, line=line, column=column, excerpt=excerpt)
    return parse_record(text, path, line, column)


class _Window:
    """The text of a file from (line, column) on, of which only so much is held as is needed.

    Bytes that are not UTF-8 are kept as "surrogateescape" does.
    """

    def __init__(self, path: Path, file: io.BufferedReader) -> None:
        self.path, self.text, self.line, self.column = path, "", 1, 1
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")

    def more(self) -> bool:
        """Reads on, as much as is held already; whether there was more."""
        data = self._file.read(max(_CHUNK, len(self.text)))
        self.text += self._decoder.decode(data, final=not data)
        return bool(data)

    def startswith(self, character: str) -> bool:
        return (bool(self.text) or self.more()) and self.text.startswith(character)

    def drop(self, n: int) -> None:
        self.line, self.column = position(self.text, n, self.line, self.column)
        self.text = self.text[n:]

    def take(self, n: int) -> str:
        taken = self.text[:n]
        self.drop(n)
        return taken

    def skip_blank(self) -> None:
        while self.text or self.more():
            self.drop(len(self.text) - len(self.text.lstrip(_BLANK)))
            if self.text:
                return

    def row_end(self) -> int:
        """Where the JSON value ends that starts here; DataError where there is none."""
        while True:
            problem: Exception | None = None
            try:
                end = _ENDS.raw_decode(self.text)[1]
            except RecursionError as error:
                raise not_json(
                    error, self.text, self.path, self.line, self.column, hint=_STOPS
                ) from None
            except ValueError as error:
                problem = error
            if problem is None and end < len(self.text):
                return end
            if len(self.text) > records.MAX_ROW_BYTES:
                raise _too_long("row", self.text, self.path, self.line)
            if not self.more():
                if problem is None:
                    return end
                raise not_json(
                    problem, self.text, self.path, self.line, self.column, hint=_STOPS
                ) from None

    def error(self, reason: str, hint: str = _STOPS) -> DataError:
        """A DataError here."""
        excerpt = self.text[:60] or None
        return DataError(
            f"not JSON: {reason}",
            path=self.path,
            line=self.line,
            column=self.column,
            excerpt=excerpt,
            hint=hint,
        )


def _too_long(what: str, text: str, path: Path, line: int) -> DataError:
    reason = f"{what} of more than {records.MAX_ROW_BYTES // 2**20} MiB"
    hint = "put one row on a line, or give long documents as .txt files"
    return DataError(reason, path=path, line=line, excerpt=text, hint=hint)
