"""The structure holds: no import runs up or sideways, no loaded file can run code.

The imports are read from the syntax tree, so an import inside a function or under TYPE_CHECKING
counts as well. `ROWS` is the picture of the house: a module imports only from a lower row or from
its own room; `THIRD_PARTY` says which room may know which library.
"""

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "instruct_jax"

ROWS = {
    "errors": -2,  # what a user can get wrong: any room may raise it
    "settings": -1,  # what is said of a configuration's field: any room may have one
    "files": -1,  # small files of JSON: any room may write one
    "paths": -1,  # how paths are written in them
    "losses": 0,
    "data": 0,
    "cli": 0,
    "models": 1,
    "training": 1,
    "sampling": 2,
    "stages": 3,
    "feedback": 3,
    "evaluation": 4,
    "serving": 4,
    "planning": 5,
    "benchmark": 5,
}

# Libraries that only the named rooms may import. Scripts and tests may import anything.
THIRD_PARTY = {
    "flax": {"models"},
    "qwix": {"models"},
    "optax": {"training", "stages"},
    "orbax": {"training"},
    "tensorboardX": {"training"},
    "datasets": {"data"},
    "tokenizers": {"data"},
    "transformers": {"data"},
    "absl": {"cli"},
    "ml_collections": {"cli"},
}
# Rooms that may import only the named libraries, beside the standard library.
ONLY = {
    "errors": set(),
    "losses": {"jax", "chex"},
}
NEVER = {"data": {"jax", "jaxlib", "chex"}}
STANDARD_LIBRARY = sys.stdlib_module_names
SCRIPTS = {"experiments", "colab", "configs", "tests"}

RUNS_CODE_MODULES = {
    "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve", "torch",
}  # fmt: skip
RUNS_CODE_CALLS = {"__import__", "compile", "eval", "exec"}
RUNS_CODE_OPTIONS = {"allow_pickle", "trust_remote_code"}
# Runs in another interpreter, to be measured against; all it loads is what the benchmark wrote.
MAY_IMPORT = {"experiments.benchmark_peers": {"torch"}}


