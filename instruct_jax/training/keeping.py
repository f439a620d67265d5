"""What stands in a directory of checkpoints: which steps, whether intact, which stay for good.

A pinned step is never deleted, neither by a run that goes on nor by `prune` (R17), nor is the best
one, which the newest names.
"""

import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from instruct_jax.errors import CheckpointError
from instruct_jax.files import read_object, write_json
from instruct_jax.training import ocp
from instruct_jax.training.integrity import MANIFEST, UNFINISHED, find_damage

PINS = "pinned.json"


class Step(NamedTuple):
    """One saved step, as it lies on disk; whether its bits are right only `damage_of` can say."""

    number: int
    path: Path
    size: int  # bytes
    written: float  # seconds since the epoch
    finished: bool
    pinned: bool
    best: str = ""  # by what it is the best of the run, as "valid_loss 1.234"


class Best(NamedTuple):
    """The step of the best value so far of a metric."""

    step: int
    metric: str
    value: float

    def __str__(self) -> str:
        return f"{self.metric} {self.value:.4g}"


def step_numbers(directory: Path) -> list[int]:
    """The steps below `directory`, whether or not they are intact, oldest first."""
    names = (path.name for path in directory.iterdir()) if directory.is_dir() else ()
    return sorted(int(name) for name in names if name.isdigit())


def saved_steps(directory: Path) -> list[Step]:
    """All steps of `directory`, oldest first; CheckpointError where there is no such directory."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no checkpoints here")
    pins, best = pinned_steps(directory), best_step(directory)
    steps = []
    for number in step_numbers(directory):
        path = directory / str(number)
        files = [file.stat() for file in path.rglob("*") if file.is_file()]
        steps.append(
            Step(
                number,
                path,
                size=sum(stat.st_size for stat in files),
                written=max((stat.st_mtime for stat in files), default=0.0),
                finished=(path / MANIFEST).exists(),
                pinned=number in pins,
                best=str(best) if best is not None and best.step == number else "",
            )
        )
    return steps


def damage_of(path: Path) -> str | None:
    """Why the step or model in `path` cannot be trusted, or None; format 1 has no manifest.

    A step says its number; one in a folder of another is damage: a run would go on from there as if
    it had made steps that it has not, or make some twice.
    """
    reason = find_damage(path)
    if reason not in (None, UNFINISHED):
        return reason
    try:
        record = ocp.checkpointables_metadata(str(path)).custom_metadata
    except Exception as error:
        return reason or f"its record cannot be read ({type(error).__name__})"
    if not isinstance(record, dict):
        return reason
    if reason is not None and record.get("format") != 1:
        return reason
    step = record.get("step")  # earlier ones do not say
    if step is not None and path.name.isdigit() and int(path.name) != step:
        return f"it is step {step}, in a folder that says {path.name}: rename it"
    return None


def best_step(directory: Path) -> Best | None:
    """The best step, as the newest finished one says; None where it does not, or it is gone."""
    numbers = step_numbers(directory)
    finished = [n for n in numbers if (directory / str(n) / MANIFEST).exists()]
    if not finished:
        return None
    try:
        record = ocp.checkpointables_metadata(str(directory / str(finished[-1]))).custom_metadata
        best = Best(*record["metadata"]["best"])
    except Exception:  # of the many layers below, of a damaged step, or of one without a best
        return None
    return best if best.step in numbers else None


def pinned_steps(directory: Path) -> set[int]:
    """The steps that stay; CheckpointError where the file of pins cannot be read."""
    path = directory / PINS
    if not path.is_file():
        return set()
    try:
        pins = json.loads(path.read_text())
        if isinstance(pins, dict):  # older ones are the list alone, and have no hash
            pins = read_object(path, "steps")["steps"]
        return {int(step) for step in pins}
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: expected a list of steps ({error})") from error


def pin(directory: Path, steps: Collection[int], *, pinned: bool = True) -> set[int]:
    """Pins steps, or unpins them; the pins after it. CheckpointError for a step that is not there.

    A run that is going on reads the pins when it starts.
    """
    if unknown := set(steps) - set(step_numbers(directory)):
        raise CheckpointError(f"{directory}: no step {', '.join(map(str, sorted(unknown)))}")
    before = pinned_steps(directory)
    after = before | set(steps) if pinned else before - set(steps)
    write_json(directory / PINS, {"steps": sorted(after)})
    return after


def prune(directory: Path, *, keep: int) -> list[int]:
    """Deletes all finished steps but the newest `keep`, the pinned ones and the best; which.

    The newest that is intact to the bit is never deleted, nor is anything newer than it: what
    cannot be trusted does not count as kept. ValueError for `keep` below 1.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}, expected 1 or more")
    kept, deleted = 0, []
    for step in reversed(saved_steps(directory)):
        if kept >= keep:
            if not step.pinned and not step.best:
                # Renamed first: a directory half deleted must not look like a step.
                doomed = step.path.with_name(f"{step.number}.deleting")
                os.replace(step.path, doomed)
                shutil.rmtree(doomed)
                deleted.append(step.number)
        elif damage_of(step.path) is None:
            kept += 1
    return sorted(deleted)
