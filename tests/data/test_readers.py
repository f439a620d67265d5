"""Files that are not what they seem: each refused in one line, or read, in bounded memory."""

import bz2
import gzip
import json
import lzma
import os
import resource
import socket
import time
import zlib

import pytest

from instruct_jax.data import packed, records
from instruct_jax.data.files import find_files
from instruct_jax.data.formats import (
    DataError,
    hash_files,
    read_comparisons,
    read_demonstrations,
    read_dialogues,
    read_documents,
    read_prompts,
    stream_documents,
)

ROW = json.dumps({"prompt": "p", "response": "r"})
BOTH = ("error", "skip")


def zstd(data):
    import pyarrow

    return pyarrow.compress(data, codec="zstd", asbytes=True)


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"[{ROW}][{ROW}]", r":1:35: not JSON: text after the end of the array.*were files joined"),
        (f"[{ROW}]\n garbage", r":2:2: not JSON: text after the end of the array: .garbage"),
        (f"[{ROW}\n {ROW}]", r":2:2: not JSON: expected ',' or '\]' after a row"),
        (f"[{ROW},]", r":1:35: not JSON: a comma after the last row"),
        (f"[{ROW},,{ROW}]", r":1:35: not JSON: Expecting value"),
        (f"[,{ROW}]", r":1:2: not JSON: Expecting value"),
        (f"[{ROW}", r":1:34: not JSON: the array has no end: was the file cut"),
        (f"[{ROW},", "not JSON: Expecting value"),
        (f"[{ROW}, {{'a': 1}}]", r":1:37: not JSON: Expecting property name"),
    ],
)
@pytest.mark.parametrize("on_bad_row", BOTH)
def test_between_the_rows_of_an_array_stands_a_comma_and_nothing_else(
    tmp_path, text, message, on_bad_row
):
    path = write(tmp_path / "rows.json", text)
    with pytest.raises(DataError, match=message):
        read_demonstrations(path, on_bad_row=on_bad_row)


def test_an_array_of_any_size_is_read_a_row_at_a_time(tmp_path, monkeypatch):
    rows = [
        {"prompt": f"{i} ü\n" * (i % 700), "response": "}]," * (i % 9) + "r"} for i in range(900)
    ]
    rows[0]["prompt"] = "first"
    rows = [row for row in rows if row["prompt"]]
    for indent in (None, 3):
        path = write(tmp_path / "rows.json", "\ufeff \n" + json.dumps(rows, indent=indent) + "\n ")
        found = read_demonstrations(path)
        assert [(row.prompt, row.response) for row in found] == [tuple(r.values()) for r in rows]
    monkeypatch.setattr(records, "MAX_ROW_BYTES", 2**17)
    path = write(tmp_path / "rows.json", json.dumps([*rows, {"prompt": "x" * 2**20}]))
    with pytest.raises(DataError, match="row of more than"):
        read_demonstrations(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[" * 500 + "]" * 500, "nested more than 100 deep"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "nested more than 100 deep"),
        ("9" * 6000, "a number of thousands of digits"),
        ("1e999", r":2:34: 1e999 is too large for a number"),
        ("-Infinity", r":2:34: -Infinity is not a number in JSON"),
        ("NaN", r":2:34: NaN is not a number in JSON"),
        (r'"\ud800"', r':2:30: field "m": lone surrogate U\+D800'),
        (r'{"a": ["ok", {"\uDFFF": 1}]}', r':2:30: field "m": lone surrogate U\+DFFF'),
        (r'1, "\udc00": 2', r"lone surrogate U\+DC00"),
        ('1, "m": 2', 'duplicate key "m"'),
    ],
)
def test_what_json_cannot_mean_spoils_its_row_wherever_in_it(tmp_path, value, message):
    bad = f'{{"prompt":"p","response":"r","m":{value}}}'
    for name, text in (("a.jsonl", f"{ROW}\n{bad}\n{ROW}"), ("b.json", f"[{ROW},\n{bad},\n{ROW}]")):
        path = write(tmp_path / name, text)
        with pytest.raises(DataError, match=message) as caught:
            read_demonstrations(path)
        assert str(caught.value).isprintable() and "\\u" not in message
        if len(value) < 10_000:  # past that the library cannot tell where such a row ends
            assert len(read_demonstrations(path, on_bad_row="skip")) == 2


