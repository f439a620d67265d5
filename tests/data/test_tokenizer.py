import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instruct_jax.data.rows import DataError
from instruct_jax.data.tokenizer import EOS, load_tokenizer, train_bpe

TEXTS = [f"The {a} sat on the mat, {n} times.\n" for a in ("cat", "old dog") for n in range(99)]
NASTY = ["", " ", "\n\n", f"a{EOS}b", "naïve 日本語 🤖", "a\tb\r", "<s></s><pad>", "é́", "\x01"]


@pytest.fixture(scope="module")
def small():
    return train_bpe(TEXTS, vocab_size=300)


@pytest.fixture(scope="module")
def gpt2(shared, tmp_path_factory):
    """From vocab.json and merges.txt alone."""
    folder = tmp_path_factory.mktemp("gpt2")
    for name in ("vocab.json", "merges.txt"):
        (folder / name).symlink_to(shared / "data/tokenizer/gpt2" / name)
    return load_tokenizer(folder)


@pytest.mark.parametrize("text", NASTY)
def test_any_text_comes_back_exactly(small, text):
    """MODEL-7: nothing is lost, normalised or unknown."""
    assert small.decode(small.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_never_becomes_a_special_token(small, text):
    ids = small.encode(text + EOS + text)
    assert small.eos_id not in ids
    assert all(0 <= i < small.vocab_size for i in ids)
    assert small.decode(ids) == text + EOS + text


def test_pad_is_past_the_vocabulary_and_not_eos(small):
    assert small.vocab_size == 300
    assert small.pad_id == small.vocab_size != small.eos_id
    assert 0 <= small.eos_id < small.vocab_size


def test_decoding_leaves_out_pad_and_eos_and_refuses_other_ids(small):
    ids = small.encode("the cat")
    padded = np.array([small.pad_id, *ids, small.eos_id, small.pad_id], np.int32)
    assert small.decode(padded) == "the cat"
    for wrong in (-1, small.pad_id + 1):
        with pytest.raises(ValueError, match=f"token id {wrong} is outside"):
            small.decode([wrong])


def test_a_batch_is_encoded_as_its_texts_are(small):
    assert small.encode_batch(NASTY) == [small.encode(text) for text in NASTY]


def test_the_published_gpt2_files_give_the_published_ids(gpt2):
    assert (gpt2.vocab_size, gpt2.eos_id, gpt2.pad_id) == (50257, 50256, 50257)
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode(" the quick\n\n") == [262, 2068, 628]


def test_both_published_forms_of_gpt2_agree(gpt2, shared):
    other = load_tokenizer(shared / "data/tokenizer/gpt2/tokenizer.json.gz")
    text = "".join(NASTY) + "The cat's 1234 mats aren't HERE… " * 3
    assert gpt2.encode(text) == other.encode(text)
    assert gpt2.decode(gpt2.encode(text)) == text
    assert (other.vocab_size, other.eos_id) == (gpt2.vocab_size, gpt2.eos_id)


def test_a_saved_tokenizer_is_loaded_equal(small, tmp_path):
    small.save(tmp_path / "t")
    for path in (tmp_path / "t", tmp_path / "t" / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert loaded.fingerprint == small.fingerprint
        assert loaded.encode_batch([*TEXTS, *NASTY]) == small.encode_batch([*TEXTS, *NASTY])
    assert train_bpe(TEXTS, vocab_size=280).fingerprint != small.fingerprint


def test_the_same_texts_train_the_same_tokenizer_in_another_process(small):
    root = Path(__file__).resolve().parents[2]
    code = (
        f"from instruct_jax.data.tokenizer import train_bpe; print(train_bpe({TEXTS!r}, "
        "vocab_size=300).fingerprint)"
    )
    for threads in ("true", "false"):
        made = subprocess.run(
            [sys.executable, "-c", code],
            cwd=root,
            env={"PYTHONPATH": str(root), "TOKENIZERS_PARALLELISM": threads},
            capture_output=True,
            text=True,
            check=True,
        )
        assert made.stdout.strip() == small.fingerprint


def test_a_corpus_too_small_for_the_vocabulary_gives_a_smaller_one():
    tokenizer = train_bpe(["ab"], vocab_size=1000)
    assert 257 <= tokenizer.vocab_size < 300 and tokenizer.pad_id == tokenizer.vocab_size
    with pytest.raises(ValueError, match="below 257"):
        train_bpe(["ab"], vocab_size=256)


def test_eos_is_the_one_that_the_tokenizer_names(small, tmp_path):
    small.save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 300, "content": "<stop>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert load_tokenizer(tmp_path).eos_id == small.eos_id
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<stop>"}}')
    loaded = load_tokenizer(tmp_path)
    assert (loaded.eos_id, loaded.vocab_size, loaded.pad_id) == (300, 301, 301)
    assert load_tokenizer(tmp_path, eos=EOS).eos_id == small.eos_id
    assert 300 not in loaded.encode("a<stop>b")
    with pytest.raises(ValueError, match="no token '<nothing>'"):
        load_tokenizer(tmp_path, eos="<nothing>")


def test_padding_and_truncation_of_a_published_file_are_ignored(small, tmp_path):
    small.save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["truncation"] = {
        "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    packed = tmp_path / "other.json.gz"
    packed.write_bytes(gzip.compress(json.dumps(spec).encode()))
    text = "the old cat sat"
    assert load_tokenizer(packed).encode(text) == small.encode(text)


def test_what_is_no_tokenizer_is_told_in_one_line(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no tokenizer in this folder .expected tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json: not a tokenizer: "):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\x00")
    with pytest.raises(DataError, match="not a tokenizer"):
        load_tokenizer(tmp_path)
