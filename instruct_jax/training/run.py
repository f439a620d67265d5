"""A training run between its steps: where it is taken up, what is saved, logged and judged, how
it ends. The steps themselves are loop.py.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar

import jax

from instruct_jax.errors import ConfigError, EvaluationError, NonFiniteError, RewardError
from instruct_jax.training import hosts
from instruct_jax.training.checkpoint import Checkpointer
from instruct_jax.training.keeping import Best
from instruct_jax.training.ledger import Ledger
from instruct_jax.training.metrics import MetricLogger
from instruct_jax.training.signals import StopSignal
from instruct_jax.training.state import TrainState

State = TypeVar("State")
Evaluate = Callable[[int, State], Mapping[str, float]]
# The metrics of a step -> why the run is to end after it, or None
StopWhen = Callable[[Mapping[str, float]], str | None]


class BestBy(NamedTuple):
    """What the best evaluation is the best by."""

    metric: str
    mode: Literal["min", "max"] = "min"


class Start(NamedTuple):
    """Where a run begins, `productive` seconds of steps behind it."""

    step: int
    state: Any
    key: jax.Array
    evaluation_owed: bool = False
    productive: float = 0.0
    fault: str | None = None
    ended: Mapping[str, float] = MappingProxyType({})
    best: Best | None = None


def newest(
    checkpointer: Checkpointer | None, state: Any, key: jax.Array, inputs: Mapping[str, str]
) -> Start:
    """The newest checkpoint, placed as `state` and `key` are; these at step 0 where none is.

    ConfigError where it was trained with other `inputs`.
    """
    if checkpointer is None or checkpointer.latest_step is None:
        return Start(0, state, key)
    step = checkpointer.latest_step
    items, metadata = checkpointer.restore({"state": state, "key": key})
    before = metadata.get("inputs", {})  # of an earlier version: it noted none
    if changed := [name for name, found in inputs.items() if before.get(name, found) != found]:
        raise ConfigError(
            f"{checkpointer.directory}: step {step} was trained with another"
            f" {' and '.join(changed)} than is given now; put it back, choose another --workdir,"
            " or --overwrite"
        )
    best = Best(*metadata["best"]) if metadata.get("best") else None
    return Start(
        step,
        items["state"],
        items["key"],
        metadata["evaluation_owed"],
        metadata.get("productive_seconds", 0.0),
        metadata.get("fault"),
        metadata.get("ended", {}),
        # Gone where what was newer than this step was set aside: then there is one of it to come.
        best if best is not None and best.step in checkpointer.steps else None,
    )


def fault_of(state: Any, metrics: Mapping[str, jax.Array]) -> str | None:
    """Why no model may be made of the `state` that a run ends with, or None."""
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, TrainState))
    trained = [x for x in leaves if isinstance(x, TrainState)]
    for steps, skipped in hosts.fetch([(x.step, x.skipped) for x in trained]):
        if skipped == steps:
            return f"none of the {steps} updates of the run was made; {_CAUSES}"
    row = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
    if row.get("skipped_in_a_row") and (found := _not_finite(row)):
        return f"the run ends with an update that was not made, {found}; {_CAUSES}"
    return None


_CAUSES = (
    "no model is written: look at the learning rate, the optimizer's values and the rows or rewards"
)


def _not_finite(row: Mapping[str, float]) -> str:
    names = [name for name, value in row.items() if not math.isfinite(value)]
    return f"since {', '.join(names)} is not finite" if names else ""


@dataclass
class TrainingRun:
    """What happens to a state between two steps, and where it is told."""

    steps: int
    key: jax.Array
    logger: MetricLogger
    ledger: Ledger
    checkpointer: Checkpointer | None
    evaluation: Evaluate[Any] | None
    eval_every: tuple[int, ...]
    max_skipped: int
    inputs: Mapping[str, str]
    fault: str | None = None
    """why no model may be made of the state, once all steps are done"""
    by: BestBy | None = None
    best: Best | None = None
    stop_when: StopWhen | None = None
    ended: Mapping[str, float] | None = None
    """the metrics of the step that the run ended after before its time"""

    def ends(self, metrics: Mapping[str, jax.Array]) -> str | None:
        """Why the run ends after the step of these metrics; None where it goes on."""
        if self.stop_when is None:
            return None
        row = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        reason = self.stop_when(row)
        if reason is not None:
            self.ended = {name: value for name, value in row.items() if math.isfinite(value)}
        return reason

    def report(self, done: int, state: Any, row: Mapping[str, float]) -> None:
        """A step ended, and with it a log interval where `row` is not empty.

        NonFiniteError, with the state saved, where too many steps in a row made no update.
        """
        self.ledger.step(done)
        if not row:
            return
        self.logger.write(done, row)
        in_a_row = row.get("skipped_in_a_row", 0)
        if in_a_row >= self.max_skipped:
            found = _not_finite(row) or "since what would come of them is not finite or too large"
            self.fault = f"{in_a_row:.0f} steps in a row made no update, {found}"
            self.save(done, state, wait=True)
            raise NonFiniteError(
                f"step {done}: {self.fault}; the parameters are as before them; {_CAUSES}"
            )

    @contextmanager
    def kept(self, done: int, state: Any) -> Iterator[None]:
        """Within it a RewardError leaves the state of before the step saved: nothing is lost."""
        try:
            yield
        except RewardError:
            if done:
                self.save(done, state, wait=True)
            raise

    def evaluation_due(self, done: int) -> bool:
        """Whether an evaluation follows step `done`."""
        due = any(every > 0 and done % every == 0 for every in self.eval_every)
        return self.evaluation is not None and due

    def evaluate(self, done: int, state: Any) -> None:
        """Evaluates, where there is something to evaluate with, and saves what is the best so far.

        Where that cannot be done the state is saved first, and it is tried again when the run is
        taken up.
        """
        if self.evaluation is None:
            return
        try:
            with self.ledger.aside():
                row = self.evaluation(done, state)
            better = self.by is not None and self._is_better(done, row)
        except (EvaluationError, ConfigError):
            self.save(done, state, wait=True, evaluation_owed=True)
            raise
        self.logger.write(done, row)
        if better:
            self.save(done, state)

    def _is_better(self, done: int, row: Mapping[str, float]) -> bool:
        """Whether this is the best so far, which is then noted. ConfigError without the metric."""
        assert self.by is not None
        if self.by.metric not in row:
            raise ConfigError(
                f"best_metric {self.by.metric!r} is not among what is evaluated: "
                f"{', '.join(sorted(row)) or 'nothing'}; the state is saved"
            )
        value, before = float(row[self.by.metric]), self.best
        if before is not None and before.metric != self.by.metric:
            before = None
        sign = 1 if self.by.mode == "max" else -1
        better = before is None or sign * value > sign * before.value
        if not math.isfinite(value) or not better:
            return False
        self.best = Best(done, self.by.metric, value)
        return True

    def at_best(self, done: int, state: Any) -> Any:
        """The state of the best step, where that is not the last."""
        assert self.best is not None
        if self.checkpointer is None or self.best.step == done:
            return state
        return self.checkpointer.restore({"state": state}, step=self.best.step)[0]["state"]

    def save(
        self, done: int, state: Any, *, wait: bool = False, evaluation_owed: bool = False
    ) -> None:
        """Saves in the background, or waits for the disk; without a checkpointer nothing."""
        if self.checkpointer is None:
            return
        productive = round(self.ledger.productive, 3)
        metadata = {
            "evaluation_owed": evaluation_owed,
            "productive_seconds": productive,
            "inputs": dict(self.inputs),
            "fault": self.fault,
            "ended": dict(self.ended or {}),
            "best": None if self.best is None else list(self.best),
        }
        items = {"state": state, "key": self.key}
        with self.ledger.aside():
            best = None if self.best is None else self.best.step
            self.checkpointer.save(done, items, metadata, best=best)
            if wait:
                self.checkpointer.wait()

    def stop(self, done: int, state: Any, signal: StopSignal) -> NoReturn:
        """Saves and ends the run; an evaluation that is due is made when it is taken up."""
        self.save(done, state, wait=True, evaluation_owed=self.evaluation_due(done))
        name = signal.name or "a signal to another process"
        self.logger.note(
            f"stopped by {name} at step {done} of {self.steps}, saved;"
            " the same command goes on from here"
        )
        raise Stopped(name)


class Stopped(Exception):
    """By a signal, with everything saved."""


@contextmanager
def accounted(ledger: Ledger, logger: MetricLogger) -> Iterator[None]:
    """Closes the ledger with why the steps ended; where they were stopped, so does the program."""
    reason = "done"
    try:
        yield
    except Stopped as stopped:
        reason = str(stopped)
        raise SystemExit(0) from None
    except BaseException as error:
        reason = type(error).__name__
        raise
    finally:
        if (account := ledger.close(reason)) and account.tells:
            logger.note(str(account))
