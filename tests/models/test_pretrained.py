"""Real weights come in exactly, and folders that cannot be read are told apart in one line."""

import base64
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from instruct_jax.errors import UserError
from instruct_jax.models import (
    init_cache,
    language_model,
    load_llama2c,
    load_pretrained,
    unstack_layers,
)
from instruct_jax.models.llama2c import llama2c_text, load_llama2c_pieces
from tests.models.oracle import row_logits

STORY = (  # what llama2.c prints for 200 greedy tokens of this model
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high.\n"
    "Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do. "
    'She said, "I want to play with your ball, but I can\'t find it."\n'
    "Lily was sad and didn't know what to do. She said, \"I'm sorry, Lily. "
    "I didn't know what to do.\"\nLily didn't want to help her mom, so she"
)


def greedy(config, params, prompts, new_tokens):
    """int32[B, P] -> int32[B, new_tokens], by cached decoding."""
    model, prompts = language_model(config), jnp.asarray(prompts)

    @jax.jit
    def run(params, prompts):
        params = unstack_layers(params)
        cache = init_cache(config, len(prompts), prompts.shape[1] + new_tokens)
        logits, cache = model.decode(params, prompts, cache, last_only=True)

        def step(carry, _):
            token, cache = carry
            logits, cache = model.decode(params, token, cache)
            return (jnp.argmax(logits, axis=-1).astype(jnp.int32), cache), token[:, 0]

        first = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.lax.scan(step, (first, cache), length=new_tokens)[1].T

    return np.asarray(run(params, prompts))


@pytest.mark.parametrize("native", [False, True], ids=["hugging-face", "llama2.c"])
def test_the_real_llama_reproduces_its_logits_and_its_story(shared, native):
    weights = shared / "weights"
    if native:
        config, params = load_llama2c(weights / "stories260K.bin")
    else:
        config, params = load_pretrained(weights / "stories260K")
    reference = np.load(weights / "stories260K" / "reference.npz")
    logits = language_model(config).apply(params, reference["input_ids"][None])[0]
    np.testing.assert_allclose(logits[:, :512], reference["logits"], rtol=0, atol=1e-4)
    ids = greedy(config, params, [[1]], 200)[0]
    assert ids[:60].tolist() == reference["input_ids"][1:].tolist()
    assert llama2c_text([1, *ids], load_llama2c_pieces(weights / "tok512.bin")) == STORY
    best = row_logits(config, params, np.array([1, *ids[:-1]])).argmax(-1)
    assert ids.tolist() == best.tolist()


def test_the_real_llama_has_the_same_parameters_in_both_formats(shared):
    _, folder = load_pretrained(shared / "weights" / "stories260K")
    _, native = load_llama2c(shared / "weights" / "stories260K.bin")
    jax.tree.map(np.testing.assert_array_equal, folder, native)


def read_mingpt(path):
    """The tensors of a minGPT JSON file, torch layout, by name."""
    flat, stack = {}, [("", json.loads(path.read_text()))]
    while stack:
        prefix, node = stack.pop()
        for name, value in node.items():
            if not isinstance(value, dict):
                continue
            if "data" in value:
                array = np.frombuffer(base64.b64decode(value["data"]), "<f4")
                flat[prefix + name] = array.reshape(value["shape"])
            else:
                stack.append((f"{prefix}{name}.", value))
    return flat


def test_the_real_sorter_has_the_same_parameters_in_both_formats(shared):
    _, params = load_pretrained(shared / "weights" / "gpt-nano-sort")
    native = read_mingpt(shared / "weights" / "gpt-nano-sort-model.json")
    layers = params["layers"]
    for i in range(3):
        block = f"transformer.h.{i}."
        for name, ours in (
            ("attn.c_proj", layers["attention"]["out"]),
            ("mlp.c_fc", layers["mlp"]["up"]),
            ("mlp.c_proj", layers["mlp"]["down"]),
        ):
            np.testing.assert_array_equal(ours["kernel"][i], native[f"{block}{name}.weight"].T)
            np.testing.assert_array_equal(ours["bias"][i], native[f"{block}{name}.bias"])
        fused = np.split(native[f"{block}attn.c_attn.weight"], 3)
        for name, kernel in zip(("query", "key", "value"), fused, strict=True):
            np.testing.assert_array_equal(layers["attention"][name]["kernel"][i], kernel.T)
    head = native["lm_head.weight"]
    np.testing.assert_array_equal(params["unembedding"]["kernel"][:, :3], head.T)
    assert not params["unembedding"]["kernel"][:, 3:].any()


def test_the_real_sorter_reproduces_its_activations_and_sorts_every_input(shared):
    config, params = load_pretrained(shared / "weights" / "gpt-nano-sort")
    partials = read_mingpt(shared / "weights" / "gpt-nano-sort-t0-partials.json")
    tokens = partials["idx"].astype(np.int32)
    model = language_model(config)
    np.testing.assert_allclose(model.hidden(params, tokens), partials["ln_f"], atol=1e-4)
    logits = model.apply(params, tokens)[..., :3]
    np.testing.assert_allclose(logits, partials["lm_head"], atol=1e-4)
    reference = np.load(shared / "weights" / "gpt-nano-sort" / "reference.npz")
    np.testing.assert_array_equal(tokens, reference["input_ids"])
    np.testing.assert_allclose(logits, reference["logits"], atol=1e-4)
    digits = np.stack(np.meshgrid(*[np.arange(3, dtype=np.int32)] * 6), axis=-1).reshape(-1, 6)
    assert len(digits) == 729
    np.testing.assert_array_equal(greedy(config, params, digits, 6), np.sort(digits, axis=1))


@pytest.fixture
def gpt2(tmp_path, rng):
    """A tiny GPT-2 folder: (path, tensors, config, save)."""
    config = {"model_type": "gpt2", "n_layer": 2, "n_embd": 8, "n_head": 2, "n_positions": 6,
              "vocab_size": 5}  # fmt: skip
    shapes = {"wte.weight": (5, 8), "wpe.weight": (6, 8), "ln_f.weight": (8,), "ln_f.bias": (8,)}
    for i in range(2):
        for name, shape in (("attn.c_attn", (8, 24)), ("attn.c_proj", (8, 8)),
                            ("mlp.c_fc", (8, 32)), ("mlp.c_proj", (32, 8)),
                            ("ln_1", (8,)), ("ln_2", (8,))):  # fmt: skip
            shapes[f"h.{i}.{name}.weight"] = shape
            shapes[f"h.{i}.{name}.bias"] = shape[-1:]
    tensors = {f"transformer.{k}": rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}

    def save(tensors=tensors, **changes):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path

    return tmp_path, tensors, save


def test_tensors_land_where_they_belong(gpt2):
    _, tensors, save = gpt2
    config, params = load_pretrained(save())
    assert (config.vocab_size, config.pad_id, config.vocab_rows) == (5, 5, 128)
    assert (config.max_length, config.tie_embeddings, config.activation) == (6, True, "gelu")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(
        params["embedder"]["tokens"][:5], tensors["transformer.wte.weight"]
    )
    assert not params["embedder"]["tokens"][5:].any()
    fused = tensors["transformer.h.1.attn.c_attn.weight"]
    np.testing.assert_array_equal(params["layers"]["attention"]["key"]["kernel"][1], fused[:, 8:16])
    fused = tensors["transformer.h.1.attn.c_attn.bias"]
    np.testing.assert_array_equal(params["layers"]["attention"]["value"]["bias"][1], fused[16:])


def test_old_names_buffers_a_tied_head_and_half_precision_are_read(gpt2):
    path, tensors, save = gpt2
    _, expected = load_pretrained(save())
    spare = {
        "h.0.attn.bias": np.ones((1, 1, 6, 6), np.float32),
        "lm_head.weight": tensors["transformer.wte.weight"],
    }
    save({k.removeprefix("transformer."): v for k, v in tensors.items()} | spare)
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(path)[1], expected)
    for dtype in (jnp.bfloat16, np.float16):
        _, half = load_pretrained(save({k: v.astype(dtype) for k, v in tensors.items()}))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-6), half, expected
        )
        assert half["final_norm"]["scale"].dtype == np.float32


def test_a_sharded_folder_reads_like_a_single_file(gpt2):
    path, tensors, save = gpt2
    _, expected = load_pretrained(save())
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, path / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(path)[1], expected)


