"""Reading token by token through the cache equals reading the whole row at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax.models import init_cache, language_model, unstack_layers
from tests.models.cases import FAMILIES, GPT, jitted, language, outputs, random_tokens, scalar

PROMPT, LENGTH, SLOTS = 7, 12, 16


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
def test_cached_decoding_equals_the_full_forward(config):
    """T7: a left-padded prompt at once, then one token at a time, from unstacked layers."""
    case = model, params = language(config)
    tokens, mask = random_tokens(2, LENGTH), np.ones((2, LENGTH), bool)
    mask[1, :3] = False
    full = outputs(case, tokens, mask)
    unstacked, decode = unstack_layers(params), jitted(model.decode)
    cache = init_cache(config, 2, SLOTS)
    logits, cache = decode(unstacked, tokens[:, :PROMPT], cache, mask=mask[:, :PROMPT])
    pieces = [logits]
    for t in range(PROMPT, LENGTH):
        step = slice(t, t + 1)
        logits, cache = decode(unstacked, tokens[:, step], cache, mask=mask[:, step])
        pieces.append(logits)
    cached = np.concatenate(pieces, axis=1)
    assert cached.dtype == np.float32
    np.testing.assert_allclose(cached[mask], full[mask], rtol=0, atol=1e-4)
    assert int(cache.index) == LENGTH
    assert cache.mask[:, :LENGTH].tolist() == mask.tolist()
    assert not cache.mask[:, LENGTH:].any()


def test_stacked_parameters_decode_the_same():
    model, params = language(GPT)
    tokens, mask = random_tokens(2, PROMPT), np.ones((2, PROMPT), bool)
    cache = init_cache(GPT, 2, SLOTS)
    decode = jitted(model.decode)
    stacked, _ = decode(params, tokens, cache, mask=mask)
    unstacked, _ = decode(unstack_layers(params), tokens, cache, mask=mask)
    np.testing.assert_allclose(stacked, unstacked, atol=1e-5)
    again = unstack_layers(unstack_layers(params))
    assert jax.tree.structure(again) == jax.tree.structure(unstack_layers(params))


def test_the_last_logits_alone_are_the_last_of_all():
    model, params = language(GPT)
    tokens, cache = random_tokens(2, PROMPT), init_cache(GPT, 2, SLOTS)
    mask = np.ones(tokens.shape, bool)
    whole, _ = jitted(model.decode)(unstack_layers(params), tokens, cache, mask=mask)
    last, _ = jax.jit(model.decode, static_argnames="last_only")(
        unstack_layers(params), tokens, cache, last_only=True
    )
    assert last.shape == (2, 1, GPT.vocab_rows)
    np.testing.assert_allclose(last[:, 0], whole[:, -1], atol=1e-5)


def test_matrices_cast_once_decode_as_if_cast_on_every_token():
    config = dataclasses.replace(GPT, dtype="bfloat16")
    model, params = language_model(config), language(GPT)[1]
    cast = unstack_layers(params, dtype=config.dtype)
    assert cast["layers"][0]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16
    assert cast["embedder"]["tokens"].dtype == jnp.bfloat16
    assert cast["layers"][0]["mlp"]["up"]["bias"].dtype == jnp.float32
    assert cast["layers"][0]["mlp_norm"]["scale"].dtype == jnp.float32
    tokens, cache = random_tokens(2, PROMPT), init_cache(config, 2, SLOTS)
    assert cache.keys[0].dtype == jnp.bfloat16
    both = [jax.jit(model.decode)(p, tokens, cache)[0] for p in (cast, unstack_layers(params))]
    np.testing.assert_array_equal(*both)


def test_a_cache_that_is_too_short_is_refused():
    model, params = language(GPT)
    with pytest.raises(ValueError, match="7 tokens do not fit a cache of 4 slots"):
        model.decode(params, random_tokens(2, PROMPT), init_cache(GPT, 2, 4))


def test_scalar_models_do_not_decode():
    model, params = scalar(GPT)
    with pytest.raises(TypeError, match="no next token"):
        model.decode(params, random_tokens(1, 1), init_cache(GPT, 1, 1))
