"""Text as files of tokens: the same rows as in memory, whatever happens on the way."""

import gzip
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
from tokenizers import models

from instruct_jax.data import corpus as corpora
from instruct_jax.data import files, progress, tokens
from instruct_jax.data.config import DataConfig
from instruct_jax.data.corpus import Corpus
from instruct_jax.data.encoding import encode_documents
from instruct_jax.data.loader import Batches
from instruct_jax.data.rows import DataError
from instruct_jax.data.sources import open_source
from instruct_jax.data.texts import pieces
from instruct_jax.data.tokenizer import Tokenizer, train_bpe
from instruct_jax.errors import CheckpointError
from tests.edits import edit

TOKENIZER = train_bpe(["abc"], vocab_size=257)  # one token a byte
WORDS = ("tea", "für", "zwei", "and", "two", "for", "tea.")


def sentence(seed, words):
    draw = np.random.default_rng(seed)
    return " ".join(WORDS[i] for i in draw.integers(0, len(WORDS), words))


@pytest.fixture
def folder(tmp_path):
    """Documents of all kinds of file, one of them long."""
    folder = tmp_path / "text"
    folder.mkdir()
    for name, opened in (("a.jsonl", open), ("b.jsonl.gz", gzip.open)):
        with opened(folder / name, "wt", encoding="utf-8") as file:
            for i in range(60):
                file.write(json.dumps({"text": sentence(100 * len(name) + i, 5 + i)}) + "\n")
    book = "\n\n".join(sentence(i, 900) for i in range(25))
    (folder / "c.txt").write_text(book.replace("\n", "\r\n"), encoding="utf-8", newline="")
    (folder / "d.csv").write_text("text\n" + "\n".join(sentence(i, 9) for i in range(30)))
    return folder


def source_of(*paths, **changes):
    documents = tuple(map(str, paths))
    return open_source(
        DataConfig(source="files", documents=documents, valid_fraction=0.2, **changes)
    )


def made(source, folder, split="train", tokenizer=TOKENIZER, of=1):
    """A Corpus that is all there, made by `of` processes one after the other."""
    corpus = Corpus(source.text(split), tokenizer, folder)
    corpus.plan()
    for share in range(of):
        corpus.make(share, of)
    return corpus


def in_memory(source, split, length):
    return encode_documents(list(source.text(split)), TOKENIZER, length=length)["tokens"]


@pytest.fixture
def small_steps(monkeypatch):
    """Many parts, batches and commits of little text."""
    monkeypatch.setattr(corpora, "PART_BYTES", 5_000)
    monkeypatch.setattr(corpora, "COMMIT_TOKENS", 2_000)
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 700)


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("length", [1, 7, 512])
def test_rows_from_files_are_the_rows_in_memory(tmp_path, folder, small_steps, split, length):
    source = source_of(folder)
    expected = in_memory(source, split, length)
    corpus = made(source, tmp_path / "tokens", split)
    rows = corpus.rows(length)
    assert len(list(corpus.directory.glob("*.tokens"))) == 4
    assert rows.shape == expected.shape and rows.dtype == expected.dtype == np.int32
    assert (rows[:] == expected).all()


def test_every_document_is_in_one_split(tmp_path, folder):
    source = source_of(folder)
    splits = [{row.text for row in source.text(split)} for split in ("train", "valid", "test")]
    assert all(splits)
    texts = set().union(*splits)
    assert sum(map(len, splits)) == len(texts)
    book = (folder / "c.txt").read_text(encoding="utf-8")  # with newlines made plain
    assert len(texts) == 60 + 60 + 30 + len(list(pieces(book)))


def test_a_file_named_twice_counts_twice(tmp_path, folder):
    once, twice = source_of(folder / "a.jsonl"), source_of(folder / "a.jsonl", folder / "a.jsonl")
    (once, twice) = (made(s, tmp_path).rows(1)[:] for s in (once, twice))
    assert (twice == np.concatenate([once, once])).all()


