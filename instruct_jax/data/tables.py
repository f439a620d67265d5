"""Rows of tables: CSV and its kin, and Parquet, some of them in memory at a time."""

import csv
import io
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from instruct_jax.data import records
from instruct_jax.data.packed import bomb, check_regular, unpacked_limit
from instruct_jax.data.records import Record, Stream, escaped_byte, not_utf8
from instruct_jax.data.rows import DataError

_DELIMITERS = ",;\t|"
_SEP = re.compile(r"sep=([,;\t|])\r?\n?")  # the first line of a file that Excel is to open
_BLANK_QUOTE = re.compile(' +"')
_BATCH_ROWS, _BATCH_BYTES, _LEAST_ROWS = 4096, 64 * 2**20, 8


def csv_rows(path: Path, file: io.BufferedReader, delimiter: str) -> Stream:
    """The rows under the header, which also tells whether another delimiter was used.

    A quote that is not closed, or closed too early, puts all that follows in doubt: it is raised.
    """
    csv.field_size_limit(records.MAX_ROW_BYTES)  # of all readers of this process
    line, delimiters = 1, delimiter + _DELIMITERS
    with io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="") as text:
        lines = _lines(path, text)
        try:
            for first in lines:
                if given := _SEP.fullmatch(first):
                    delimiters = given[1]
                elif first.strip():
                    break
                line += 1
            else:
                return
            above = line - 1
            delimiter = _sniff(first, delimiters)
            # A blank behind each delimiter of the header is the manner of the whole file.
            blank = first.count(delimiter) == first.count(f"{delimiter} ") > 0
            taken: list[str] = []
            reader = csv.reader(
                _noted(itertools.chain([first], lines), taken),
                delimiter=delimiter,
                strict=True,
                skipinitialspace=blank,
            )
            header = _header(path, next(reader))
            line = above + reader.line_num + 1
            taken.clear()
            for row in reader:
                if row:
                    try:
                        _check_quotes(path, line, row, taken, delimiter)
                        yield _record(path, line, header, row)
                    except DataError as error:
                        yield error
                line = above + reader.line_num + 1
                taken.clear()
        except csv.Error as error:
            hint = 'a quote inside of quotes is written twice (""); nothing after this can be read'
            ends = str(error) == "unexpected end of data"
            reason = "a quote that is opened here is not closed" if ends else str(error)
            raise DataError(f"not CSV: {reason}", path=path, line=line, hint=hint) from error


def _noted(lines: Iterable[str], taken: list[str]) -> Iterator[str]:
    for line in lines:
        taken.append(line)
        yield line


def _check_quotes(path: Path, line: int, row: list[str], lines: list[str], delimiter: str) -> None:
    """DataError for a quote that opens no field of `lines`, since a blank stands before it, and so
    was read as one of the text.
    """
    if any(_BLANK_QUOTE.match(value) for value in row):
        opened = next(csv.reader(lines, delimiter=delimiter, skipinitialspace=True))
        if [value.lstrip() for value in opened] != [value.lstrip() for value in row]:
            hint = f'write {delimiter}" without a blank between, or a blank in the header too'
            raise DataError("a blank before a quote", path=path, line=line, hint=hint)


def _lines(path: Path, text: io.TextIOWrapper) -> Iterator[str]:
    number = 0
    while line := text.readline(records.MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > records.MAX_ROW_BYTES:
            reason = f"line of more than {records.MAX_ROW_BYTES // 2**20} MiB"
            raise DataError(reason, path=path, line=number, excerpt=line)
        yield line


def _sniff(header: str, delimiters: str) -> str:
    """The delimiter that makes the most columns of a header, of equally good ones the first."""
    return max(delimiters, key=lambda d: len(next(csv.reader([header], delimiter=d))))


def _header(path: Path, names: list[str]) -> list[str]:
    header = [name.strip() for name in names]
    twice = [name for name, n in Counter(header).items() if n > 1 and name]
    if twice:
        raise DataError("the column is there twice", path=path, line=1, field=twice[0])
    if any(escaped_byte(name) for name in header):
        raise DataError("the header is not UTF-8", path=path, line=1)
    return header


def _record(path: Path, line: int, header: list[str], row: list[str]) -> Record:
    found = escaped_byte("".join(row))
    if found is not None:
        raise not_utf8(found[1], path=path, line=line)
    if len(row) > len(header):
        extra = f"{len(row) - len(header)} values more than columns"
        raise DataError(extra, path=path, line=line)
    if len(row) < len(header):
        reason = "the row has no value"
        raise DataError(reason, path=path, line=line, field=header[len(row)])
    unnamed = [value for name, value in zip(header, row, strict=True) if not name]
    if len(unnamed) > 1 and any(value.strip() for value in unnamed):
        raise DataError("a value in a column without a name", path=path, line=line)
    return Record(dict(zip(header, row, strict=True)), str(path), line)


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file as they are; DataError for a damaged one."""
    import pyarrow.parquet

    try:
        check_regular(path)
        with pyarrow.parquet.ParquetFile(path) as file:
            names = Counter(file.schema_arrow.names)
            twice = [name for name, n in names.items() if n > 1]
            if twice:
                raise DataError("the column is there twice", path=path, field=twice[0])
            for rows in file.iter_batches(batch_size=_batch_rows(path, file.metadata)):
                yield from rows.to_pylist()
    except DataError:
        raise
    except OSError as error:
        reason = f"cannot be read: {error.strerror}" if error.errno else f"not Parquet: {error}"
        raise DataError(_first_line(reason), path=path) from error
    except Exception as error:  # the library raises many kinds; all mean "not to be had"
        raise DataError(f"not Parquet: {_first_line(str(error))}", path=path) from error


def _batch_rows(path: Path, metadata: Any) -> int:
    """Rows that are read at once, in _BATCH_BYTES or little more; DataError for a bomb.

    A column that is kept as a dictionary names its values by number, so a few bytes may stand for a
    batch of copies of the largest.
    """
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    sizes = [column.total_uncompressed_size for column in columns]
    if min(sizes, default=0) < 0 or sum(sizes) > unpacked_limit(path.stat().st_size):
        raise bomb(path)
    named = [c.total_uncompressed_size for c in columns if c.has_dictionary_page]
    a_row = max((g.total_byte_size // max(g.num_rows, 1) for g in groups), default=0)
    largest = max([a_row, *named, 1])
    return min(max(_BATCH_BYTES // largest, _LEAST_ROWS), _BATCH_ROWS)


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[0]
