"""Adapters in the stages: what is trained and kept, who shares a trunk, and the memory it saves."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax.data.loader import Batches
from instruct_jax.data.tokenizer import train_bpe
from instruct_jax.errors import ConfigError
from instruct_jax.models.adapters import LoraConfig, adapt, freeze, merge
from instruct_jax.models.matrices import parameter_total
from instruct_jax.models.transformer import (
    TransformerConfig,
    language_model,
    scalar_from_language,
    scalar_model,
)
from instruct_jax.sampling.sampler import Rollout
from instruct_jax.stages import ppo
from instruct_jax.stages.experience import Experience
from instruct_jax.stages.ppo_config import PPOConfig
from instruct_jax.stages.ppo_models import (
    Recipe,
    frozen_models,
    initial_state,
    on_the_policys_trunk,
    optimizers,
)
from instruct_jax.stages.pretrain import language_loss, language_rows
from instruct_jax.stages.stage import FitConfig, fit
from instruct_jax.stages.trained import (
    Adapter,
    TrainedModel,
    load_adapter,
    trunk_fingerprint,
)
from instruct_jax.training.checkpoint import load_model
from instruct_jax.training.mesh import make_mesh, replicated
from tests.stages import lab as labs
from tests.stages.run_ppo import CONFIG as PPO

LORA = LoraConfig(rank=2, alpha=8.0)
FIT = FitConfig(batch_size=16, learning_rate=1e-2, lora=LORA, save_every=3)


def fitted(workdir, config=FIT, *, steps=6, evaluate=None, mesh="data:2"):
    """The lab's policy after a few updates on random text."""
    rows = language_rows(labs.text_rows(rows=64)["tokens"])
    model = adapt(language_model(labs.SHAPE), config.lora)
    return fit(
        dataclasses.replace(config, eval_every=steps),
        language_loss(model),
        labs.policy_params(),
        Batches(rows, config.batch_size, seed=0),
        steps=steps,
        mesh=make_mesh(mesh),
        workdir=workdir,
        name="lora",
        evaluate=evaluate,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir, the parameters that `fit` returned, and those that its evaluation saw."""
    workdir, seen = tmp_path_factory.mktemp("lora"), []
    params = fitted(workdir, evaluate=lambda step, state: seen.append(state.params) or {})
    return workdir, params, seen[-1]


def test_a_stage_trains_and_keeps_an_adapter_and_hands_on_whole_parameters(trained):
    workdir, params, seen = trained
    before = labs.policy_params()
    assert jax.tree.structure(params) == jax.tree.structure(before)
    for name in ("embedder", "final_norm"):
        assert labs.same_bits(params[name], before[name])
    for kernel in (lambda p: p["layers"]["mlp"]["up"], lambda p: p["layers"]["attention"]["out"]):
        assert labs.distance(kernel(params)["kernel"], kernel(before)["kernel"]) > 1e-3
        assert labs.same_bits(kernel(params)["bias"], kernel(before)["bias"])
    assert labs.same_bits(seen, params)
    adapter = load_adapter(workdir / "adapter")
    assert (adapter.lora, adapter.base) == (LORA, trunk_fingerprint(before))
    assert set(adapter.params) == {"layers"}
    assert labs.distance(merge(before, adapter.params, LORA), params) <= 1e-6


def test_a_checkpoint_holds_the_adapter_alone(trained):
    workdir, _, _ = trained
    steps = sorted((workdir / "checkpoints").glob("[0-9]*"))
    size = sum(f.stat().st_size for f in steps[-1].rglob("*") if f.is_file())
    adapter, _ = load_model(workdir / "adapter" / "params")
    whole = 4 * parameter_total(labs.policy_params())
    assert 3 * 4 * parameter_total(adapter) < whole
    assert size < whole


def test_a_stage_with_an_adapter_resumes_where_it_stopped(trained, tmp_path):
    _, whole, _ = trained
    fitted(tmp_path, steps=6, config=dataclasses.replace(FIT, save_every=3), mesh="data:2")
    (tmp_path / "checkpoints" / "6").rename(tmp_path / "gone")
    assert labs.same_bits(fitted(tmp_path), whole)


@pytest.mark.slow
def test_an_adapter_learns_over_quantised_weights(tmp_path):
    """QLoRA: whole parameters come back, the quantised base expanded."""
    config = dataclasses.replace(FIT, lora=dataclasses.replace(LORA, base="nf4"))
    params, before = fitted(tmp_path, config), labs.policy_params()
    rows = language_rows(labs.text_rows(rows=64)["tokens"])
    loss = language_loss(language_model(labs.SHAPE))
    losses = [float(jax.jit(loss)(p, rows, labs.KEY)[0]) for p in (before, params)]
    assert losses[1] < losses[0]
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(params))


# --- PPO ----------------------------------------------------------------------------------------


def ppo_run(workdir, config, reward_params):
    config = dataclasses.replace(
        config, episodes=2 * config.rollout_batch, eval_every=1, warmup_iterations=2
    )
    seen = []

    def evaluate(step, state):
        seen.append(jax.tree.map(np.asarray, state.policy.ema))
        return {}

    state = ppo.train(
        config,
        language_model(labs.SHAPE),
        scalar_model(labs.SHAPE),
        labs.policy_params(),
        reward_params,
        lambda step: labs.prompt_rows(step, rows=config.prompts),
        ptx=labs.text_rows,
        eos_id=labs.EOS,
        mesh=make_mesh("data:1"),
        workdir=workdir,
        evaluate=evaluate,
    )
    return state, seen


def reward_adapter(seed=3):
    """An adapter and a head on the policy's own trunk that score nothing like its start."""
    params = scalar_from_language(labs.policy_params(), jax.random.key(seed), labs.SHAPE)
    state = initial_state(
        PPOConfig(lora=LORA), labs.policy_params(), params, optimizers(PPOConfig())
    )
    rng = np.random.default_rng(seed)
    draw = lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, state.value.params)


