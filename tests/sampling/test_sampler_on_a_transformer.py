"""The generation loop on the real model: cache, positions, padding, batches and meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax.losses import token_log_probs
from instruct_jax.models.transformer import PARTITION_RULES, TransformerConfig, language_model
from instruct_jax.sampling import generate
from instruct_jax.training.mesh import batch_sharding, make_mesh, tree_shardings

VOCAB, EOS, WIDTH = 61, 60, 9
ROWS = ([5, 9, 3], [7], [8, 8, 1, 2, 30, 31, 4, 4], [12, 60, 13, 14, 15])
SETTINGS = dict(max_new_tokens=12, eos_id=EOS)


@pytest.fixture(scope="module", params=["gpt", "llama"])
def model(request):
    shape = dict(vocab_size=VOCAB, num_layers=2, d_model=16, num_heads=4, max_length=96)
    if request.param == "llama":
        shape |= dict(norm="rmsnorm", activation="swiglu", positions="rope", num_kv_heads=2)
    return language_model(TransformerConfig(**shape, init_std=0.3, vocab_multiple=64))


@pytest.fixture(scope="module")
def params(model):
    return model.init(jax.random.key(0))


def prompts_of(rows=ROWS, width=WIDTH):
    tokens = np.full((len(rows), width), VOCAB, np.int32)
    for line, row in zip(tokens, rows, strict=True):
        line[width - len(row) :] = row
    return jnp.asarray(tokens), jnp.asarray(tokens != VOCAB)


def keys_of(count, seed=0):
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), jnp.arange(count))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_cached_log_probs_equal_those_of_the_full_forward(model, params, temperature):
    """T7: to 1e-4; what the trainer computes for the same tokens (NUM-4)."""
    rollout = generate(
        model, params, *prompts_of(), keys_of(4), **SETTINGS, temperature=temperature
    )
    logits = model.apply(params, rollout.tokens, mask=rollout.mask)
    full = token_log_probs(
        logits[:, WIDTH - 1 : -1],
        jnp.minimum(rollout.tokens[:, WIDTH:], VOCAB - 1),
        temperature=temperature,
    )
    full = jnp.where(rollout.response_mask, full, 0.0)
    np.testing.assert_allclose(rollout.log_probs, full, atol=1e-4)


def test_greedy_decoding_is_the_argmax_of_the_full_forward(model, params):
    rollout = generate(model, params, *prompts_of(), keys_of(4), **SETTINGS, temperature=0)
    logits = model.apply(params, rollout.tokens, mask=rollout.mask)[:, WIDTH - 1 : -1]
    best = jnp.where(rollout.response_mask, jnp.argmax(logits, axis=-1), VOCAB)
    assert np.array_equal(rollout.tokens[:, WIDTH:], best)


def test_a_batch_samples_what_each_row_alone_would(model, params):
    """R15: tokens equal, log-probs to 1e-5."""
    prompts, mask = prompts_of()
    keys = keys_of(4)
    together = generate(model, params, prompts, mask, keys, **SETTINGS)
    for b in range(4):
        alone = generate(
            model, params, prompts[b : b + 1], mask[b : b + 1], keys[b : b + 1], **SETTINGS
        )
        assert np.array_equal(alone.tokens[0], together.tokens[b])
        np.testing.assert_allclose(alone.log_probs[0], together.log_probs[b], atol=1e-5)


@pytest.mark.parametrize("extra", [1, 63])
def test_more_padding_on_the_left_changes_nothing(model, params, extra):
    """T5: no log-prob moves by more than 1e-5."""
    base = generate(model, params, *prompts_of(), keys_of(4), **SETTINGS)
    padded = generate(model, params, *prompts_of(width=WIDTH + extra), keys_of(4), **SETTINGS)
    assert np.array_equal(padded.tokens[:, WIDTH + extra :], base.tokens[:, WIDTH:])
    np.testing.assert_allclose(padded.log_probs, base.log_probs, atol=1e-5)


def test_a_one_token_prompt_needs_no_prefill(model, params):
    alone = generate(model, params, *prompts_of([[7]], width=1), keys_of(2)[1:], **SETTINGS)
    padded = generate(model, params, *prompts_of(), keys_of(4), **SETTINGS)
    assert np.array_equal(alone.tokens[0, 1:], padded.tokens[1, WIDTH:])


@pytest.mark.parametrize("axes", ["data:8", "data:2,fsdp:2,tensor:2"])
def test_a_mesh_samples_what_one_device_would(model, params, axes):
    """The rows of a batch are spread over data and fsdp; tokens are the same."""
    mesh = make_mesh(axes)
    rows = ROWS * 4
    prompts, mask = prompts_of(rows)
    keys = keys_of(len(rows))
    single = generate(model, params, prompts, mask, keys, **SETTINGS)
    sharded = jax.device_put(params, tree_shardings(mesh, PARTITION_RULES, params))
    batch = jax.device_put((prompts, mask, keys), batch_sharding(mesh))
    with jax.set_mesh(mesh):
        spread = generate(model, sharded, *batch, **SETTINGS)
    assert np.array_equal(single.tokens, spread.tokens)
    np.testing.assert_allclose(single.log_probs, spread.log_probs, atol=1e-4)
    rows_here = spread.tokens.sharding.shard_shape(spread.tokens.shape)[0]
    assert rows_here == len(rows) // (mesh.shape["data"] * mesh.shape["fsdp"])
