"""A GGUF file gives the configuration and parameters of the Hugging Face folder it was made from,
whose logits are those of transformers (test_hf_families.py).
"""

import dataclasses
import json

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from instruct_jax.errors import UserError
from instruct_jax.models.gguf import open_gguf
from instruct_jax.models.gguf.container import read_container
from instruct_jax.models.hf import load_pretrained, read_pretrained
from tests.models.gguf_files import ARCHITECTURES, config_of, tensors_of, write_gguf

Q = gguf.GGMLQuantizationType


def folder_of(path, case, **changes):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config_of(case) | changes))
    save_file(tensors_of(case), path / "model.safetensors")
    return path


def read(path):
    with open_gguf(path) as found:
        return read_pretrained(found)


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_a_file_holds_the_folder_that_it_was_made_from(case, tmp_path):
    config, params = read(write_gguf(tmp_path / "a.gguf", case))
    wanted, theirs = load_pretrained(folder_of(tmp_path / "hf", case))
    # The default of a size is said in full in GGUF.
    assert dataclasses.replace(config, head_dim=None, d_ff=None) == dataclasses.replace(
        wanted, head_dim=None, d_ff=None
    )
    assert (config.head_size, config.ff_size) == (wanted.head_size, wanted.ff_size)
    close = 1e-6 if case.startswith("gemma") else 0  # 1 was added and taken off again
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=close), params, theirs)


PLAIN = ("F32", "F16", "BF16")
BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


@pytest.fixture
def one(tmp_path):
    """Writes a file of one tensor; the container's view of it."""

    def write(raw, kind, shape):
        writer = gguf.GGUFWriter(tmp_path / f"{kind.name}.gguf", "llama")
        writer.add_tensor("x", raw, raw_shape=raw.shape, raw_dtype=kind)
        for step in ("header", "kv_data", "tensors"):
            getattr(writer, f"write_{step}_to_file")()
        writer.close()
        found = read_container(tmp_path / f"{kind.name}.gguf")[1]["x"]
        assert found.shape == shape
        return found.open()

    return write


@pytest.mark.parametrize("name", PLAIN + BLOCKS)
def test_numbers_are_read_back_as_they_were_written(one, name):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 64)).astype(np.float32)
    back = one(gguf.quants.quantize(x, Q[name]), Q[name], x.shape)
    bits = {"F32": 99, "F16": 10, "BF16": 7, "Q8_0": 6, "Q5_0": 3, "Q5_1": 3}.get(name, 2)
    assert np.abs(back - x).max() <= np.abs(x).max() * 2.0**-bits
    assert back.dtype == np.float32


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ2_XXS"])
def test_blocks_of_other_kinds_are_those_of_the_package(one, name):
    per_block, size = gguf.GGML_QUANT_SIZES[Q[name]]
    raw = np.random.default_rng(0).integers(0, 60, (3, 2 * size), np.uint8)
    back = one(raw, Q[name], (3, 2 * per_block))
    np.testing.assert_array_equal(back, gguf.quants.dequantize(raw, Q[name]))
    assert np.isfinite(back).all() and back.std() > 0


def test_a_file_of_half_precision_is_the_model_rounded(tmp_path):
    _, exact = read(write_gguf(tmp_path / "a.gguf", "llama"))
    _, params = read(write_gguf(tmp_path / "b.gguf", "llama", kind="F16"))
    rounded = jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), exact["layers"])
    for part in ("attention", "mlp"):
        jax.tree.map(np.testing.assert_array_equal, params["layers"][part], rounded[part])


def test_what_older_files_leave_out_is_what_llama_cpp_takes(tmp_path):
    names = ("attention.key_length", "attention.value_length", "rope.freq_base",
             "rope.dimension_count")  # fmt: skip
    without = dict.fromkeys(f"llama.{name}" for name in names)
    config, _ = read(write_gguf(tmp_path / "a.gguf", "llama_linear", **without))
    assert (config.head_size, config.rope_theta, config.rope_fraction) == (4, 10_000.0, 1.0)
    each = {"llama.attention.head_count": [4, 4, 4], "llama.attention.head_count_kv": [2, 2, 2]}
    config, _ = read(write_gguf(tmp_path / "b.gguf", "llama_linear", **each))
    assert (config.num_heads, config.kv_heads) == (4, 2)
    config, _ = read(
        write_gguf(tmp_path / "c.gguf", "gemma3", **{"gemma3.attention.sliding_window": None})
    )
    assert not any(config.local_layers), "no window, no local layers"


def test_the_name_the_licence_and_the_template_come_along(tmp_path):
    about = {
        "general.source.repo_url": "https://huggingface.co/owner/name-1",
        "general.license": "apache-2.0",
        "tokenizer.chat_template": "{{ messages }}\u00e9",
    }
    with open_gguf(write_gguf(tmp_path / "a.gguf", "llama", **about)) as found:
        assert (found.name, found.licence) == ("owner/name-1", "apache-2.0")
        assert found.tokenizer.chat == "{{ messages }}\u00e9"
        folder = found.folder
    assert not folder.exists()
    strange = {"general.source.repo_url": "../../etc/passwd", "general.license": "x\ny"}
    with open_gguf(write_gguf(tmp_path / "b.gguf", "llama", **strange)) as found:
        assert (found.name, found.licence) == ("b", None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "mamba"}, "general.architecture=mamba is not read; read: llama"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.block_count": 10**6}, "llama.block_count=1000000 is absurd"),
        ({"llama.block_count": 9_999}, "llama.block_count=9999, of 30 tensors"),
        ({"llama.block_count": "three"}, "llama.block_count=three is not an integer"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count=0 is absurd"),
        ({"llama.attention.head_count": [4, 2, 4]}, "llama.attention.head_count=[4 2 4] is not"),
        ({"llama.attention.head_count_kv": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
        ({"llama.attention.value_length": 4}, "value_length is not llama.attention.key_length"),
        ({"llama.embedding_length": 2**31 - 2}, "config.json describes"),
        ({"llama.feed_forward_length": 25}, "mlp.gate_proj.weight is F32[24, 16]"),
        ({"llama.attention.layer_norm_rms_epsilon": "x"}, "epsilon=x is not a number"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "yarn"),
        ({"llama.expert_count": 8}, "mixtures are not read"),
        ({"split.count": 3}, "one of several files"),
        ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model='t5': gpt2"),
        ({"tokenizer.ggml.pre": "new"}, "tokenizer.ggml.pre='new' is not known"),
        ({"tokenizer.ggml.merges": ["AB"]}, "tokenizer.ggml.merges: 'AB' is no pair"),
        ({"tokenizer.ggml.merges": ["A zz"]}, "not a tokenizer"),
        ({"tokenizer.ggml.tokens": ["a"] * 61}, "tokenizer.ggml.tokens: 'a' is there twice"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "token_type has 2 of 61 tokens"),
        ({"tokenizer.ggml.add_bos_token": "yes"}, "add_bos_token: expected true or false"),
        ({"tokenizer.chat_template": "x" * 1_000_001}, "tokenizer.chat_template: not a text of"),
    ],
    ids=str,
)
def test_what_is_not_read_is_told_in_one_line(tmp_path, changes, message):
    case = "llama_linear" if "rope.scaling.type" in str(changes) else "llama"
    path = write_gguf(tmp_path / "a.gguf", case, **changes)
    with pytest.raises(UserError) as error:
        read(path)
    told = str(error.value)
    assert message in told and str(path) in told
    assert "\n" not in told and len(told) < 1_000 and "/tmp/tmp" not in told
