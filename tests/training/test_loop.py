import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax.errors import NonFiniteError, UserError
from instruct_jax.training.checkpoint import Checkpointer
from instruct_jax.training.loop import train
from instruct_jax.training.metrics import MetricLogger
from instruct_jax.training.optim import adamw, schedule
from instruct_jax.training.signals import catch_stop_signals, hold_signals
from instruct_jax.training.state import init_state, make_train_step
from tests.training import tiny
from tests.training.run_tiny import fingerprint, run

STEPS = 40


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The workdir and the sha256 of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, fingerprint(run(workdir, STEPS))


def rows(workdir, name="tiny"):
    return [json.loads(line) for line in (Path(workdir) / f"{name}.jsonl").read_text().splitlines()]


def start(repository, workdir, *, pause):
    arguments = [str(workdir), str(STEPS), str(pause)]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.training.run_tiny", *arguments],
        cwd=repository,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(process, workdir, step):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (Path(workdir) / "tiny.jsonl").exists() and rows_so_far(workdir) >= step:
            return
        time.sleep(0.02)
    pytest.fail(f"the run did not reach step {step}: {process.communicate()[1][-2000:]}")


def rows_so_far(workdir):
    return (Path(workdir) / "tiny.jsonl").read_text().count("\n")


def test_killed_and_preempted_a_run_ends_with_the_same_bits(tmp_path, repository, uninterrupted):
    """R1, R3, T55: SIGKILL, then SIGTERM, then to the end; the log reads as if nothing happened."""
    process = start(repository, tmp_path, pause=0.05)
    wait_for_step(process, tmp_path, 11)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL

    process = start(repository, tmp_path, pause=0.05)
    wait_for_step(process, tmp_path, 20)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=120)
    assert process.returncode == 0, log
    assert "resumed from step" in log and "stopped by SIGTERM at step" in log
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        assert checkpointer.latest_step == rows(tmp_path)[-1]["step"] < STEPS  # no step is lost

    process = start(repository, tmp_path, pause=0)
    out, log = process.communicate(timeout=120)
    assert process.returncode == 0, log
    assert out.strip() == uninterrupted[1]
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_and_exits_with_code_0(tmp_path, uninterrupted, number):
    """R3: and the handlers of the program are back afterwards."""
    before = signal.getsignal(number)

    def batch_at(i):
        if i == 20:
            os.kill(os.getpid(), number)
        return tiny.batch(i)

    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, STEPS, batch_at=batch_at, save_every=0)
    assert stopped.value.code == 0 and signal.getsignal(number) is before
    assert 18 <= rows(tmp_path)[-1]["step"] <= 22
    assert fingerprint(run(tmp_path, STEPS)) == uninterrupted[1]


