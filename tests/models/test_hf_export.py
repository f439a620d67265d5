"""What is written reads back to the bit, and transformers computes the same with it."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax.data.rows import Turn
from instruct_jax.data.templates import TEMPLATES, encode_segments
from instruct_jax.data.tokenizer import load_tokenizer, train_bpe
from instruct_jax.errors import UserError
from instruct_jax.models import PARTITION_RULES, preset, scalar_model
from instruct_jax.models.hf import (
    chat_template_of,
    exported_files,
    inspect_pretrained,
    load_pretrained,
    model_card,
    save_pretrained,
)
from instruct_jax.models.hf.container import read_header
from instruct_jax.models.hf.schema import resolved
from instruct_jax.models.hf.text import write_tokenizer
from instruct_jax.models.transformer import scalar_from_language
from instruct_jax.training.mesh import make_mesh, tree_shardings
from tests.models.cases import GPT, language
from tests.models.folders import NAMES, recorded, write_folder

cases = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name -> (config, params), loaded once."""

    @functools.cache
    def load(name):
        return load_pretrained(write_folder(tmp_path_factory.mktemp(name), name))

    return load


def same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def with_scalar_head(config, params, bias=0.75):
    scalar = scalar_from_language(params, jax.random.key(1), config)
    scalar["head"]["bias"] = np.array([bias], np.float32)
    return jax.tree.map(np.asarray, scalar)


@cases
def test_what_is_written_reads_back_to_the_bit(tmp_path, models, name):
    config, params = models(name)
    about, _ = recorded(name)
    model_type = about["config"]["model_type"]
    out = save_pretrained(tmp_path / "out", config, params, family=model_type)
    again, params_again = load_pretrained(out)
    assert resolved(again) == resolved(config)
    same_bits(params_again, params)
    shapes = {k: list(v.shape) for k, v in read_header(out / "model.safetensors").items()}
    vocab = config.vocab_size
    for key, shape in about["shapes"].items():
        more = shape[0] == vocab and len(shape) == 2
        assert shapes[key] == ([vocab + 1, *shape[1:]] if more else shape), key
    assert set(shapes) == set(about["shapes"])
    raw = json.loads((out / "config.json").read_text())
    assert raw["architectures"] == about["config"]["architectures"]
    assert (raw["vocab_size"], raw["pad_token_id"]) == (vocab + 1, vocab)
    assert "auto_map" not in raw
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"pad_token_id": vocab, "suppress_tokens": [vocab]}
    assert not list(tmp_path.glob(".*")), "nothing half-written is left"


def test_files_are_cut_at_the_size_asked_for(tmp_path, models):
    config, params = models("gemma3")
    out = save_pretrained(tmp_path / "out", config, params, shard_bytes=6_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert {p.name for p in files} == set(index["weight_map"].values())
    held = [sum(4 * int(np.prod(t.shape)) for t in read_header(p).values()) for p in files]
    assert max(held) <= 6_000 and sum(held) == index["metadata"]["total_size"]
    same_bits(load_pretrained(out)[1], params)


def test_half_precision_is_rounded_once(tmp_path, models):
    config, params = models("llama")
    out = save_pretrained(tmp_path / "out", config, params, dtype="bfloat16")
    _, half = load_pretrained(out, dtype="bfloat16")
    assert half["final_norm"]["scale"].dtype == jnp.bfloat16
    same_bits(half, jax.tree.map(lambda w: w.astype(jnp.bfloat16), params))
    _, full = load_pretrained(out)
    same_bits(full, jax.tree.map(lambda w: w.astype(np.float32), half))


@pytest.mark.parametrize("name", ["gpt2", "pythia", "llama", "gemma2", "opt_post_norm"])
def test_a_reward_model_keeps_its_bias(tmp_path, models, name):
    """RM-4 sets it; transformers has no place for it."""
    config, params = models(name)
    scalar = with_scalar_head(config, params)
    out = save_pretrained(tmp_path / "out", config, scalar)
    assert inspect_pretrained(out).kind == "scalar"
    raw = json.loads((out / "config.json").read_text())
    assert raw["num_labels"] == 1 and raw["architectures"][0].endswith("SequenceClassification")
    has_bias = config.norm == "layernorm" and config.norm_order != "post"
    assert raw["instruct_jax"]["head_bias"] == 0.75
    assert raw["instruct_jax"]["bias_is_folded"] == has_bias
    same_bits(load_pretrained(out)[1], scalar)
    # What transformers reads, without our own file: the same scores where the bias is folded.
    (out / "scalar_head.safetensors").unlink()
    _, theirs = load_pretrained(out)
    hidden = np.random.default_rng(0).normal(size=(5, config.d_model)).astype(np.float32)
    bias = scalar.get("final_norm", {}).get("bias", np.float32(0))
    folded = theirs.get("final_norm", {}).get("bias", np.float32(0))
    ours, other = ((hidden + b) @ scalar["head"]["kernel"][:, 0] for b in (bias, folded))
    offset = 0.0 if has_bias else 0.75
    np.testing.assert_allclose(ours + 0.75, other + offset, atol=1e-5)


def test_parameters_go_straight_to_their_devices(tmp_path, models):
    config, params = models("phi3")
    folder = write_folder(tmp_path / "phi3", "phi3")
    mesh = make_mesh("data:2,fsdp:2,tensor:2")
    shardings = functools.partial(tree_shardings, mesh, PARTITION_RULES)
    _, placed = load_pretrained(folder, shardings=shardings, dtype="float32")
    wanted = shardings(jax.eval_shape(lambda: params))
    jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(str(s)),
                 placed, wanted)  # fmt: skip
    key = placed["layers"]["attention"]["key"]["kernel"]
    assert key.addressable_shards[0].data.size == key.size // 4
    same_bits(jax.tree.map(np.asarray, placed), params)
    out = save_pretrained(tmp_path / "out", config, placed)
    same_bits(load_pretrained(out)[1], params)


