"""Rollouts that lag by one iteration: what is learnt from what, to the bit, also after a stop."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax.errors import ConfigError
from instruct_jax.models.transformer import language_model, scalar_model
from instruct_jax.sampling.sampler import generate
from instruct_jax.stages import ppo
from instruct_jax.stages.ppo_lag import BEFORE, Lagging
from instruct_jax.stages.ppo_models import Recipe, optimizers
from instruct_jax.training.checkpoint import Checkpointer
from instruct_jax.training.mesh import make_mesh
from tests.stages import lab as labs
from tests.stages.run_ppo import CONFIG, Killed, fingerprint, run

LAGGING = dataclasses.replace(CONFIG, rollout_lag=1)
ITERATIONS = 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed: its workdir and last state."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, run(workdir, ITERATIONS, config=LAGGING)


def rows(workdir):
    lines = [json.loads(line) for line in (workdir / "ppo.jsonl").read_text().splitlines()]
    return [row for row in lines if "kl" in row]


def defined(config, iterations):
    """The last state by the definition: batch i is of the models before iteration i - 1, or of the
    first ones, and is sampled when its iteration comes.
    """
    policy, scalar = language_model(labs.SHAPE), scalar_model(labs.SHAPE)
    recipe = Recipe(config, policy, scalar, *optimizers(config), labs.EOS)
    mesh, key = make_mesh("data:1"), jax.random.key(config.seed)
    with jax.set_mesh(mesh):
        given = labs.policy_params(), labs.reward_params()
        frozen, state = ppo.placed_models(recipe, *given, mesh)
        states, programs = [state], ppo.make_programs(recipe, state, mesh)
        for i in range(iterations):
            behind, rollout_key = states[0], jax.random.fold_in(key, BEFORE)
            if i > 0:
                behind = states[i - 1]
                rollout_key, _ = jax.random.split(jax.random.fold_in(key, i - 1))
            asked = labs.prompt_rows(i)
            rollout = generate(
                policy,
                behind.policy.params,
                jnp.asarray(asked["tokens"]),
                jnp.asarray(asked["mask"]),
                jax.random.split(rollout_key, labs.ROWS),
                max_new_tokens=labs.RESPONSE,
                eos_id=labs.EOS,
            )
            readings = programs.read(behind, frozen, rollout)
            experience, metrics = programs.score(behind.kl_coef, rollout, readings)
            batches = ppo.IterationBatches(labs.prompt_rows, labs.text_rows, config.updates)
            text = batches(i)["text"]
            _, update_key = jax.random.split(jax.random.fold_in(key, i))
            kept = jax.tree.map(jnp.copy, states[-1])  # the update takes its buffers
            state, _ = programs.update(kept, frozen, experience, text, metrics["kl"], update_key)
            states.append(state)
    return states[-1]


def test_every_batch_is_of_the_models_one_iteration_behind(whole):
    assert labs.same_bits(whole[1], defined(LAGGING, ITERATIONS))


def test_the_ratio_is_of_the_policy_that_sampled_and_not_one_where_it_has_moved(whole):
    """Old log-probs are the sampler's own; the first batch alone is answered by what it trains."""
    first, *rest = rows(whole[0])
    assert all(row["sampler_gap"] < 1e-5 for row in (first, *rest))
    assert first["ratio_error"] <= 1e-5
    assert all(row["ratio_error"] > 1e-3 for row in rest)


def test_the_first_two_batches_are_answered_by_the_first_policy(whole):
    kl = [abs(row["kl"]) for row in rows(whole[0])]
    assert max(kl[:2]) / labs.RESPONSE <= 1e-6
    assert min(kl[2:]) > 1e-3


@pytest.mark.parametrize(
    ("mesh", "tolerance"),
    [("data:1", 0.0), pytest.param("data:2,fsdp:2,tensor:2", 1e-5, marks=pytest.mark.slow)],
)
def test_a_run_taken_up_at_a_checkpoint_ends_as_if_it_had_not_stopped(
    tmp_path, whole, mesh, tolerance
):
    """The rollout that waits is in the checkpoint, and goes onto any mesh."""
    with pytest.raises(Killed):
        run(tmp_path, ITERATIONS, config=LAGGING, stop_at=3)
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        assert checkpointer.latest_step == 2
    state = run(tmp_path, ITERATIONS, mesh=mesh, config=LAGGING)
    if tolerance:
        assert labs.distance(jax.device_get(state), jax.device_get(whole[1])) <= tolerance
    else:
        assert fingerprint(state) == fingerprint(whole[1])
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]
    np.testing.assert_allclose(
        [row["score"] for row in rows(tmp_path)],
        [row["score"] for row in rows(whole[0])],
        atol=1e-5,
    )


def test_eight_devices_change_nothing(tmp_path, whole):
    state = run(tmp_path, ITERATIONS, mesh="data:8", config=LAGGING)
    assert labs.distance(jax.device_get(state), jax.device_get(whole[1])) <= 1e-5


def test_an_evaluation_sees_the_models_and_a_longer_run_begins_with_what_waits(tmp_path):
    """A finished run has a rollout left, and goes on as the longer run would have."""
    seen = []

    def evaluate(step, state):
        seen.append((step, isinstance(state, Lagging), fingerprint(state.policy.params)))
        return {"seen": float(step)}

    config = dataclasses.replace(LAGGING, eval_every=1, warmup_iterations=1)
    run(tmp_path / "a", 2, config=config, evaluate=evaluate)
    run(tmp_path / "a", 3, config=config, evaluate=evaluate)
    run(tmp_path / "b", 3, config=config, evaluate=evaluate)
    assert [step for step, *_ in seen] == [1, 2, 3, 1, 2, 3]
    assert not any(lagging for _, lagging, _ in seen)
    assert seen[:3] == seen[3:]


def test_the_command_line_takes_a_lag_of_one_and_no_other():
    from experiments.ppo import Config
    from instruct_jax.cli.config import load_config, resolve

    for text in ("0", "1"):
        values = load_config("configs/ppo.py:debug")
        config = resolve(Config, values, {"ppo.rollout_lag": text, "ppo.micro_batches": "2"})
        assert (config.ppo.rollout_lag, config.ppo.micro_batches) == (int(text), 2)
    with pytest.raises(ConfigError, match=r"ppo.rollout_lag=2: expected one of 0, 1"):
        resolve(Config, load_config("configs/ppo.py:debug"), {"ppo.rollout_lag": "2"})
