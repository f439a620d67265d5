"""The losses are usable alone: they need jax and chex and nothing else that is heavy."""

import subprocess
import sys

import pytest

HEAVY = (
    "datasets", "flax", "ml_collections", "optax", "orbax", "qwix", "safetensors",
    "tensorboardX", "tokenizers", "torch", "tqdm", "transformers",
)  # fmt: skip


def run(code, repository):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, timeout=120
    )


def test_importing_the_losses_loads_no_model_optimizer_or_data_library(repository):
    """T57."""
    code = (
        "import sys, instruct_jax.losses\n"
        f"print(sorted(set({HEAVY}) & set(sys.modules)))\n"
        "print(sorted(m for m in sys.modules if m.startswith('instruct_jax.')"
        " and not m.startswith('instruct_jax.losses')))"
    )
    done = run(code, repository)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]


def test_the_losses_work_where_only_jax_and_chex_are_installed(repository):
    """T57: every other library is made impossible to import."""
    code = (
        "import sys\n"
        f"for name in {HEAVY}: sys.modules[name] = None\n"
        "import jax.numpy as jnp\n"
        "from instruct_jax.losses import ranking_loss\n"
        "print(ranking_loss(jnp.array([[2.0, 1.0, 0.0]]), jnp.array([[0, 1, 2]]))[0])"
    )
    done = run(code, repository)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(0.25115046, rel=1e-5)


def test_importing_the_package_imports_nothing(repository):
    code = "import sys; before = set(sys.modules); import instruct_jax; " + (
        "print(sorted(set(sys.modules) - before))"
    )
    assert run(code, repository).stdout.strip() == "['instruct_jax']"
