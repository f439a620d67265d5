"""What a test call is: its arrays, its hyper-parameters, its oracle and what it promises."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from instruct_jax import losses


@dataclass(frozen=True)
class Case:
    """One call of a public function.

    Attributes:
      name: the function, a slash, and what is special about the call.
      arrays: positional arguments by name, float64, int32 or bool, in order.
      masks: keyword arguments that are arrays.
      hyper: keyword arguments that are plain values.
      differentiable: arguments whose gradient must match the oracle's.
      stopped: arguments whose gradient must be exactly 0.
      shared: arguments without a batch axis; "all" where nothing has one.
      time: arguments whose axis 1 is time, so that masked steps may be appended.
    """

    name: str
    oracle: Callable[..., Any]
    arrays: dict[str, np.ndarray]
    masks: dict[str, np.ndarray] = field(default_factory=dict)
    hyper: dict[str, Any] = field(default_factory=dict)
    differentiable: tuple[str, ...] = ()
    stopped: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    time: tuple[str, ...] = ()

    @property
    def function_name(self) -> str:
        return self.name.split("/")[0]

    @property
    def function(self) -> Callable[..., Any]:
        return getattr(losses, self.function_name)

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        return self.arrays | self.masks

    def call(self, function: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        positional = [inputs[name] for name in self.arrays]
        keywords = {name: inputs[name] for name in self.masks}
        return function(*positional, **keywords, **self.hyper)


def leaves(result: Any) -> list[np.ndarray]:
    """The arrays of a result, be it an array, a tuple or a NamedTuple; None was not asked for."""
    parts = result if isinstance(result, tuple) else (result,)
    return [np.asarray(x) for x in parts if x is not None]


def cotangent(shape: tuple[int, ...]) -> np.ndarray:
    """Weights that tell the entries of an output apart."""
    return np.linspace(0.5, 1.5, int(np.prod(shape, dtype=int))).reshape(shape)


def weighted_sum(result: Any) -> Any:
    """A scalar that weighs every output entry differently."""
    parts = result if isinstance(result, tuple) else (result,)
    return sum((x * cotangent(x.shape).astype(x.dtype)).sum() for x in parts if x is not None)


def finite_differences(case: Case, name: str, step: float = 1e-5) -> np.ndarray:
    """Central differences of the oracle, one entry at a time."""
    base = np.asarray(case.inputs[name])
    out = np.zeros(base.shape)
    for index in np.ndindex(base.shape):
        values = []
        for sign in (1, -1):
            moved = base.copy()
            moved[index] += sign * step
            inputs = case.inputs | {name: moved}
            values.append(weighted_sum(case.call(case.oracle, inputs)))
        out[index] = (values[0] - values[1]) / (2 * step)
    return out


class Draw:
    """Random arguments of the usual kinds, the same for a name at every run."""

    def __init__(self, name: str):
        self.rng = np.random.default_rng(zlib.crc32(name.encode()))

    def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        return scale * self.rng.standard_normal(shape)

    def log_probs(self, *shape: int) -> np.ndarray:
        return -self.rng.exponential(1.5, shape)

    def near(self, x: np.ndarray, scale: float = 0.3) -> np.ndarray:
        return x + scale * self.rng.standard_normal(x.shape)

    def tokens(self, *shape: int, vocab: int = 7) -> np.ndarray:
        return self.rng.integers(0, vocab, shape).astype(np.int32)

    def where(self, *shape: int) -> np.ndarray:
        """Ragged: rows of different lengths, the first one full."""
        lengths = self.rng.integers(1, shape[-1], shape[:-1])
        lengths.flat[0] = shape[-1]
        return np.arange(shape[-1]) < lengths[..., None]
