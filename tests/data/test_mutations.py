"""Damaged files of every kind: rows, or one line that says what is wrong, soon, in little memory.

The rows are those of public sets; each case is drawn from its number alone.
"""

import bz2
import gzip
import itertools
import json
import lzma
import random
import resource
import signal
import time

import pytest

from instruct_jax.data.formats import (
    DataError,
    read_comparisons,
    read_demonstrations,
    read_dialogues,
    read_documents,
    read_prompts,
    stream_documents,
)

CASES, FAST = 2_000, 200
SECONDS, MEGABYTES = 5, 500

# What was in a real file, its reader, and the kinds of file that such rows come in.
TABLES = ("jsonl", "json", "csv", "tsv", "parquet")
ROWS = {
    "sft/alpaca_52k.jsonl.gz": (read_demonstrations, TABLES),
    "sft/lima.jsonl.gz": (read_dialogues, ("jsonl", "json", "parquet")),
    "sft/self_instruct_seed_tasks.jsonl": (read_demonstrations, ("jsonl", "json")),
    "sft/t0_train.jsonl.gz": (read_demonstrations, TABLES),
    "rm/hh_helpful_base_pairs.jsonl.gz": (read_comparisons, TABLES),
    "rm/oasst_rankings.jsonl.gz": (read_comparisons, ("jsonl", "json", "parquet")),
    "rm/pandalm_human_3annotators.jsonl.gz": (read_comparisons, TABLES),
    "rm/alpacaeval_rankings_k25.jsonl.gz": (read_comparisons, ("jsonl", "json")),
    "pretrain/c4_300.jsonl.gz": (read_documents, (*TABLES, "txt")),
    "eval/mt_bench_question.jsonl": (read_prompts, ("jsonl", "json")),
}
PACKINGS = ("", "", ".gz", ".zst", ".bz2", ".xz")
PIECES = (
    b"{", b"}", b"[", b"]", b'"', b",", b":", b";", b"\t", b"null", b"NaN", b"-Infinity", b"\xff",
    b"\\ud800", b"\0", b"9" * 5000, b"1e999", b"\r", b"\n", b"\r\n", b"\\", b"[[[[", b"{}", b"true",
    b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"][", b"[" * 3000, b'{"a":' * 2000, b"\x1f\x8b", b'""', b"'",
)  # fmt: skip


@pytest.fixture(scope="module")
def rows(shared):
    """The first rows of every set of ROWS."""
    found = {}
    for name in ROWS:
        path = shared / "data" / name
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            found[name] = [json.loads(line) for line in itertools.islice(file, 40)]
    return found


def content(records, kind):
    """The bytes of a good file."""
    import pyarrow.csv
    import pyarrow.parquet

    if kind == "jsonl":
        return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()
    if kind == "json":
        return json.dumps(records, indent=1).encode()
    if kind == "txt":
        return "\n\n".join(record["text"] for record in records).encode()
    table, sink = pyarrow.Table.from_pylist(records), pyarrow.BufferOutputStream()
    if kind == "parquet":
        pyarrow.parquet.write_table(table, sink, row_group_size=7)
    else:
        columns = {n: c.cast("string") for n, c in zip(table.column_names, table, strict=True)}
        delimiter = "\t" if kind == "tsv" else ",;"[len(records) % 2]
        options = pyarrow.csv.WriteOptions(delimiter=delimiter)
        pyarrow.csv.write_csv(pyarrow.table(columns), sink, write_options=options)
    return sink.getvalue().to_pybytes()


def mutated(data, draw):
    """With one to four mistakes: of bytes, of lines, or cut."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(data) or 1)
        end = at + draw.choice((0, 1, 4, 50, 5000))
        how = draw.randrange(8)
        if how == 0:
            data[at : at + 1] = bytes([draw.randrange(256)])
        elif how == 1:
            data[at:end] = draw.choice(PIECES)
        elif how == 2:
            del data[at:end]
        elif how == 3:
            data[at:at] = data[at:end]
        elif how == 4:
            del data[at:]
        elif how == 5:
            lines = data.splitlines(keepends=True)
            draw.shuffle(lines)
            data = bytearray(b"".join(lines))
        elif how == 6:
            wanted = draw.choice(b'{}[]",:\n;\t\\')
            at = data.find(wanted, at)
            data[max(at, 0) : max(at, 0) + 1] = draw.choice((b"", bytes([wanted]) * 2, b" "))
        else:
            data += draw.choice((bytes(data), draw.choice(PIECES), b"\n"))
    return bytes(data)


def packed(data, packing):
    import pyarrow

    pack = {
        "": bytes,
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
    }
    return pack[packing](data)


def damaged_file(case, rows, folder):
    """(path, reader) of the case of this number."""
    draw = random.Random(f"mutation {case}")
    name = draw.choice(list(ROWS))
    read, kinds = ROWS[name]
    kind = draw.choice(kinds)
    records = draw.sample(rows[name], draw.randint(1, 12))
    data = content(records, kind)
    packing = "" if kind == "parquet" else draw.choice(PACKINGS)
    if draw.random() < 0.5:  # a good archive of damaged text, or a damaged archive
        data = packed(mutated(data, draw), packing)
    else:
        data = mutated(packed(data, packing), draw)
    path = folder / f"rows.{kind}{packing}"
    path.write_bytes(data)
    return path, draw.choice((read, read, read_prompts, streamed))


def streamed(path, on_bad_row):
    return list(stream_documents(path, on_bad_row=on_bad_row, reports=[]))


def outcome(path, read, on_bad_row):
    """What reading comes to; anything but rows or one line is an error of the test."""

    def too_long(*_):
        raise AssertionError(f"no answer within {SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        found = read(path, on_bad_row=on_bad_row)
    except DataError as error:
        text = str(error)
        assert text.startswith(str(path)) and text.isprintable() and len(text) < 2_000
        return "refused"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert len(found) > 0
    bad = sum(report.bad.total() for report in getattr(found, "report", ()))
    return "rows without the bad ones" if bad else "rows"


def run_cases(cases, rows, folder):
    """{(on_bad_row, outcome): how many}, the longest time and the growth of memory in MB."""
    counts, longest = {}, 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in cases:
        path, read = damaged_file(case, rows, folder)
        for on_bad_row in ("error", "skip"):
            began = time.monotonic()
            try:
                found = outcome(path, read, on_bad_row)
            except Exception as error:
                raise AssertionError(f"case {case} ({path.name}, {read.__name__})") from error
            longest = max(longest, time.monotonic() - began)
            counts[on_bad_row, found] = counts.get((on_bad_row, found), 0) + 1
        path.unlink()
    return counts, longest, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def check(cases, rows, folder):
    counts, longest, megabytes = run_cases(cases, rows, folder)
    print(counts, f"longest {longest:.2f} s, memory {megabytes:.0f} MB")
    assert longest < SECONDS and megabytes < MEGABYTES
    # Many are refused and many are not: the mistakes are neither too coarse nor too fine.
    for on_bad_row in ("error", "skip"):
        assert 0.15 < counts[on_bad_row, "refused"] / len(cases) < 0.95
    assert counts["skip", "rows without the bad ones"] > len(cases) / 20
    assert ("error", "rows without the bad ones") not in counts


def test_a_damaged_file_gives_rows_or_one_line_soon_and_in_little_memory(rows, tmp_path):
    check(range(FAST), rows, tmp_path)


@pytest.mark.slow
def test_two_thousand_damaged_files_give_rows_or_one_line(rows, tmp_path):
    check(range(CASES), rows, tmp_path)
