"""R5: a disk that is full or may not be written to costs the step at hand and nothing before it."""

import errno
import json
import resource
import subprocess
import sys
from contextlib import contextmanager

import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax.errors import StorageError
from instruct_jax.training import checkpoint
from instruct_jax.training.checkpoint import Checkpointer, load_model, save_model
from tests.experiments.scripts import environment

# Orbax leaves callbacks of a failed write to event loops that are closed.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]
SIZE = 1 << 18
ITEMS = {"state": {"w": jnp.arange(SIZE, dtype=jnp.float32), "step": jnp.int32(1)}}


@contextmanager
def files_of_at_most(size):
    """Within it the system refuses to write more than that to any file, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def refuse(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device", "x")


def check_the_step_before(directory):
    with Checkpointer(directory) as checkpointer:
        assert checkpointer.steps == [1]
        items, metadata = checkpointer.restore(ITEMS)
        np.testing.assert_array_equal(items["state"]["w"], ITEMS["state"]["w"])
        assert metadata == {"good": True}
        checkpointer.save(2, ITEMS, {"good": "again"})
    with Checkpointer(directory) as checkpointer:
        assert checkpointer.steps == [1, 2]


@pytest.mark.parametrize("size", [0, 100, 50_000], ids=["at once", "metadata", "data"])
def test_a_full_disk_leaves_the_step_before(tmp_path, size):
    """Whichever write it is that fails."""
    directory = tmp_path / "checkpoints"
    with Checkpointer(directory) as checkpointer:
        checkpointer.save(1, ITEMS, {"good": True})
    with (
        pytest.raises(StorageError, match=str(directory)) as error,
        files_of_at_most(size),
        Checkpointer(directory) as checkpointer,
    ):
        checkpointer.save(2, ITEMS, {"good": False})
        checkpointer.wait()
    text = str(error.value)
    assert "\n" not in text and f"{4 * SIZE + 4:,} bytes are needed" in text and "are free" in text
    assert error.value.exit_code == 5
    check_the_step_before(directory)


@pytest.mark.parametrize("point", ["manifest", "begin"])
def test_an_error_at_the_first_or_the_last_write_leaves_the_step_before(
    tmp_path, monkeypatch, point
):
    directory = tmp_path / "checkpoints"
    with Checkpointer(directory) as checkpointer:
        checkpointer.save(1, ITEMS, {"good": True})
    if point == "manifest":
        monkeypatch.setattr(checkpoint, "write_manifest", refuse)
    else:
        steps = checkpoint.ocp.training.Checkpointer
        monkeypatch.setattr(steps, "save_checkpointables_async", refuse)
    with (
        pytest.raises(StorageError, match="No space left"),
        Checkpointer(directory) as checkpointer,
    ):
        checkpointer.save(2, ITEMS, {"good": False})
        checkpointer.save(3, ITEMS, {"good": False})
    monkeypatch.undo()
    check_the_step_before(directory)


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="file/checkpoints: not written"):
        Checkpointer(tmp_path / "file" / "checkpoints")
    with pytest.raises(StorageError, match="file/model: not written"):
        save_model(tmp_path / "file" / "model", {"w": jnp.ones(3)}, {})


def test_a_model_that_cannot_be_replaced_is_still_there_or_refused(tmp_path):
    """Never half of one and half of another."""
    save_model(tmp_path / "model", ITEMS["state"], {})
    with pytest.raises(StorageError), files_of_at_most(50_000):
        save_model(tmp_path / "model", {"w": ITEMS["state"]["w"] + 1, "step": jnp.int32(2)}, {})
    try:
        params, _ = load_model(tmp_path / "model")
    except checkpoint.CheckpointError:
        return
    np.testing.assert_array_equal(params["w"], ITEMS["state"]["w"])


SCRIPT = """
import dataclasses, errno, resource, sys
from pathlib import Path
from instruct_jax import cli

@dataclasses.dataclass(frozen=True)
class Config:
    what: str = "log"

def main(config, run):
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    if config.what == "log":
        from instruct_jax.training.metrics import MetricLogger
        logger = MetricLogger(run.workdir, "x", total=100)
        for i in range(100):
            logger.write(i, {"loss": 1.0})
    raise OSError(getattr(errno, config.what), "as it is called", str(run.workdir / "y"))

if __name__ == "__main__":
    cli.run(main, Config, default="presets.py")
"""


@pytest.mark.parametrize("what", ["log", "EROFS", "EACCES"])
def test_a_script_says_it_in_one_line_and_ends_with_code_5(tmp_path, repository, what):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "presets.py").write_text("def get_config():\n    return {}\n")
    done = subprocess.run(
        [sys.executable, "script.py", f"--config.what={what}", "--workdir=run"],
        cwd=tmp_path,
        env=environment(repository),
        capture_output=True,
        text=True,
    )
    *_, last = done.stderr.splitlines()
    assert done.returncode == 5, done.stderr
    assert last.startswith("error: run") and "bytes are free" in last and "--workdir" in last
    assert "Traceback" not in done.stderr
    json.loads((tmp_path / "run" / "config.json").read_text() if what == "log" else "{}")
