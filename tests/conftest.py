"""The conditions every test runs under.

Eight simulated CPU devices, so that sharding is exercised on any machine; strict dtype promotion
and no rank promotion, so that an integer reward or a silent [B, T] * [B] is an error and not a
wrong number; warnings as errors (pyproject.toml). The environment is set before anything imports
jax, and is inherited by the processes that tests start.
"""

import gc
import os
import signal
from pathlib import Path

from instruct_jax.cli import HOST_DEVICE_FLAGS

REPOSITORY = Path(__file__).resolve().parents[1]
DEVICES = 8

# On an accelerator: INSTRUCT_JAX_TEST_PLATFORM=cuda (or tpu). Not JAX_PLATFORMS itself, which the
# images of TPU machines and notebooks set for everyone.
os.environ["JAX_PLATFORMS"] = os.environ.get("INSTRUCT_JAX_TEST_PLATFORM", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    [
        # Next to nothing is computed here: compiling takes the time, and this a third off it.
        "--xla_backend_optimization_level=0",
        *(f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f),
        f"--xla_force_host_platform_device_count={DEVICES}",
        *HOST_DEVICE_FLAGS,
    ]
)
# Most of the suite's time is compilation; a second run reads it from here (pytest --cache-clear).
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".pytest_cache" / "d" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# The processes that tests start keep their compiled modules, as those of users do: else each of
# them compiles the package anew, for a quarter of a second.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# A shell starts what is in the background with Ctrl-C ignored, and a run that finds it so leaves it
# so; the tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)
# No test may reach for the network: a missing file fails at once, not after retries.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import numpy as np
import pytest

# Every compiled program is some memory maps, of which Linux gives a process 65,530; one more ends
# it in a segmentation fault. The suite has that many programs.
MAPS = Path("/proc/self/maps")
MOST_MAPS = 20_000

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


# Files of tests that take a minute and more, the longest first: begun last, they would keep one
# worker busy while the other has nothing left.
LONGEST = (
    "test_files", "test_quickstart", "test_kills", "test_notebooks", "test_damage", "test_compress",
    "test_ppo_lag", "test_kills_at_files", "test_rewards", "test_effects", "test_launch",
    "test_lengths", "test_ppo_update", "test_meshes", "test_rows_at_the_door", "test_preference",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    def place(item):
        return LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST)

    items.sort(key=place)


@pytest.fixture(autouse=True)
def _same_numpy_seed():
    np.random.seed(0)  # third-party code draws from the global generator


@pytest.fixture(scope="module", autouse=True)
def _few_compiled_programs():
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def rng() -> np.random.Generator:
    """A NumPy generator with the same seed in every test."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and weights: INSTRUCT_JAX_SHARED, else shared/ beside the checkout."""
    path = Path(os.environ.get("INSTRUCT_JAX_SHARED", REPOSITORY.parent / "shared"))
    if not path.is_dir():
        pytest.skip(f"no shared data at {path} (set INSTRUCT_JAX_SHARED)")
    return path