@pytest.mark.parametrize(
    ("name", "family"),
    [("tiny", "gpt2"), ("mini", "gpt_neox"), ("small", "gpt2"), ("small-qwen2", "qwen2")],
)
def test_our_own_sizes_have_a_family(tmp_path, name, family):
    config = dataclasses.replace(preset(name), num_layers=1, max_length=8)
    model = scalar_model(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
    out = save_pretrained(tmp_path / "out", config, params)
    raw = json.loads((out / "config.json").read_text())
    assert raw["model_type"] == family
    same_bits(load_pretrained(out)[1], jax.tree.map(_without_spare_rows(config), params))


def _without_spare_rows(config):
    # Rows past PAD only round the table up; they are no part of the model.
    def cut(x):
        if x.shape != (config.vocab_rows, config.d_model):
            return x
        return np.where(np.arange(len(x))[:, None] < config.vocab_size, x, np.float32(0))

    return cut


def test_what_a_killed_export_left_is_replaced_and_nothing_else_is(tmp_path, models):
    config, params = models(NAMES[0])
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "model-00001-of-00009.safetensors").write_bytes(b"half")
    (partial / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes.txt: not of an export; move it away"):
        save_pretrained(tmp_path / "out", config, params)
    assert len(list(partial.iterdir())) == 2 and not (tmp_path / "out").exists()
    (partial / "notes.txt").rename(tmp_path / "notes.txt")
    out = save_pretrained(tmp_path / "out", config, params)
    assert not partial.exists() and not list(out.glob("model-*-of-*"))
    written = {f"{tmp_path}/out/{path.name}" for path in out.iterdir()}
    assert written < {name for name in exported_files(str(tmp_path / "out"))}


def test_a_link_in_the_place_of_a_half_written_export_is_not_followed(tmp_path, models):
    config, params = models(NAMES[0])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text("mine")
    (tmp_path / ".out.partial").symlink_to("elsewhere")
    with pytest.raises(UserError, match="no folder of an export"):
        save_pretrained(tmp_path / "out", config, params)
    assert (tmp_path / "elsewhere" / "config.json").read_text() == "mine"


def test_a_folder_that_is_there_is_not_written_over(tmp_path, models):
    config, params = models("gpt2")
    (tmp_path / "mine").write_text("")
    with pytest.raises(UserError, match="is there already"):
        save_pretrained(tmp_path, config, params)
    odd = dataclasses.replace(config, positions="rope", norm="rmsnorm", use_bias=True)
    with pytest.raises(UserError, match="no family of transformers has this configuration"):
        save_pretrained(tmp_path / "out", odd, params)
    with pytest.raises(UserError, match="dtype='int8' is not one of"):
        save_pretrained(tmp_path / "out", config, params, dtype="int8")
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["the cat sat on the mat, and so did the dog"] * 3, vocab_size=280)


def test_transformers_reads_the_tokenizer_with_our_pad(tmp_path, tokenizer):
    from transformers import AutoTokenizer

    config = dataclasses.replace(GPT, vocab_size=tokenizer.vocab_size, max_length=16)
    shapes = jax.eval_shape(scalar_model(config).init, jax.random.key(0))
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
    out = save_pretrained(
        tmp_path / "out", config, params, tokenizer=tokenizer, chat_template="{{ 1 }}"
    )
    theirs = AutoTokenizer.from_pretrained(out)
    assert theirs.pad_token_id == tokenizer.pad_id == config.pad_id
    assert theirs.eos_token_id == tokenizer.eos_id
    text = "the dog sat on 7 cats \u00e9"
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs.chat_template.strip() == "{{ 1 }}"
    own = load_tokenizer(out)
    assert (own.pad_id, own.eos_id) == (tokenizer.pad_id, tokenizer.eos_id)
    assert inspect_pretrained(out).config.vocab_size == tokenizer.vocab_size
    with pytest.raises(UserError, match=r"the tokenizer has .* tokens, the model 61"):
        save_pretrained(tmp_path / "other", GPT, language(GPT)[1], tokenizer=tokenizer)


