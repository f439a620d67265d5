"""The decoder computes what its docstring says, whatever the padding, packing and sharding."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from instruct_jax.errors import ConfigError
from instruct_jax.models import (
    TransformerConfig,
    init_cache,
    language_model,
    scalar_model,
    token_positions,
)
from instruct_jax.models.config import ComputeConfig, check_length
from instruct_jax.models.layers import Block, make_context
from instruct_jax.models.rows import MASKED
from tests.models.cases import (
    FAMILIES,
    GPT,
    LLAMA,
    SHAPE,
    jitted,
    language,
    outputs,
    random_tokens,
    scalar,
)
from tests.models.oracle import row_logits, row_scores

HALF = dataclasses.replace(GPT, vocab_size=15, max_length=SHAPE[1], dtype="bfloat16")

families = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())


@functools.cache
def jitted_loss(model):
    """(params, tokens, mask) -> the sum of squared outputs at real columns, and its gradients."""

    def loss(params, tokens, mask):
        return jnp.sum(jnp.square(model.apply(params, tokens, mask=mask)[..., :15]))

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize(
    "config",
    [
        GPT,
        LLAMA,
        dataclasses.replace(GPT, activation="relu", head_dim=6, num_kv_heads=1),
        dataclasses.replace(LLAMA, tie_embeddings=True, use_bias=True, rope_theta=100.0),
    ],
    ids=["gpt", "llama", "multi-query", "tied"],
)
def test_logits_equal_the_oracle(config):
    tokens = random_tokens(*SHAPE)
    logits = outputs(language(config), tokens)
    assert logits.dtype == np.float32
    assert logits.shape == (*SHAPE, config.vocab_rows)
    expected = [row_logits(config, language(config)[1], row) for row in tokens]
    np.testing.assert_allclose(logits[..., : config.vocab_size], expected, atol=5e-5)


@families
def test_scores_equal_the_oracle(config):
    tokens = random_tokens(*SHAPE)
    scores = outputs(scalar(config), tokens)
    assert scores.dtype == np.float32
    expected = [row_scores(config, scalar(config)[1], row) for row in tokens]
    np.testing.assert_allclose(scores, expected, atol=5e-5)


def test_apply_is_the_readout_of_hidden_of_any_shape():
    tokens = random_tokens(*SHAPE)
    for model, params in (language(GPT), scalar(LLAMA)):
        hidden = jitted(model.hidden)(params, tokens)
        assert hidden.shape == (*SHAPE, GPT.d_model)
        whole = outputs((model, params), tokens)
        flat = jitted(model.readout)(params, hidden.reshape(-1, GPT.d_model))
        np.testing.assert_allclose(flat, whole.reshape(-1, *whole.shape[2:]), atol=1e-5)


@families
def test_padding_changes_no_log_prob_and_no_value(config):
    """T5: n in {0, 1, 7, 63} PAD to the left; what stands there does not matter."""
    pads = (0, 1, 7, 63)
    row = random_tokens(12)
    tokens = np.full((4, 75), config.pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for i, n in enumerate(pads):
        tokens[i, n : n + 12], mask[i, n : n + 12] = row, True
    garbage = np.where(mask, tokens, random_tokens(4, 75, seed=2))
    for case in (language(config), scalar(config)):
        plain = outputs(case, np.tile(row, (2, 1)))[0]
        padded, spoilt = outputs(case, tokens, mask), outputs(case, garbage, mask)
        np.testing.assert_array_equal(padded[mask], spoilt[mask])
        for i, n in enumerate(pads):
            found = padded[i, n : n + 12]
            np.testing.assert_allclose(
                found, plain, rtol=0, atol=1e-5 * max(1, np.abs(plain).std())
            )


@families
def test_no_token_sees_the_future(config):
    """T21 is this promise for values."""
    for case in (language(config), scalar(config)):
        tokens = random_tokens(*SHAPE)
        before = outputs(case, tokens)
        tokens[:, 6] = (tokens[:, 6] + 1) % config.vocab_size
        after = outputs(case, tokens)
        np.testing.assert_array_equal(before[:, :6], after[:, :6])
        assert np.all(np.abs(before[:, 6] - after[:, 6]).reshape(2, -1).max(-1) > 1e-3)


@families
def test_packed_segments_equal_separate_rows(config):
    tokens = random_tokens(*SHAPE)
    segments = np.array([[1] * 5 + [2] * 7, [3] * 4 + [1] * 5 + [0] * 3], np.int32)
    packed = outputs(language(config), tokens, segments > 0, segment_ids=segments)
    for row, start, stop in ((0, 0, 5), (0, 5, 12), (1, 0, 4), (1, 4, 9)):
        alone, mask = np.zeros(SHAPE, np.int32), np.zeros(SHAPE, bool)
        alone[0, : stop - start], mask[0, : stop - start] = tokens[row, start:stop], True
        expected = outputs(language(config), alone, mask)[0, : stop - start]
        np.testing.assert_allclose(packed[row, start:stop], expected, atol=2e-5)


def test_positions_count_real_tokens_and_restart_with_each_segment():
    """JAX-3"""
    mask = jnp.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], bool)
    assert token_positions(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 3], [0, 1, 2, 3, 4]]
    segments = jnp.array([[0, 0, 4, 4, 4], [4, 4, 7, 0, 0], [1, 2, 2, 1, 0]], jnp.int32)
    restarted = [[0, 0, 0, 1, 2], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0]]
    assert token_positions(mask, segments).tolist() == restarted


@families
def test_columns_past_the_vocabulary_are_never_drawn_and_never_in_the_normaliser(config):
    """T10"""
    logits = outputs(language(config), random_tokens(*SHAPE))
    assert np.all(logits[..., config.vocab_size :] == MASKED)
    whole = jax.nn.logsumexp(logits, axis=-1)
    real = jax.nn.logsumexp(logits[..., : config.vocab_size], axis=-1)
    np.testing.assert_allclose(whole, real, rtol=1e-6)
    # A temperature of 100 is nearly uniform, and still no column past the vocabulary comes up.
    drawn = jax.random.categorical(jax.random.key(0), 0.01 * logits[0, 0], shape=(4096,))
    assert len(np.unique(drawn)) > 50
    assert drawn.max() < config.vocab_size == config.pad_id


@pytest.mark.parametrize("wrong", [-1, -100, 62, 63, 2**31 - 1])
def test_an_id_that_is_neither_a_token_nor_padding_is_seen_in_all_of_its_row(wrong):
    """Not read as the nearest row of the table, nor as one that only rounds it up."""
    model, params = language(GPT)
    assert GPT.pad_id == 61 and GPT.vocab_rows == 64
    tokens = jnp.asarray(random_tokens(*SHAPE))
    for place, good in ((GPT.pad_id, True), (wrong, False)):
        logits = jitted(model.apply)(params, tokens.at[0, 3].set(place))[..., : GPT.vocab_size]
        assert jnp.isfinite(logits[1]).all()
        assert jnp.isfinite(logits[0]).all() == good
        assert jnp.isnan(logits[0, 3:]).all() != good


@pytest.mark.parametrize(("vocab_size", "rows"), [(50_257, 50_304), (127, 128), (128, 256)])
def test_there_is_always_a_row_for_padding(vocab_size, rows):
    """T12: PAD is an id of its own, past every real one."""
    config = dataclasses.replace(GPT, vocab_size=vocab_size, vocab_multiple=128)
    assert (config.pad_id, config.vocab_rows) == (vocab_size, rows)


def test_dropout_acts_only_when_a_key_is_given():
    """T3"""
    dropping = dataclasses.replace(
        GPT, residual_dropout=0.2, attention_dropout=0.1, embedding_dropout=0.1
    )
    case = language_model(dropping), language(GPT)[1]
    tokens = random_tokens(*SHAPE)
    plain = outputs(language(GPT), tokens)
    np.testing.assert_array_equal(outputs(case, tokens), plain)
    one, two, again = (outputs(case, tokens, dropout_key=jax.random.key(i)) for i in (1, 2, 1))
    assert np.abs(one - plain).max() > 1e-2
    assert np.abs(one - two).max() > 1e-2
    np.testing.assert_array_equal(one, again)


def test_residual_dropout_draws_afresh_at_both_outputs_of_every_layer():
    """SFT-3: all 2L outputs are 1 here, so the hidden state counts the survivors of 2L draws."""
    rate, layers = 0.3, 2
    config = dataclasses.replace(
        GPT, norm="rmsnorm", num_layers=layers, residual_dropout=rate, d_model=64, num_heads=1
    )
    model, params = language(config)
    params = jax.tree.map(np.zeros_like, params)
    params["layers"]["attention"]["out"]["bias"] += np.float32(1)
    params["layers"]["mlp"]["down"]["bias"] += np.float32(1)
    params["final_norm"]["scale"] += np.float32(1)
    hidden = jitted(model.hidden)(params, random_tokens(4, 80), dropout_key=jax.random.key(3))
    kept = np.asarray(hidden / hidden.max(-1, keepdims=True)) * 2 * layers
    np.testing.assert_allclose(kept, kept.round(), atol=1e-3)
    found = np.bincount(kept.round().astype(int).ravel(), minlength=5) / kept.size
    binomial = [0.3**4, 4 * 0.3**3 * 0.7, 6 * 0.3**2 * 0.7**2, 4 * 0.3 * 0.7**3, 0.7**4]
    np.testing.assert_allclose(found, binomial, atol=0.01)


def test_dropout_keeps_the_mean():
    rate = 0.25
    config = dataclasses.replace(GPT, residual_dropout=rate)
    layer = jax.tree.map(lambda w: np.zeros_like(w[0]), language(GPT)[1]["layers"])
    layer["mlp"]["down"]["bias"] += np.float32(1)

    @jax.jit
    def block(x):
        ones = jnp.ones((8, 96, 96), bool)
        context = make_context(config, ones, jnp.zeros((8, 96), jnp.int32))
        rngs = {"dropout": jax.random.key(0)}
        return Block(config).apply({"params": layer}, x, context, rngs=rngs)[0]

    y = np.asarray(block(np.zeros((8, 96, config.d_model), np.float32)))
    assert set(np.unique(y)) == {0.0, np.float32(1 / (1 - rate))}
    assert abs(y.mean() - 1.0) < 0.02


@pytest.mark.parametrize("case", [language(HALF), scalar(LLAMA)], ids=["language", "scalar"])
def test_a_row_of_padding_is_finite_and_so_are_its_gradients(case):
    """T54"""
    model, params = case
    mask = np.ones(SHAPE, bool)
    mask[1] = False
    value, grads = jitted_loss(model)(params, random_tokens(*SHAPE) % 15, mask)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@families
def test_bfloat16_stays_close_to_float32(config):
    half = language_model(dataclasses.replace(config, dtype="bfloat16"))
    params, tokens = language(config)[1], random_tokens(*SHAPE)
    exact = outputs(language(config), tokens)[..., : config.vocab_size]
    rough = outputs((half, params), tokens)[..., : config.vocab_size]
    assert jax.eval_shape(half.hidden, params, tokens).dtype == jnp.bfloat16
    assert rough.dtype == np.float32
    cosine = np.sum(exact * rough) / np.linalg.norm(exact) / np.linalg.norm(rough)
    assert cosine > 0.999
    assert 0 < np.abs(exact - rough).mean() < 0.02 * np.abs(exact).mean()


def test_small_updates_survive_in_fp32_masters_and_die_in_bfloat16():
    """T53, NUM-1: Adam's first step, lr * g / (|g| + eps), at a learning rate of 1e-6."""
    model, params = language(HALF)
    masters = jax.tree.map(lambda w: w * np.float32(0.1), params)  # matrices ~ N(0, 0.02)
    tokens, mask = np.arange(24, dtype=np.int32).reshape(SHAPE) % 15, np.ones(SHAPE, bool)
    _, grads = jitted_loss(model)(masters, tokens, mask)

    def changed(dtype):
        moved = []
        for w, g in zip(*map(jax.tree.leaves, (masters, jax.device_get(grads))), strict=True):
            step = (1e-6 * g / (np.abs(g) + 1e-8)).astype(dtype)
            moved.append((w.astype(dtype) - step != w.astype(dtype)).ravel())
        return np.concatenate(moved).mean()

    assert changed(np.float32) > 0.99
    assert changed(jnp.bfloat16) < 0.1


