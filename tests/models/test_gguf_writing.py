"""What is written as GGUF is what llama.cpp's converter would write, and comes back the same."""

import dataclasses

import gguf
import jax
import numpy as np
import pytest

from instruct_jax.data.tokenizer import train_bpe
from instruct_jax.errors import UserError
from instruct_jax.models import language_model, scalar_model
from instruct_jax.models.gguf import GGUF_DTYPES, open_gguf, save_gguf
from instruct_jax.models.gguf.container import read_container
from instruct_jax.models.hf import read_pretrained
from instruct_jax.models.transformer import TransformerConfig
from tests.models.gguf_files import ARCHITECTURES, write_gguf

GEMMA3 = {"gemma3.attention.sliding_window_pattern": None}  # the usual one, of six


def read(path):
    with open_gguf(path) as found:
        return *read_pretrained(found), found.tokenizer


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_a_model_is_written_as_it_came(case, tmp_path):
    source = write_gguf(tmp_path / "a.gguf", case, **(GEMMA3 if case == "gemma3" else {}))
    config, params, tokenizer = read(source)
    written = save_gguf(
        tmp_path / "b.gguf", config, params, tokenizer=tokenizer, dtype="float32",
        family=None if ARCHITECTURES[case] == "llama" else
        {"gemma3": "gemma3_text"}.get(case, ARCHITECTURES[case]),
    )  # fmt: skip
    theirs, ours = gguf.GGUFReader(source), gguf.GGUFReader(written)
    wanted = {key for key in theirs.fields if not key.startswith("GGUF.")}
    lost = {key for key in wanted if key not in ours.fields
            or ours.fields[key].contents() != theirs.fields[key].contents()}  # fmt: skip
    assert not lost
    tensors = {t.name: t.data for t in theirs.tensors}
    assert tensors.keys() == {t.name for t in ours.tensors}
    close = 1e-6 if case.startswith("gemma") else 0
    for tensor in ours.tensors:
        np.testing.assert_allclose(tensor.data, tensors[tensor.name], rtol=1e-6, atol=close)
    again, back, same = read(written)
    assert again == config and same.fingerprint == tokenizer.fingerprint
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=close), back, params)


def wide(**changes):
    """A model whose rows are whole blocks, with a tokenizer of ours."""
    tokenizer = train_bpe([f"the cat sat on the mat {n}" for n in range(50)], vocab_size=300)
    config = TransformerConfig(
        vocab_size=tokenizer.vocab_size, num_layers=2, d_model=64, num_heads=4, num_kv_heads=2,
        d_ff=96, max_length=32, norm="rmsnorm", positions="rope", activation="swiglu",
        use_bias=False,
    )  # fmt: skip
    config = dataclasses.replace(config, **changes)
    return config, jax.device_get(language_model(config).init(jax.random.key(1))), tokenizer


@pytest.mark.parametrize("dtype", GGUF_DTYPES)
def test_matrices_are_of_the_type_asked_for_and_norms_stay_exact(tmp_path, dtype):
    config, params, tokenizer = wide()
    path = save_gguf(tmp_path / "a.gguf", config, params, tokenizer=tokenizer, dtype=dtype)
    kinds = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType[GGUF_DTYPES[dtype]]
    for tensor in reader.tensors:
        wanted = "F32" if "norm" in tensor.name else kinds[dtype]
        assert tensor.tensor_type.name == wanted, tensor.name
    _, back, _ = read(path)
    exact = params["layers"]["mlp"]["down"]["kernel"].swapaxes(1, 2)
    kind = gguf.GGMLQuantizationType[kinds[dtype]]
    rounded = gguf.quants.dequantize(gguf.quants.quantize(exact, kind), kind)
    np.testing.assert_array_equal(back["layers"]["mlp"]["down"]["kernel"].swapaxes(1, 2), rounded)
    np.testing.assert_array_equal(back["final_norm"]["scale"], params["final_norm"]["scale"])


