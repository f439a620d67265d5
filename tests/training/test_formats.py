"""R18: what an older version saved is still taken up, and what a newer one saved is refused.

tests/fixtures/checkpoints/format_N/4 is step 4 of `run_tiny.run(..., 4, mesh="data:1")` as the
version that wrote format N left it: a whole training state and its key. A new format adds a folder;
none is ever written anew.
"""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from instruct_jax.errors import CheckpointError
from instruct_jax.training import checkpoint
from instruct_jax.training.integrity import MANIFEST, write_manifest
from tests.training.run_tiny import run

FIXTURES = Path(__file__).parents[1] / "fixtures" / "checkpoints"
FORMATS = range(1, checkpoint.FORMAT + 1)
STEPS = 4


def saved_by(number, workdir):
    """A run directory with the checkpoint of that format."""
    shutil.copytree(FIXTURES / f"format_{number}", workdir / "checkpoints")
    return workdir


def never(i):
    raise AssertionError("a step was made again")


@pytest.fixture(scope="module")
def today(tmp_path_factory):
    """The state after the same steps by this version."""
    return jax.device_get(run(tmp_path_factory.mktemp("today"), STEPS))


def test_every_format_there_has_been_has_a_checkpoint():
    assert sorted(path.name for path in FIXTURES.iterdir()) == [f"format_{n}" for n in FORMATS]


@pytest.mark.parametrize("number", FORMATS)
@pytest.mark.parametrize("mesh", ["data:1", "data:2,fsdp:2,tensor:2"])
def test_a_run_saved_in_an_older_format_is_taken_up(tmp_path, today, number, mesh):
    """Its state is today's to 1e-5: parameters, moments, average, counters; and it goes on."""
    workdir = saved_by(number, tmp_path)
    state = jax.device_get(run(workdir, STEPS, mesh=mesh, batch_at=never))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state, today)
    assert int(run(workdir, STEPS + 2, mesh=mesh).updates) == STEPS + 2


def test_a_format_of_the_future_is_refused_by_its_number(tmp_path):
    """Not taken for damage, and not set aside: an update of the program reads it."""
    workdir = saved_by(checkpoint.FORMAT, tmp_path)
    step = workdir / "checkpoints" / str(STEPS)
    metadata = step / "_CHECKPOINT_METADATA"
    record = json.loads(metadata.read_text())
    record["custom_metadata"]["format"] = 99
    metadata.write_text(json.dumps(record))
    (step / MANIFEST).unlink()
    write_manifest(step)
    with pytest.raises(
        CheckpointError, match="checkpoint format 99, this version reads 1 to 2"
    ) as e:
        run(workdir, STEPS + 2)
    assert e.value.exit_code == 4 and step.is_dir()
