"""Every family: our logits are those of transformers, however the rows are padded and read.

The fixtures were recorded by tests/fixtures/models/record.py with torch.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax.models import init_cache, language_model, scalar_model, unstack_layers
from instruct_jax.models.hf import FAMILIES, family_of, inspect_pretrained, load_pretrained
from instruct_jax.models.hf.schema import resolved
from instruct_jax.models.transformer import final_scores
from tests.models.folders import NAMES, recorded, write_folder

LENGTH, NEW, SLOTS = 12, 64, 80
cases = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name -> (config, params), loaded once."""

    @functools.cache
    def load(name):
        return load_pretrained(write_folder(tmp_path_factory.mktemp(name), name))

    return load


def arrangements(kept):
    """One batch [4, 12] with its mask and segments: left-padded, right-padded, packed, whole."""
    a, b = kept["a"], kept["b"]
    pad = np.zeros(5, int)
    tokens = np.stack(
        [np.r_[pad, b], np.r_[b, pad], np.r_[b, a[:5]], a],
    ).astype(np.int32)
    mask = np.ones((4, LENGTH), bool)
    mask[0, :5], mask[1, 7:] = False, False
    segments = np.ones((4, LENGTH), np.int32)
    segments[2, 7:] = 2
    return tokens, mask, segments


@cases
def test_logits_are_those_of_transformers_padded_left_right_and_packed(models, name):
    config, params = models(name)
    _, kept = recorded(name)
    tokens, mask, segments = arrangements(kept)
    apply = jax.jit(language_model(config).apply)
    logits = np.asarray(apply(params, tokens, mask=mask, segment_ids=segments))
    vocab = config.vocab_size
    assert kept["alone_a"].shape[-1] == vocab
    same = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)
    same(logits[0, 5:, :vocab], kept["left"][1, 5:])
    same(logits[1, :7, :vocab], kept["right"][1, :7])
    same(logits[2, :7, :vocab], kept["alone_b"])
    same(logits[2, 7:, :vocab], kept["alone_a"][:5])
    same(logits[3, :, :vocab], kept["alone_a"])
    same(logits[3, :, :vocab], kept["left"][0])


@cases
def test_cached_decoding_gives_their_logits_and_their_greedy_text(models, name):
    """A left-padded prompt at once, the rest token by token; then 64 greedy tokens."""
    config, params = models(name)
    _, kept = recorded(name)
    model, params = language_model(config), unstack_layers(params)
    a, b, pad = kept["a"], kept["b"], np.zeros(5, int)
    tokens = np.stack([a, np.r_[pad, b]]).astype(np.int32)
    mask = np.stack([np.ones(LENGTH, bool), np.arange(LENGTH) >= 5])

    @jax.jit
    def run(params, tokens, mask):
        cache = init_cache(config, 2, SLOTS)
        first, cache = model.decode(params, tokens[:, :7], cache, mask=mask[:, :7])

        def read(cache, column):
            token, real = column
            logits, cache = model.decode(params, token[:, None], cache, mask=real[:, None])
            return cache, logits[:, 0]

        cache, rest = jax.lax.scan(read, cache, (tokens[:, 7:].T, mask[:, 7:].T))
        logits = jnp.concatenate([first, rest.swapaxes(0, 1)], axis=1)

        def write(carry, _):
            token, cache = carry
            logits, cache = model.decode(params, token[:, None], cache)
            return (jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32), cache), token

        start = jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32)
        return logits, jax.lax.scan(write, (start, cache), length=NEW)[1].T

    logits, greedy = (np.asarray(x) for x in run(params, tokens, mask))
    logits = logits[..., : config.vocab_size]
    np.testing.assert_allclose(logits[0], kept["alone_a"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits[1, 5:], kept["left"][1, 5:], rtol=0, atol=1e-4)
    assert greedy[0].tolist() == kept["greedy"].tolist()


@cases
def test_a_classifier_of_one_label_is_a_scalar_model(tmp_path, name):
    folder = write_folder(tmp_path / "scalar", name, scalar=True)
    assert inspect_pretrained(folder).kind == "scalar"
    config, params = load_pretrained(folder)
    _, kept = recorded(name)
    b = np.r_[kept["b"], np.zeros(5, int)]
    tokens, mask = np.stack([kept["a"], b]).astype(np.int32), np.ones((2, LENGTH), bool)
    mask[1, 7:] = False
    scores = jax.jit(scalar_model(config).apply)(params, tokens, mask=mask)
    np.testing.assert_allclose(final_scores(scores, mask), kept["scores"], rtol=0, atol=1e-4)


def test_every_family_has_a_recorded_model():
    assert {recorded(name)[0]["config"]["model_type"] for name in NAMES} == set(FAMILIES)


@cases
def test_a_configuration_written_as_its_family_reads_back(models, name):
    config, model_type = models(name)[0], recorded(name)[0]["config"]["model_type"]
    assert family_of(config, model_type) == model_type
    for part in ("attention_pattern", "rope_theta", "norm_eps", "tie_embeddings"):
        assert getattr(resolved(config), part) == getattr(resolved(resolved(config)), part)


def test_what_no_family_has_a_word_for_is_named(models):
    config = dataclasses.replace(models("qwen3")[0], norm_offset=0.5)
    with pytest.raises(ValueError, match=r"no family .* qwen3 is nearest, .* norm_offset=0\.5$"):
        family_of(config)
    with pytest.raises(ValueError, match=r"llama cannot say .*qk_norm=True"):
        family_of(config, "llama")
    with pytest.raises(ValueError, match="no family is called 'lama'; there are llama"):
        family_of(config, "lama")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 2.0}},
         "rope type='yarn' is not supported; supported: default, linear, llama3"),
        ("phi3", {"rope_parameters": None, "rope_scaling": {"type": "longrope"}},
         "rope type='longrope'"),
        ("llama", {"attention_bias": True}, "attention_bias=True is not supported"),
        ("opt", {"word_embed_proj_dim": 8}, "word_embed_proj_dim=8: .*OPT-350m"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma3", {"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ("gemma3", {"layer_types": ["chunked_attention"] * 4}, "expected a list of full_attention"),
        ("pythia", {"hidden_act": "silu"}, "hidden_act='silu' is not supported; .*gelu"),
        ("mistral", {"sliding_window": "4"}, "sliding_window=4 is not a size"),
        ("llama", {"rms_norm_eps": "1e-6"}, "rms_norm_eps=1e-6 is not a number"),
        ("llama3", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
         "'factor' is missing"),
    ],
    ids=lambda value: value if isinstance(value, str) and value in NAMES else "",
)  # fmt: skip
def test_an_option_that_is_not_supported_is_told_apart(tmp_path, name, changes, message):
    from instruct_jax.errors import UserError

    folder = write_folder(tmp_path / name, name)
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=message):
        load_pretrained(folder)
