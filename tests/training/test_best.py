"""The best step by a metric, the end of a run before its time, and evaluations that fail."""

import json

import jax
import numpy as np
import pytest

from instruct_jax.errors import ConfigError, EvaluationError
from instruct_jax.training.checkpoint import Checkpointer
from instruct_jax.training.keeping import Best, best_step, prune, saved_steps
from instruct_jax.training.loop import train
from instruct_jax.training.metrics import MetricLogger
from instruct_jax.training.optim import adamw
from instruct_jax.training.run import BestBy
from instruct_jax.training.state import init_state, make_train_step
from tests.training import tiny

TX = adamw(1e-2)
STEP = jax.jit(make_train_step(tiny.loss_fn, TX))
# Of steps 1 to 10; the best is at 4, and again at 9.
FIGURES = [5.0, 4.0, np.nan, 1.0, 3.0, 2.0, 6.0, 7.0, 1.0, 2.0]

BY = BestBy("figure")


class Killed(Exception):
    """The end of the process, for a test."""


def run(workdir, steps=10, *, figures=FIGURES, by=BY, every=1, killed=None, **more):
    """What was told of the best, and the last state."""
    told = []

    def look(step, state):
        if step == killed:
            raise Killed
        return {"figure": figures[step - 1]}

    def best(found, state):
        told.append((found, jax.device_get(state.params)))

    with (
        Checkpointer(workdir / "checkpoints") as checkpointer,
        MetricLogger(workdir, "tiny", total=steps) as logger,
    ):
        state = train(
            STEP, init_state(tiny.init(jax.random.key(0)), TX), batch_at=tiny.batch, steps=steps,
            key=jax.random.key(1), logger=logger, checkpointer=checkpointer, save_every=1,
            evaluate=look, eval_every=every, best=by, on_best=best, **more,
        )  # fmt: skip
    return told, state


def of_step(step):
    state = init_state(tiny.init(jax.random.key(0)), TX)
    for i in range(step):
        state, _ = STEP(state, tiny.batch(i), jax.random.fold_in(jax.random.key(1), i))
    return jax.device_get(state.params)


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def numbers(workdir):
    return [step.number for step in saved_steps(workdir / "checkpoints")]


def test_the_best_step_stays_beside_the_last_ones_and_is_told_at_the_end(tmp_path):
    """Of equals the first; what is not finite is no best."""
    ((found, params),), _ = run(tmp_path)
    assert found == Best(4, "figure", 1.0) and equal(params, of_step(4))
    assert numbers(tmp_path) == [4, 9, 10]
    assert best_step(tmp_path / "checkpoints") == found
    ((found, params),), _ = run(tmp_path / "largest", by=BestBy("figure", "max"))
    assert found.step == 8 and equal(params, of_step(8))


@pytest.mark.parametrize("killed", [2, 5, 8, 10])
def test_a_killed_run_tells_of_the_same_best(tmp_path, killed):
    """R1: also where the better one is still to come, or the best is long saved."""
    with pytest.raises(Killed):
        run(tmp_path, killed=killed)
    ((found, params),), _ = run(tmp_path)
    assert found == Best(4, "figure", 1.0) and equal(params, of_step(4))
    again, _ = run(tmp_path)  # with nothing left to do
    assert again[0][0] == found and numbers(tmp_path) == [4, 9, 10]


def test_pruning_spares_the_best_step(tmp_path):
    """R17."""
    run(tmp_path)
    assert prune(tmp_path / "checkpoints", keep=1) == [9]
    assert numbers(tmp_path) == [4, 10]
    assert [step.best for step in saved_steps(tmp_path / "checkpoints")] == ["figure 1", ""]


def test_an_improvement_is_saved_whatever_is_saved_else(tmp_path):
    run(tmp_path, every=2, figures=[0, 5.0, 0, 4.0, 0, 3.0, 0, 4.0, 0, 4.0])
    assert 6 in numbers(tmp_path)


def test_a_metric_that_is_not_evaluated_is_told_with_those_that_are(tmp_path):
    """The state is saved, and with the right name the run goes on from there."""
    with pytest.raises(ConfigError, match=r"best_metric 'loss' is not among .*: figure; the state"):
        run(tmp_path, by=BestBy("loss"), every=3)
    assert numbers(tmp_path)[-1] == 3
    ((found, _),), _ = run(tmp_path, every=3)
    assert found.step == 9
    rows = [json.loads(x) for x in (tmp_path / "tiny.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "figure" in row] == [3, 6, 9]


def test_a_failing_evaluation_loses_no_step_and_is_made_again(tmp_path):
    class Failing(list):
        def __getitem__(self, i):
            raise EvaluationError("the user's")

    with pytest.raises(EvaluationError):
        run(tmp_path, figures=Failing(), every=5)
    assert numbers(tmp_path)[-1] == 5
    run(tmp_path, every=5)
    rows = [json.loads(x) for x in (tmp_path / "tiny.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "figure" in row] == [5, 10]


def test_a_run_that_is_ended_by_its_metrics_stays_so_until_they_would_not_end_it(tmp_path):
    """Saved, once; a rerun does nothing; with a larger limit it goes on to the same bits."""

    def above(limit):
        return lambda row: f"absolute above {limit}" if row["absolute"] > limit else None

    calls = []

    def first_above(limit):
        def stop(row):
            calls.append(row)
            return above(limit)(row) if len(calls) >= 4 else None

        return stop

    told, state = run(tmp_path, stop_when=first_above(0.0))
    assert int(state.step) == 4 and equal(state.params, of_step(4)) and told[0][0].step == 4
    before = sorted(p.stat().st_mtime_ns for p in (tmp_path / "checkpoints").rglob("*"))
    _, state = run(tmp_path, stop_when=above(0.0))
    assert int(state.step) == 4
    assert sorted(p.stat().st_mtime_ns for p in (tmp_path / "checkpoints").rglob("*")) == before
    _, state = run(tmp_path, stop_when=above(1e9))
    assert int(state.step) == 10 and equal(state.params, of_step(10))