def test_a_limit_counts_the_rows_of_all_files_of_a_path(tmp_path, folder):
    source = source_of(folder / "[ab].*", limit=70)
    parts = [list(source.text(split)) for split in ("train", "valid", "test")]
    assert sum(map(len, parts)) == 70
    assert (made(source, tmp_path).rows(3)[:] == in_memory(source, "train", 3)).all()


def test_the_embedded_world_is_a_text_like_any_other(tmp_path):
    source = open_source(DataConfig(toy_documents=30, toy_valid=5))
    documents = source.world.pretraining_corpus(35)
    assert list(source.text("train")) == documents[:30]
    assert list(source.text("valid")) == documents[30:]
    assert (made(source, tmp_path).rows(16)[:] == in_memory(source, "train", 16)).all()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_batches_of_files_are_batches_of_memory(tmp_path, folder, count):
    """R7: and the slices of all processes are the global batch."""
    source = source_of(folder)
    arrays = {"tokens": in_memory(source, "train", 9)}
    rows = {"tokens": made(source, tmp_path, of=count).rows(9)}
    whole = Batches(arrays, 8, seed=3)
    parts = [Batches(rows, 8, seed=3, process_index=i, process_count=count) for i in range(count)]
    for step in (0, 1, whole.steps_per_epoch - 1, 1000):
        batch = np.concatenate([part(step)["tokens"] for part in parts])
        assert type(batch) is np.ndarray and (batch == whole(step)["tokens"]).all()


def test_rows_are_indexed_as_an_array_is(tmp_path, folder):
    source = source_of(folder)
    array, rows = in_memory(source, "train", 11), made(source, tmp_path).rows(11)
    for index in (0, len(rows) - 1, slice(3, 20, 4), slice(-2, None), np.array([[5, 1], [1, 0]])):
        assert (rows[index] == array[index]).all() and rows[index].shape == array[index].shape
    for index in (len(rows), -1, np.array([0, len(rows)]), 0.5, np.array([True])):
        with pytest.raises(IndexError):
            rows[index]


