"""A function of the user's, named on a command line by its file and its name."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from instruct_jax.errors import ConfigError


def python_function(text: str, *, field: str) -> Callable[..., Any]:
    """The function that "FILE.py:NAME" names; the file is run. Raises ConfigError, which says that
    the configuration's `field` named it.
    """
    file, colon, name = text.rpartition(":")
    if not colon or not file or not name:
        raise ConfigError(f"{field}: {text!r}: expected FILE.py:NAME")
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"{field}: {file}: there is no such file")
    spec = importlib.util.spec_from_file_location(f"users_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{field}: {file}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file does
        raise ConfigError(f"{field}: {file}: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        there = [n for n, value in vars(module).items() if callable(value) and n[0] != "_"]
        raise ConfigError(
            f"{field}: {file}: no function {name!r} here; there are {', '.join(there) or 'none'}"
        )
    return found
