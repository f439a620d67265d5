"""R17: what is kept of a run's checkpoints, by the run itself and by hand."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax.errors import CheckpointError
from instruct_jax.training.checkpoint import Checkpointer
from instruct_jax.training.integrity import MANIFEST
from instruct_jax.training.keeping import (
    PINS,
    damage_of,
    pin,
    pinned_steps,
    prune,
    saved_steps,
    step_numbers,
)

ITEMS = {"x": {"w": jnp.arange(64.0)}}


def save(directory, *steps, keep=100):
    with Checkpointer(directory, keep=keep) as checkpointer:
        for step in steps:
            checkpointer.save(step, ITEMS)


def spoil(directory, step):
    path = directory / str(step) / "_CHECKPOINT_METADATA"
    path.write_bytes(path.read_bytes()[:-1])


def test_a_listing_says_what_is_there(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "2" / MANIFEST).unlink()
    pin(tmp_path, [1])
    first, second = saved_steps(tmp_path)
    assert (first.number, first.finished, first.pinned) == (1, True, True)
    assert (second.number, second.finished, second.pinned) == (2, False, False)
    assert first.size > 64 * 4
    with pytest.raises(CheckpointError, match="no checkpoints here"):
        saved_steps(tmp_path / "nowhere")


def test_a_pinned_step_survives_the_run(tmp_path):
    save(tmp_path, 1, 2, keep=2)
    pin(tmp_path, [1])
    save(tmp_path, 3, 4, 5, keep=2)
    assert step_numbers(tmp_path) == [1, 4, 5]
    assert pin(tmp_path, [1], pinned=False) == set()
    save(tmp_path, 6, keep=2)
    assert step_numbers(tmp_path) == [5, 6]


def test_what_cannot_be_pinned_is_told(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="no step 2"):
        pin(tmp_path, [1, 2])
    (tmp_path / PINS).write_text("{")
    with pytest.raises(CheckpointError, match=f"{PINS}: expected a list of steps"):
        pinned_steps(tmp_path)


def test_the_newest_intact_step_outlives_newer_damaged_ones(tmp_path):
    save(tmp_path, 1, 2, 3, 4)
    spoil(tmp_path, 3)
    spoil(tmp_path, 4)
    assert prune(tmp_path, keep=1) == [1]
    assert step_numbers(tmp_path) == [2, 3, 4]
    with pytest.raises(ValueError, match="expected 1 or more"):
        prune(tmp_path, keep=0)


def leave_half(directory, step, rng):
    """What a run that is killed leaves of a save: files being written, or all but the manifest."""
    name = f"{step}.orbax-checkpoint-tmp" if rng.integers(2) else str(step)
    half = directory / name
    shutil.copytree(directory / str(step_numbers(directory)[-1]), half)
    (half / MANIFEST).unlink(missing_ok=True)


def test_no_random_sequence_of_saves_kills_and_pruning_loses_the_last_good_or_a_pinned_step(
    tmp_path,
):
    rng = np.random.default_rng(0)
    directory, step, pins = tmp_path / "checkpoints", 0, set()
    save(directory, step)
    for _ in range(40):
        act = rng.choice(["save", "kill", "spoil", "prune", "pin"])
        present = step_numbers(directory)
        intact = [s for s in present if damage_of(directory / str(s)) is None]
        if act == "save":
            step += 1
            save(directory, step, keep=int(rng.integers(1, 4)))
        elif act == "kill":
            step += 1
            leave_half(directory, step, rng)
        elif act == "spoil" and len(intact) > 1 and intact[-1] not in pins:
            spoil(directory, intact[-1])
        elif act == "prune":
            prune(directory, keep=int(rng.integers(1, 4)))
            assert max(intact) in step_numbers(directory)
        elif act == "pin" and intact:
            pins.add(int(rng.choice(intact)))
            pin(directory, pins)
        left = set(step_numbers(directory))
        assert pins <= left
        assert any(damage_of(directory / str(s)) is None for s in left)