@pytest.mark.parametrize(("size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_ids_take_two_bytes_where_they_can(tmp_path, folder, size, dtype):
    vocabulary = {"<|endoftext|>": size - 1, "für": size - 2, "?": 0}
    words = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    corpus = made(source_of(folder), tmp_path, tokenizer=Tokenizer(words))
    stored = np.fromfile(corpus.directory / "00000.tokens", dtype)
    assert set(stored.tolist()) == {0, size - 2, size - 1}
    assert (corpus.rows(1)[:].ravel() == stored).all()


def test_a_long_preparation_tells_how_far_it_is(tmp_path, folder, small_steps, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    made(source_of(folder), tmp_path)
    line = re.compile(r"tokens of train: (\d+)% of [\d.]+ GB, [\d,]+ tokens/s(, \d+ min left)?")
    shares = [int(line.fullmatch(text)[1]) for text in capsys.readouterr().err.splitlines()]
    assert shares == sorted(shares) and shares[0] < 20 and shares[-1] > 90


# --- found again, or noticed --------------------------------------------------------------------


def no_tokenizer():
    """As TOKENIZER, but must not be used."""
    tokenizer = train_bpe(["abc"], vocab_size=257)
    assert tokenizer.fingerprint == TOKENIZER.fingerprint
    tokenizer.encode_batch = None  # type: ignore[method-assign]
    return tokenizer


def touched(folder):
    os.utime(folder / "a.jsonl", (1, 1))


def moved(folder):
    folder.rename(folder.with_name("elsewhere"))
    shutil.copytree(folder.with_name("elsewhere"), folder)


@pytest.mark.parametrize("change", [None, touched, moved])
def test_a_second_run_finds_the_tokens(tmp_path, folder, change):
    before = made(source_of(folder), tmp_path / "tokens").rows(5)[:]
    if change is not None:
        change(folder)
    again = made(source_of(folder), tmp_path / "tokens", tokenizer=no_tokenizer())
    assert (again.rows(5)[:] == before).all()


def test_a_second_run_need_not_read_the_text_for_its_provenance(tmp_path, folder, monkeypatch):
    source = source_of(folder)
    made(source, tmp_path)
    hashes = source.provenance()
    monkeypatch.setattr(files, "_SHA256", {})  # a new process
    made(source, tmp_path)
    monkeypatch.setattr(files.hashlib, "file_digest", None)
    assert source.provenance() == hashes and len(hashes) == 4


def edited(folder):
    text = (folder / "a.jsonl").read_text()
    (folder / "a.jsonl").write_text(text.replace("tea", "pea"))


def added(folder):
    shutil.copy(folder / "a.jsonl", folder / "aa.jsonl")


def removed(folder):
    (folder / "d.csv").unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [(edited, "a.jsonl has changed"), (added, "aa.jsonl is new"), (removed, "d.csv is gone")],
)
def test_a_changed_source_is_noticed(tmp_path, folder, change, words):
    made(source_of(folder), tmp_path / "tokens")
    change(folder)
    with pytest.raises(DataError, match=f"{words}.*since its tokens were made.*delete this folder"):
        made(source_of(folder), tmp_path / "tokens")


def test_a_source_that_changed_before_its_tokens_were_all_made_is_begun_anew(
    tmp_path, folder, small_steps
):
    corpus = Corpus(source_of(folder).text("train"), TOKENIZER, tmp_path / "tokens")
    corpus.plan()
    corpus.make(0, 2)  # another process never came
    edited(folder)
    source = source_of(folder)
    assert (made(source, tmp_path / "tokens").rows(5)[:] == in_memory(source, "train", 5)).all()


@pytest.mark.parametrize("change", [{"seed": 1}, {"valid_fraction": 0.4}, {"split_text": "line"}])
def test_other_settings_and_tokenizers_have_tokens_of_their_own(tmp_path, folder, change):
    source = source_of(folder)
    other = open_source(replace(source.config, **change))
    larger = train_bpe(["tea for two and two for tea"], vocab_size=260)
    first = made(source, tmp_path)
    for corpus in (made(other, tmp_path), made(source, tmp_path, tokenizer=larger)):
        assert corpus.directory != first.directory
        assert corpus.rows(1).shape != first.rows(1).shape
    assert (first.rows(5)[:] == in_memory(source, "train", 5)).all()


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "\x00", '{"documents": 1, "more": 2}'])
@pytest.mark.parametrize("name", ["plan.json", "00000.json"])
def test_a_spoilt_plan_or_journal_is_one_line_of_code_4(tmp_path, folder, name, text):
    corpus = made(source_of(folder), tmp_path / "tokens")
    (corpus.directory / name).write_text(text)
    with pytest.raises(CheckpointError, match=name) as error:
        made(source_of(folder), tmp_path / "tokens")
    assert "\n" not in str(error.value) and "delete" in str(error.value)


def test_tokens_that_are_not_all_there_are_refused(tmp_path, folder, small_steps):
    source = source_of(folder)
    corpus = Corpus(source.text("train"), TOKENIZER, tmp_path)
    with pytest.raises(DataError, match="no plan of tokens here"):
        corpus.make()
    corpus.plan()
    corpus.make(1, 2)
    with pytest.raises(DataError, match="not all made"):
        corpus.rows(5)
    corpus.make(0, 2)
    with pytest.raises(DataError, match="do not fill one row"):
        corpus.rows(10**6)
    with open(corpus.directory / "00001.tokens", "r+b") as file:
        file.truncate(100)
    with pytest.raises(DataError, match=r"00001\.tokens: shorter than its journal says"):
        corpus.rows(5)
    plan = corpus.directory / "plan.json"
    edit(plan, {"format": 99})
    with pytest.raises(DataError, match="format 99, this version reads 1"):
        corpus.rows(5)