@pytest.fixture
def _ctrl_c():
    """Ctrl-C as on a terminal; what a shell runs in the background inherits that it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c")
def test_a_second_signal_ends_the_run_at_once():
    with pytest.raises(KeyboardInterrupt), catch_stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop and stop.name == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("_ctrl_c")
def test_a_signal_waits_until_the_arrays_are_on_disk():
    done = []
    with pytest.raises(KeyboardInterrupt), hold_signals():
        os.kill(os.getpid(), signal.SIGINT)
        done.append("saved")
    assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with catch_stop_signals() as stop, hold_signals():  # as a save within the loop
        os.kill(os.getpid(), signal.SIGINT)
        assert not stop
    assert stop.name == "SIGINT"


def test_a_run_goes_on_with_another_mesh(tmp_path, uninterrupted):
    """T55: the same losses to 1e-5."""
    with pytest.raises(UserError, match="row 3 is malformed"):
        run(tmp_path, STEPS, batch_at=fail_at(20))
    run(tmp_path, STEPS, mesh="fsdp:4")
    losses = [[row["loss"] for row in rows(workdir)] for workdir in (tmp_path, uninterrupted[0])]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_finished_run_has_nothing_to_do(uninterrupted):
    workdir, sha = uninterrupted
    assert fingerprint(run(workdir, STEPS, batch_at=fail_at(0))) == sha


def test_a_finished_run_goes_on_for_more_steps_with_other_intervals(tmp_path):
    """As with more epochs: the steps done stand, the schedule is that of the longer run, and from
    there on it is that run to the bit, however often it logs and saves.
    """
    run(tmp_path, 8, log_every=2, save_every=5)
    whole = fingerprint(run(tmp_path, 20, log_every=3, save_every=4))
    assert [row["step"] for row in rows(tmp_path)] == [2, 4, 6, 8, 9, 12, 15, 18, 20]
    run(tmp_path / "other", 8)
    assert fingerprint(run(tmp_path / "other", 20, save_every=0)) == whole
    with pytest.raises(UserError):
        run(tmp_path / "other", 30, batch_at=fail_at(20))


def fail_at(step):
    def batch_at(i):
        if i == step:
            raise UserError("row 3 is malformed")
        return tiny.batch(i)

    return batch_at


def nan_from(step):
    def batch_at(i):
        batch = tiny.batch(i)
        if i >= step:
            batch["y"][:] = np.nan
        return batch

    return batch_at


def test_non_finite_steps_in_a_row_stop_the_run_with_a_good_checkpoint(tmp_path):
    """R9: exit code 3 after max_skipped; what is saved is the last good step's."""
    with pytest.raises(NonFiniteError, match="step 9: 4 steps in a row") as error:
        run(tmp_path, STEPS, batch_at=nan_from(5), max_skipped=4)
    assert error.value.exit_code == 3
    assert [row["skipped"] for row in rows(tmp_path)] == [0] * 5 + [1] * 4
    assert rows(tmp_path)[-1]["loss"] is None
    with pytest.raises(NonFiniteError, match="step 9: 4 steps in a row"):
        run(tmp_path, 9)  # restores step 9 and has nothing to do: of that no model is made
    saved = restored(tmp_path)
    assert (int(saved.step), int(saved.updates)) == (9, 5)
    good = {}

    def keep(step, state):
        good[step] = fingerprint((state.params, state.opt_state, state.ema))
        return {}

    run(tmp_path / "good", STEPS, evaluate=keep, eval_every=5)
    assert fingerprint((saved.params, saved.opt_state, saved.ema)) == good[5]


def restored(workdir):
    """The state of the newest checkpoint of `run`."""
    tx = adamw(schedule(1e-2, "cosine", steps=STEPS), weight_decay=0.1)
    state = init_state(tiny.init(jax.random.key(1)), tx, ema=True)
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        return checkpointer.restore({"state": state})[0]["state"]


def test_a_run_of_any_length_without_an_update_is_none(tmp_path):
    """R21: exit code 3, also of one of a single step, and again when it is run again."""
    for _ in range(2):
        with pytest.raises(NonFiniteError, match="none of the 2 updates of the run was made") as e:
            run(tmp_path, 2, batch_at=nan_from(0), save_every=1)
        assert e.value.exit_code == 3
    assert len(rows(tmp_path)) == 2
    assert int(run(tmp_path, 3).updates) == 1  # a batch that is whole, and it is a run


def test_a_run_that_ends_with_a_value_that_is_not_finite_is_refused(tmp_path):
    """R21: the parameters are finite, but there is none of which the last loss is known."""
    for _ in range(2):
        with pytest.raises(NonFiniteError, match=r"step 6: .* since .*loss is not finite"):
            run(tmp_path, 6, batch_at=nan_from(5))
    assert int(restored(tmp_path).updates) == 5


