"""Orbax's interface for checkpoints, imported when one is first touched.

It takes a fifth of a script's start, for which a mistake on the command line should not wait.
"""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    return getattr(importlib.import_module("orbax.checkpoint.experimental.v1"), name)