def test_a_flipped_bit_in_tokens_is_never_read(tmp_path, folder, small_steps):
    """R20: every block has its checksum; the other blocks are read all the same."""
    corpus = made(source_of(folder), tmp_path)
    whole = corpus.rows(64)[:]
    path = corpus.directory / "00000.tokens"
    data, rng = path.read_bytes(), np.random.default_rng(0)
    for at in rng.integers(0, len(data), 20):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.integers(8)]) + data[at + 1 :])
        with pytest.raises(CheckpointError, match=r"00000\.tokens: block \d+ is not as it was wri"):
            corpus.rows(64)[:]
        last = len(whole) - 1  # of the last part
        assert (corpus.rows(64)[last] == whole[last]).all()
    path.write_bytes(data + b"x")
    with pytest.raises(DataError, match="longer than its journal says"):
        corpus.rows(64)
    path.write_bytes(data)
    assert (corpus.rows(64)[:] == whole).all()


@pytest.mark.parametrize("suffix", [".sums", ".json"])
def test_what_stands_beside_the_tokens_is_that_part_s_own(tmp_path, folder, small_steps, suffix):
    corpus = made(source_of(folder), tmp_path)
    paths = [(corpus.directory / f"0000{i}").with_suffix(suffix) for i in (0, 1)]
    paths[0].write_bytes(paths[1].read_bytes())
    with pytest.raises(CheckpointError, match=rf"00000\{suffix} is .*; delete .* are made again"):
        corpus.rows(64)
    paths[0].unlink()
    with pytest.raises((CheckpointError, DataError)):
        corpus.rows(64)


def test_tokens_of_before_the_checksums_are_read_and_none_is_past_the_vocabulary(
    tmp_path, folder, small_steps
):
    corpus = made(source_of(folder), tmp_path)
    whole = corpus.rows(64)[:]
    edit(corpus.directory / "plan.json", {"corpus": None})
    for path in corpus.directory.glob("0*.json"):
        edit(path, {"part": None, "sums": None})
        path.with_suffix(".sums").unlink()
    assert (corpus.rows(64)[:] == whole).all()
    path = corpus.directory / "00000.tokens"
    tokens = np.fromfile(path, corpus.dtype)
    tokens[70] = TOKENIZER.vocab_size
    path.write_bytes(tokens.tobytes())
    with pytest.raises(CheckpointError, match=rf"token {TOKENIZER.vocab_size} is past the vocab"):
        corpus.rows(64)[1]


def test_tokens_renamed_to_those_of_another_tokenizer_are_refused(tmp_path, folder):
    corpus = made(source_of(folder), tmp_path)
    other = Corpus(corpus.text, train_bpe(["a b c"] * 3, vocab_size=260), tmp_path)
    shutil.move(corpus.directory, other.directory)
    with pytest.raises(CheckpointError, match=r"plan\.json is of train-"):
        other.rows(64)


# --- killed, or wrong ---------------------------------------------------------------------------

# Kills itself at every place where something reaches the disk, in a process of its own each time.
KILLED = """
import os, signal, sys
from pathlib import Path
from tests.data import test_corpus as t

folder, out = Path(sys.argv[1]), Path(sys.argv[2])
t.corpora.PART_BYTES, t.corpora.COMMIT_TOKENS, t.tokens.BATCH_CHARACTERS = 5_000, 8_000, 4_000
source, left = t.source_of(folder), 0

def dying(function):
    def call(*arguments):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return call

os.fsync, os.replace, os.rename = dying(os.fsync), dying(os.replace), dying(os.rename)
t.Corpus._commit = dying(t.Corpus._commit)
for place in range(1, 1000):
    child = os.fork()
    if child == 0:
        left = place
        t.made(source, out / str(place))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        break
print(place, os.waitstatus_to_exitcode(status))
"""


