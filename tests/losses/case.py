"""What a test call is: its arrays, its hyper-parameters, its oracle and what it promises."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
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
      slope: the derivative of each entry of the result with respect to that entry of the one
        differentiable argument, where a part of it is held constant: differences of the oracle
        would not know that.
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
    slope: Callable[..., np.ndarray] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Every hyper-parameter of the call by name, those at their defaults as well."""
        parameters = inspect.signature(self.function).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        given = defaults | self.hyper
        return {k: v for k, v in given.items() if k not in ARRAYS and k not in self.masks}

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


ARRAYS = ("where", "bootstrap")
"""Keyword arguments that are arrays: inputs of a call, not settings."""


def hidden_entries(case: Case, name: str) -> np.ndarray | None:
    """Which entries of an input the mask of the case hides: bool, its shape; None for none.

    An entry of an array with fewer axes than the mask, such as the score of a response, is hidden
    with everything that the mask has under it.
    """
    x, where = np.asarray(case.inputs[name]), case.masks.get("where")
    if where is None or name == "where" or not x.ndim or name in case.shared:
        return None
    if "next_token" in case.function_name:  # entry t of the loss is of token t + 1
        where = where.copy()
        where[:, 0] = False
        if name != "tokens":
            where = np.roll(where, -1, axis=1)
    if case.function_name == "labeler_ranking_loss" and name == "scores":
        where = where.any(axis=1)
    if x.ndim < where.ndim:
        where = where.any(axis=tuple(range(x.ndim, where.ndim)))
    if x.shape[: where.ndim] != where.shape:
        return None
    return np.broadcast_to(~where.reshape(where.shape + (1,) * (x.ndim - where.ndim)), x.shape)


def behind_the_mask(case: Case, number: float, integer: int) -> dict[str, np.ndarray]:
    """The inputs of the case with what its mask hides replaced."""
    out = dict(case.inputs)
    for name, x in case.inputs.items():
        hidden = hidden_entries(case, name)
        if hidden is not None and x.dtype != bool:
            fill = number if np.issubdtype(x.dtype, np.floating) else integer
            out[name] = np.where(hidden, np.asarray(fill, x.dtype), x)
    return out


def littered(case: Case) -> Case:
    """The case with 1e30 and -100 behind its mask: what an oracle must not see."""
    inputs = behind_the_mask(case, 1e30, -100)
    arrays, masks = ({name: inputs[name] for name in of} for of in (case.arrays, case.masks))
    return replace(case, arrays=arrays, masks=masks)


def with_mask(case: Case) -> Case:
    """A case without a mask as one with: the oracle sees its old arrays behind the mask."""
    shape = leaves(case.call(case.oracle, case.inputs))[0].shape
    shift = int("next_token" in case.function_name)
    where = Draw(case.name).where(*shape[:-1], shape[-1] + shift)
    name = case.name + ("+where" if "/" in case.name else "/where")
    masked = replace(case, name=name, masks=case.masks | {"where": where})

    def seen(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arrays: np.ndarray, where: np.ndarray, **keywords: Any) -> Any:
            hidden = [hidden_entries(masked, name) for name in case.arrays]
            known = [
                x if h is None else np.where(h, case.arrays[name], x)
                for name, x, h in zip(case.arrays, arrays, hidden, strict=True)
            ]
            parts = [np.where(where[:, shift:] if shift else where, x, 0.0)
                     for x in leaves(function(*known, **keywords))]  # fmt: skip
            return parts[0] if len(parts) == 1 else tuple(parts)

        return call

    slope = None if case.slope is None else seen(case.slope)
    return replace(masked, oracle=seen(case.oracle), slope=slope)


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
    if case.slope is not None:
        slopes = case.call(case.slope, case.inputs)
        return cotangent(slopes.shape) * slopes
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
        """Ragged: rows of different lengths, the first one full and the last one empty."""
        lengths = self.rng.integers(1, shape[-1], shape[:-1])
        lengths.flat[0], lengths.flat[-1] = shape[-1], 0
        return np.arange(shape[-1]) < lengths[..., None]
