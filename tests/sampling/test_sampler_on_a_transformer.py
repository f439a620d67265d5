"""The generation loop on the real model: cache, positions, padding, batches and meshes."""

import contextlib

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


SHAPE = dict(vocab_size=VOCAB, d_model=16, num_heads=4, max_length=96, vocab_multiple=64)
GPT = dict(num_layers=2)
LLAMA = dict(num_layers=1, norm="rmsnorm", activation="swiglu", positions="rope", num_kv_heads=2)


def make_model(**options):
    config = TransformerConfig(**SHAPE, **options, init_std=0.3)
    return language_model(config), language_model(config).init(jax.random.key(0))


@pytest.fixture(scope="module")
def gpt():
    """(model, params) of a GPT of two layers."""
    return make_model(**GPT)


@pytest.fixture(scope="module")
def rollout(gpt):
    """What `gpt` samples for ROWS."""
    return generate(*gpt, *prompts_of(), keys_of(4), **SETTINGS)


def prompts_of(rows=ROWS, width=WIDTH):
    tokens = np.full((len(rows), width), VOCAB, np.int32)
    for line, row in zip(tokens, rows, strict=True):
        line[width - len(row) :] = row
    return jnp.asarray(tokens), jnp.asarray(tokens != VOCAB)


def keys_of(count, seed=0):
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), jnp.arange(count))


@pytest.mark.parametrize(("options", "temperature"), [(GPT, 0.7), (LLAMA, 1.0)])
def test_cached_log_probs_equal_those_of_the_full_forward(options, temperature):
    """T7: to 1e-4; what the trainer computes for the same tokens (NUM-4)."""
    model, params = make_model(**options)
    rollout = generate(
        model, params, *prompts_of(), keys_of(4), **SETTINGS, temperature=temperature
    )

    @jax.jit
    def full_forward(params, rollout):
        logits = model.apply(params, rollout.tokens, mask=rollout.mask)[:, WIDTH - 1 : -1]
        responses = jnp.minimum(rollout.tokens[:, WIDTH:], VOCAB - 1)
        log_probs = token_log_probs(logits, responses, temperature=temperature)
        return jnp.where(rollout.response_mask, log_probs, 0.0)

    np.testing.assert_allclose(rollout.log_probs, full_forward(params, rollout), atol=1e-4)


def test_greedy_decoding_is_the_argmax_of_the_full_forward(gpt):
    model, params = gpt
    greedy = generate(model, params, *prompts_of(), keys_of(4), **SETTINGS, temperature=0)
    apply = jax.jit(lambda tokens, mask: model.apply(params, tokens, mask=mask))
    best = np.argmax(apply(greedy.tokens, greedy.mask), axis=-1)[:, WIDTH - 1 : -1]
    best = np.where(greedy.response_mask, best, VOCAB)
    assert np.array_equal(greedy.tokens[:, WIDTH:], best)


def test_a_batch_samples_what_each_row_alone_would(gpt, rollout):
    """R15: tokens equal, log-probs to 1e-5. Row 1, unpadded, is one token: nothing to prefill."""
    for b, width in enumerate([WIDTH, 1, WIDTH, WIDTH]):
        prompt = prompts_of([ROWS[b]], width=width)
        alone = generate(*gpt, *prompt, keys_of(4)[b : b + 1], **SETTINGS)
        assert np.array_equal(alone.tokens[0, width:], rollout.tokens[b, WIDTH:])
        np.testing.assert_allclose(alone.log_probs[0], rollout.log_probs[b], atol=1e-5)


@pytest.mark.parametrize("mesh", [None, "data:2", "data:2,fsdp:2"])
def test_a_batch_that_shrinks_samples_what_one_that_does_not_would(gpt, mesh):
    """Rows of 1 to 12 tokens, in blocks of 16, 8 or 4 that are halved three times or twice."""
    rows, keys = ROWS * 4, keys_of(16, seed=3)
    stops = {"stop_ids": tuple(range(0, VOCAB, 6))}
    wanted = generate(*gpt, *prompts_of(rows), keys, **SETTINGS, **stops)
    lengths = np.sort(wanted.response_mask.sum(1))
    assert lengths[0] < lengths[8] < lengths[12] < lengths[-1], "lengths that say nothing"
    model, params = gpt
    batch = (*prompts_of(rows), keys)
    with jax.set_mesh(make_mesh(mesh)) if mesh else contextlib.nullcontext():
        if mesh:
            batch = jax.device_put(batch, batch_sharding(make_mesh(mesh)))
        got = generate(model, params, *batch, **SETTINGS, **stops, halvings=3)
    for name in ("tokens", "mask", "response_mask"):
        np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name))
    np.testing.assert_allclose(got.log_probs, wanted.log_probs, atol=1e-5)


def test_more_padding_on_the_left_changes_nothing(gpt, rollout):
    """T5: no log-prob moves by more than 1e-5."""
    width = WIDTH + 63
    padded = generate(*gpt, *prompts_of(width=width), keys_of(4), **SETTINGS)
    assert np.array_equal(padded.tokens[:, width:], rollout.tokens[:, WIDTH:])
    np.testing.assert_allclose(padded.log_probs, rollout.log_probs, atol=1e-5)


def test_a_mesh_samples_what_one_device_would(gpt, rollout):
    """The rows of a batch are spread over data and fsdp; tokens are the same."""
    model, params = gpt
    mesh = make_mesh("data:2,fsdp:2,tensor:2")
    rows = ROWS * 2
    prompts, mask = prompts_of(rows)
    keys = jnp.tile(keys_of(4), 2)
    sharded = jax.device_put(params, tree_shardings(mesh, PARTITION_RULES, params))
    batch = jax.device_put((prompts, mask, keys), batch_sharding(mesh))
    with jax.set_mesh(mesh):
        spread = generate(model, sharded, *batch, **SETTINGS)
    assert np.array_equal(spread.tokens, np.tile(rollout.tokens, (2, 1)))
    np.testing.assert_allclose(spread.log_probs, np.tile(rollout.log_probs, (2, 1)), atol=1e-4)
    rows_here = spread.tokens.sharding.shard_shape(spread.tokens.shape)[0]
    assert rows_here == len(rows) // (mesh.shape["data"] * mesh.shape["fsdp"])