def test_a_killed_preparation_is_completed_wherever_it_was_killed(
    tmp_path, folder, small_steps, repository
):
    """Every fsync and rename of the work is met by a SIGKILL; the next run ends with the bytes of a
    run that never stopped.
    """
    environment = os.environ | {"PYTHONPATH": str(repository)}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, folder, tmp_path / "killed"],
        cwd=repository, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    places, code = map(int, done.stdout.split())
    assert code == 0 and places > 20, done.stderr
    source, kept = source_of(folder), 0
    whole = made(source, tmp_path / "whole").directory
    expected = {p.name: p.read_bytes() for p in whole.iterdir() if p.name != "plan.json"}
    for place in range(1, places):
        journals = [*(tmp_path / "killed" / str(place)).glob("*/0*.json")]
        kept += sum(json.loads(path.read_text())["tokens"] for path in journals)
        again = made(source, tmp_path / "killed" / str(place)).directory
        assert {
            p.name: p.read_bytes() for p in again.iterdir() if p.name in expected
        } == expected, place
        assert {p.suffix for p in again.iterdir()} <= {".tokens", ".json", ".sums"}
    assert kept > 0, "some work outlived a kill"


def test_a_bad_row_is_named_and_nothing_is_left(tmp_path, folder):
    (folder / "a.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    with pytest.raises(DataError, match=r'a\.jsonl:2:2: field "text"'):
        made(source_of(folder), tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


def test_skipped_rows_are_counted_and_never_taken_for_all(tmp_path, folder):
    with open(folder / "a.jsonl", "a") as file:
        file.write('{"text": 3}\n')
    skipping = source_of(folder, on_bad_row="skip")
    rows = made(skipping, tmp_path).rows(5)[:]
    assert (rows == in_memory(skipping, "train", 5)).all()
    with pytest.raises(DataError, match=r"made without bad rows: .*a\.jsonl.*1 bad rows skipped"):
        made(source_of(folder), tmp_path).rows(5)


def test_what_was_done_before_a_bad_row_is_kept_for_the_run_that_skips_it(
    tmp_path, folder, small_steps
):
    with open(folder / "d.csv", "a") as file:
        file.write("\none,two\n")
    with pytest.raises(DataError, match=r"d\.csv:32"):
        made(source_of(folder), tmp_path)
    skipping = source_of(folder, on_bad_row="skip")
    assert (made(skipping, tmp_path).rows(5)[:] == in_memory(skipping, "train", 5)).all()


def test_a_full_disk_is_told_with_the_file_and_harms_nothing(tmp_path, folder, small_steps):
    source = source_of(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            made(source, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.filename.endswith(".tokens")
    assert (made(source, tmp_path).rows(5)[:] == in_memory(source, "train", 5)).all()


# --- bounded memory -----------------------------------------------------------------------------

MEASURED = """
import sys
from pathlib import Path
from instruct_jax.stages.pretrain import language_rows
from tests.data import test_corpus as t

source, reads = t.source_of(sys.argv[1]), t.train_bpe([t.sentence(0, 2000)], vocab_size=300)
rows = t.made(source, sys.argv[2], tokenizer=reads).rows(512)
batches = t.Batches(language_rows(rows), 32, seed=0)
for step in range(batches.steps_per_epoch):
    batches(step)
status = Path("/proc/self/status").read_text()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["books.jsonl", "book.txt", "packed.jsonl.gz"])
def test_memory_does_not_grow_with_the_text(tmp_path, repository, name):
    """20 and 150 MB of text are tokenised and read for an epoch in the same memory."""
    opened = gzip.open if name.endswith(".gz") else open
    paragraph = sentence(0, 150)
    row = paragraph if name.endswith("txt") else json.dumps({"text": "\n\n".join([paragraph] * 40)})
    peaks = []
    for size in (20_000_000, 150_000_000):
        path = tmp_path / f"{size}" / name
        path.parent.mkdir()
        with opened(path, "wt") as file:
            for i in range(size // len(row)):
                file.write(row[:-2] + f" {i}" + row[-2:] + "\n\n"[: 1 + name.endswith("txt")])
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, path, tmp_path / f"tokens{size}"],
            cwd=repository, env=os.environ | {"PYTHONPATH": str(repository)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        peaks.append(int(done.stdout) / 1000)
    assert peaks[1] < peaks[0] + 40, f"MB: {peaks}"
