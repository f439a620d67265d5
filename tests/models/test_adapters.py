"""Adapters change a model by little, are exact to merge, and are all that is trained."""

import dataclasses

import flax.traverse_util as tree_paths
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix
from jax.sharding import PartitionSpec

from instruct_jax.errors import ConfigError
from instruct_jax.models import (
    PARTITION_RULES,
    LanguageModel,
    init_cache,
    unstack_layers,
)
from instruct_jax.models.adapters import (
    LoraConfig,
    adapt,
    adapter_rules,
    init_adapter,
    merge,
    split,
    unmerge,
)
from instruct_jax.models.matrices import join, matrices, parameter_total
from instruct_jax.sampling.sampler import generate
from instruct_jax.training.mesh import make_mesh, match_partition_rules, tree_shardings
from instruct_jax.training.state import init_state, state_shardings
from tests.models.cases import (
    FAMILIES,
    GPT,
    SHAPE,
    jitted,
    language,
    outputs,
    random_tokens,
    scalar,
)

LORA = LoraConfig(rank=3, alpha=6.0)

families = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())


def drawn(params, config=LORA):
    """An adapter whose B is not 0."""
    rng = np.random.default_rng(5)
    adapter = init_adapter(jax.random.key(1), params, config)
    return jax.tree.map(lambda x: rng.normal(0, 0.05, x.shape).astype(np.float32), adapter)


def flat(tree):
    return tree_paths.flatten_dict(tree, sep="/")


@families
def test_a_fresh_adapter_changes_nothing_and_a_trained_one_reaches_every_matrix(config):
    model, params = language(config)
    adapted, tokens = adapt(model, LORA), random_tokens(*SHAPE)
    plain = outputs((model, params), tokens)
    fresh = init_adapter(jax.random.key(0), params, LORA)
    assert {path[: -len("_lora_a")] for path in flat(fresh)} == set(matrices(params))
    np.testing.assert_array_equal(outputs((adapted, join(params, fresh)), tokens), plain)

    @jax.jit
    def gradients(adapter, base):
        loss = lambda adapter: jnp.square(adapted.hidden(join(base, adapter), tokens)[..., 0]).sum()  # noqa: E731
        return jax.grad(loss)(adapter)

    for path, gradient in flat(gradients(drawn(params), params)).items():
        for layer in gradient:
            assert abs(layer).max() > 1e-6, path


@families
def test_merged_equals_unmerged_and_comes_apart_again(config):
    model, params = language(config)
    adapter, tokens = drawn(params), random_tokens(*SHAPE)
    both = outputs((adapt(model, LORA), join(params, adapter)), tokens)
    merged = merge(params, adapter, LORA)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    np.testing.assert_allclose(outputs((model, merged), tokens), both, rtol=0, atol=1e-5)
    assert abs(both - outputs((model, params), tokens)).max() > 0.01
    back = unmerge(merged, adapter, LORA)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), back, params)


def test_with_the_adapter_off_the_base_is_the_reference_bit_for_bit():
    model, params = language(GPT)
    tokens = random_tokens(*SHAPE)
    off = outputs((adapt(model, LORA), join(params, {})), tokens)
    np.testing.assert_array_equal(off, outputs((model, params), tokens))


@families
def test_decoding_through_the_cache_and_sampling_use_the_adapter(config):
    model, params = language(config)
    adapted, both = adapt(model, LORA), join(params, drawn(params))
    tokens = random_tokens(2, 8)
    full = outputs((adapted, both), tokens)
    cached, _ = jitted(adapted.decode)(unstack_layers(both), tokens, init_cache(config, 2, 9))
    np.testing.assert_allclose(cached, full, rtol=0, atol=1e-4)
    merged = merge(params, drawn(params), LORA)
    prompts, mask, keys = (
        tokens,
        np.ones(tokens.shape, bool),
        jax.random.split(jax.random.key(3), 2),
    )
    rollouts = [
        generate(m, p, jnp.asarray(prompts), jnp.asarray(mask), keys, max_new_tokens=6, eos_id=0)
        for m, p in ((adapted, both), (model, merged))
    ]
    np.testing.assert_array_equal(rollouts[0].tokens, rollouts[1].tokens)


# Qwix 0.1.8 still asks Flax for a name that Flax has renamed.
@pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning")
@families
def test_qwix_computes_the_same_from_the_same_tree(config):
    model, params = language(config)
    both, tokens = join(params, drawn(params)), random_tokens(*SHAPE)
    provider = qwix.LoraProvider(module_path="layers/.*", rank=LORA.rank, alpha=LORA.alpha)
    theirs = qwix.apply_lora_to_model(LanguageModel(config), provider)
    shapes = jax.eval_shape(theirs.init, jax.random.key(0), tokens)["params"]
    assert {p: x.shape for p, x in flat(shapes).items()} == {
        p: x.shape for p, x in flat(both).items()
    }
    with jax.numpy_rank_promotion("allow"):
        logits = jax.jit(theirs.apply)({"params": both}, tokens)
    np.testing.assert_allclose(outputs((adapt(model, LORA), both), tokens), logits, atol=1e-5)