def test_a_pair_of_surrogates_is_one_character(tmp_path):
    path = write(tmp_path / "a.jsonl", r'{"prompt": "\ud83d\ude00", "response": "r"}')
    assert read_demonstrations(path)[0].prompt == "\N{GRINNING FACE}"


@pytest.mark.parametrize("suffix", PACK)
def test_every_packing_is_read_and_a_damaged_one_is_refused(tmp_path, suffix):
    data = (f"{ROW}\n" * 30).encode()
    pack = PACK[suffix]
    for name in (f"rows.jsonl{suffix}", f"ROWS.JSONL{suffix.upper()}"):
        path = write(tmp_path / name, pack(data) + pack(data))
        assert len(read_demonstrations(path)) == 60
    for damaged in (pack(data)[:-9], data, pack(data)[:8] + b"\0\1\2\3" + pack(data)[12:]):
        path.write_bytes(damaged)
        for on_bad_row in BOTH:
            with pytest.raises(DataError, match=r"damaged (gzip|bzip2|xz|Zstandard) file: "):
                read_demonstrations(path, on_bad_row=on_bad_row)
    hint = rf"its first bytes are those of \w+ \(name it rows.jsonl{suffix}\)"
    with pytest.raises(DataError, match=hint):
        read_demonstrations(write(tmp_path / "rows.jsonl", pack(data)))


