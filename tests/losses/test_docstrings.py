"""The docstrings are the reference: their examples run, and every public name has one."""

import doctest
import importlib
import pkgutil

import pytest

from instruct_jax import losses
from tests.losses.jitted import FUNCTIONS

MODULES = sorted(m.name for m in pkgutil.iter_modules(losses.__path__) if m.name[0] != "_")


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module):
    module = importlib.import_module(f"instruct_jax.losses.{module}")
    compiled = {name: f for name, f in FUNCTIONS.items() if hasattr(module, name)}
    failed, attempted = doctest.testmod(module, extraglobs=compiled)
    assert attempted
    assert not failed


@pytest.mark.parametrize(
    "name", [n for n in losses.__all__ if not isinstance(getattr(losses, n), type)]
)
def test_every_public_function_documents_arguments_returns_and_shows_an_example(name):
    text = getattr(losses, name).__doc__
    for part in ("Args:", "Returns:", ">>> "):
        assert part in text, f"{name} lacks {part}"


def test_public_names_are_listed_in_order_and_exist():
    assert losses.__all__ == sorted(losses.__all__)
    assert all(hasattr(losses, name) for name in losses.__all__)