def test_our_models_compute_the_same_after_a_round_trip(tmp_path):
    for changes in ({}, {"tie_embeddings": False}, {"qk_norm": True, "head_dim": 8}):
        config, params, tokenizer = wide(**changes)
        path = save_gguf(
            tmp_path / f"{len(changes)}.gguf", config, params, tokenizer=tokenizer, dtype="float32"
        )
        again, back, same = read(path)
        assert same.fingerprint == tokenizer.fingerprint
        tokens = np.arange(12, dtype=np.int32)[None]
        logits = [
            np.asarray(language_model(c).apply(p, tokens))[..., : config.vocab_size]
            for c, p in ((config, params), (again, back))
        ]
        np.testing.assert_array_equal(*logits)


def test_rows_that_are_no_whole_blocks_are_half_precision(tmp_path):
    config, params, tokenizer = wide(d_model=48, num_heads=4)
    path = save_gguf(tmp_path / "a.gguf", config, params, tokenizer=tokenizer, dtype="q8_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.attn_q.weight"] == "F16" and kinds["blk.0.ffn_down.weight"] == "Q8_0"


def test_the_table_has_the_tokens_and_no_padding(tmp_path):
    config, params, tokenizer = wide()
    path = save_gguf(tmp_path / "a.gguf", config, params, tokenizer=tokenizer)
    metadata, tensors = read_container(path)
    assert tensors["token_embd.weight"].shape == (tokenizer.vocab_size, 64)
    assert len(metadata["tokenizer.ggml.tokens"]) == tokenizer.vocab_size
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert metadata["tokenizer.ggml.eos_token_id"] == tokenizer.eos_id
    assert metadata["tokenizer.ggml.token_type"][tokenizer.eos_id] == gguf.TokenType.CONTROL
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert metadata["llama.vocab_size"] == tokenizer.vocab_size


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (
            {"attention_pattern": "l", "window": 8},
            {},
            "no architecture of GGUF has this configuration",
        ),
        ({"norm_order": "post"}, {}, "no architecture of GGUF has this configuration"),
        ({}, {"family": "gpt_neox"}, "no architecture of GGUF is written for 'gpt_neox'"),
        ({}, {"family": "qwen3"}, "qwen3 cannot say"),
        ({}, {"dtype": "q4_0"}, "dtype='q4_0' is not one of float32, float16, bfloat16, q8_0"),
    ],
    ids=str,
)
def test_what_llama_cpp_would_not_compute_is_refused(tmp_path, changes, options, message):
    config, params, tokenizer = wide(**changes)
    with pytest.raises(UserError, match=message):
        save_gguf(tmp_path / "a.gguf", config, params, tokenizer=tokenizer, **options)
    assert not list(tmp_path.iterdir())


def test_a_number_past_float16_is_refused_and_nothing_is_left(tmp_path):
    config, params, tokenizer = wide()
    up = params["layers"]["mlp"]["up"]
    up["kernel"] = up["kernel"].copy()
    up["kernel"][1, 0, 0] = 1e5
    with pytest.raises(UserError, match=r"blk.1.ffn_up.weight has a number past float16"):
        save_gguf(tmp_path / "a.gguf", config, params, tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())
    save_gguf(tmp_path / "a.gguf", config, params, tokenizer=tokenizer, dtype="bfloat16")
    with pytest.raises(UserError, match="is there already"):
        save_gguf(tmp_path / "a.gguf", config, params, tokenizer=tokenizer, dtype="bfloat16")


def test_a_reward_model_has_no_place_in_gguf(tmp_path):
    config, _, tokenizer = wide()
    params = jax.device_get(scalar_model(config).init(jax.random.key(0)))
    with pytest.raises(UserError, match="a reward or value model has no place in GGUF"):
        save_gguf(tmp_path / "a.gguf", config, params, tokenizer=tokenizer)


def test_a_second_end_of_an_answer_goes_out_too(tmp_path):
    about = {"tokenizer.ggml.eot_token_id": 7}
    config, params, tokenizer = read(write_gguf(tmp_path / "a.gguf", "qwen2", **about))
    assert tokenizer.stop_ids == (60, 7)
    save_gguf(tmp_path / "b.gguf", config, params, tokenizer=tokenizer)
    metadata, _ = read_container(tmp_path / "b.gguf")
    assert metadata["tokenizer.ggml.eos_token_id"] == 60
    assert metadata["tokenizer.ggml.eot_token_id"] == 7
