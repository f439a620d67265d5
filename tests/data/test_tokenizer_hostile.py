"""A tokenizer from elsewhere is read rightly or refused in one line, in bounded time and memory."""

import gzip
import json
import os
import time
import tracemalloc

import pytest

from instruct_jax.data.rows import DataError
from instruct_jax.data.tokenizer import load_tokenizer, train_bpe

GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    """tokenizer.json of a small byte-level BPE, as a dict."""
    folder = tmp_path_factory.mktemp("spec")
    train_bpe(["the cat sat on the mat"], vocab_size=280).save(folder)
    return json.loads((folder / "tokenizer.json").read_text())


def written(folder, spec, **changes):
    (folder / "tokenizer.json").write_text(json.dumps(spec | changes))
    return folder


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def added(number, content, **changes):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": True, **flags, **changes}


def refused(path, match):
    """The error, one line, within five seconds of this process, and what it allocated bounded."""
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(DataError, match=match) as error:
            load_tokenizer(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 5 and peak < 300_000_000
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "part",
    [
        {"pre_tokenizer": split("(a+)+$")},
        {"pre_tokenizer": split(r"(\w+\s?)*!")},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split("(x|x)*y")]}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "(é*)*!"}, "content": ""}},
    ],
    ids=["letters", "words", "a sequence", "a normalizer"],
)
def test_a_pattern_that_backtracks_without_end_is_refused(tmp_path, capfd, spec, part):
    """In another process: what the library prints when it gives up is nobody's to read."""
    refused(
        written(tmp_path, spec, **part), r"pre-tokenizer (takes|fails .*retry-limit).*mend its pat"
    )
    assert capfd.readouterr() == ("", "")


def test_a_normalizer_that_makes_a_text_grow_without_end_is_refused(tmp_path, spec):
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    bomb = {"type": "Sequence", "normalizers": [double] * 40}
    refused(
        written(tmp_path, spec, normalizer=bomb),
        "takes more than 2 seconds|fails .*(memory|capacity)",
    )


def test_the_patterns_of_published_tokenizers_are_read(tmp_path, spec):
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    steps = [split(GPT4), bytes_only | {"trim_offsets": True}]
    sequence = {"type": "Sequence", "pretokenizers": steps}
    tokenizer = load_tokenizer(written(tmp_path, spec, pre_tokenizer=sequence))
    assert tokenizer.decode(tokenizer.encode("the cat's 1234\n mats")) == "the cat's 1234\n mats"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["model"]["vocab"].update(far=2_000_000_000), "largest token id is 2000000000"),
        (lambda s: s["model"]["vocab"].update(twin=5), "have one id, 5"),
        (lambda s: s["model"]["vocab"].update(bad=-1), "not a tokenizer"),
        (lambda s: s["model"]["vocab"].update(bad=2**40), "not a tokenizer"),
        (lambda s: s["added_tokens"].append(added(500, "<think>")), "'<think>' has the id 500"),
        (lambda s: s["added_tokens"].append(added(5, "<think>")), "'<think>' has the id 5, which"),
        (lambda s: s["added_tokens"].append(added(2_000_000_000, "<x>")), "the id 2000000000"),
        (lambda s: s["added_tokens"].append(added("7", "<x>")), "not a tokenizer"),
        (lambda s: s.update(added_tokens=7), "not a tokenizer"),
        (lambda s: s.update(model=[]), "not a tokenizer"),
        (lambda s: s.update(normalizer="x"), "pre-tokenizer fails"),
        (lambda s: s["model"].update(vocab={}, merges=[]), "it encodes plain text to nothing"),
        (lambda s: s["model"].update(merges=[["zz", "yy"]]), "not a tokenizer"),
        (lambda s: s.update(model={"type": "WordLevel", "vocab": {"a": 0, "<|endoftext|>": 1},
                                   "unk_token": "?"}, added_tokens=[]), "Missing .UNK. token"),
    ],
)  # fmt: skip
def test_ids_that_no_table_could_have_and_fields_of_wrong_types_are_refused(
    tmp_path, spec, change, message
):
    changed = json.loads(json.dumps(spec))
    change(changed)
    refused(written(tmp_path, changed), message)


@pytest.mark.parametrize("eos", [5, True, ["</s>"], {"content": 5}, {"content": None}, "<nothing>"])
def test_an_eos_that_is_no_token_is_refused_with_its_file(tmp_path, spec, eos):
    written(tmp_path, spec)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    if eos == {"content": None}:
        assert load_tokenizer(tmp_path).eos == "<|endoftext|>", "null says nothing"
        return
    refused(tmp_path, r"tokenizer_config.json: eos_token=.* is no token of the tokenizer")


@pytest.mark.parametrize("content", [b"[]", b"7", b"{", b"\xff\xfe", b"[" * 100_000, b""])
def test_a_damaged_file_is_refused(tmp_path, spec, content):
    written(tmp_path, spec)
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path, rf"{name}: not a tokenizer")


@pytest.mark.parametrize("kept", [0, 1, 10, 100, 1000, -1])
def test_a_truncated_file_is_refused(tmp_path, spec, kept):
    whole = json.dumps(spec).encode()
    (tmp_path / "tokenizer.json").write_bytes(whole[:kept])
    refused(tmp_path, "not JSON")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json.gz").write_bytes(gzip.compress(whole)[:kept])
    refused(tmp_path, "not a tokenizer")


def test_a_file_that_unpacks_to_gigabytes_is_refused(tmp_path):
    block = gzip.compress(b" " * 10_000_000)
    (tmp_path / "tokenizer.json.gz").write_bytes(block * 300)
    refused(tmp_path, "more than 64,000,000 bytes")
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(3_000_000_000)  # takes no room
    refused(tmp_path, "more than 64,000,000 bytes")
    (tmp_path / "tokenizer.json").write_bytes(b"[" + b"[]," * 5_000_000)
    refused(tmp_path, "more than 4,000,000 values")


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    refused(tmp_path, "no tokenizer in this folder")


def test_merges_are_never_left_out_at_random(tmp_path, spec):
    changed = spec | {"model": spec["model"] | {"dropout": 0.9}}
    tokenizer = load_tokenizer(written(tmp_path, changed))
    assert tokenizer.encode("the cat sat") == load_tokenizer(written(tmp_path, spec)).encode(
        "the cat sat"
    )
    assert len({tuple(tokenizer.encode("the cat sat on the mat")) for _ in range(20)}) == 1