DIALOGUES = {
    "a question": [Turn("user", 'Say "hi"\n  twice: {{ x }}')],
    "a system": [Turn("system", "Be {kind}."), Turn("user", "Who are you?")],
    "an empty system": [Turn("system", "  "), Turn("user", "Who are you?")],
    "two systems": [Turn("system", "Be kind."), Turn("system", "Be brief."), Turn("user", "Hi")],
    "an answer": [Turn("user", "Say hi"), Turn("assistant", "hi")],
    "an empty answer": [Turn("user", "Say nothing"), Turn("assistant", "")],
    "three turns": [Turn("user", "Say hi"), Turn("assistant", "hi"), Turn("user", "Ag\u00e9in?")],
    "four turns": [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"),
                   Turn("assistant", "d\n")],
}  # fmt: skip


@pytest.fixture(scope="module")
def theirs(tmp_path_factory, tokenizer):
    """The exported tokenizer of every template, as transformers loads it."""
    from transformers import AutoTokenizer

    loaded = {}
    for template in TEMPLATES:
        out = tmp_path_factory.mktemp(template.name)
        config = dataclasses.replace(GPT, vocab_size=tokenizer.vocab_size, max_length=4096)
        write_tokenizer(out, tokenizer, config, chat_template_of(template))
        loaded[template.name] = AutoTokenizer.from_pretrained(out)
    return loaded


@pytest.mark.parametrize("dialogue", DIALOGUES.values(), ids=DIALOGUES)
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.name)
def test_transformers_gives_a_dialogue_the_ids_that_the_model_was_trained_on(
    theirs, tokenizer, template, dialogue
):
    """Those of `encode_segments`, EOS after every answer included, in every template of ours."""
    messages = [{"role": turn.role, "content": turn.text} for turn in dialogue]
    render = theirs[template.name].apply_chat_template
    try:
        segments = template.segments(dialogue)
    except ValueError:
        with pytest.raises(Exception, match="single questions"):
            render(messages)
        return
    text = "".join(segment.text + tokenizer.eos * segment.ours for segment in segments)
    assert render(messages, tokenize=False) == text
    (pieces,) = encode_segments([segments], tokenizer)
    for generate in (False, True):
        ids = render(messages, add_generation_prompt=generate, return_dict=False)
        assert ids == [i for piece in pieces for i in piece]
    assert ids.count(tokenizer.eos_id) == sum(segment.ours for segment in segments)


@pytest.mark.parametrize(
    "dialogue",
    [
        [Turn("assistant", "hi")],
        [Turn("user", "a"), Turn("user", "b")],
        [Turn("user", "a"), Turn("system", "b")],
        [Turn("tool", "a")],
    ],
    ids=["begins with an answer", "two questions", "a late system", "another role"],
)
def test_what_a_template_refuses_its_export_refuses_too(theirs, dialogue):
    messages = [{"role": turn.role, "content": turn.text} for turn in dialogue]
    for template in TEMPLATES:
        with pytest.raises(ValueError, match="alternate"):
            template.segments(dialogue)
        with pytest.raises(Exception, match="must alternate"):
            theirs[template.name].apply_chat_template(messages)


def test_the_card_says_what_the_record_says_and_no_more():
    record = {
        "data": {"a.jsonl": "beef"},
        "licences": {"a.jsonl": "CC-BY-4.0"},
        "config": {"sft": {"epochs": 2}},
        "commit": "c0ffee",
        "versions": {"jax": "9"},
        "command": ["sft.py", "--x=<b>\n# Heading"],
    }
    card = model_card("m", GPT, kind="language", stage="sft", record=record, notes={"loss": 1.25})
    for told in ("`a.jsonl`, sha256 `beef`", "`a.jsonl`: CC-BY-4.0", "`sft.epochs` = `2`",
                 "`commit`: c0ffee",
                 "`loss`: 1.25", "PAD (id 61)", "Limitations", "license: other"):  # fmt: skip
        assert told in card
    assert "<b>" not in card and "\n# Heading" not in card
    bare = model_card("m", GPT, kind="scalar", stage="reward_model", record={}, notes={},
                      folded=False, head_bias=0.5)  # fmt: skip
    assert "names no data file" in bare and "Add 0.5" in bare
    assert "Add" not in model_card("m", GPT, kind="scalar", stage="reward_model", record={},
                                   notes={}, folded=True, head_bias=0.5)  # fmt: skip
