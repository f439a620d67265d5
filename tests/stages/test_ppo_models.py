"""The four models of PPO: which parameters each is, whatever trunks they have or share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax.errors import ConfigError
from instruct_jax.models.adapters import LoraConfig, adapt, freeze
from instruct_jax.models.transformer import language_model, scalar_from_language, scalar_model
from instruct_jax.sampling.choose import Sampling
from instruct_jax.sampling.engine import respond
from instruct_jax.sampling.sampler import generate
from instruct_jax.stages import ppo
from instruct_jax.stages.optimizers import AdamConfig
from instruct_jax.stages.ppo_lag import BEFORE
from instruct_jax.stages.ppo_models import Recipe, frozen_models, initial_state, optimizers
from instruct_jax.stages.stage import ADAPTER, RunConfig
from instruct_jax.training.mesh import make_mesh
from tests.stages import lab as labs
from tests.stages.run_ppo import CONFIG as RUN
from tests.stages.run_ppo import Killed, run

LORA = LoraConfig(rank=2, alpha=8.0)
# What a reward model of another family and depth may lack, or have besides.
OTHERS = {
    "no biases": dataclasses.replace(
        labs.SHAPE, use_bias=False, norm="rmsnorm", activation="swiglu"
    ),
    "another depth": dataclasses.replace(labs.SHAPE, num_layers=1),
}


def biased(params):
    """`params` with biases that would be missed: fresh ones are 0."""

    def shift(path, leaf):
        return leaf + 0.5 if "bias" in jax.tree_util.keystr(path[-1:]) else leaf

    return jax.tree_util.tree_map_with_path(shift, params)


@pytest.mark.parametrize("base", ["full", None, "int8", "fp8"])
@pytest.mark.parametrize("shape", OTHERS.values(), ids=OTHERS)
def test_a_reward_model_with_a_trunk_of_its_own_is_read_as_it_is(shape, base):
    """Nothing of the policy shines through where it has no such parameter, and the value model
    starts as it."""
    lora = LoraConfig() if base == "full" else dataclasses.replace(LORA, base=base)
    config = dataclasses.replace(labs.CONFIG, lora=lora)
    scalar = scalar_model(shape)
    language = language_model(shape).init(jax.random.key(5))
    reward = scalar_from_language(language, jax.random.key(6), shape)
    policy = biased(labs.policy_params())
    frozen = frozen_models(config, policy, reward)
    models = frozen.models(initial_state(config, policy, reward, optimizers(config)))
    rows = labs.prompt_rows()
    score = jax.jit(lambda p: adapt(scalar, lora).apply(p, rows["tokens"], mask=rows["mask"]))
    alone = score(freeze(reward, lora))
    np.testing.assert_array_equal(score(models.reward), alone)
    np.testing.assert_allclose(score(models.value), alone, atol=1e-6)


def test_a_base_in_fp8_samples_decodes_and_trains():
    """The matrices stay what they are: a cast of their values alone is no quantised matrix."""
    lora = dataclasses.replace(LORA, base="fp8")
    config = dataclasses.replace(labs.CONFIG, lora=lora)
    shape = dataclasses.replace(labs.SHAPE, dtype="bfloat16")
    policy, scalar = adapt(language_model(shape), lora), adapt(scalar_model(shape), lora)
    recipe = Recipe(config, policy, scalar, *optimizers(config), labs.EOS)
    mesh = make_mesh("data:1")
    frozen, state = ppo.placed_models(recipe, labs.policy_params(), labs.reward_params(), mesh)
    asked = {name: jnp.asarray(x) for name, x in labs.prompt_rows(rows=4).items()}
    keys = jax.random.split(labs.KEY, 4)
    params = frozen.models(state).policy
    options = {"max_new_tokens": 4, "temperature": 0.0}
    once = generate(
        policy, params, asked["tokens"], asked["mask"], keys, eos_id=labs.EOS, **options
    )
    prompts = [
        row[mask].tolist() for row, mask in zip(*map(np.asarray, asked.values()), strict=True)
    ]
    sampling = Sampling(stop_ids=(labs.EOS,), temperature=0.0)
    told = respond(policy, params, prompts, keys, sampling, max_new_tokens=4, slots=2)
    for row, where, response in zip(once.tokens, once.response_mask, told, strict=True):
        assert tuple(row[labs.PROMPT :][where].tolist()) == response.tokens
    iteration = ppo.make_iteration(recipe, frozen, state, mesh)
    batch = ppo.IterationBatches(labs.prompt_rows, None, config.updates)(0)
    with jax.set_mesh(mesh):
        after, metrics = iteration(state, batch, labs.KEY)
    assert np.isfinite(float(metrics["policy_loss"])) and int(after.policy.updates) == 2


def test_what_is_drawn_once_shares_no_key_with_a_step():
    """Steps count up from 0, roles down from the top; a run of 266 steps met its adapter's key."""
    assert len({ADAPTER, BEFORE}) == 2 and min(ADAPTER, BEFORE) >= 2**31
    config = dataclasses.replace(labs.CONFIG, lora=LORA)
    given = labs.policy_params(), labs.reward_params()
    drawn = initial_state(config, *given, optimizers(config)).policy.params
    kernel = drawn["layers"]["mlp"]["up"]["kernel_lora_a"]
    root = jax.random.key(config.seed)
    for step in (0, 266, 2**31 - 1):
        own = jax.random.split(jax.random.fold_in(root, step))[0]
        for i in range(8):
            bound = kernel.shape[1] ** -0.5
            other = jax.random.uniform(
                jax.random.fold_in(own, i), kernel.shape, jnp.float32, -bound, bound
            )
            assert not np.array_equal(other, kernel)


def test_the_form_of_adam_is_a_field():
    """JAX-6: in TensorFlow's form eps weighs 1 / sqrt(1 - b2^t) as much, 4.5 times at t = 1."""
    first = []
    for form in ("pytorch", "tensorflow"):
        run_config = RunConfig(adam=AdamConfig(eps=1e-5, clip=0.0, form=form))
        tx = run_config.make_optimizer(lambda count: jnp.float32(1.0))
        params = {"w": jnp.zeros(1)}
        with jax.numpy_dtype_promotion("standard"):  # as in `apply_gradients`
            updates, _ = tx.update({"w": jnp.full(1, 1e-5)}, tx.init(params), params)
        first.append(-float(updates["w"][0]))
    np.testing.assert_allclose(first, [0.5, 1.0 / (1.0 + 0.05**-0.5)], rtol=1e-4)


@pytest.mark.parametrize("changed", ["init", "reward_model"])
def test_a_run_is_not_taken_up_with_another_reference_or_reward_model(
    tmp_path, monkeypatch, changed
):
    """R20: the KL and the scores would be of another run."""
    config = dataclasses.replace(RUN, ptx_coef=0.0, kl_target=None)
    with pytest.raises(Killed):
        run(tmp_path, 3, config=config, stop_at=2)
    name = {"init": "policy_params", "reward_model": "reward_params"}[changed]
    given = getattr(labs, name)
    with monkeypatch.context() as patch:
        patch.setattr(labs, name, lambda *seed: jax.tree.map(lambda x: x * 1.0001, given(*seed)))
        with pytest.raises(
            ConfigError, match=f"trained with another .*{changed} than is given|{changed} and"
        ):
            run(tmp_path, 3, config=config)
    assert int(run(tmp_path, 3, config=config).policy.step) == 3 * config.updates