def test_grouped_heads_equal_repeated_heads():
    model, params = language(LLAMA)

    def repeat(kernel):
        split = kernel.reshape(*kernel.shape[:-1], LLAMA.kv_heads, LLAMA.head_size)
        return np.repeat(split, 2, axis=-2).reshape(*kernel.shape[:-1], -1)

    attention = dict(params["layers"]["attention"])
    for name in ("key", "value"):
        attention[name] = {"kernel": repeat(attention[name]["kernel"])}
    full = {**params, "layers": {**params["layers"], "attention": attention}}
    repeated = language_model(dataclasses.replace(LLAMA, num_kv_heads=None))
    tokens = random_tokens(*SHAPE)
    np.testing.assert_allclose(
        outputs((repeated, full), tokens), outputs((model, params), tokens), atol=1e-5
    )


@families
@pytest.mark.parametrize("remat", ["products", "full"])
@pytest.mark.parametrize("scan_unroll", [1, 2])
def test_unrolling_and_rematerialising_change_no_number(config, remat, scan_unroll):
    tokens, mask = random_tokens(*SHAPE), np.ones(SHAPE, bool)
    changed = dataclasses.replace(config, scan_unroll=scan_unroll, remat=remat)
    plain, other = (
        jitted_loss(language_model(c))(language(config)[1], tokens, mask) for c in (config, changed)
    )
    np.testing.assert_allclose(other[0], plain[0], rtol=1e-6)
    scale = max(np.abs(g).max() for g in jax.tree.leaves(plain[1]))
    for ours, theirs in zip(*map(jax.tree.leaves, (other[1], plain[1])), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * scale)


def test_what_is_computed_again_needs_no_memory():
    """Of each of six layers all, the products, and the input alone are kept."""
    tokens = jax.ShapeDtypeStruct((4, 96), jnp.int32)
    mask = jax.ShapeDtypeStruct((4, 96), jnp.bool_)

    def temporaries(remat):
        config = dataclasses.replace(GPT, num_layers=6, remat=remat)
        model = language_model(config)
        params = jax.eval_shape(model.init, jax.random.key(0))
        compiled = jitted_loss(model).lower(params, tokens, mask).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    kept, products, full = map(temporaries, ("none", "products", "full"))
    numbers = 4 * 6 * 4 * 96  # float32, layers, positions
    # Query, key and value, what attention and the feed-forward layer begin with: 8 D more.
    assert products - full > 0.8 * 8 * 32 * numbers
    # The scores alone are as many as N T, and half of them are not seen.
    assert kept - products > 4 * 96 / 2 * numbers


def test_equal_configs_share_one_model_and_one_compiled_program():
    """T56"""
    again = TransformerConfig(**dataclasses.asdict(GPT))
    assert again is not GPT
    assert language_model(GPT) is language_model(again)
    assert scalar_model(GPT) is scalar_model(again)
    assert language_model(GPT).apply is language_model(again).apply


