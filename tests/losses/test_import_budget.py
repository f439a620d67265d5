"""The losses are usable alone: they need jax and chex and nothing else that is heavy."""

import subprocess
import sys

HEAVY = (
    "datasets", "flax", "grain", "matplotlib", "ml_collections", "optax", "orbax", "qwix",
    "safetensors", "tensorboardX", "tokenizers", "torch", "tqdm", "transformers",
)  # fmt: skip


def run(code, repository):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, timeout=600
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


# Runs in a bare interpreter. NumPy only beside the losses: the published vectors are the arguments.
EACH_FUNCTION_ONCE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HEAVY:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
try:
    import optax
except ImportError:
    pass
else:
    sys.exit("the block does not hold")

import numpy as np
from instruct_jax.losses import *
from instruct_jax import losses
from tests.fixtures.losses.reader import read

called = set()
for path in FIXTURES:
    for vector in read(path):
        if vector.function in called:
            continue
        arrays = [np.asarray(x, np.float32) if x.dtype == np.float64 else x
                  for x in vector.arguments]
        result = globals()[vector.function](*arrays, **{
            k: np.asarray(x, np.float32) if getattr(x, "dtype", None) == np.float64 else x
            for k, x in vector.keywords.items()})
        parts = result if isinstance(result, tuple) else (result,)
        parts = [part for part in parts if part is not None]
        for part, expected in zip(parts, vector.expected, strict=True):
            np.testing.assert_allclose(part, expected, rtol=1e-4, atol=1e-4)
        called.add(vector.function)
functions = {n for n in losses.__all__ if not isinstance(getattr(losses, n), type)}
print(sorted(functions - called))
"""


def test_every_loss_works_where_only_jax_and_chex_are_installed(repository):
    """T57: every other library raises ImportError, and each function gives its published value."""
    folder = repository / "tests" / "fixtures" / "losses"
    fixtures = [str(p) for p in sorted(folder.glob("*.json")) if p.stem not in ("schema", "trl")]
    code = f"HEAVY, FIXTURES = {HEAVY!r}, {fixtures!r}\n{EACH_FUNCTION_ONCE}"
    done = run(code, repository)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_importing_the_package_imports_nothing(repository):
    code = "import sys; before = set(sys.modules); import instruct_jax; " + (
        "print(sorted(set(sys.modules) - before))"
    )
    assert run(code, repository).stdout.strip() == "['instruct_jax']"
