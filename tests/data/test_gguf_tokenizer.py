"""Tokenizers of GGUF files: the ids of transformers and of SentencePiece, and back without loss."""

import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers

from instruct_jax.data import gguf_splits
from instruct_jax.data.gguf_tokenizer import tokenizer_files, tokenizer_metadata
from instruct_jax.data.tokenizer import load_tokenizer, train_bpe

LINES = [
    "The quick brown fox doesn't jump over 12345 lazy dogs, he'S told.",
    "  two spaces,   three    four\tand a tab \n\n and lines\r\n  ",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich",
    "Быстрая лиса; Ελληνικά! العربية? हिन्दी में",
    "日本語のテキスト、中文文本。한국어 문장",
    "x_1 = f(y)[2] ** 3.14  # naïve café e\u0301 ½ Ⅻ",
    "🤖🚀 😶\u200d🌫️ <|im_start|>user </s> [INST] <0x0A>",
    "HTTPServer getValue ABCdef //path/to\n$5+4=9",
    " ",
    "\u2581already \u2581\u2581 there",
]


def loaded(folder, metadata, architecture="llama"):
    folder.mkdir(exist_ok=True)
    for name, value in tokenizer_files(metadata, architecture).items():
        (folder / name).write_text(json.dumps(value))
    return load_tokenizer(folder)


def written(tokenizer, folder):
    """The metadata of a tokenizer, with arrays as a file gives them."""
    tokenizer.save(folder)
    files = [json.loads((folder / name).read_text()) for name in
             ("tokenizer.json", "tokenizer_config.json")]  # fmt: skip
    found = tokenizer_metadata(*files, ends=[tokenizer.eos_id])
    numbers = ("tokenizer.ggml.scores", "tokenizer.ggml.token_type")
    return {k: np.array(v) if k in numbers else v for k, v in found.items()}


@pytest.fixture(scope="module")
def trained():
    return train_bpe(LINES * 20, vocab_size=420)


def test_one_of_ours_comes_back_with_its_fingerprint(trained, tmp_path):
    metadata = written(trained, tmp_path / "a")
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert loaded(tmp_path / "b", metadata).fingerprint == trained.fingerprint


def test_gpt2_comes_back_with_its_ids(shared, tmp_path):
    gpt2 = load_tokenizer(shared / "data/tokenizer/gpt2")
    metadata = written(gpt2, tmp_path / "a")
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert metadata["tokenizer.ggml.bos_token_id"] == metadata["tokenizer.ggml.eos_token_id"]
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    back = loaded(tmp_path / "b", metadata)
    assert back.encode_batch(LINES) == gpt2.encode_batch(LINES)
    assert back.vocab_size == gpt2.vocab_size


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "qwen2", "tekken", "gpt-4o"])
def test_splits_are_those_of_transformers(trained, tmp_path, name):
    module = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    metadata = written(trained, tmp_path / "a") | {"tokenizer.ggml.pre": name}
    theirs, _ = module.convert_gguf_tokenizer(
        "llama",
        {
            "tokenizer_type": "gpt2",
            "pre_tokenizer_type": name,
            "tokens": metadata["tokenizer.ggml.tokens"],
            "token_type": metadata["tokenizer.ggml.token_type"].tolist(),
            "merges": metadata["tokenizer.ggml.merges"],
        },
    )
    theirs.encode_special_tokens = True
    ours = loaded(tmp_path / name, metadata)
    # NFC is Qwen's own, and whole words are tokens at once in LLaMA 3: neither shows here.
    lines = [line for line in LINES if "\u0301" not in line]
    wanted = [theirs.encode(line, add_special_tokens=False).ids for line in lines]
    assert ours.encode_batch(lines) == wanted


def test_every_name_splits_and_is_found_again():
    for name in gguf_splits.NAMES:
        pre, whole = gguf_splits.pre_tokenizer(name), name in gguf_splits.WHOLE_WORDS
        found = gguf_splits.name_of(pre, whole_words=whole)
        assert gguf_splits.pre_tokenizer(found) == pre
    assert gguf_splits.name_of(None, whole_words=False) is None
    assert gguf_splits.name_of({"type": "Whitespace"}, whole_words=False) is None