@pytest.mark.parametrize(
    ("shared", "base"),
    [
        pytest.param(False, None, marks=pytest.mark.slow),
        (True, None),
        pytest.param(True, "int8", marks=pytest.mark.slow),
    ],
    ids=["own trunk", "one trunk", "one trunk in int8"],
)
def test_ppo_trains_adapters_and_the_reference_is_the_policy_without_its_own(
    tmp_path, shared, base
):
    lora = dataclasses.replace(LORA, base=base)
    config = dataclasses.replace(PPO, lora=lora)
    reward = reward_adapter() if shared else labs.reward_params()
    state, seen = ppo_run(tmp_path, config, reward)
    lines = (tmp_path / "ppo.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "kl" in row]
    assert abs(rows[0]["kl"]) <= 1e-5 < abs(rows[1]["kl"])
    assert all(row["ratio_error"] <= 1e-5 for row in rows)
    assert set(state.policy.params) == {"layers"}
    assert set(state.value.params) == {"layers", "head"}
    before = labs.policy_params()
    assert jax.tree.structure(state.policy.ema) == jax.tree.structure(before)
    assert labs.same_bits(state.policy.ema["final_norm"], before["final_norm"])
    assert not labs.same_bits(state.policy.ema["layers"], before["layers"])
    assert abs(state.policy.params["layers"]["mlp"]["up"]["kernel_lora_b"]).max() > 1e-4
    assert labs.same_bits(seen[-1], state.policy.ema)
    kept = load_adapter(tmp_path / "adapter")
    merged = merge(freeze(before, lora), kept.params, lora)
    assert labs.distance(merged, state.policy.ema) <= 1e-6


def test_on_one_trunk_the_reward_is_that_of_the_whole_model():
    config = dataclasses.replace(PPO, lora=LORA)
    reward = reward_adapter()
    frozen = frozen_models(config, labs.policy_params(), reward)
    assert parameter_total(frozen.reward) < 0.5 * parameter_total(frozen.reference)
    state = initial_state(config, labs.policy_params(), reward, optimizers(config))
    assert labs.same_bits(state.value.params, reward), "the value model starts as the reward model"
    whole = merge({**labs.policy_params(), "head": reward["head"]}, reward, LORA)
    tokens = labs.prompt_rows()["tokens"]
    plain, adapted = scalar_model(labs.SHAPE), adapt(scalar_model(labs.SHAPE), LORA)
    models = frozen.models(state)
    for params in (models.reward, models.value):
        np.testing.assert_allclose(
            adapted.apply(params, tokens), plain.apply(whole, tokens), atol=1e-4
        )


def test_a_reward_adapter_that_does_not_belong_is_refused():
    config = dataclasses.replace(PPO, lora=LORA)
    reads = train_bpe(["hello world"], vocab_size=260)
    start = TrainedModel("language", labs.SHAPE, labs.policy_params(), reads, "sft")
    reward = TrainedModel("scalar", labs.SHAPE, labs.reward_params(), reads, "reward_model")
    fits = Adapter(reward_adapter(), LORA, trunk_fingerprint(start.params))
    shared = on_the_policys_trunk(config, start, reward, fits, "A")
    assert shared["head"] is reward.params["head"] and set(shared) == {"layers", "head"}
    for other, adapter, message in [
        (PPO, fits, "A: .*rank 0 trains all"),
        (config, fits._replace(base="0"), "A: trained on another trunk than config.init"),
        (config, fits._replace(lora=dataclasses.replace(LORA, rank=4)), "alpha / rank 2 .* has 4"),
    ]:
        with pytest.raises(ConfigError, match=message):
            on_the_policys_trunk(other, start, reward, adapter, "A")


def abstract_memory(config, shape, *, one_trunk):
    """Bytes of the score and update programs of PPO, arguments and temporaries; nothing is run."""
    mesh, txs = make_mesh("data:1"), optimizers(config)
    policy, scalar = (adapt(make(shape), config.lora) for make in (language_model, scalar_model))

    def models(key):
        params = policy.init(key)
        reward = scalar_from_language(params, key, shape)
        if one_trunk:
            reward = initial_state(config, params, reward, txs).value.params
        return frozen_models(config, params, reward), initial_state(config, params, reward, txs)

    def placed(tree):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), tree
        )

    frozen, state = placed(jax.eval_shape(models, jax.random.key(0)))
    programs = ppo.make_programs(Recipe(config, policy, scalar, *txs, 0), state, mesh)
    b, p, r = config.rollout_batch, config.prompt_length, config.response_length

    def array(dtype, *size):
        return jax.ShapeDtypeStruct(size, dtype, sharding=replicated(mesh))

    tokens, mask = array(jnp.int32, b, p + r), array(jnp.bool_, b, p + r)
    where, column = array(jnp.bool_, b, r), array(jnp.float32, b, r)
    rollout = Rollout(tokens, mask, where, column)
    experience = Experience(tokens, mask, where, *[column] * 5)
    key = jax.eval_shape(lambda: jax.random.key(0))
    inputs = [(programs.read, (state, frozen, rollout))]
    inputs += [(programs.update, (state, frozen, experience, None, array(jnp.float32), key))]
    sizes = []
    with jax.set_mesh(mesh):
        for program, arguments in inputs:
            memory = program.lower(*arguments).compile().memory_analysis()
            sizes.append(memory.argument_size_in_bytes + memory.temp_size_in_bytes)
    return sizes


def test_four_models_on_one_trunk_take_less_than_half_the_memory():
    """Arguments and temporaries of the compiled programs; the target is 0.45 of full PPO's."""
    shape = TransformerConfig(
        vocab_size=255, num_layers=4, d_model=256, num_heads=4, max_length=32, remat="full"
    )
    config = PPOConfig(
        rollout_batch=4, minibatch=2, prompt_length=8, response_length=8, whiten_advantages="none"
    )
    lora = dataclasses.replace(config, lora=LoraConfig(rank=4))
    full = abstract_memory(config, shape, one_trunk=False)
    small = abstract_memory(lora, shape, one_trunk=True)
    assert max(small) <= 0.45 * max(full)
    assert small[0] <= 0.45 * full[0] and small[1] <= 0.45 * full[1]
