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
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from types import MappingProxyType
from typing import Any, TypeVar

import jax

from instruct_jax.errors import ConfigError, NonFiniteError
from instruct_jax.training.checkpoint import Checkpointer
from instruct_jax.training.hosts import AnyProcess
from instruct_jax.training.keeping import Best
from instruct_jax.training.ledger import Ledger
from instruct_jax.training.metrics import MetricLogger
from instruct_jax.training.run import (
    BestBy,
    Evaluate,
    StopWhen,
    TrainingRun,
    accounted,
    fault_of,
    newest,
)
from instruct_jax.training.signals import StopSignal, catch_stop_signals

State = TypeVar("State")
StepFn = Callable[[State, Any, jax.Array], tuple[State, Mapping[str, jax.Array]]]


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
    start = newest(checkpointer, state, key, inputs)
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
    run = TrainingRun(
        steps, start.key, logger, ledger, checkpointer, evaluate, every, max_skipped, inputs,
        start.fault, best, start.best, stop_when, start.ended if ended else None,
    )  # fmt: skip
    state, done = start.state, start.step
    signals = nullcontext(StopSignal()) if checkpointer is None else catch_stop_signals()
    with accounted(ledger, logger):
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
                run.fault = fault_of(state, metrics) if last else None
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
