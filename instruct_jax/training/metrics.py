"""What a run reports: a JSONL file, which is the truth; TensorBoard beside it; a line of progress.

Each line of the file is written whole, so a killed run leaves a readable file; taken up again at a
checkpoint, it forgets the lines after it, so the file reads as if the run had never stopped. Only
process 0 writes.
"""

import itertools
import json
import math
import socket
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
from tensorboardX import SummaryWriter
from tqdm import tqdm

from instruct_jax.files import json_line, write_bytes

PLAIN_LINE_SECONDS = 2.0  # off a terminal, at most one line in this time


class MetricLogger:
    """Writes `workdir/NAME.jsonl` and `workdir/tensorboard/NAME`; prints those in `show`.

    `beside` names files of `workdir` that are added to by `append_rows`: they are rewound with it.
    """

    def __init__(
        self,
        workdir: str | Path,
        name: str,
        *,
        total: int,
        show: Sequence[str] = ("loss", "grad_norm"),
        beside: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.total = total
        self.show = tuple(show)
        self.path = Path(workdir) / f"{name}.jsonl"
        self._beside = [Path(workdir) / file for file in beside]
        self._active = jax.process_index() == 0
        self._board_dir = Path(workdir) / "tensorboard" / name
        self._board: SummaryWriter | None = None
        self._bar: tqdm | None = None
        self._begun: tuple[float, int] | None = None
        self._printed = -math.inf

    def resume(self, step: int) -> None:
        """Forgets what an earlier process wrote after `step`; called before the first `write`.

        Says that a program is compiled next, which is all that is seen of a run for some time.
        """
        if not self._active:
            return
        if step < self.total:
            self.note(f"compiling step {step + 1} of {self.total}")
        for path in (self.path, *self._beside):
            _rewind(path, step)
        self._open_board(step)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records scalars after `step` steps, if any. A value that is not finite is null."""
        if not self._active or not metrics:
            return
        values = {name: float(value) for name, value in metrics.items()}
        row: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        row |= {name: v if math.isfinite(v) else None for name, v in values.items()}
        append_rows(self.path, [row])
        board = self._board or self._open_board(None)
        for name, value in values.items():
            board.add_scalar(name, value, step)
        self._progress(step, values)

    def note(self, text: str) -> None:
        """One line for the person who watches, without breaking the progress bar."""
        if self._active:
            tqdm.write(f"{self.name}: {text}", file=sys.stderr)

    def close(self) -> None:
        """Flushes everything."""
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _open_board(self, purge_after: int | None) -> SummaryWriter:
        # Made late: a run that fails before its first step leaves no files.
        purge = None if purge_after is None else purge_after + 1
        self._board = SummaryWriter(str(self._board_dir), purge_step=purge)
        self._leave_out_the_host()
        return self._board

    def _leave_out_the_host(self) -> None:
        """Renames what the writer has just opened, whose name ends with that of this machine: the
        directory of a run is published, and the file stays the one that is written to.
        """
        host = f".{socket.gethostname()}"
        for path in self._board_dir.glob("events.out.tfevents.*"):
            if path.name.endswith(host):
                stem = path.name.removesuffix(host)
                names = (path.with_name(f"{stem}.{i}") for i in itertools.count())
                path.rename(next(name for name in names if not name.exists()))

    def _progress(self, step: int, values: Mapping[str, float]) -> None:
        # An evaluation has none of those in `show`: the first of its own say how it went.
        names = [name for name in self.show if name in values] or list(values)[: len(self.show)]
        shown = {name: f"{values[name]:.4g}" for name in names}
        if sys.stderr.isatty():
            if self._bar is None:
                self._bar = tqdm(total=self.total, initial=step, desc=self.name, file=sys.stderr)
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        # From the first write on, so that compilation does not count.
        begun, first = self._begun = self._begun or (now, step)
        if now - self._printed < PLAIN_LINE_SECONDS and step < self.total:
            return
        self._printed = now
        text = " ".join(f"{name} {value}" for name, value in shown.items())
        if step > first:
            rate = (step - first) / max(now - begun, 1e-9)
            text += f" | {rate:.3g} steps/s"
            if step < self.total:
                text += f" | {_clock((self.total - step) / rate)} left"
        print(f"{self.name} {step}/{self.total} {text}", file=sys.stderr, flush=True)


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds lines of JSON to a file, which is made where there is none; each has its `step`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("".join(map(json_line, rows)))


def _rewind(path: Path, step: int) -> None:
    """Forgets the lines after `step`, and those that are none of ours."""
    if not path.exists():
        return
    before = path.read_bytes()
    kept = [line for line in before.splitlines() if _step_of(line) <= step]
    after = b"".join(line + b"\n" for line in kept)
    if after != before:
        write_bytes(path, after)


def _step_of(line: bytes) -> float:
    """The step of a line of ours; of another, as a killed run may leave, it is never reached."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf
    return step if type(step) is int else math.inf


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