@pytest.mark.parametrize(
    ("name", "start", "body"),
    [
        ("a.jsonl.gz", b"", b"0"), ("a.json.gz", b'[{"text":"', b"0"), ("a.json.gz", b"[", b" "),
        ("a.json.gz", b"", b"["), ("a.txt.gz", b"", b"0"), ("a.txt.gz", b"", b"\n"),
        ("a.csv.gz", b'text\n"', b"0"), ("a.jsonl.gz", b"", b"\n"),
        ("a.txt.gz", b"", b"a word \n" * 5 + b"\n"),
    ],
)  # fmt: skip
def test_a_bomb_is_refused_soon_and_in_little_memory(tmp_path, monkeypatch, name, start, body):
    monkeypatch.setattr(packed, "ALWAYS_FINE", 2**20)
    monkeypatch.setattr(packed, "MAX_RATIO", 2)
    pack = zlib.compressobj(9, zlib.DEFLATED, 31)
    data = pack.compress(start)
    for _ in range(200):
        data += pack.compress(body * (2**20 // len(body)))
    path = write(tmp_path / name, data + pack.flush())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for on_bad_row in BOTH:
        with pytest.raises(DataError, match=r"unpacks to more than|nested more than"):
            for _ in stream_documents(path, on_bad_row=on_bad_row, reports=[]):
                pass
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10


def test_a_table_that_names_one_large_value_many_times_is_read_a_few_rows_at_a_time(tmp_path):
    import pyarrow
    import pyarrow.parquet

    numbers = pyarrow.array([0] * 20_000, pyarrow.int32())
    texts = pyarrow.DictionaryArray.from_arrays(numbers, pyarrow.array(["x" * 4_000_000]))
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, path, dictionary_pagesize_limit=2**30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(read_documents(path, limit=3)) == 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 2**10


@pytest.mark.parametrize("named", ["it", "glob", "folder"])
def test_a_pipe_a_socket_or_a_device_is_refused_at_once(tmp_path, named):
    began = time.monotonic()
    for kind in ("a pipe", "a socket", "a device", "a link that leads nowhere"):
        folder = tmp_path / kind.replace(" ", "")
        folder.mkdir()
        path = folder / "x.jsonl"
        if kind == "a pipe":
            os.mkfifo(path)
        elif kind == "a socket":
            with socket.socket(socket.AF_UNIX) as server:
                here = os.getcwd()
                os.chdir(folder)  # the whole path is too long for a socket
                server.bind(path.name)
                os.chdir(here)
        else:
            path.symlink_to("/dev/zero" if kind == "a device" else "nowhere")
        source = {"it": path, "glob": folder / "*", "folder": folder}[named]
        with pytest.raises(DataError, match=f"x.jsonl: {kind}, not a file"):
            read_documents(source)
        with pytest.raises(DataError, match="not a file"):
            hash_files(source)
    assert time.monotonic() - began < 3


def test_a_folder_is_read_with_those_in_it_and_without_what_is_about_the_data(tmp_path):
    for name in ("b.jsonl", "a/deep/er/c.jsonl", "a/A.JSONL"):
        write(tmp_path / name, ROW)
    for name in ("README.md", "LICENSE.txt", "a/dataset_infos.json", ".git/x.jsonl", "a/._c.jsonl"):
        write(tmp_path / name, "not data")
    (tmp_path / "a" / "up").symlink_to("..")
    (tmp_path / "a" / "again").symlink_to("deep")
    found = ["a/A.JSONL", "a/again/er/c.jsonl", "b.jsonl"]
    assert [str(path.relative_to(tmp_path)) for path in find_files(tmp_path)] == found
    assert len(read_demonstrations(tmp_path)) == 3
    names = {path.name for path in find_files(tmp_path / "**" / "*.[jJ]*")}
    assert names == {"A.JSONL", "c.jsonl", "b.jsonl", "dataset_infos.json"}
    assert len(find_files(tmp_path / "**" / "c.jsonl")) == 1


def test_what_the_system_refuses_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    with pytest.raises(DataError, match=r"loop.jsonl: cannot be read: Too many levels"):
        read_documents(tmp_path / "loop.jsonl")
    with pytest.raises(DataError, match="cannot be read: File name too long"):
        read_documents(tmp_path / ("x" * 300 + ".jsonl"))
    with pytest.raises(DataError, match="no such file"):
        read_documents(f"{tmp_path}/a\0b.jsonl")
    path = write(tmp_path / "line\nfeed.jsonl", "{")
    with pytest.raises(DataError, match=r"line\\u000afeed.jsonl:1:2: not JSON") as caught:
        read_documents(path)
    assert str(caught.value).isprintable()
    gone = write(tmp_path / "gone.jsonl", ROW)
    (found,) = find_files(gone)
    monkeypatch.setattr("instruct_jax.data.files.find_files", lambda source: [found])
    gone.unlink()
    with pytest.raises(DataError, match=r"gone.jsonl: cannot be read: No such file"):
        read_demonstrations(gone)
    gone.mkdir()
    with pytest.raises(DataError, match=r"gone.jsonl"):
        read_demonstrations(gone)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", "prompt,response\na,b\n".encode("utf-16"), r"UTF-16; save it as UTF-8: iconv"),
        ("a.jsonl", ROW.encode("utf-16-le"), "UTF-16; save it as UTF-8"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid x", "LFS pointer.*lfs pull"),
        ("a.json", b"PK\x03\x04abc", "those of zip .unzip it"),
        ("a.jsonl", f"{ROW}\r{ROW}\r".encode(), r"lines end with CR alone .tr"),
        ("a.txt", b"one\rtwo\r", r"lines end with CR alone"),
        ("a.csv", b'prompt,response\na,"b\nc,d\n', ":2: not CSV: a quote that is opened here"),
        ("a.csv", b'prompt,response\nx,y\na,"b"c\n', ":3: not CSV: ',' expected after '\"'"),
        ("a.csv", b"prompt,response,response\na,b,c\n", ':1: field "response": .*there twice'),
        ("a.csv", b"prompt,response,,\na,b,c,\n", ":2: a value in a column without a name"),
        ("a.parquet.gz", b"x", "Parquet is packed in itself"),
        ("a.csv", b"", "no rows"),
        ("a.csv", b"prompt,response\n", "no rows"),
        ("a.json", b"[]", "no rows"),
    ],
)  # fmt: skip
def test_a_file_of_another_kind_is_refused_with_what_to_do(tmp_path, name, data, message):
    for on_bad_row in BOTH:
        with pytest.raises(DataError, match=message):
            read_demonstrations(write(tmp_path / name, data), on_bad_row=on_bad_row)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.csv", b"prompt;response\np;r, s\n"),
        ("a.csv", b"prompt\tresponse\np\tr, s\n"),
        ("a.csv", b"sep=;\r\nprompt;response\r\np;r, s\r\n"),
        ("a.csv", b'\xef\xbb\xbf\n\n prompt , response,,\np,"r, s",,\n\n'),
        ("a.csv", b'"prompt","response"\r"p","r, s"\r'),
        ("a.tsv", b'prompt,response\np,"r, s"\n'),
        ("a.tsv", b"prompt\tresponse\np\tr, s\n"),
    ],
)
def test_the_delimiter_of_a_table_is_told_from_its_header(tmp_path, name, data):
    (row,) = read_demonstrations(write(tmp_path / name, data))
    assert (row.prompt, row.response) == ("p", "r, s")