def test_a_run_that_ends_with_a_spike_is_a_run(tmp_path):
    """What is skipped for its size alone, as `skip_above` says, was finite."""
    step = make_train_step(tiny.loss_fn, adamw(1e-2), skip_above=1e4)
    state = init_state(tiny.init(jax.random.key(1)), adamw(1e-2))

    def batch_at(i):
        batch = tiny.batch(i)
        return batch | {"y": batch["y"] * 1e6} if i == 2 else batch

    with MetricLogger(tmp_path, "tiny", total=3) as logger:
        options = {"steps": 3, "key": jax.random.key(0), "logger": logger}
        state = train(jax.jit(step), state, batch_at=batch_at, **options)
    assert (int(state.skipped), int(state.updates)) == (1, 2)


def test_a_broken_streak_does_not_stop_the_run(tmp_path):
    def batch_at(i):
        return nan_from(0)(i) if i % 3 else tiny.batch(i)

    state = run(tmp_path, 13, batch_at=batch_at, max_skipped=3)
    assert int(state.skipped) == 8


def test_evaluations_are_logged_and_none_is_lost_to_a_signal(tmp_path):
    """A step that was saved without its evaluation is evaluated when the run is taken up."""

    def evaluate(step, state):
        return {"held_out": 10.0 * step}

    def batch_at(i):
        if i == 8:  # made while step 7 runs: the run stops at step 8, an evaluation step
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
        return tiny.batch(i)

    options = {"evaluate": evaluate, "eval_every": 4}
    with pytest.raises(SystemExit):
        run(tmp_path, 12, batch_at=batch_at, **options)
    run(tmp_path, 12, **options)
    evaluations = [(row["step"], row["held_out"]) for row in rows(tmp_path) if "held_out" in row]
    assert evaluations == [(4, 40.0), (8, 80.0), (12, 120.0)]


def test_a_logged_metric_is_the_mean_over_its_interval(tmp_path):
    """Steps without a finite value are left out; the rate is logged beside it."""

    def step_fn(state, batch, key):
        value = jnp.where(state == 4, jnp.nan, state.astype(jnp.float32))
        return state + 1, {"value": value}

    with MetricLogger(tmp_path, "mean", total=8) as logger:
        state = train(
            step_fn,
            jnp.int32(0),
            batch_at=lambda i: None,
            steps=8,
            key=jax.random.key(0),
            logger=logger,
            log_every=3,
        )
    assert state == 8
    logged = rows(tmp_path, "mean")
    assert [(row["step"], row["value"]) for row in logged] == [(3, 1.0), (6, 4.0), (8, 6.5)]
    assert all(row["steps_per_second"] > 0 for row in logged)


@pytest.mark.parametrize(("reading", "stepping"), [(0.05, 0.0), (0.0, 0.05)])
def test_the_log_tells_how_long_steps_waited_for_their_batches(tmp_path, reading, stepping):
    """Reading a batch of 50 ms starves a step of no time; a step of 50 ms hides it all."""

    def batch_at(i):
        time.sleep(reading)

    def step_fn(state, batch, key):
        time.sleep(stepping)
        return state + 1, {"value": jnp.float32(0.0)}

    with MetricLogger(tmp_path, "wait", total=12) as logger:
        train(
            step_fn,
            jnp.int32(0),
            batch_at=batch_at,
            steps=12,
            key=jax.random.key(0),
            logger=logger,
            log_every=6,
        )
    waits = [row["batch_wait_seconds"] for row in rows(tmp_path, "wait")]
    if reading:
        assert all(wait > 0.03 for wait in waits)
    else:
        assert waits[1] < 0.01


def test_without_a_checkpointer_signals_are_left_alone(tmp_path):
    seen = []

    def step_fn(state, batch, key):
        seen.append(signal.getsignal(signal.SIGTERM))
        return state, {}

    before = signal.getsignal(signal.SIGTERM)
    with MetricLogger(tmp_path, "x", total=1) as logger:
        train(
            step_fn,
            0,
            batch_at=lambda i: None,
            steps=1,
            key=jax.random.key(0),
            logger=logger,
        )
    assert seen == [before]
