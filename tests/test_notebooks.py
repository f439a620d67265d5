"""The notebooks run from the first cell to the last, and are the scripts they are paired with."""

import os
from pathlib import Path

import jupytext
import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from instruct_jax.cli import HOST_DEVICE_FLAGS

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "colab").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))

SECONDS_PER_CELL = 600  # of a machine that is busy with the rest of the suite
XLA_FLAGS = (
    "--xla_force_host_platform_device_count=2",
    *HOST_DEVICE_FLAGS,
    "--xla_backend_optimization_level=0",
)


def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def own_kernel() -> AsyncKernelManager:
    """The kernel of the interpreter that runs this, whatever kernels the machine has installed."""
    return AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))


def kernel_environment(folder: Path) -> dict[str, str]:
    """Two CPU devices, as in the notebook itself, under the strict rules of the suite."""
    return {
        **os.environ,
        "INSTRUCT_JAX_SMOKE": "1",
        "IPYTHONDIR": str(folder / "ipython"),
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(folder),
        "XLA_FLAGS": " ".join(XLA_FLAGS),
    }


def test_every_notebook_has_a_script_and_every_script_a_notebook():
    assert [path.stem for path in NOTEBOOKS] == [path.stem for path in SCRIPTS] != []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_notebook_is_its_script(script):
    """After a change of the script: jupytext --update --to ipynb colab/NAME.py"""
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    assert cells(notebook) == cells(jupytext.read(script))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_output_is_stored(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell.source for cell in code if cell.outputs or cell.execution_count is not None]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs_from_the_first_cell_to_the_last(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        km=own_kernel(),
        timeout=SECONDS_PER_CELL,
        resources={"metadata": {"path": str(ROOT)}},
    )
    client.execute(cleanup_kc=True, env=kernel_environment(tmp_path))
    printed = [
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream" and output.name == "stderr"
    ]
    assert "Warning" not in "".join(printed)