def test_bos_is_put_before_a_text_where_the_file_says_so(trained, tmp_path):
    bos = {"tokenizer.ggml.bos_token_id": 5}
    for name, flag, adds in (("llama-bpe", None, True), ("llama-bpe", False, False),
                             ("gpt-2", None, False), ("gpt-2", True, True)):  # fmt: skip
        metadata = written(trained, tmp_path / "a") | bos | {"tokenizer.ggml.pre": name}
        metadata["tokenizer.ggml.add_bos_token"] = flag
        if flag is None:
            del metadata["tokenizer.ggml.add_bos_token"]
        files = tokenizer_files(metadata, "llama")
        backend = tokenizers.Tokenizer.from_str(json.dumps(files["tokenizer.json"]))
        plain = backend.encode("ab", add_special_tokens=False).ids
        assert backend.encode("ab").ids == ([5, *plain] if adds else plain)
        assert files["tokenizer_config.json"]["add_bos_token"] is adds
        again = tokenizer_metadata(files["tokenizer.json"], files["tokenizer_config.json"], [0])
        assert again["tokenizer.ggml.add_bos_token"] is adds


def test_all_ends_of_an_answer_are_kept(trained, tmp_path):
    metadata = written(trained, tmp_path / "a")
    tokens, types = list(metadata["tokenizer.ggml.tokens"]), metadata["tokenizer.ggml.token_type"]
    tokens += ["<|im_end|>", "<end_of_text>"]
    metadata |= {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.append(types, [3, 3]),
        "tokenizer.ggml.eot_token_id": len(tokens) - 1,
    }
    files = tokenizer_files(metadata, "qwen2")
    wanted = [metadata["tokenizer.ggml.eos_token_id"], len(tokens) - 1, len(tokens) - 2]
    assert files["generation_config.json"] == {"eos_token_id": wanted}


def test_rows_that_fill_up_a_table_are_no_tokens(trained, tmp_path):
    metadata = written(trained, tmp_path / "a")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    more = {
        "tokenizer.ggml.tokens": [*tokens, "[PAD420]", "[PAD421]"],
        "tokenizer.ggml.token_type": np.append(types, [gguf.TokenType.UNUSED] * 2),
    }
    assert loaded(tmp_path / "b", metadata | more).vocab_size == len(tokens)