def test_a_long_field_of_a_table_is_read(tmp_path):
    path = write(tmp_path / "a.csv", "prompt,response\np," + "x" * 200_000 + "\n")
    assert len(read_demonstrations(path)[0].response) == 200_000


def test_a_byte_that_is_not_utf8_spoils_its_row_alone_in_every_kind_of_file(tmp_path):
    bad = b"caf\xe9"
    good, line = {"prompt": "p", "response": "r"}, b'{"prompt":"p","response":"%s"}' % bad
    files = {
        "a.csv": b"prompt,response\np,%s\np,r\n" % bad,
        "a.jsonl": line + b"\n" + ROW.encode(),
        "a.json": b"[" + line + b",\n" + ROW.encode() + b"]",
    }
    for name, data in files.items():
        path = write(tmp_path / name, data)
        with pytest.raises(DataError, match=r"not UTF-8: byte 0xe9.*iconv.*data.on_bad_row=skip"):
            read_demonstrations(path)
        (row,) = read_demonstrations(path, on_bad_row="skip")
        assert {"prompt": row.prompt, "response": row.response} == good
    path = write(tmp_path / "a.txt", b"one\n" + bad + b"\nthree\n")
    rows = read_prompts(path, on_bad_row="skip")
    assert [row.text for row in rows] == ["one", "three"]
    path = write(tmp_path / "b.txt", b"one\n\n" + bad + b"\n\nthree\n")
    rows = read_documents(path, on_bad_row="skip", split="paragraph")
    assert [row.text for row in rows] == ["one", "three"]
    with pytest.raises(DataError, match=r"b.txt:3:4: not UTF-8"):
        read_documents(path, on_bad_row="skip")  # one document, and that a bad one


def test_text_without_line_ends_or_empty_lines_is_cut_in_bounded_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_ROW_BYTES", 1000)
    for text in ("word ü" * 2000, "wörter\n" * 2000, "ü" * 5000):
        path = write(tmp_path / "a.txt", text)
        pieces = [row.text for row in stream_documents(path, reports=[])]
        assert "".join(pieces) == text
        assert max(map(len, pieces)) < 2500 and len(pieces) > 4
        (whole,) = read_documents(path)
        assert whole.text == text


