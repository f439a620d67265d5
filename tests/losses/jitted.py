"""The public losses under jit: `from tests.losses.jitted import ranking_loss`.

Compiling a loss whole takes a third of the time of compiling its operations one by one. That jit
and no jit agree is checked in `test_cases.py`.
"""

import functools

import jax
import numpy as np

from instruct_jax import losses


@functools.cache
def _compiled(function, static):
    return jax.jit(functools.partial(function, **dict(static)))


def jitted(function):
    """Calls the function compiled, with every keyword that is no array held static."""

    @functools.wraps(function)
    def call(*args, **keywords):
        arrays = {k: v for k, v in keywords.items() if isinstance(v, jax.Array | np.ndarray)}
        if any(isinstance(v, dict) for v in keywords.values()):
            return function(*args, **keywords)  # no key of the cache
        static = tuple(sorted((k, v) for k, v in keywords.items() if k not in arrays))
        return _compiled(function, static)(*args, **arrays)

    return call


FUNCTIONS = {
    name: jitted(getattr(losses, name))
    for name in losses.__all__
    if not isinstance(getattr(losses, name), type)
}


def __getattr__(name):
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    raise AttributeError(name)
