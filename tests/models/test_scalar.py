"""Reward and value models: where the head starts, and where it is read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax.models import (
    final_scores,
    response_values,
    scalar_from_language,
    scalar_model,
)
from tests.models.cases import GPT, LLAMA, SHAPE, jitted, language, outputs, random_tokens, scalar


@pytest.mark.parametrize("width", [768, 1024])
def test_the_head_starts_at_one_over_the_root_of_d_plus_one(width):
    """T42"""
    config = dataclasses.replace(GPT, d_model=width, num_layers=1)
    trunk = dict.fromkeys(("embedder", "layers", "final_norm"), jnp.zeros(()))
    heads = [scalar_from_language(trunk, jax.random.key(seed), config)["head"] for seed in range(8)]
    kernels = np.concatenate([head["kernel"] for head in heads])
    assert heads[0]["kernel"].shape == (width, 1)
    assert abs(kernels.std() * np.sqrt(width + 1) - 1) < 0.05
    assert all(np.all(head["bias"] == 0) for head in heads)


def test_a_fresh_scalar_model_starts_like_one_made_from_a_language_model():
    """T42: the same names, shapes and scales, whichever way it is made."""
    model = scalar_model(LLAMA)
    fresh = model.init(jax.random.key(0, impl="rbg"))  # compiles faster
    made = scalar_from_language(language(LLAMA)[1], jax.random.key(0), LLAMA)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, made)
    ratio = np.asarray(fresh["head"]["kernel"]).std() * np.sqrt(LLAMA.d_model + 1)
    assert 0.6 < ratio < 1.4
    assert made["embedder"] is language(LLAMA)[1]["embedder"]
    hidden = jitted(model.hidden)(made, random_tokens(*SHAPE), mask=np.ones(SHAPE, bool))
    theirs = jitted(language(LLAMA)[0].hidden)(
        language(LLAMA)[1], random_tokens(*SHAPE), mask=np.ones(SHAPE, bool)
    )
    np.testing.assert_allclose(hidden, theirs, atol=1e-5)


def test_the_score_is_read_at_the_last_real_token_on_either_side_of_the_padding():
    """T6, MODEL-4"""
    tokens = random_tokens(*SHAPE)
    right, left = np.ones(SHAPE, bool), np.ones(SHAPE, bool)
    right[:, 8:], left[:, :4] = False, False
    shifted = np.roll(tokens, 4, axis=1)
    case = scalar(LLAMA)
    on_right = final_scores(outputs(case, tokens, right), right)
    on_left = final_scores(outputs(case, shifted, left), left)
    np.testing.assert_allclose(on_right, on_left, atol=1e-4)
    np.testing.assert_array_equal(on_right, outputs(case, tokens, right)[:, 7])


def test_the_score_of_a_row_without_tokens_is_finite():
    scores = jnp.arange(6.0).reshape(2, 3)
    mask = jnp.array([[True, True, False], [False, False, False]])
    assert final_scores(scores, mask).tolist() == [1.0, 5.0]


def test_a_value_is_read_before_its_token_is_emitted():
    """T21: V_t does not know y_t; V_0 knows the whole prompt."""
    prompt = 5
    tokens = random_tokens(*SHAPE)

    def values(tokens):
        return np.asarray(response_values(outputs(scalar(GPT), tokens), prompt_length=prompt))

    before = values(tokens)
    assert before.shape == (2, SHAPE[1] - prompt)
    for t in range(SHAPE[1] - prompt):
        changed = tokens.copy()
        changed[:, prompt + t :] = (changed[:, prompt + t :] + 1) % GPT.vocab_size
        np.testing.assert_array_equal(values(changed)[:, : t + 1], before[:, : t + 1])
    changed = tokens.copy()
    changed[:, prompt - 1] = (changed[:, prompt - 1] + 1) % GPT.vocab_size
    assert np.all(np.abs(values(changed)[:, 0] - before[:, 0]) > 1e-4)


def test_a_value_model_copied_from_the_reward_model_gives_the_score_at_the_end():
    """T43: with the head's bias, which carries the zero point."""
    model, params = scalar(GPT)
    assert np.all(params["head"]["bias"] != 0)
    mask = np.ones(SHAPE, bool)
    mask[1, 9:] = False
    tokens = random_tokens(*SHAPE)
    score = final_scores(outputs((model, params), tokens, mask), mask)
    value = outputs((model, jax.tree.map(np.copy, params)), tokens, mask)
    np.testing.assert_array_equal(score, value[[0, 1], [11, 8]])


def test_a_head_of_zeros_outputs_exactly_zero():
    """T42"""
    model, params = scalar(GPT)
    params = {**params, "head": jax.tree.map(np.zeros_like, params["head"])}
    assert np.all(outputs((model, params), random_tokens(*SHAPE)) == 0)
