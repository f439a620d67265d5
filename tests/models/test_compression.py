"""Quantised and pruned models stay close to their origin, and are as small as they say."""

import dataclasses

import flax.traverse_util as tree_paths
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from jax.sharding import PartitionSpec

from instruct_jax.errors import ConfigError
from instruct_jax.models import (
    PARTITION_RULES,
    init_cache,
    language_model,
    load_llama2c,
    unstack_layers,
)
from instruct_jax.models.adapters import LoraConfig, adapt, adapter_rules, merge, split
from instruct_jax.models.compression import NAMES, as_it_is, compress, is_variant
from instruct_jax.models.matrices import join, matrices, tree_bytes
from instruct_jax.models.pruning import prune, sparse_bytes
from instruct_jax.models.quantization import (
    dequantize_params,
    quantize_params,
    quantized,
    with_int8_cache,
)
from instruct_jax.sampling.sampler import generate
from instruct_jax.training.mesh import make_mesh, tree_shardings
from tests.models.cases import FAMILIES, GPT, SHAPE, jitted, language, outputs, random_tokens

LORA = LoraConfig(rank=3, alpha=6.0)

families = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
kinds = pytest.mark.parametrize("kind", ["int8", "int4", "nf4", "fp8"])


def cosine(a, b, vocab_size):
    a, b = (np.asarray(x, np.float64)[..., :vocab_size] for x in (a, b))
    return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


@kinds
def test_a_quantised_model_computes_with_the_values_it_stores(kind):
    """Scan, scoring and cached decoding alike."""
    model, params = language(FAMILIES["llama"])
    small, tokens = quantize_params(params, kind), random_tokens(*SHAPE)
    own = outputs((quantized(model), small), tokens)
    expanded = outputs((model, dequantize_params(small)), tokens)
    np.testing.assert_allclose(own, expanded, rtol=0, atol=2e-5)
    assert abs(own - outputs((model, params), tokens)).max() > 1e-3, "something was rounded"
    cache = init_cache(model.config, SHAPE[0], SHAPE[1] + 1)
    cached, _ = jitted(quantized(model).decode)(unstack_layers(small), tokens, cache)
    np.testing.assert_allclose(cached, own, rtol=0, atol=1e-4)


@kinds
def test_each_weight_is_off_by_at_most_half_a_step(kind):
    _, params = language(GPT)
    small = quantize_params(params, kind)
    # The widest gap between neighbouring values, as a share of the largest.
    gap = {"int8": 1 / 127, "int4": 1 / 7, "nf4": 0.3039, "fp8": 32 / 448}[kind]
    for path, kernel in matrices(params).items():
        stored = tree_paths.flatten_dict(small, sep="/")[path]
        tile = kernel.shape[1] // stored.scale.shape[1]
        assert tile == {"int8": kernel.shape[1], "fp8": kernel.shape[1]}.get(kind, 32)
        blocks = kernel.reshape(len(kernel), -1, tile, kernel.shape[2])
        error = abs(np.asarray(qwix.dequantize(stored)) - kernel).reshape(blocks.shape)
        largest = abs(blocks).max(2, keepdims=True)
        assert (error <= 0.51 * gap * largest).all()


def test_a_tile_that_does_not_divide_grows_to_the_next_divisor():
    config = dataclasses.replace(GPT, d_ff=4 * 43)
    params = quantize_params(language_model(config).init(jax.random.key(0)), "int4")
    assert params["layers"]["mlp"]["down"]["kernel"].scale.shape == (2, 4, GPT.d_model)


