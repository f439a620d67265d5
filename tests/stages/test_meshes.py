"""How devices share the work changes no result: axes data, fsdp, tensor and sequence.

Plain descent, since Adam divides by the root of a second moment that may be nothing but rounding.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from instruct_jax.data.trees import RowShape, pack_trees
from instruct_jax.models.transformer import PARTITION_RULES, language_model, scalar_model
from instruct_jax.stages import ppo
from instruct_jax.stages.experience import Experience
from instruct_jax.stages.pretrain import language_loss, language_rows
from instruct_jax.stages.reward_model import reward_loss
from instruct_jax.stages.stage import FitConfig, make_step
from instruct_jax.training.mesh import batch_sharding, make_mesh, replicated, shard_batch
from instruct_jax.training.state import compile_step, init_state, shard_state
from tests.stages import lab as labs
from tests.stages.lab import KEY, PAD, VOCAB

# Four heads, so that four devices can each have one.
GPT = dataclasses.replace(labs.SHAPE, num_heads=4)
LLAMA = dataclasses.replace(
    GPT, norm="rmsnorm", activation="swiglu", positions="rope", num_kv_heads=2, use_bias=False,
    tie_embeddings=False,
)  # fmt: skip
DESCENT = optax.sgd(0.05)
PPO_PTX = dataclasses.replace(
    labs.CONFIG, ptx_coef=0.5, whiten_rewards=True, whiten_advantages="minibatch"
)
ROWS, LENGTH = 16, 16
ALL = "fsdp:2,tensor:2,sequence:2"
MESHES = ["data:8", "fsdp:8", "data:2,tensor:4", ALL]
STAGES = ["pretrain", "sft", "reward_model", "ppo_ptx"]


def pretrain_rows(step):
    """Text without padding."""
    tokens = np.random.default_rng(step).integers(0, VOCAB, (ROWS, LENGTH))
    return language_rows(tokens.astype(np.int32))


def sft_rows(step):
    """Two demonstrations a row, the second padded on the right; prompts are no targets."""
    rng = np.random.default_rng(step)
    rows = pretrain_rows(step)
    place = np.arange(LENGTH)
    second = place >= LENGTH // 2
    mask = place[None] < rng.integers(LENGTH // 2 + 3, LENGTH + 1, (ROWS, 1))
    answers = (place % (LENGTH // 2) >= 2)[None] & mask
    segments = np.where(second, 2, 1)[None] * np.ones((ROWS, 1), np.int64)
    return {
        "tokens": np.where(mask, rows["tokens"], PAD).astype(np.int32),
        "mask": mask,
        "loss_mask": answers,
        "segment_ids": segments.astype(np.int32),
    }


def comparison_rows(step):
    """Three ranked completions of each prompt, two trees in most rows, some on another device than
    their prompts.
    """
    rng = np.random.default_rng(step)
    mask = np.arange(8) < rng.integers(4, 7, (ROWS, 3, 1))
    tokens = rng.integers(0, VOCAB, mask.shape)
    tokens[..., :2] = tokens[:, :1, :2]
    rows = {
        "tokens": np.where(mask, tokens, PAD).astype(np.int32),
        "mask": mask,
        "ranks": rng.permuted(np.tile(np.arange(3, dtype=np.int32), (ROWS, 1)), axis=1),
        "where": np.ones((ROWS, 3), bool),
        "prompt_lengths": np.full(ROWS, 2, np.int32),
    }
    return pack_trees(rows, pad_id=PAD, shape=RowShape(8, 32))


FITS = {
    "pretrain": (language_loss(language_model(GPT)), labs.policy_params, pretrain_rows),
    "sft": (language_loss(language_model(GPT)), labs.policy_params, sft_rows),
    "reward_model": (reward_loss(scalar_model(GPT)), labs.reward_params, comparison_rows),
}


def fit_history(stage, mesh, steps):
    """The losses and metrics of `steps` updates by the step of `fit`."""
    loss, params, batch_at = FITS[stage]
    state = shard_state(init_state(params(), DESCENT), mesh, PARTITION_RULES)
    step = compile_step(make_step(FitConfig(), loss, DESCENT), mesh, state, {})
    history = []
    with jax.set_mesh(mesh):
        for i in range(steps):
            batch = shard_batch(batch_at(i), mesh)
            state, metrics = step(state, batch, jax.random.fold_in(KEY, i))
            history.append(jax.device_get(metrics))
    return history


def ppo_state(mesh):
    """A lab, and its state and frozen models on `mesh`."""
    lab = labs.make_lab(PPO_PTX, shape=GPT, reference=1, tx=DESCENT)
    frozen, state = ppo.placed_models(lab.recipe(), lab.frozen.reference, lab.frozen.reward, mesh)
    # The reference is not where the policy starts.
    policy = shard_state(lab.state.policy, mesh, PARTITION_RULES)
    return lab, frozen, dataclasses.replace(state, policy=policy)


def ppo_history(mesh, steps):
    """The metrics of as many iterations as make `steps` updates: rollouts, scores, updates."""
    lab, frozen, state = ppo_state(mesh)
    run = ppo.make_iteration(lab.recipe(), frozen, state, mesh)
    batches = ppo.IterationBatches(labs.prompt_rows, labs.text_rows, PPO_PTX.updates)
    history = []
    with jax.set_mesh(mesh):
        for i in range(steps // PPO_PTX.updates):
            state, metrics = run(state, batches(i), jax.random.fold_in(KEY, i))
            history.append(jax.device_get(metrics))
    return history


@functools.cache
def history(stage, spec, steps):
    """float64[steps, M]: what a stage logged on a mesh."""
    mesh = make_mesh(spec)
    rows = ppo_history(mesh, steps) if stage == "ppo_ptx" else fit_history(stage, mesh, steps)
    return [sorted(row) for row in rows], np.array([[float(r[k]) for k in sorted(r)] for r in rows])


def relative_difference(stage, spec, steps):
    """The largest over all steps and all that is logged.

    What is below 0.1 is compared to 0.1: the policy's loss is a mean of whitened advantages, which
    cancel.
    """
    names, here = history(stage, spec, steps)
    expected_names, expected = history(stage, "data:1", steps)
    assert names == expected_names and np.isfinite(here).all()
    return (np.abs(here - expected) / np.maximum(np.abs(expected), 0.1)).max()


@pytest.mark.parametrize(
    ("stage", "spec", "steps"),
    [("sft", ALL, 3), ("reward_model", "data:2,tensor:4", 3), ("ppo_ptx", ALL, 2)],
)
def test_a_mesh_changes_nothing(stage, spec, steps):
    assert relative_difference(stage, spec, steps) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("spec", MESHES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_mesh_changes_nothing_in_twenty_updates(stage, spec):
    difference = relative_difference(stage, spec, 20)
    print(f"{stage:12s} {spec:28s} {difference:.1e}")
    assert difference < 1e-5


# --- the partitioner ----------------------------------------------------------------------------


@pytest.fixture
def recompiled():
    """No program from the cache, which would come without the compiler's warnings."""
    compilation_cache.reset_cache()
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def abstract(tree, sharding):
    """Shapes in place of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def lowered_fit(config, make_model, mesh):
    """One train step of a language or scalar model."""
    model = make_model(config)
    loss = language_loss(model) if make_model is language_model else reward_loss(model)
    rows = pretrain_rows(0) if make_model is language_model else comparison_rows(0)
    params = jax.eval_shape(model.init, KEY)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
    state = shard_state(init_state(zeros, DESCENT), mesh, PARTITION_RULES)
    kept = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(
        functools.partial(make_step(FitConfig(), loss, DESCENT), fixed={}),
        out_shardings=(kept, replicated(mesh)),
    )
    rows = abstract(rows, batch_sharding(mesh))
    with jax.set_mesh(mesh):
        return step.lower(state, batch=rows, key=KEY)


def lowered_update(mesh):
    """The updates of one iteration of PPO-ptx."""
    lab, frozen, state = ppo_state(mesh)
    programs = ppo.make_programs(lab.recipe(), state, mesh)
    rows = batch_sharding(mesh)
    b, p, r = PPO_PTX.rollout_batch, PPO_PTX.prompt_length, PPO_PTX.response_length
    tokens, mask = jnp.zeros((b, p + r), jnp.int32), jnp.zeros((b, p + r), jnp.bool_)
    experience = Experience(tokens, mask, mask[:, :r], *[jnp.zeros((b, r))] * 5)
    batches = ppo.IterationBatches(labs.prompt_rows, labs.text_rows, PPO_PTX.updates)
    text_rows = NamedSharding(mesh, PartitionSpec(None, *rows.spec))
    inputs = (
        abstract(experience, rows),
        abstract(batches(0)["text"], text_rows),
        jnp.float32(0.0),
        KEY,
    )
    with jax.set_mesh(mesh):
        return programs.update.lower(state, frozen, *inputs)


SPLIT = "data:2,fsdp:2,tensor:2"
PROGRAMS = {
    "gpt": functools.partial(lowered_fit, GPT, language_model),
    "llama": functools.partial(lowered_fit, LLAMA, language_model),
    "scalar": functools.partial(lowered_fit, GPT, scalar_model),
    "ppo-ptx": lowered_update,
}


@pytest.mark.parametrize(
    ("program", "spec"),
    [
        ("gpt", SPLIT),
        ("ppo-ptx", SPLIT),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("gpt", ALL),
                ("llama", SPLIT),
                ("llama", ALL),
                ("scalar", SPLIT),
                ("scalar", ALL),
                ("ppo-ptx", ALL),
            ]
        ),
    ],
)
def test_no_array_is_made_whole_to_be_split_another_way(program, spec, recompiled, capfd):
    """The compiler tells on stderr, where it finds no way between two layouts."""
    lowered = PROGRAMS[program](make_mesh(spec))
    capfd.readouterr()
    lowered.compile()
    said = capfd.readouterr().err
    assert "Involuntary full rematerialization" not in said, said
