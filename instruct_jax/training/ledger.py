"""The ledger of a run: when it started, resumed and stopped, what that cost, its goodput (R16).

workdir/ledger.log has a line of JSON for every process that worked on the run and one for how it
ended. The last line of a live run says how far it is; it is written over in place after every step,
so a killed run leaves the step that it had reached, and what the next one does again is known
exactly.

    goodput = time of the steps that stand / time since the first start

The time of a step is that of the loop around it without evaluation and saving; the first step of a
process, which compiles, counts as long as its second. Steps that were lost, the time between two
processes and everything before the first step are in the denominator alone.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from instruct_jax.files import read_lines

LEDGER = "ledger.log"
RUNNING = "running"
TELLING_SECONDS = 600.0


class Account(NamedTuple):
    """What a ledger comes to."""

    step: int
    processes: int  # that worked on the run, one after another
    lost_steps: int
    productive: float  # seconds
    wall: float  # seconds, from the first start to the last line
    reason: str  # why the last process stopped; RUNNING where it is at work or was killed

    @property
    def goodput(self) -> float:
        """The share of the time that went into steps that stand."""
        return self.productive / self.wall if self.wall > 0 else 0.0

    @property
    def tells(self) -> bool:
        """Whether it says more than that a short run begins with compiling."""
        return self.processes > 1 or self.wall > TELLING_SECONDS

    def __str__(self) -> str:
        text = f"goodput {self.goodput:.1%} of {_clock(self.wall)}"
        if self.processes > 1:
            text += f", {self.processes - 1} restarts, {self.lost_steps} steps done twice"
        return text


class Ledger:
    """The ledger of the part `name` of the run in `workdir`; where not `active` it writes nothing.

    `productive` are the seconds of the steps before `step`, as the checkpoint of that step has
    them.
    """

    def __init__(
        self, workdir: Path, name: str, *, step: int, productive: float = 0.0, active: bool = True
    ) -> None:
        self.path, self.name = workdir / LEDGER, name
        self._active = active
        self._step, self._productive = step, productive
        self._compiled: float | None = None  # how long the first step took
        self._steps = 0
        self._file: int | None = None
        if active:
            self._open()
        self._clock = time.monotonic()

    @property
    def productive(self) -> float:
        """Seconds of the steps that stand."""
        return self._productive

    def step(self, done: int) -> None:
        """A step ended: `done` of them now."""
        now = time.monotonic()
        seconds, self._clock = now - self._clock, now
        self._steps += 1
        if self._steps == 1:
            self._compiled = seconds
        else:
            self._productive += seconds
        if self._steps == 2:
            assert self._compiled is not None
            self._productive += min(self._compiled, seconds)
        self._step = done
        if self._file is not None:
            os.pwrite(self._file, self._state(RUNNING), self._at)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within it time belongs to no step."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._clock += time.monotonic() - began

    def close(self, reason: str) -> Account | None:
        """The process stops, and why."""
        if self._file is None:
            return None
        os.pwrite(self._file, self._state(reason), self._at)
        os.fsync(self._file)
        os.close(self._file)
        self._file = None
        return account(self.path.parent, self.name)

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        before = [row for row in read(self.path.parent) if row["name"] == self.name]
        reached = before[-1]["step"] if before else 0
        line = {"event": "resume" if before else "start", "name": self.name}
        line |= {"step": self._step, "lost": max(reached - self._step, 0), "time": _now()}
        line["process"] = os.getpid()
        flags = os.O_RDWR | os.O_CREAT
        self._file = os.open(self.path, flags, 0o644)
        self._at = os.lseek(self._file, 0, os.SEEK_END)
        text = (json.dumps(line) + "\n").encode()
        os.pwrite(self._file, text, self._at)
        self._at += len(text)
        os.pwrite(self._file, self._state(RUNNING), self._at)

    def _state(self, reason: str) -> bytes:
        # Of one length whatever it says, since it is written over.
        line = {"event": "state", "name": self.name, "step": self._step}
        line |= {"productive": round(self._productive, 3), "time": _now(), "reason": reason[:80]}
        return (json.dumps(line).ljust(255) + "\n").encode()


def read(workdir: Path) -> list[dict[str, Any]]:
    """The lines of the ledger of `workdir` that are whole, none where it has none."""
    return [row for row in read_lines(workdir / LEDGER) if _is_ours(row)]


def _is_ours(row: dict[str, Any]) -> bool:
    numbers = ["step", "time", "productive" if row.get("event") == "state" else "lost"]
    return all(type(row.get(name)) in (int, float) for name in numbers) and all(
        isinstance(row.get(name), str) for name in ("event", "name")
    )


def account(workdir: Path, name: str | None = None) -> Account | None:
    """What the ledger of `workdir` comes to, of the part `name` or the last one."""
    rows = read(workdir)
    if rows and name is None:
        name = rows[-1]["name"]
    rows = [row for row in rows if row["name"] == name]
    if not rows:
        return None
    opened = [row for row in rows if row["event"] != "state"]
    return Account(
        step=rows[-1]["step"],
        processes=len(opened),
        lost_steps=sum(row["lost"] for row in opened),
        productive=rows[-1].get("productive", 0.0),
        wall=rows[-1]["time"] - rows[0]["time"],
        reason=str(rows[-1].get("reason", RUNNING)),
    )


def _now() -> float:
    return round(time.time(), 3)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
