"""Tokens made ahead of a run, by one process or several, and where they cannot be written."""

import errno
import json
import subprocess
import sys

import numpy as np
import pytest

from instruct_jax.data.config import DataConfig
from instruct_jax.data.corpus import Corpus
from instruct_jax.data.encoding import encode_documents
from instruct_jax.data.sources import open_source
from tests.experiments import scripts


def files_of(folder):
    """When each file below `folder` was written, and which it is."""
    stats = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path: (stat.st_ino, stat.st_mtime_ns) for path, stat in stats.items()}


def test_a_run_finds_the_tokens_that_were_made_ahead(tmp_path):
    kept = f"--config.data.token_dir={tmp_path / 'tokens'}"
    scripts.launch(
        "corpus", "--config=configs/corpus.py:debug", f"--workdir={tmp_path / 'corpus'}", kept
    )
    report = json.loads((tmp_path / "corpus" / "corpus.json").read_text())
    made = files_of(tmp_path / "tokens")
    (stored,) = (tmp_path / "tokens").glob("train-*/00000.tokens")
    assert report["train"]["tokens"] == stored.stat().st_size // 2 // 64 * 64 > 5_000
    assert set(report["batches"]) == {"cold", "warm"} and report["memory_mb"]["at start"] > 50
    scripts.launch(
        "pretrain", "--config=configs/pretrain.py:debug", f"--workdir={tmp_path / 'run'}", kept,
        "--config.pretrain.epochs=0.1", "--config.pretrain.warmup=0", "--mesh=data:1",
    )  # fmt: skip
    assert files_of(tmp_path / "tokens") == made
    assert not (tmp_path / "run" / "tokens").exists()
    log = map(json.loads, (tmp_path / "run" / "pretrain.jsonl").read_text().splitlines())
    assert all(row["batch_wait_seconds"] >= 0 for row in log if "loss" in row)


def test_a_synthetic_corpus_is_as_large_as_asked_and_made_once(tmp_path):
    arguments = [
        "--config=configs/corpus.py:debug", f"--workdir={tmp_path}",
        "--config.synthetic_bytes=300000",
    ]  # fmt: skip
    scripts.launch("corpus", *arguments)
    made = files_of(tmp_path / "text")
    (path,) = (tmp_path / "text").glob("*.jsonl")
    rows = map(json.loads, path.read_text().splitlines())
    assert 300_000 <= sum(len(row["text"].encode()) for row in rows) < 320_000
    scripts.launch("corpus", *arguments)
    assert files_of(tmp_path / "text") == made


def test_a_full_disk_is_told_in_one_line_with_the_file_and_what_is_free(
    tmp_path, capsys, monkeypatch
):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Corpus, "_commit", full)
    with pytest.raises(SystemExit) as stop:
        scripts.launch(
            "pretrain", "--config=configs/pretrain.py:debug", f"--workdir={tmp_path / 'run'}",
            f"--config.data.token_dir={tmp_path / 'tokens'}",
        )  # fmt: skip
    assert stop.value.code == 5
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {tmp_path / 'tokens' / 'train-'}")
    assert "00000.tokens: No space left on device" in line
    assert f"bytes are free at {tmp_path / 'tokens' / 'train-'}" in line


SHARED = """
import sys
from pathlib import Path

import jax
import numpy as np
from instruct_jax.cli import processes

processes.join()
from instruct_jax.data import corpus
from instruct_jax.stages.text import text_rows
from tests.experiments import scripts
from tests.experiments.test_corpus import source_of

corpus.PART_BYTES = 2_000
made, make = [], corpus.Corpus._make_part
corpus.Corpus._make_part = lambda self, i, *rest: (made.append(i), make(self, i, *rest))
folder, process = Path(sys.argv[1]), jax.process_index()
reads = scripts.tokenizer()
rows = text_rows(source_of(folder), "train", reads, length=9, folder=folder / "tokens")
np.savez(folder / str(process), rows=rows[:], made=made)
"""


def source_of(folder):
    return open_source(DataConfig(source="files", documents=(str(folder / "text"),)))


def test_two_processes_tokenise_a_share_each_and_read_the_same_rows(tmp_path, repository):
    for i in range(5):
        scripts.write_rows(tmp_path / str(i), rows=20 + i)
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / str(i) / "documents.jsonl").rename(tmp_path / "text" / f"{i}.jsonl")
    launcher = [sys.executable, "experiments/launch.py", "-n", "2", "--devices-per-process=1", "--"]
    done = subprocess.run(
        [*launcher, sys.executable, "-c", SHARED, str(tmp_path)],
        cwd=repository, env=scripts.environment(repository), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = encode_documents(
        list(source_of(tmp_path).text("train")), scripts.tokenizer(), length=9
    )["tokens"]
    for process, parts in (("0", [0, 2, 4]), ("1", [1, 3])):
        with np.load(tmp_path / f"{process}.npz") as found:
            assert (found["rows"] == expected).all()
            assert found["made"].tolist() == parts