def python_files(*folders: str) -> list[Path]:
    return sorted(f for folder in folders for f in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(source: str, *, module: str, is_package: bool) -> Iterator[str]:
    """Absolute names of all that is imported; `from a import b` gives a.b (b may be a module)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = node.level - 1 if is_package else node.level
                parents = module.split(".")
                base = ".".join([*parents[: len(parents) - up], *filter(None, [base])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def room_of(module: str) -> str | None:
    """The room of a module of the package; None for the package itself."""
    return ([*module.split("."), ""])[1] or None


def wrong_arrows(source: str, *, module: str, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of one module of the package, in words."""
    room = room_of(module)
    problems = []
    if room is not None and room not in ROWS:
        return [f"{module}: {room} has no row; say where it stands"]
    for name in imported_modules(source, module=module, is_package=is_package):
        top = name.split(".")[0]
        if top in SCRIPTS:
            problems.append(f"{module} imports {name}: the package knows no script")
        elif room is None:
            problems.append(f"{module} imports {name}: the package itself imports nothing")
        elif top == PACKAGE:
            target = room_of(name)
            if target is None or target not in ROWS:
                continue  # a name of the package itself, such as __version__
            if target != room and ROWS[target] >= ROWS[room]:
                way = "sideways" if ROWS[target] == ROWS[room] else "up"
                problems.append(f"{module} imports {name}: the arrow runs {way}")
            elif target != room and room in ONLY:
                problems.append(f"{module} imports {name}: {room} must be usable alone")
        elif top in THIRD_PARTY and room not in THIRD_PARTY[top]:
            problems.append(f"{module} imports {name}: only {sorted(THIRD_PARTY[top])} know {top}")
        elif top in NEVER.get(room, ()):
            problems.append(f"{module} imports {name}: {room} never imports {top}")
        elif room in ONLY and top not in ONLY[room] and top not in STANDARD_LIBRARY:
            problems.append(f"{module} imports {name}: {room} imports only {sorted(ONLY[room])}")
    return problems


def code_runners(source: str, *, module: str) -> list[str]:
    """Places where a file that was loaded could run code."""
    problems = []

    def report(node: ast.AST, what: str) -> None:
        problems.append(f"{module}:{getattr(node, 'lineno', 0)}: {what}")

    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in RUNS_CODE_CALLS:
                report(node, f"{node.func.id}()")
        elif isinstance(node, ast.keyword) and node.arg in RUNS_CODE_OPTIONS:
            report(node.value, node.arg)
        elif isinstance(node, ast.Constant) and node.value in RUNS_CODE_OPTIONS:
            report(node, str(node.value))
        for name in names:
            if name.split(".")[0] in RUNS_CODE_MODULES - MAY_IMPORT.get(module, set()):
                report(node, f"import {name}")
    return problems


def test_imports_run_downwards():
    problems = [
        problem
        for path in python_files(PACKAGE)
        for problem in wrong_arrows(
            path.read_text(), module=module_name(path), is_package=path.name == "__init__.py"
        )
    ]
    assert not problems, "\n".join(problems)


def test_configs_hold_values_only():
    """Their own, and those of the file beside them that they name (`runpy.run_path`)."""
    problems = [
        f"{path.name} imports {name}"
        for path in python_files("configs")
        for name in imported_modules(
            path.read_text(), module=module_name(path), is_package=path.name == "__init__.py"
        )
        if name.split(".")[0] not in ("ml_collections", "runpy", "pathlib")
    ]
    assert not problems, "\n".join(problems)


def test_scripts_do_not_import_tests():
    problems = [
        f"{module_name(path)} imports {name}"
        for path in python_files("experiments", "colab")
        for name in imported_modules(
            path.read_text(), module=module_name(path), is_package=path.name == "__init__.py"
        )
        if name.split(".")[0] in {"tests", "colab"}
    ]
    assert not problems, "\n".join(problems)


def test_no_script_hides_a_standard_module():
    """A script's folder comes first on its path: a select.py there breaks Python itself."""
    names = {path.stem for path in python_files("experiments", "colab")}
    assert not names & STANDARD_LIBRARY


def test_no_loaded_file_can_run_code():
    """R10."""
    problems = [
        problem
        for path in python_files(PACKAGE, "experiments", "configs", "colab")
        for problem in code_runners(path.read_text(), module=module_name(path))
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("instruct_jax.losses.ppo", "from instruct_jax.models import transformer"),
        ("instruct_jax.losses.ppo", "import numpy as np"),
        ("instruct_jax.losses.ppo", "from instruct_jax import errors"),
        ("instruct_jax.data.toyworld.judge", "from instruct_jax.losses import masked_mean"),
        ("instruct_jax.data.toyworld.judge", "def f():\n    import jax.numpy"),
        ("instruct_jax.models.hf", "from ..training import state"),
        ("instruct_jax.models.hf", "from .. import training"),
        ("instruct_jax.training.state", "import instruct_jax.models.transformer as t"),
        ("instruct_jax.training.state", "import flax.linen as nn"),
        ("instruct_jax.stages.ppo", "from instruct_jax.evaluation import win_rate"),
        ("instruct_jax.stages.ppo", "import orbax.checkpoint as ocp"),
        ("instruct_jax.stages.ppo", "from experiments import quickstart"),
        ("instruct_jax.planning.report", "from instruct_jax.benchmark import measure"),
        ("instruct_jax.sampling.sampler", "if TYPE_CHECKING:\n    from ..stages import ppo"),
        ("instruct_jax.unheard_of", ""),
        ("instruct_jax", "import jax"),
    ],
)
def test_an_arrow_that_runs_up_or_sideways_is_seen(module, source):
    assert wrong_arrows(source, module=module, is_package=module == PACKAGE)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("instruct_jax.losses.ppo", "import chex\nimport jax.numpy as jnp\nfrom . import masked"),
        ("instruct_jax.data.toyworld.judge", "import numpy as np\nfrom ..formats import Prompt"),
        ("instruct_jax.data.formats", "from instruct_jax.errors import DataError"),
        ("instruct_jax.stages.ppo", "from instruct_jax import losses, data, models, sampling"),
        ("instruct_jax.cli", "from instruct_jax import __version__\nfrom absl import flags"),
    ],
)
def test_an_arrow_that_runs_down_is_allowed(module, source):
    assert not wrong_arrows(source, module=module)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from torch import load",
        "import torch.nn",
        "eval(text)",
        "exec(text)",
        "np.load(path, allow_pickle=True)",
        "load_dataset(name, trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
    ],
)
def test_a_way_to_run_code_is_seen(source):
    """R10: the check itself."""
    assert code_runners(source, module="m")


def public_packages() -> list[str]:
    return [module_name(p) for p in python_files(PACKAGE) if p.name == "__init__.py"][1:]


@pytest.mark.parametrize("package", public_packages())
def test_public_names_are_listed_by_hand_and_exist(package):
    path = ROOT.joinpath(*package.split("."), "__init__.py")
    tree = ast.parse(path.read_text())
    assert not [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names)
    ], "a star import hides what is public"
    imports = any(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body)
    listed = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and [t.id for t in node.targets if isinstance(t, ast.Name)] == ["__all__"]
    ]
    assert listed or not imports, "names without __all__"
    names = listed[0] if listed else []
    assert len(set(names)) == len(names)
    module = importlib.import_module(package)
    missing = [n for n in names if n.startswith("_") or not hasattr(module, n)]
    assert not missing, f"{package} lists {missing} and does not have them"