def test_bytes_are_those_of_the_stored_values():
    _, params = language(GPT)
    weights = sum(kernel.size for kernel in matrices(params).values())
    columns = sum(kernel.shape[0] * kernel.shape[2] for kernel in matrices(params).values())
    tiles = sum(kernel.size // 32 for kernel in matrices(params).values())
    table = GPT.vocab_rows * GPT.d_model
    rest = tree_bytes(params) - 4 * (weights + table)
    scales = {"int8": columns, "int4": tiles, "nf4": tiles}
    width = {"int8": 8, "int4": 4, "nf4": 4}
    for kind, count in scales.items():
        expected = weights * width[kind] // 8 + 4 * count + table + 4 * GPT.vocab_rows + rest
        assert tree_bytes(quantize_params(params, kind)) == expected


def test_rounded_activations_stay_close_and_multiply_integers():
    model, params = language(GPT)
    small, tokens = quantize_params(params, "int8"), random_tokens(*SHAPE)
    rounded = quantized(model, activations=True)
    exact, near = outputs((quantized(model), small), tokens), outputs((rounded, small), tokens)
    assert cosine(exact, near, GPT.vocab_size).min() > 0.999
    assert abs(exact - near).max() > 1e-3
    text = jax.jit(rounded.apply).lower(small, tokens).as_text()
    assert "xi8>, tensor<32x128xi8>) -> tensor<24x128xi32>" in text


def test_plain_parameters_pass_through_unchanged():
    model, params = language(GPT)
    tokens = random_tokens(*SHAPE)
    for activations in (False, True):
        small = quantized(model, activations=activations)
        np.testing.assert_array_equal(
            outputs((small, params), tokens), outputs((model, params), tokens)
        )
    assert quantized(model) is quantized(model)


def test_half_precision_compute_keeps_the_integers_of_the_weights():
    config = dataclasses.replace(GPT, dtype="bfloat16")
    model, params = quantized(language_model(config)), quantize_params(language(GPT)[1], "int8")
    tokens = random_tokens(*SHAPE)
    near = outputs((model, params), tokens)
    assert near.dtype == np.float32
    assert cosine(near, outputs(language(GPT), tokens), GPT.vocab_size).min() > 0.999


def test_samples_of_a_quantised_model_are_those_of_its_values():
    model, params = language(GPT)
    small = quantize_params(params, "int8")
    prompts, keys = jnp.asarray(random_tokens(2, 5)), jax.random.split(jax.random.key(0), 2)
    rollouts = [
        generate(m, p, prompts, jnp.ones((2, 5), bool), keys, max_new_tokens=6, eos_id=0)
        for m, p in (
            (quantized(model), unstack_layers(small)),
            (model, dequantize_params(small)),
        )
    ]
    np.testing.assert_array_equal(rollouts[0].tokens, rollouts[1].tokens)


@families
def test_a_cache_in_int8_takes_a_third_and_decodes_nearly_the_same(config):
    model, params = language(config)
    small, tokens = with_int8_cache(model), random_tokens(2, 8)
    unstacked = unstack_layers(params)
    exact, full = jitted(model.decode)(unstacked, tokens, init_cache(config, 2, 9))
    first, cache = jitted(small.decode)(unstacked, tokens[:, :5], init_cache(config, 2, 9))
    np.testing.assert_allclose(first, exact[:, :5], rtol=0, atol=1e-4)
    for t in range(5, 8):
        step, cache = jitted(small.decode)(unstacked, tokens[:, t : t + 1], cache)
        assert cosine(step[:, 0], exact[:, t], config.vocab_size).min() > 0.9995
    assert abs(step[:, 0] - exact[:, 7]).max() > 1e-5, "something was rounded"
    assert cache.keys[0].qvalue.dtype == jnp.int8
    assert tree_bytes(cache[:2]) == (1 / 4 + 1 / config.head_size) * tree_bytes(full[:2])
    near = qwix.dequantize(cache.keys[1])[:, :, :8]
    np.testing.assert_allclose(near, full.keys[1][:, :, :8], atol=0.02 * abs(full.keys[1]).max())
    assert int(cache.index) == 8 and cache.mask[:, :8].all() and not cache.mask[:, 8].any()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_adapters_learn_over_a_quantised_base(kind):
    """QLoRA: the gradient passes the frozen integers and reaches A and B alone."""
    model, params = language(GPT)
    tokens, config = random_tokens(*SHAPE), dataclasses.replace(LORA, base=kind)
    adapted = adapt(model, config)
    base, adapter = split(jax.random.key(0), params, config)
    assert tree_bytes(base) < 0.45 * tree_bytes(params)

    @jax.jit
    def step(adapter, base):
        def loss(adapter):
            log_probs = jax.nn.log_softmax(adapted.apply(join(base, adapter), tokens)[:, :-1])
            return -jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1).mean()

        value, grads = jax.value_and_grad(loss)(adapter)
        return jax.tree.map(lambda p, g: p - 0.3 * g, adapter, grads), value

    losses = []
    for _ in range(10):
        adapter, value = step(adapter, base)
        losses.append(float(value))
    assert losses[-1] < losses[0] - 0.1
    merged = merge(base, adapter, config)
    both = outputs((adapted, join(base, adapter)), tokens)
    np.testing.assert_allclose(outputs((model, merged), tokens), both, rtol=0, atol=2e-5)


def test_quantised_weights_are_sharded_like_the_matrices_they_stand_for():
    model, params = language(GPT)
    small, tokens = quantize_params(params, "int4"), random_tokens(4, 12)
    rules, mesh = adapter_rules(PARTITION_RULES), make_mesh("data:2,fsdp:2,tensor:2")
    places = tree_shardings(mesh, rules, small)
    up = places["layers"]["mlp"]["up"]["kernel"]
    assert up.qvalue.spec == PartitionSpec(None, "fsdp", "tensor")
    assert up.scale.spec == PartitionSpec(None, None, "tensor")
    assert places["embedder"]["tokens"].qvalue.spec == PartitionSpec("tensor", "fsdp")
    with jax.set_mesh(mesh):
        sharded = jax.jit(quantized(model).apply)(jax.device_put(small, places), tokens)
    np.testing.assert_allclose(sharded, outputs((quantized(model), small), tokens), atol=1e-4)