def test_only_the_adapter_and_a_scalar_head_have_gradients_and_moments():
    model, params = scalar(GPT)
    adapted, adapter = adapt(model, LORA), init_adapter(jax.random.key(0), params, LORA)
    assert set(adapter) == {"layers", "head"}
    tx, tokens = optax.adam(0.01), random_tokens(*SHAPE)
    state = init_state(adapter, tx)
    assert parameter_total(state.opt_state) == 2 * parameter_total(adapter) + 1
    frozen = jax.tree.map(np.copy, params)

    @jax.jit
    def step(adapter, moments, base):
        def loss(adapter):
            return jnp.square(adapted.apply(join(base, adapter), tokens) - 1.0).mean()

        value, grads = jax.value_and_grad(loss)(adapter)
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = tx.update(grads, moments)
        return optax.apply_updates(adapter, updates), moments, value

    moments, losses = state.opt_state, []
    for _ in range(12):
        adapter, moments, value = step(adapter, moments, params)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
    assert all(abs(x).max() > 0 for x in jax.tree.leaves(adapter["layers"])), "B has moved"
    jax.tree.map(np.testing.assert_array_equal, frozen, params)
    merged = merge(params, adapter, LORA)
    np.testing.assert_array_equal(merged["head"]["kernel"], adapter["head"]["kernel"])


def test_targets_are_patterns_and_the_count_is_theirs():
    _, params = language(GPT)
    config = LoraConfig(rank=2, targets=("attention/(query|value)", "mlp/down"))
    adapter = init_adapter(jax.random.key(0), params, config)
    paths = {path.rsplit("/", 1)[0] for path in flat(adapter)}
    assert paths == {"layers/attention/query", "layers/attention/value", "layers/mlp/down"}
    d, ff, layers = GPT.d_model, GPT.ff_size, GPT.num_layers
    assert parameter_total(adapter) == layers * 2 * (2 * (d + d) + (d + ff))
    with pytest.raises(ConfigError, match=r"target 'mlp/gate' is found in .*layers/mlp/up/kernel"):
        init_adapter(jax.random.key(0), params, dataclasses.replace(config, targets=("mlp/gate",)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": -1}, "rank=-1: expected 0 or more"),
        ({"rank": 2, "alpha": 0.0}, "alpha=0.0: expected above 0"),
        ({"base": "int8"}, "base 'int8' is frozen: give a rank above 0"),
    ],
)
def test_values_that_make_no_adapter_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**values)


@pytest.mark.parametrize("rank", [0, 32])
def test_a_rank_that_saves_nothing_is_refused(rank):
    with pytest.raises(ConfigError, match=f"rank {rank} on .*: give a rank from 1 to 31"):
        init_adapter(jax.random.key(0), language(GPT)[1], LoraConfig(rank=rank))


def test_rank_zero_is_the_model_itself_and_trains_all_of_it():
    model, params = language(GPT)
    assert adapt(model, LoraConfig()) is model
    frozen, trained = split(jax.random.key(0), params, LoraConfig())
    assert join(frozen, trained) == params == merge(frozen, trained, LoraConfig())
    assert adapt(model, LORA) is adapt(model, dataclasses.replace(LORA))


def test_adapters_are_sharded_like_the_matrices_they_adapt():
    model, params = language(GPT)
    adapter = init_adapter(jax.random.key(0), params, LORA)
    rules, mesh = adapter_rules(PARTITION_RULES), make_mesh("data:2,fsdp:2,tensor:2")
    specs = flat(match_partition_rules(rules, adapter))
    assert specs["layers/mlp/up/kernel_lora_a"] == PartitionSpec(None, "fsdp", None)
    assert specs["layers/mlp/up/kernel_lora_b"] == PartitionSpec(None, None, "tensor")
    assert specs["layers/mlp/down/kernel_lora_a"] == PartitionSpec(None, "tensor", None)
    assert specs["layers/mlp/down/kernel_lora_b"] == PartitionSpec(None, None, "fsdp")
    state = init_state(adapter, optax.adam(0.1))
    moments = state_shardings(state, mesh, rules).opt_state[0].mu
    assert jax.tree.leaves(moments) == jax.tree.leaves(tree_shardings(mesh, rules, adapter))
    tokens = random_tokens(4, 12)
    both = join(params, drawn(params))
    placed = jax.device_put(both, tree_shardings(mesh, rules, both))
    adapted = adapt(model, LORA)
    with jax.set_mesh(mesh):
        sharded = jax.jit(adapted.apply)(placed, tokens)
    np.testing.assert_allclose(sharded, jitted(adapted.apply)(both, tokens), atol=1e-5)
