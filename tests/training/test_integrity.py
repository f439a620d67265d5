"""R4: a damaged checkpoint is never used silently."""

import logging
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax.errors import CheckpointError
from instruct_jax.training.checkpoint import (
    DAMAGED,
    Checkpointer,
    load_model,
    save_model,
    set_damaged_aside,
)
from instruct_jax.training.integrity import MANIFEST, UNFINISHED, find_damage, write_manifest

ITEMS = {"state": {"w": jnp.arange(4096.0), "b": jnp.ones(3)}, "key": {"k": jnp.int32(3)}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory of steps 1 and 2."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpointer(directory) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, ITEMS, {"step": step})
    return directory


@pytest.fixture
def run(saved, tmp_path):
    """A copy to damage."""
    return shutil.copytree(saved, tmp_path / "checkpoints")


def files(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def flip(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(data)


def test_what_was_saved_is_intact(run):
    assert find_damage(run / "1") is None
    assert find_damage(run / "2") is None
    assert set_damaged_aside(run) == {}


def test_a_step_in_a_folder_of_another_number_is_not_taken_up(run, caplog):
    """It would go on as if it had made steps that it has not, or make some twice."""
    (run / "2").rename(run / "9")
    with caplog.at_level(logging.WARNING), Checkpointer(run) as checkpointer:
        assert checkpointer.latest_step == 1
    assert "step 9: it is step 2, in a folder that says 9: rename it" in caplog.text
    (run.with_name(DAMAGED) / "9").rename(run / "2")
    with Checkpointer(run) as checkpointer:
        assert checkpointer.latest_step == 2
    (run / "1").rename(run / "0")
    (run / "2").rename(run / "1")
    with pytest.raises(CheckpointError, match=r"step 1: it is step 2, .* step 0: it is step 1"):
        Checkpointer(run)


def test_none_of_fifty_flipped_bits_goes_unseen(run):
    rng = np.random.default_rng(0)
    paths = [path for path in files(run / "2") if path.stat().st_size]
    for i in range(50):
        path = paths[i % len(paths)]
        before = path.read_bytes()
        flip(path, rng)
        reason = find_damage(run / "2")
        assert reason is not None
        assert path.name in reason or path.name == MANIFEST
        path.write_bytes(before)
    assert find_damage(run / "2") is None


@pytest.mark.parametrize("damage", ["truncate", "delete", "zero", "append"])
def test_no_damage_of_a_whole_file_goes_unseen(run, damage):
    for path in files(run / "2"):
        before = path.read_bytes()
        if damage == "delete":
            path.unlink()
        elif damage == "append":
            path.write_bytes(before + b"x")
        elif not before:
            continue
        else:
            path.write_bytes(before[:-1] if damage == "truncate" else bytes(len(before)))
        assert find_damage(run / "2") is not None, path
        path.write_bytes(before)
    (run / "2" / "stranger").write_text("x")
    assert find_damage(run / "2") == "stranger is not in the manifest"


def test_the_newest_intact_step_is_used_and_the_reason_is_named(run, caplog):
    flip(next(path for path in files(run / "2" / "state") if path.stat().st_size > 1000),
         np.random.default_rng(1))  # fmt: skip
    with caplog.at_level(logging.WARNING), Checkpointer(run) as checkpointer:
        assert checkpointer.steps == [1]
        items, metadata = checkpointer.restore(ITEMS)
        assert metadata == {"step": 1}
        np.testing.assert_array_equal(items["state"]["w"], ITEMS["state"]["w"])
        checkpointer.save(2, ITEMS, {"step": "again"})
    assert "step 2: state/" in caplog.text
    assert "was changed; set aside" in caplog.text
    assert (run.with_name(DAMAGED) / "2").is_dir()
    with Checkpointer(run) as checkpointer:
        assert checkpointer.restore(ITEMS)[1] == {"step": "again"}


def test_where_no_step_is_intact_the_run_refuses_and_moves_nothing(run):
    rng = np.random.default_rng(2)
    for step in ("1", "2"):
        flip(run / step / "_CHECKPOINT_METADATA", rng)
    with pytest.raises(CheckpointError, match=r"no step is intact \(step 2: .*; step 1: ") as error:
        Checkpointer(run)
    assert error.value.exit_code == 4
    assert sorted(path.name for path in run.iterdir()) == ["1", "2"]


def test_a_save_that_was_killed_before_its_manifest_is_not_a_step(run):
    (run / "2" / MANIFEST).unlink()
    assert find_damage(run / "2") == UNFINISHED
    with Checkpointer(run) as checkpointer:
        assert checkpointer.steps == [1]
    (run / "1" / MANIFEST).unlink()
    with Checkpointer(run) as checkpointer:
        assert checkpointer.latest_step is None, "the first save of all: a fresh start"


def test_a_damaged_model_is_refused(tmp_path):
    save_model(tmp_path / "model", {"w": jnp.arange(1000.0)}, {})
    path = max(files(tmp_path / "model"), key=lambda path: path.stat().st_size)
    flip(path, np.random.default_rng(3))
    with pytest.raises(CheckpointError, match=f"{path.name} was changed"):
        load_model(tmp_path / "model")


def test_a_step_of_format_1_has_no_manifest_and_is_read(run):
    """R18."""
    step = run / "2"
    metadata = step / "_CHECKPOINT_METADATA"
    text = metadata.read_text()
    assert '"format":2' in text.replace(" ", "")
    metadata.write_text(
        text.replace('"format":2', '"format":1').replace('"format": 2', '"format": 1')
    )
    (step / MANIFEST).unlink()
    with Checkpointer(run) as checkpointer:
        assert checkpointer.restore(ITEMS)[1] == {"step": 2}


def test_a_manifest_does_not_list_itself(tmp_path):
    (tmp_path / "a").write_text("a")
    for _ in range(2):
        write_manifest(tmp_path)
        assert find_damage(tmp_path) is None
    assert MANIFEST not in (tmp_path / MANIFEST).read_text()