def fields(data):
    """(field number, value) of a message of protobuf."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte, at = data[at], at + 1
            value, shift = value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(data):
        tag = varint()
        size = {0: 0, 1: 8, 5: 4}.get(tag & 7)
        if size == 0:
            yield tag >> 3, varint()
            continue
        size = varint() if size is None else size
        yield tag >> 3, data[at : at + size]
        at += size


@pytest.fixture(scope="module")
def sentencepiece(shared):
    """The metadata that llama.cpp's converter makes of a SentencePiece model of 32,000 tokens."""
    path = shared / "data/tokenizer/llama_style/mistral_v1_tokenizer.model"
    pieces = [dict(fields(value)) for field, value in fields(path.read_bytes()) if field == 1]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece[1].decode() for piece in pieces],
        "tokenizer.ggml.scores": np.array(
            [struct.unpack("<f", piece.get(2, bytes(4)))[0] for piece in pieces], np.float32
        ),
        "tokenizer.ggml.token_type": np.array([piece.get(3, 1) for piece in pieces], np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


# Recorded with sentencepiece 0.2.3: SentencePieceProcessor(model_file=...).encode(line).
RECORDED = Path(__file__).parents[1] / "fixtures" / "gguf" / "sentencepiece.json"


def test_sentencepiece_ids_are_those_of_sentencepiece(sentencepiece, tmp_path):
    tokenizer = loaded(tmp_path / "a", sentencepiece)
    assert tokenizer.encode_batch(LINES) == json.loads(RECORDED.read_text())
    for line in LINES[:4]:
        assert tokenizer.decode(tokenizer.encode(line)) == line
    assert (tokenizer.vocab_size, tokenizer.eos) == (32_000, "</s>")


def test_sentencepiece_goes_out_and_comes_back(sentencepiece, tmp_path):
    tokenizer = loaded(tmp_path / "a", sentencepiece)
    files = tokenizer_files(sentencepiece, "llama")
    back = tokenizer_metadata(files["tokenizer.json"], files["tokenizer_config.json"], ends=[2])
    for key in ("tokens", "token_type", "bos_token_id", "unknown_token_id", "model"):
        wanted = sentencepiece[f"tokenizer.ggml.{key}"]
        assert list(back[f"tokenizer.ggml.{key}"]) == list(wanted) if key[0] == "t" else True
    assert back["tokenizer.ggml.add_space_prefix"] and back["tokenizer.ggml.add_bos_token"]
    arrays = {k: np.array(back[k]) for k in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type")}
    again = loaded(tmp_path / "b", back | arrays)
    assert again.encode_batch(LINES) == tokenizer.encode_batch(LINES)
    never = sentencepiece | {"tokenizer.ggml.add_space_prefix": False}
    bare = loaded(tmp_path / "c", never)
    assert bare.decode(bare.encode(" x")) == " x" and bare.encode("x") != tokenizer.encode("x")


def test_no_text_is_merged_into_a_special_token(tmp_path):
    """Gemma's vocabulary ends with user-defined tokens, which merge; its unused ones never do."""
    tokens = ["<unk>", "<s>", "<", "s", ">", "<s", "s>", "x", "xx", "<u>", "u", "\t", "\t\t"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.zeros(len(tokens), np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 1, 1, 1, 1, 1, 1, 5, 5, 1, 4, 4], np.int32),
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_space_prefix": False,
    }
    backend = tokenizers.Tokenizer.from_str(
        json.dumps(tokenizer_files(metadata, "gemma3")["tokenizer.json"])
    )
    backend.encode_special_tokens = True
    assert backend.encode("<s>", add_special_tokens=False).ids == [5, 4]
    assert backend.encode("xx<u>", add_special_tokens=False).ids == [7, 7, 2, 10, 4]
    assert backend.encode("\t\t\t", add_special_tokens=False).ids == [12, 11]


def test_gemma_merges_in_the_order_of_its_tokens(tmp_path):
    tokens = ["<unk>", "<eos>", "a", "b", "c", "ab", "bc", "  ", "abc", "\u2581"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array([0, 0, 0, 0, 0, -9, -1, -1, -1, 0], np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 1, 1, 1, 1, 1, 4, 1, 1], np.int32),
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_space_prefix": False,
    }
    by_score = tokenizer_files(metadata, "llama")["tokenizer.json"]["model"]
    assert by_score["merges"] == [["ab", "c"], ["a", "bc"], ["b", "c"], ["\u2581"] * 2, ["a", "b"]]
    by_place = tokenizer_files(metadata, "gemma3")["tokenizer.json"]["model"]
    assert by_place["merges"] == [["a", "b"], ["b", "c"], ["\u2581"] * 2, ["ab", "c"], ["a", "bc"]]
    assert by_place["vocab"]["\u2581\u2581"] == 7, "runs of spaces are merged as other tokens"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "no name for the normalizer and split"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "neither byte-level BPE nor"),
        ({"model": {"type": "Unigram"}}, "a tokenizer of the kind Unigram is not written"),
    ],
    ids=str,
)
def test_a_tokenizer_that_llama_cpp_has_no_word_for_is_refused(trained, tmp_path, change, message):
    trained.save(tmp_path)
    about = json.loads((tmp_path / "tokenizer.json").read_text())
    with pytest.raises(ValueError, match=message):
        tokenizer_metadata(about | change, {}, ends=[0])
