import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from instruct_jax.data import hub
from instruct_jax.data.formats import DataError, read_comparisons, read_demonstrations

# The libraries retry for half a minute. An idle machine needs 1.2 seconds; a busy one more.
LIMIT = 6.0
RECORDS = [{"instruction": "p", "input": "", "output": f"a{i}", "id": i} for i in range(3)]


@pytest.mark.parametrize(
    ("source", "yes"),
    [
        ("tatsu-lab/alpaca", True),
        ("Anthropic/hh-rlhf:test", True),
        ("owner/name:config:validation", True),
        ("hf:imdb", True),
        ("imdb", False),
        ("data/rows.jsonl", False),
        ("data/rows.txt.gz", False),
        ("./data/rows", False),
        ("../rows", False),
        ("/data/rows", False),
        ("a/b/c", False),
        ("tests/rows", False),  # a folder of that name is here
        ("data/*", False),
    ],
)
def test_a_hub_id_is_told_from_a_path(monkeypatch, repository, source, yes):
    monkeypatch.chdir(repository)
    assert hub.is_hub_id(source) is yes


@pytest.mark.parametrize("offline", ["1", "0"])
def test_without_a_network_a_hub_id_fails_within_seconds(monkeypatch, tmp_path, offline):
    """Both where HF_HUB_OFFLINE says so and where nothing answers."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(DataError, match="owner/name: no such path, and the hub cannot be reached"):
        read_demonstrations("owner/name")
    assert time.monotonic() - start < LIMIT


def test_a_host_that_never_answers_is_given_up(monkeypatch, tmp_path):
    import socket

    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(DataError, match="the hub cannot be reached"):
            read_demonstrations("hf:name")
        assert time.monotonic() - start < LIMIT


@pytest.fixture
def endpoint(monkeypatch, tmp_path):
    """A hub on this machine that knows owner/known, owner/gated and, with a token, owner/private.

    Gives the list of what was asked: (name, token).
    """
    from huggingface_hub import constants

    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            name, token = self.path.removeprefix("/api/datasets/"), self.headers["Authorization"]
            asked.append((name, token))
            known = name in ("owner/known", "owner/gated") or (name == "owner/private" and token)
            self.send_response(200 if known else 401)
            self.end_headers()
            if known:
                self.wfile.write(json.dumps({"gated": name == "owner/gated" and "auto"}).encode())

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        monkeypatch.setattr(hub, "_said", set())
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield asked
        server.shutdown()
        thread.join()


def test_a_data_set_that_the_hub_does_not_know_is_told_at_once(endpoint):
    with pytest.raises(DataError, match="owner/other: neither a path nor a public hub data set"):
        read_demonstrations("owner/other")


def test_a_mistyped_name_is_asked_for_without_the_token_and_said_first(endpoint, capsys):
    with pytest.raises(DataError, match="neither a path nor a public hub data set"):
        read_demonstrations("owner/other")
    assert endpoint == [("owner/other", None)]
    (line,) = capsys.readouterr().err.splitlines()
    assert "asking http://127.0.0.1" in line and '"owner/other"' in line


@pytest.mark.parametrize(
    ("source", "tokens", "asked"),
    [
        ("owner/known", [False], [("owner/known", None)]),
        ("owner/gated", [None], [("owner/gated", None)]),
        ("owner/private", [], [("owner/private", None)]),
        (
            "hf:owner/private",
            [None],
            [("owner/private", None), ("owner/private", "Bearer hf_secret")],
        ),
    ],
)
def test_the_token_goes_only_where_the_hub_or_the_user_asks_for_it(
    endpoint, monkeypatch, source, tokens, asked
):
    import datasets

    used = []

    def load_dataset(*_, split, token):
        used.append(token)
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    if tokens:
        assert len(read_demonstrations(source)) == 3
    else:
        with pytest.raises(DataError, match="a private data set is hf:owner/private"):
            read_demonstrations(source)
    assert (used, endpoint) == (tokens, asked)


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_offline_means_that_nothing_is_asked(endpoint, monkeypatch, capsys, name):
    monkeypatch.setenv(name, "1")
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set, so the hub was not asked"):
        read_demonstrations("owner/known")
    assert endpoint == [] and capsys.readouterr().err == ""


@pytest.mark.parametrize("mistyped", ["data/rwos", "dat/rows", "date/rows", "data/row"])
def test_a_name_near_a_local_path_is_not_taken_to_the_hub(
    endpoint, monkeypatch, tmp_path, mistyped
):
    folder = tmp_path / "here" / "data"
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("{}")
    monkeypatch.chdir(folder.parent)
    with pytest.raises(DataError, match=r'no such (path|file).*did you mean "data/rows.jsonl"'):
        read_demonstrations(mistyped)
    assert endpoint == []


def test_a_hub_data_set_is_read_with_its_config_and_split(endpoint, monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config, *, split, token):
        assert token is False
        asked.append((name, config, split))
        if config == "broken":
            raise RuntimeError("a long story\nwith a trace")
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(read_demonstrations("owner/known")) == 3
    assert len(read_demonstrations("owner/known:test", limit=2)) == 2
    assert len(read_demonstrations("hf:owner/known:cfg:valid")) == 3
    assert asked == [
        ("owner/known", None, "train"),
        ("owner/known", None, "test"),
        ("owner/known", "cfg", "valid"),
    ]
    with pytest.raises(DataError, match=r"owner/known:broken:x: a long story$"):
        read_demonstrations("owner/known:broken:x")


def test_the_copy_in_the_local_cache_is_used_without_a_network(monkeypatch, tmp_path):
    import datasets
    from datasets.arrow_writer import ArrowWriter

    folder = tmp_path / "datasets" / "Owner___my_set" / "default" / "0.0.0" / "abc"
    folder.mkdir(parents=True)
    with ArrowWriter(path=str(folder / "my_set-train.arrow")) as writer:
        for record in RECORDS:
            writer.write(record)
        count, size = writer.finalize()
    split = {"name": "train", "num_bytes": size, "num_examples": count, "dataset_name": "my_set"}
    info = {"builder_name": "json", "dataset_name": "my_set", "config_name": "default",
            "version": {"version_str": "0.0.0", "major": 0, "minor": 0, "patch": 0},
            "splits": {"train": split}}  # fmt: skip
    (folder / "dataset_info.json").write_text(json.dumps(info))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    rows = read_demonstrations("Owner/MySet")
    assert [row.response for row in rows] == ["a0", "a1", "a2"]


def test_a_name_that_cannot_be_a_hub_id_is_refused():
    with pytest.raises(DataError, match=r"not a hub id .hf:OWNER/NAME"):
        read_demonstrations("hf:a/b/c/d")


def test_a_folder_saved_by_datasets_is_read(tmp_path):
    import datasets

    table = datasets.Dataset.from_list(RECORDS)
    table.save_to_disk(str(tmp_path / "table"))
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "splits"))
    datasets.DatasetDict({"test": table}).save_to_disk(str(tmp_path / "other"))
    for name in ("table", "splits", "other/test"):
        rows = read_demonstrations(tmp_path / name)
        assert [row.response for row in rows] == ["a0", "a1", "a2"]
        assert rows[2].meta == {"id": 2}
        assert rows.report[0].format == "alpaca"
    with pytest.raises(DataError, match=r'no split "train" .name one: other/test'):
        read_demonstrations(tmp_path / "other")


def test_a_parquet_file_is_read_and_its_bad_rows_have_numbers(tmp_path):
    import datasets

    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list([*RECORDS, {**RECORDS[0], "output": ""}]).to_parquet(str(path))
    with pytest.raises(DataError, match=r'rows.parquet:4: field "output": empty text'):
        read_demonstrations(path)
    assert len(read_demonstrations(path, on_bad_row="skip")) == 3
    path.write_bytes(b"PAR1 and nothing")
    with pytest.raises(DataError, match="not Parquet"):
        read_demonstrations(path)


def test_nested_columns_of_a_table_are_read(tmp_path):
    import datasets

    chats = [[{"role": "user", "content": "p"}, {"role": "assistant", "content": a}] for a in "xy"]
    table = datasets.Dataset.from_list([{"chosen": chats[0], "rejected": chats[1], "score": None}])
    table.save_to_disk(str(tmp_path / "pairs"))
    (row,) = read_comparisons(tmp_path / "pairs")
    assert row.completions == ("x", "y") and row.meta == {}