def test_a_bad_row_names_the_remedy_and_a_wrong_file_does_not(tmp_path):
    path = write(tmp_path / "a.jsonl", f'{ROW}\n{{"prompt": "p", "response": ""}}\n')
    with pytest.raises(DataError, match=r"data.on_bad_row=skip leaves such rows out"):
        read_demonstrations(path)
    path = write(tmp_path / "a.jsonl", "no JSON\n")
    with pytest.raises(DataError, match=r"data.on_bad_row=skip"):
        read_demonstrations(path)
    with pytest.raises(DataError) as caught:
        read_comparisons(write(tmp_path / "a.jsonl", ROW))
    assert "on_bad_row" not in str(caught.value)
    with pytest.raises(DataError) as caught:
        read_demonstrations(write(tmp_path / "a.jsonl", "no JSON\n"), on_bad_row="skip")
    assert "on_bad_row" not in str(caught.value)


def test_a_file_of_bad_rows_alone_is_given_up_before_its_end(tmp_path):
    path = write(tmp_path / "a.jsonl", "0\n" * 2_000_000)
    began = time.process_time()
    with pytest.raises(DataError, match=r"a.jsonl:1:1: expected an object"):
        read_dialogues(path, on_bad_row="skip")
    assert time.process_time() - began < 5


def test_a_verdict_lists_some_reasons_only(tmp_path):
    lines = [ROW, *(json.dumps({f"k{i}": 1}) for i in range(1500))]
    rows = read_demonstrations(write(tmp_path / "a.jsonl", "\n".join(lines)), on_bad_row="skip")
    (report,) = rows.report
    assert report.bad.total() == 1500 and len(report.bad) <= 1001
    assert len(str(report)) < 1000 and str(report).endswith("...)")


def test_a_table_gives_plain_values_and_no_nan(tmp_path):
    import datetime

    import pyarrow
    import pyarrow.parquet

    at = datetime.datetime(2026, 1, 2)
    rows = [
        {"prompt": "p", "response": "r", "x": float("nan"), "at": at, "n": {"y": [float("nan")]}}
    ]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    (row,) = read_demonstrations(path)
    assert row.meta == {"at": "2026-01-02T00:00:00", "n": {"y": [None]}}
    json.dumps(row.meta, allow_nan=False)
    twice = pyarrow.table([["p"], ["q"]], names=["prompt", "prompt"])
    pyarrow.parquet.write_table(twice, path)
    with pytest.raises(DataError, match=r'a.parquet: field "prompt": the column is there twice'):
        read_prompts(path)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_what_follows_a_packed_stream_is_refused(tmp_path, suffix):
    data = PACK[suffix](f"{ROW}\n".encode())
    path = write(tmp_path / f"a.jsonl{suffix}", data + b"\0" * 8)
    assert len(read_demonstrations(path)) == 1
    for rest in (b"garbage", data[:-4]):
        path.write_bytes(data + rest)
        with pytest.raises(DataError, match=r"damaged (gzip|bzip2|xz) file"):
            read_demonstrations(path)


def test_bytes_in_a_table_are_text_or_refused(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["zwei ü".encode(), b"\xff"]}), path)
    with pytest.raises(DataError, match=r'a.parquet:2: field "text": bytes that are not UTF-8'):
        read_documents(path)
    assert [row.text for row in read_documents(path, on_bad_row="skip")] == ["zwei ü"]


def test_a_blank_before_a_quote_is_the_manner_of_the_file_or_refused(tmp_path):
    path = write(tmp_path / "a.csv", 'prompt, completion\nq, "a, b"\n')
    assert read_demonstrations(path)[0].response == "a, b"
    write(path, 'prompt,completion\nq, "a b"\nq," ""yes"""\n')
    with pytest.raises(DataError, match=r"a.csv:2: a blank before a quote"):
        read_demonstrations(path)
    assert [row.response for row in read_demonstrations(path, on_bad_row="skip")] == [' "yes"']
