"""A whole run of PPO: where it starts, what it logs, how it stops and goes on."""

import dataclasses
import itertools
import json
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from instruct_jax.errors import ConfigError
from instruct_jax.stages import ppo
from instruct_jax.training.checkpoint import Checkpointer
from tests.stages import lab as labs
from tests.stages.run_ppo import CONFIG, Killed, fingerprint, run

ITERATIONS = 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed: its workdir, last state, rollouts, keys and compilations."""
    workdir = tmp_path_factory.mktemp("whole")
    calls, compiled = [], []
    with pytest.MonkeyPatch.context() as patch, labs.compilations() as programs:
        generate = ppo.generate

        def recorded(*args, **kwargs):
            rollout = generate(*args, **kwargs)
            calls.append((args[4], rollout))
            return rollout

        def evaluate(step, state):
            jax.block_until_ready(state)
            compiled.append(len(programs))
            return {"seen": float(step)}

        patch.setattr(ppo, "generate", recorded)
        config = dataclasses.replace(CONFIG, eval_every=1)
        state = run(workdir, ITERATIONS, config=config, evaluate=evaluate)
    keys = [np.asarray(jax.random.key_data(keys)) for keys, _ in calls]
    return workdir, state, [rollout for _, rollout in calls], keys, compiled


def rows(workdir):
    lines = [json.loads(line) for line in (workdir / "ppo.jsonl").read_text().splitlines()]
    return [row for row in lines if "kl" in row]


# --- the start ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def beginning(tmp_path_factory):
    """What `train` hands to its loop: the first state, and the frozen models."""
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        make_iteration = ppo.make_iteration

        def noted(recipe, frozen, *others):
            seen["frozen"] = frozen
            return make_iteration(recipe, frozen, *others)

        patch.setattr(ppo, "make_iteration", noted)
        patch.setattr(ppo, "run_loop", lambda step, state, **options: state)
        state = run(tmp_path_factory.mktemp("beginning"), 1)
    return state, seen["frozen"]


def test_policy_value_average_and_frozen_models_share_no_buffer(beginning):
    """T35, JAX-8: any of them may be donated or updated without a trace in another."""
    state, frozen = beginning
    trees = [state.policy.params, state.policy.ema, state.value.params, *frozen]
    trees += [state.policy.opt_state, state.value.opt_state]
    buffers = [x.unsafe_buffer_pointer() for tree in trees for x in jax.tree.leaves(tree)]
    assert len(set(buffers)) == len(buffers)


def test_the_models_start_as_the_copies_they_should_be(beginning):
    """T43: value model = reward model, bias included; policy = reference = average = M3."""
    state, frozen = beginning
    assert labs.same_bits(state.value.params, labs.reward_params())
    assert labs.same_bits(frozen.reward, labs.reward_params())
    assert float(state.value.params["head"]["bias"][0]) == np.float32(0.7)
    for tree in (state.policy.params, state.policy.ema, frozen.reference):
        assert labs.same_bits(tree, labs.policy_params())
    assert state.kl_coef == np.float32(CONFIG.kl_coef)


# --- the run ------------------------------------------------------------------------------------


def test_the_ratio_is_one_in_the_first_minibatch_of_every_iteration(whole):
    """T1: logged, mean |rho - 1| <= 1e-5; later minibatches have moved."""
    log = rows(whole[0])
    assert len(log) == ITERATIONS
    assert all(row["ratio_error"] <= 1e-5 for row in log)
    assert all(row["ratio_min"] < 1 - 1e-4 and row["ratio_max"] > 1 + 1e-4 for row in log)


def test_the_kl_is_zero_in_iteration_zero_and_then_grows_from_a_fixed_reference(whole):
    """T2, JAX-8: updates donate the state and leave the reference alone."""
    first, *rest = rows(whole[0])
    assert abs(first["kl"]) / labs.RESPONSE <= 1e-6
    assert all(row["kl_k3"] > 1e-4 for row in rest)
    assert rest[-1]["kl_k3"] > rest[0]["kl_k3"]


def test_every_iteration_draws_with_keys_of_its_own(whole):
    """T9: no key is used twice; the same prompts under the next keys give other responses."""
    _, _, rollouts, keys, _ = whole
    assert len({key.tobytes() for batch in keys for key in batch}) == ITERATIONS * labs.ROWS
    lab = labs.make_lab(CONFIG)
    responses = []
    for seed in (0, 1, 0):
        rollout = labs.sample(lab, seed=seed, same=True)
        responses.append(np.asarray(rollout.tokens)[:, labs.PROMPT :])
        distinct = {row.tobytes() for row in responses[-1]}
        assert len(distinct) > labs.ROWS // 2, "rows of one prompt differ too"
    assert (responses[0] != responses[1]).any(-1).mean() > 0.9
    assert np.array_equal(responses[0], responses[2]), "the same keys, bit for bit"
    for a, b in itertools.pairwise(rollouts):
        assert not np.array_equal(a.tokens[:, labs.PROMPT :], b.tokens[:, labs.PROMPT :])


def test_nothing_is_compiled_after_the_first_iteration(whole):
    """T56: rollout, scoring and update are one program each, whatever is sampled."""
    compiled = whole[-1]
    assert len(compiled) == ITERATIONS and compiled[0] > 0
    assert compiled == [compiled[0]] * ITERATIONS


def test_the_log_has_what_a_run_must_be_judged_by(whole):
    """PPO-16."""
    required = [
        "kl",
        "kl_k3",
        "entropy",
        "score",
        "score_sd",
        "score_min",
        "score_max",
        "reward_kl",
        "reward_total",
        "response_length",
        "eos_rate",
        "ratio",
        "ratio_min",
        "ratio_max",
        "ratio_var",
        "approx_kl",
        "clip_fraction",
        "value_loss",
        "value_clip_fraction",
        "explained_variance",
        "return_mean",
        "return_var",
        "grad_norm_pg",
        "grad_norm_ptx",
        "grad_cosine",
        "grad_norm_value",
        "pretrain_nll",
        "sampler_gap",
        "kl_coef",
        "tokens",
        "steps_per_second",
        "tokens_per_second",
        "learning_rate",
        "value_learning_rate",
        "sampler_gap_rms",
        "sampler_within_0.001",
        "sampler_within_0.01",
        "sampler_within_0.05",
        "skipped",
    ]
    for row in rows(whole[0]):
        missing = [name for name in required if not np.isfinite(row.get(name, np.nan))]
        assert not missing, missing
        assert row["sampler_gap"] < 1e-5, "NUM-4"
        speed = row["tokens"] * row["steps_per_second"]
        np.testing.assert_allclose(row["tokens_per_second"], speed, rtol=1e-6)
    # In warm-up from a tenth over three iterations of two updates each (PPO-3).
    risen = 0.1 + 0.9 * np.minimum((2 * np.arange(ITERATIONS) + 0.5) / 6, 1)
    risen[-1] = 1.0
    for name in ("learning_rate", "value_learning_rate"):
        rates = [row[name] / getattr(CONFIG, name) for row in rows(whole[0])]
        np.testing.assert_allclose(rates, risen, rtol=1e-5)


def test_the_controller_steers_the_penalty(whole):
    """T27, PPO-17: from the KL of the rollout, once an iteration; and the state carries it."""
    log = rows(whole[0])
    coefs = [row["kl_coef"] for row in log] + [float(whole[1].kl_coef)]
    assert coefs[0] == pytest.approx(CONFIG.kl_coef)
    for row, (before, after) in zip(log, itertools.pairwise(coefs), strict=True):
        error = np.clip(row["kl"] / CONFIG.kl_target - 1, -0.2, 0.2)
        factor = 1 + error * labs.ROWS / CONFIG.kl_horizon
        assert after == pytest.approx(before * factor, rel=1e-5)


def test_the_average_trails_the_policy(whole):
    """T40, PPO-14: fp32, after every update, from the start of the run."""
    state = whole[1]
    policy, average, start = (
        labs.flat(x) for x in (state.policy.params, state.policy.ema, labs.policy_params())
    )
    assert {x.dtype for x in jax.tree.leaves(state.policy.ema)} == {np.dtype(np.float32)}
    share = np.linalg.norm(average - start) / np.linalg.norm(policy - start)
    updates = ITERATIONS * CONFIG.updates
    assert 0 < share < 1 - CONFIG.ema_decay**updates + 1e-6
    assert int(state.policy.step) == int(state.value.step) == updates


@pytest.mark.parametrize(
    ("mesh", "tolerance"),
    [("data:1", 0.0), pytest.param("data:2,fsdp:2", 1e-5, marks=pytest.mark.slow)],
)
def test_a_run_taken_up_at_a_checkpoint_ends_as_if_it_had_not_stopped(
    tmp_path, whole, mesh, tolerance
):
    """T55, JAX-10: bit for bit on one device; to 1e-5 on another mesh."""
    with pytest.raises(Killed):
        run(tmp_path, ITERATIONS, stop_at=3)
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        assert checkpointer.latest_step == 3
    state = run(tmp_path, ITERATIONS, mesh=mesh)
    if tolerance:
        assert labs.distance(jax.device_get(state), jax.device_get(whole[1])) <= tolerance
    else:
        assert fingerprint(state) == fingerprint(whole[1])
    before, after = rows(whole[0]), rows(tmp_path)
    assert [row["step"] for row in after] == [1, 2, 3, 4]
    for a, b in zip(before, after, strict=True):
        assert b["score"] == pytest.approx(a["score"], abs=1e-5)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(tmp_path, repository):
    """T55: SIGKILL, then to the end."""
    outputs = []
    for folder, kill in (("killed", True), ("killed", False), ("whole", False)):
        workdir = tmp_path / folder
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.stages.run_ppo",
                str(workdir),
                "12",
                "0.3" if kill else "0",
            ],
            cwd=repository,
            stdout=subprocess.PIPE,
            text=True,
        )
        log = workdir / "ppo.jsonl"
        while kill and process.poll() is None:
            time.sleep(0.05)
            if log.exists() and log.read_text().count("\n") >= 5:
                process.send_signal(signal.SIGKILL)
        outputs.append(process.communicate(timeout=600)[0].strip())
        assert process.returncode == (-signal.SIGKILL if kill else 0)
    assert outputs[0] == "" and outputs[1] == outputs[2]


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rollout_batch=33), "rollout_batch 33 is not a multiple of minibatch 16"),
        (dict(micro_batches=3), "minibatch 16 is not a multiple of micro_batches 3"),
        (dict(ptx_micro_batches=3), "32 rows of text, is not a multiple of ptx_micro_batches 3"),
        (dict(ptx_micro_batches=0), "ptx_micro_batches=0: expected 1 or more"),
    ],
)
def test_batches_that_do_not_divide_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_a_run_that_cannot_start_writes_nothing(tmp_path):
    short = dataclasses.replace(CONFIG, rollout_batch=48, warmup_iterations=1)
    with pytest.raises(ConfigError, match="16 rows cannot be divided over mesh data:3"):
        run(tmp_path / "a", 1, mesh="data:3", config=short)
    with pytest.raises(ConfigError, match="with 4 micro-batches: use a multiple of 32"):
        run(tmp_path / "b", 1, mesh="data:8", config=dataclasses.replace(CONFIG, micro_batches=4))
    with pytest.raises(ConfigError, match=r"32 rows .* with 8 micro-batches: use a multiple of 64"):
        config = dataclasses.replace(CONFIG, ptx_micro_batches=8)
        run(tmp_path / "b", 1, mesh="data:8", config=config)
    with pytest.raises(ConfigError, match=r"ptx_coef 0.5 needs pretraining text"):
        ppo.train(
            CONFIG, *[None] * 5, eos_id=0, mesh=None, workdir=tmp_path / "c"
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_a_run_ends_after_the_iteration_whose_kl_is_above_kl_stop(whole, tmp_path, capsys):
    """Its model is that of a run of so many iterations; a rerun does nothing, and one with a larger
    kl_stop goes on to the same bits.
    """
    workdir, state, *_ = whole
    kls = [row["kl"] for row in rows(workdir)]
    *_, second, most = sorted(kls[:-1])
    limit, last = (second + most) / 2, kls.index(most) + 1
    config = dataclasses.replace(CONFIG, kl_stop=limit)
    ended = run(tmp_path, ITERATIONS, config=config)
    assert int(ended.policy.step) == last * CONFIG.updates and len(rows(tmp_path)) == last
    told = f"ended after step {last} of {ITERATIONS}: its KL of {kls[last - 1]:.4g} nats is above"
    assert told in capsys.readouterr().err
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        assert checkpointer.latest_step == last
    again = run(tmp_path, ITERATIONS, config=config)
    assert fingerprint(again) == fingerprint(ended) and told in capsys.readouterr().err
    larger = dataclasses.replace(CONFIG, kl_stop=1e6)
    assert fingerprint(run(tmp_path, ITERATIONS, config=larger)) == fingerprint(state)