def test_missing_unexpected_and_misshapen_tensors_are_listed(gpt2):
    _, tensors, save = gpt2
    wrong = dict(tensors)
    del wrong["transformer.h.1.ln_2.bias"]
    wrong["transformer.adapter"] = np.zeros(3, np.float32)
    wrong["transformer.wpe.weight"] = np.zeros((7, 8), np.float32)
    with pytest.raises(UserError) as error:
        load_pretrained(save(wrong))
    message = str(error.value)
    assert "1 missing: h.1.ln_2.bias" in message
    assert "1 unexpected: adapter" in message
    assert "1 not float[6, 8]: wpe.weight is F32[7, 8]" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "t5"}, "model_type='t5' is not supported; supported: gpt2, llama"),
        ({"activation_function": "swish"}, "activation_function='swish' is not supported"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"n_head": 3}, "d_model=8 is not a multiple of num_heads=3"),
        ({"n_layer": "two"}, "config.json"),
    ],
    ids=str,
)
def test_an_option_that_is_not_supported_is_named(gpt2, changes, message):
    with pytest.raises(UserError, match=message):
        load_pretrained(gpt2[2](**changes))


def test_llama_options_of_old_and_new_transformers_are_understood(tmp_path):
    raw = {"model_type": "llama", "vocab_size": 5, "hidden_size": 8, "intermediate_size": 12,
           "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip

    def problem(**changes):
        (tmp_path / "config.json").write_text(json.dumps({**raw, **changes}))
        with pytest.raises(UserError) as error:
            load_pretrained(tmp_path)
        return str(error.value)

    no_weights = "model.safetensors: no such file"
    assert no_weights in problem(rope_theta=5e5, rope_scaling=None)
    assert no_weights in problem(rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    assert no_weights in problem(rope_scaling={"type": "linear", "factor": 2.0})
    assert "rope type='dynamic'" in problem(rope_scaling={"type": "dynamic", "factor": 2.0})
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert "'original_max_position_embeddings' is missing" in problem(rope_scaling=llama3)
    assert "attention_bias=True" in problem(attention_bias=True)
    del raw["hidden_size"]
    assert "'hidden_size' is missing" in problem()


def test_folders_that_cannot_be_read_say_why(gpt2):
    path, _, save = gpt2
    with pytest.raises(UserError, match=r"config\.json: No such file"):
        load_pretrained(path)
    (path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        load_pretrained(path)
    whole = (save() / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_pretrained(path)
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match="only safetensors weights are read"):
        load_pretrained(path)
    index = {"weight_map": {"wte.weight": "../elsewhere.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="files of its own folder"):
        load_pretrained(path)


def test_a_llama2c_file_with_a_head_of_its_own_is_read(tmp_path, rng):
    vocab, d, ff, length = 6, 8, 12, 4
    sizes = [
        vocab * d,
        d,
        d * d,
        d * d,
        d * d,
        d * d,
        d,
        ff * d,
        d * ff,
        ff * d,
        d,
        length * d // 2,
    ]
    parts = [rng.normal(size=size).astype("<f4") for size in sizes]
    head = rng.normal(size=(vocab, d)).astype("<f4")
    path = tmp_path / "model.bin"
    header = struct.pack("<7i", d, ff, 1, 2, 2, -vocab, length)
    path.write_bytes(header + b"".join(p.tobytes() for p in [*parts, head]))
    config, params = load_llama2c(path)
    assert not config.tie_embeddings
    np.testing.assert_array_equal(params["unembedding"]["kernel"][:, :vocab], head.T)
    np.testing.assert_array_equal(params["layers"]["mlp"]["up"]["kernel"][0].ravel("F"), parts[9])
    assert params["unembedding"]["kernel"].shape == (d, config.vocab_rows)


def test_llama2c_files_that_cannot_be_read_say_why(tmp_path):
    path = tmp_path / "model.bin"
    for content, message in (
        (None, "No such file"),
        (b"abc", "too short"),
        (struct.pack("<7i", 8, 12, -1, 2, 2, 6, 4), "not a llama2.c file"),
        (struct.pack("<7i", 8, 12, 1, 2, 2, 6, 4), "28 bytes, but its header describes"),
        (struct.pack("<7i", 8, 12, 1, 3, 2, 6, 4), "not a multiple of num_heads=3"),
    ):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_llama2c(path)
