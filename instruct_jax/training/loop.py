"""The loop of every stage: batch, step, log, evaluate, save; and how a run stops and goes on.

Step i is a function of the state, of `batch_at(i)` and of `fold_in(key, i)`, so a run taken up at a
checkpoint goes on bit for bit as if it had not stopped (same versions, devices and mesh). The host
waits for the device once a log interval; the next batch is prepared in a thread while a step runs.

SIGTERM (a pre-emption) or Ctrl-C lets the step finish, saves and exits with code 0; a second one
ends the run at once. Of several processes one that gets a signal stops all of them, after the same
step, the one after it.
"""

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar

import jax

from instruct_jax.errors import ConfigError, EvaluationError, NonFiniteError, RewardError
from instruct_jax.training import hosts
from instruct_jax.training.checkpoint import Checkpointer
from instruct_jax.training.hosts import AnyProcess
from instruct_jax.training.keeping import Best
from instruct_jax.training.ledger import Ledger
from instruct_jax.training.metrics import MetricLogger
from instruct_jax.training.signals import StopSignal, catch_stop_signals
from instruct_jax.training.state import TrainState

State = TypeVar("State")
StepFn = Callable[[State, Any, jax.Array], tuple[State, Mapping[str, jax.Array]]]
Evaluate = Callable[[int, State], Mapping[str, float]]
# The metrics of a step -> why the run is to end after it, or None
StopWhen = Callable[[Mapping[str, float]], str | None]


class BestBy(NamedTuple):
    """What the best evaluation is the best by."""

    metric: str
    mode: Literal["min", "max"] = "min"


def train(
    step_fn: StepFn[State],
    state: State,
    *,
    batch_at: Callable[[int], Any],
    steps: int,
    key: jax.Array,
    logger: MetricLogger,
    checkpointer: Checkpointer | None = None,
    save_every: int = 0,
    evaluate: Evaluate[State] | None = None,
    eval_every: int | Sequence[int] = 0,
    log_every: int = 1,
    max_skipped: int = 20,
    inputs: Mapping[str, str] = MappingProxyType({}),
    stop_when: StopWhen | None = None,
    best: BestBy | None = None,
    on_best: Callable[[Best, State], None] | None = None,
) -> State:
    """Runs steps 0 to `steps` - 1, from the newest checkpoint if there is one; the last state.

    With a `checkpointer` the state is saved every `save_every` steps (0: never), at the end and on
    a signal, which then raises SystemExit(0). `evaluate(step, state)` is logged every `eval_every`
    steps (0: never; of several, whenever one of them is due), before the save, so that none is
    lost. Logged metrics are means over the steps of a log
    interval; `batch_wait_seconds` is how long a step waited for its batch: 0 where that keeps up.

    Raises NonFiniteError once `max_skipped` steps in a row made no update (`skipped_in_a_row` of
    `apply_gradients`), and at the end of a run of any length none of whose updates was made, or
    whose last one was not since something is not finite; the state, which they did not touch, is
    saved first, and a run that is taken up with nothing left to do raises it again (R21). `inputs`
    are hashes by name of what the steps read beside the state: a run is taken up with the same
    alone (R20).

    `stop_when` may end the run after a step, as if that were the last; taken up again, the run goes
    on where the same metrics would not end it any more. With `best` the state is also saved after
    every evaluation that is the best so far, and stays; `on_best` sees it at the end.
    """
    if best is not None and evaluate is None:
        raise ConfigError(f"best_metric {best.metric!r}: nothing is evaluated in this run")
    start = _newest(checkpointer, state, key, inputs)
    if start.step and checkpointer is not None:
        logger.note(f"resumed from step {start.step} of {steps} ({checkpointer.directory})")
    logger.resume(start.step)
    ended = stop_when(start.ended) if stop_when is not None and start.ended else None
    ahead = range(start.step, start.step if ended else steps)
    active = checkpointer is not None and len(ahead) > 0 and jax.process_index() == 0
    ledger = Ledger(
        logger.path.parent, logger.name, step=start.step, productive=start.productive, active=active
    )
    every = (eval_every,) if isinstance(eval_every, int) else tuple(eval_every)
    run = _Run(steps, start.key, logger, ledger, checkpointer, evaluate, every, max_skipped, inputs)
    run.by, run.stop_when, run.ended = best, stop_when, start.ended if ended else None
    state, run.fault, run.best, done = start.state, start.fault, start.best, start.step
    signals = nullcontext(StopSignal()) if checkpointer is None else catch_stop_signals()
    with _accounted(ledger, logger):
        if start.evaluation_owed:
            run.evaluate(start.step, state)
        with signals as stop, closing(_ahead(batch_at, ahead)) as batches:
            interval, anyone = _Interval(), AnyProcess()
            for i, batch, waited in batches:
                with run.kept(i, state):
                    state, metrics = step_fn(state, batch, jax.random.fold_in(start.key, i))
                done = i + 1
                ended = run.ends(metrics)
                last = done == steps or ended is not None
                run.fault = _fault(state, metrics) if last else None
                interval.add(metrics, waited)
                due = done % log_every == 0 or last
                run.report(done, state, interval.end() if due else {})
                if anyone.ask(bool(stop)):
                    run.stop(done, state, stop)
                if run.evaluation_due(done):
                    run.evaluate(done, state)
                    interval.restart_clock()
                if save_every and done % save_every == 0:
                    run.save(done, state)
                if ended is not None:
                    break
        run.save(done, state, wait=True)
        if run.fault is not None:
            raise NonFiniteError(f"step {done}: {run.fault}")
    if ended is not None:
        logger.note(f"ended after step {done} of {steps}: {ended}")
    if run.best is not None and on_best is not None:
        on_best(run.best, run.at_best(done, state))
    return state