@pytest.mark.parametrize("axis", ["data", "sequence"])
@pytest.mark.parametrize("length", [12, 11])
def test_sharded_over_a_mesh_the_logits_are_the_same(axis, length):
    """Also with a batch or a length that the mesh cannot divide, as a chat of one row."""
    mesh = jax.make_mesh((2, 2, 2), (axis, "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    model, params = language(LLAMA)
    tokens = random_tokens(*SHAPE)
    expected = outputs((model, params), tokens)[:, :length]
    with jax.set_mesh(mesh):
        batch = np.tile(tokens, (2, 1))[:, :length]
        logits = np.asarray(jax.jit(model.apply)(params, batch))
        assert jax.eval_shape(model.apply, params, tokens[:1]).shape[0] == 1
    np.testing.assert_allclose(logits, np.tile(expected, (2, 1, 1)), atol=1e-5)


def test_between_the_layers_positions_are_split_by_sequence():
    """Of the states that the scan keeps for the backward pass, a device holds its part alone; keys
    and values alone are whole.
    """
    names = ("data", "fsdp", "tensor", "sequence")
    mesh = jax.make_mesh((1, 2, 1, 4), names, axis_types=(AxisType.Auto,) * 4)
    config = dataclasses.replace(GPT, num_kv_heads=1, remat="full")
    model, params = language(config)
    tokens = random_tokens(4, 64)

    def loss(params, tokens):
        return jnp.sum(jnp.square(model.hidden(params, tokens)))

    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        compiled = jax.jit(jax.grad(loss)).lower(params, jax.device_put(tokens, rows)).compile()
    text = compiled.as_text()
    # [L, B, T, D] of 4 rows over 2 and 64 positions over 4.
    assert "f32[2,2,16,32]" in text
    assert not re.findall(r"f32\[(?:2,)?[24],64,32\]", text)
    # [B, K, S, H] of keys, and scores [B, K, G, T, S].
    assert "f32[2,1,64,8]" in text
    assert "f32[2,1,4,16,64]" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "silu"}, "activation='silu' is not one of gelu"),
        ({"dtype": "float16"}, "dtype"),
        ({"remat": True}, "remat=True is not one of none, products, full"),
        ({"d_model": 30}, "d_model=30 is not a multiple of num_heads=4"),
        ({"num_kv_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
        ({"head_dim": 5, "positions": "rope"}, "even head size"),
        ({"residual_dropout": 1.0}, "residual_dropout must lie in"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(GPT, **change)


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
@pytest.mark.parametrize("make", [language, scalar], ids=["policy", "reward and value"])
def test_no_position_past_the_last_is_read_in_silence(config, make):
    """Neither learned nor rotary ones, with a mask or without, whole or through a cache."""
    model, params = make(config)
    tokens = random_tokens(1, 97)
    for options in ({}, {"mask": np.ones(tokens.shape, bool)}):
        for function in (model.apply, model.hidden):
            with pytest.raises(ValueError, match="97 tokens do not fit max_length=96"):
                function(params, tokens, **options)
        if make is language:
            with pytest.raises(ValueError, match="97 tokens do not fit max_length=96"):
                model.decode(params, tokens, init_cache(config, 1, 128), **options)


def test_in_packed_rows_the_position_counts_and_not_the_width_of_the_row():
    config = dataclasses.replace(GPT, max_length=8)
    case = language(config)
    tokens = random_tokens(1, 16)
    segments = np.repeat([[1, 2]], 8, axis=1).astype(np.int32)
    packed = outputs(case, tokens, segment_ids=segments)
    alone = outputs(case, tokens.reshape(2, 8))
    np.testing.assert_allclose(packed.reshape(alone.shape), alone, atol=1e-5)


def test_a_length_that_the_model_has_no_positions_for_is_told_at_the_door():
    check_length(GPT, 96, field="config.sft.pack_length")
    with pytest.raises(ConfigError, match=r"^config\.sft\.pack_length: 97 tokens, .* 96"):
        check_length(GPT, 97, field="config.sft.pack_length")


def test_how_a_model_is_computed_can_be_chosen_whatever_it_was_made_with():
    made = dataclasses.replace(GPT, dtype="bfloat16", remat="full")
    assert ComputeConfig().on(made) is not GPT and ComputeConfig().on(made) == made
    chosen = ComputeConfig(dtype="float32", remat="none", attention="xla").on(made)
    assert chosen == dataclasses.replace(GPT, attention="xla")
    dropping = dataclasses.replace(GPT, attention_dropout=0.1)
    with pytest.raises(ConfigError, match=r"config\.model: attention='blocks' cannot drop weights"):
        ComputeConfig(attention="blocks").on(dropping)
