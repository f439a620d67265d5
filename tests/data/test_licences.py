"""DATA-21: a data set's licence is found where people write it down, and is never made up."""

import json
import os

import pytest

from instruct_jax.data.config import DataConfig
from instruct_jax.data.licences import NOT_STATED, find_licences
from instruct_jax.data.sources import open_source


@pytest.fixture
def rows(tmp_path):
    """A file of prompts in a folder of its own."""
    path = tmp_path / "sets" / "prompts.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps({"prompt": "a"}) + "\n")
    return path


def test_a_file_that_says_nothing_is_not_stated(rows):
    assert find_licences(rows) == {str(rows): NOT_STATED}


def test_a_sidecar_counts_more_than_a_manifest_and_that_more_than_a_card(rows):
    (rows.parent / "README.md").write_text("---\nlicense: cc-by-sa-3.0\n---\n# Rows\n")
    assert find_licences(rows) == {str(rows): "cc-by-sa-3.0"}
    table = "| file | rows | licence |\n|---|---|---|\n| `sets/prompts.jsonl` | 1 | MIT |\n"
    (rows.parent.parent / "MANIFEST.md").write_text(f"# Data\n\n{table}")
    assert find_licences(rows) == {str(rows): "MIT"}
    sidecar = rows.with_name(f"{rows.name}.license")
    sidecar.write_text("SPDX-License-Identifier: CC-BY-NC-4.0\n")
    assert find_licences(rows) == {str(rows): "CC-BY-NC-4.0"}


def test_a_file_that_the_manifest_leaves_out_is_not_stated(rows):
    table = "| file | licence |\n|---|---|\n| other.jsonl | MIT |\n"
    (rows.parent / "MANIFEST.md").write_text(table)
    assert find_licences(rows) == {str(rows): NOT_STATED}


def test_a_hub_id_is_known_or_read_from_its_local_card(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    assert find_licences("Anthropic/hh-rlhf") == {"Anthropic/hh-rlhf": "MIT"}
    assert find_licences("hf:somebody/rows") == {"hf:somebody/rows": NOT_STATED}
    card = tmp_path / "hub" / "datasets--somebody--rows" / "snapshots" / "1" / "README.md"
    card.parent.mkdir(parents=True)
    card.write_text("---\ntask: x\nlicense: apache-2.0\n---\n")
    assert find_licences("hf:somebody/rows:train") == {"hf:somebody/rows:train": "apache-2.0"}


def test_a_source_names_the_licence_of_every_file(rows):
    config = DataConfig(source="files", prompts=(str(rows),), documents=("Anthropic/hh-rlhf",))
    assert open_source(config).licences() == {
        str(rows): NOT_STATED,
        "Anthropic/hh-rlhf": "MIT",
    }
    assert open_source(DataConfig()).licences() == {}


def test_real_rows_have_the_licence_of_their_manifest(shared):
    path = shared / "data" / "sft" / "alpaca_52k.jsonl.gz"
    assert "CC BY-NC 4.0" in find_licences(path)[str(path)]


def test_what_others_wrote_about_a_file_cannot_stop_its_reading(tmp_path):
    """Latin-1, a pipe, a folder, names that are no path: nothing is stated, and nothing waits."""
    path = tmp_path / "rows.jsonl"
    path.write_text("{}")
    card = tmp_path / "README.md"
    card.write_bytes(b"---\nlicense: mit\ntitle: caf\xe9\n---\n")
    assert find_licences(path) == {str(path): "mit"}
    card.unlink()
    os.mkfifo(card)
    (tmp_path / "rows.jsonl.license").mkdir()
    assert find_licences(path) == {str(path): NOT_STATED}
    manifest = tmp_path / "MANIFEST.md"
    manifest.write_bytes(
        b"| file | licence |\n| --- | --- |\n| a\0b | \xe9 |\n| rows.jsonl | MIT |\n"
    )
    assert find_licences(path) == {str(path): "MIT"}
    manifest.unlink()
    manifest.symlink_to(manifest)
    assert find_licences(path) == {str(path): NOT_STATED}