def test_the_real_llama_in_int8_is_the_same_model(shared):
    """Cosine above 0.999 and perplexity within 1 % on text the model was trained to write."""
    config, params = load_llama2c(shared / "weights" / "stories260K.bin")
    tokens = np.load(shared / "weights" / "stories260K" / "reference.npz")["input_ids"][None]
    model, small = language_model(config), quantize_params(params, "int8")
    before, after = outputs((model, params), tokens), outputs((quantized(model), small), tokens)
    assert cosine(before, after, config.vocab_size).min() > 0.999

    def loss(logits):
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
        return -float(picked.mean())

    assert loss(after[:, :-1]) < loss(before[:, :-1]) + np.log(1.01)
    assert tree_bytes(small) < 0.3 * tree_bytes(params)


def test_pruning_zeroes_the_smallest_weights_of_the_whole_model():
    _, params = language(GPT)
    pruned, report = prune(params, 0.4)
    before = np.concatenate([abs(k).ravel() for k in matrices(params).values()])
    after = np.concatenate([abs(np.asarray(k)).ravel() for k in matrices(pruned).values()])
    gone = after == 0
    assert gone.sum() == round(0.4 * before.size)
    assert before[gone].max() < before[~gone].min()
    np.testing.assert_array_equal(after[~gone], before[~gone])
    assert len(report) == GPT.num_layers * len(matrices(params))
    total = sum(row.weights * row.zeroed for row in report) / sum(row.weights for row in report)
    assert total == pytest.approx(0.4, abs=1e-4)
    row = next(r for r in report if (r.path, r.layer) == ("layers/mlp/up/kernel", 1))
    old, new = (np.asarray(p["layers"]["mlp"]["up"]["kernel"][1]) for p in (params, pruned))
    assert row.zeroed == pytest.approx((new == 0).mean())
    assert row.energy_lost == pytest.approx(1 - (new**2).sum() / (old**2).sum(), abs=1e-5)
    untouched = [tree["embedder"]["tokens"] for tree in (params, pruned)]
    np.testing.assert_array_equal(*untouched)


def test_one_threshold_lets_a_layer_of_small_weights_give_more():
    _, params = language(GPT)
    up = params["layers"]["mlp"]["up"]
    shrunk = np.asarray(up["kernel"]) * np.array([1.0, 0.1], np.float32)[:, None, None]
    uneven = join(params, {"layers": {"mlp": {"up": {"kernel": shrunk}}}})
    _, report = prune(uneven, 0.3)
    first, second = (row.zeroed for row in report if row.path == "layers/mlp/up/kernel")
    assert second > 0.9 > 0.4 > first


def test_the_size_of_a_pruned_model_counts_a_bit_and_the_values_left():
    _, params = language(GPT)
    pruned, _ = prune(params, 0.5)
    weights = sum(kernel.size for kernel in matrices(params).values())
    saved = tree_bytes(params) - sparse_bytes(pruned)
    assert saved == 4 * round(0.5 * weights) - weights // 8
    plain, nothing = prune(params, 0.0)
    jax.tree.map(np.testing.assert_array_equal, plain, params)
    assert all(row.zeroed == 0 for row in nothing)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0])
def test_a_sparsity_that_leaves_nothing_is_refused(sparsity):
    with pytest.raises(ConfigError, match=r"sparsity must lie in \[0, 1\)"):
        prune(language(GPT)[1], sparsity)


def test_every_name_makes_the_variant_that_it_says():
    model, params = language(GPT)
    plain, sizes = as_it_is(model, params), {}
    assert plain.stored_bytes == tree_bytes(params)
    for name in NAMES:
        variant = compress(model, params, name.replace("SHARE", "0.5"))
        sizes[name] = variant.stored_bytes / plain.stored_bytes
        tokens = random_tokens(*SHAPE)
        near = cosine(
            outputs((variant.model, variant.params), tokens),
            outputs((model, params), tokens),
            model.config.vocab_size,
        )
        assert near.mean() > 0.7, name
    assert sizes["int4"] == sizes["nf4"] < sizes["int8"] == sizes["int8_activations"] < 0.6
    assert sizes["fp8"] == sizes["int8"] and sizes["int8_cache"] == 1.0
    assert 0.5 < sizes["prune:SHARE"] < 1.0
    layers = compress(model, params, "prune:0.5").notes["layers"]
    assert len(layers) == sum(len(kernel) for kernel in matrices(params).values())


def test_what_computes_in_integers_decodes_from_separate_layers():
    model, params = language(GPT)
    assert compress(model, params, "prune:0.5").decoding is None
    small = compress(model, params, "int8")
    jax.tree.map(np.testing.assert_array_equal, small.decoding, unstack_layers(small.params))


@pytest.mark.parametrize(
    "name", ["int3", "int8:4", "prune", "prune:1.0", "prune:-0.1", "prune:nan", "prune:half", ""]
)
def test_a_name_of_no_variant_is_refused(name):
    assert not is_variant(name)
    with pytest.raises(ValueError, match="is none of int8, int4"):
        compress(*language(GPT), name)