class _Start(NamedTuple):
    """Where a run begins, `productive` seconds of steps behind it."""

    step: int
    state: Any
    key: jax.Array
    evaluation_owed: bool = False
    productive: float = 0.0
    fault: str | None = None
    ended: Mapping[str, float] = MappingProxyType({})
    best: Best | None = None


def _newest(
    checkpointer: Checkpointer | None, state: Any, key: jax.Array, inputs: Mapping[str, str]
) -> _Start:
    """The newest checkpoint, placed as `state` and `key` are; these at step 0 where none is.

    ConfigError where it was trained with other `inputs`.
    """
    if checkpointer is None or checkpointer.latest_step is None:
        return _Start(0, state, key)
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
    return _Start(
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


def _fault(state: Any, metrics: Mapping[str, jax.Array]) -> str | None:
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
class _Run:
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
        raise _Stopped(name)


class _Stopped(Exception):
    """By a signal, with everything saved."""


@contextmanager
def _accounted(ledger: Ledger, logger: MetricLogger) -> Iterator[None]:
    """Closes the ledger with why the steps ended; where they were stopped, so does the program."""
    reason = "done"
    try:
        yield
    except _Stopped as stopped:
        reason = str(stopped)
        raise SystemExit(0) from None
    except BaseException as error:
        reason = type(error).__name__
        raise
    finally:
        if (account := ledger.close(reason)) and account.tells:
            logger.note(str(account))


def _ahead(
    batch_at: Callable[[int], Any], steps: range
) -> Generator[tuple[int, Any, float], None, None]:
    """(i, batch_at(i), seconds that it was waited for) for i in `steps`; the next batch is made in
    a thread meanwhile.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        upcoming = [pool.submit(batch_at, i) for i in steps[:1]]
        for i in steps:
            began = time.monotonic()
            batch = upcoming.pop().result()
            waited = time.monotonic() - began
            upcoming = [pool.submit(batch_at, j) for j in range(i + 1, min(i + 2, steps.stop))]
            yield i, batch, waited


class _Interval:
    """The metrics of the steps since the last line of the log, on the device until then."""

    def __init__(self) -> None:
        self._metrics: list[Mapping[str, jax.Array]] = []
        self._waited = 0.0
        self.restart_clock()

    def restart_clock(self) -> None:
        self._timed = len(self._metrics)
        self._began = time.monotonic()

    def add(self, metrics: Mapping[str, jax.Array], waited: float) -> None:
        self._metrics.append(metrics)
        self._waited += waited

    def end(self) -> dict[str, float]:
        """Means over the steps, without values that are not finite; the last value of a streak."""
        rows = jax.device_get(self._metrics)
        means = {name: _finite_mean([float(row[name]) for row in rows]) for name in rows[-1]}
        if "skipped_in_a_row" in means:
            means["skipped_in_a_row"] = float(rows[-1]["skipped_in_a_row"])
        elapsed = time.monotonic() - self._began
        means["steps_per_second"] = (len(rows) - self._timed) / max(elapsed, 1e-9)
        if "tokens" in means:
            means["tokens_per_second"] = means["tokens"] * means["steps_per_second"]
        means["batch_wait_seconds"] = self._waited / len(rows)
        self._metrics, self._waited = [], 0.0
        self.restart_clock()
        return means


def _finite_mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan
