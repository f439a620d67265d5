"""Which window of which stored tensor each parameter is, in both directions.

A `Piece` is one parameter, or one layer of a stacked one, in its stored tensor. Reading copies
stored[index] into the parameter, writing copies the parameter into stored[index]: both use the same
`Piece.place`, so what is written reads back to the bit.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from instruct_jax.models.config import TransformerConfig
from instruct_jax.models.hf.schema import Family, Tensor
from instruct_jax.models.transformer import Params, language_model, scalar_model

Shapes = dict[str, jax.ShapeDtypeStruct]
Index = tuple[slice | np.ndarray, ...]


class Piece(NamedTuple):
    """One parameter, or one layer of it, in the stored tensor `name`."""

    path: str
    layer: int | None
    tensor: Tensor
    name: str
    shape: tuple[int, ...]
    """As stored."""
    limits: tuple[int, ...]
    """The part of the parameter that is stored: vocabulary padding is not."""
    offset: int = 0
    """Where it starts among the outputs of a fused tensor; with `per_head`, its place in a head."""
    head_size: int = 0

    def place(self, window: tuple[slice, ...]) -> Index:
        """`window` of the parameter, within its limits, in the stored tensor (once transposed)."""
        inside = clip(window, self.limits)
        index: list[slice | np.ndarray] = list(inside)
        outputs = inside[-1]
        if self.tensor.per_head:
            rows = np.arange(outputs.start, outputs.stop)
            head, place = np.divmod(rows, self.head_size)
            parts = len(self.tensor.fused)
            index[-1] = (head * parts + self.offset) * self.head_size + place
        elif self.tensor.fused:
            index[-1] = _shift(outputs, self.offset)
        if self.tensor.skip:
            index[0] = _shift(inside[0], self.tensor.skip)
        return tuple(index)

    def oriented(self, stored: np.ndarray) -> np.ndarray:
        """The stored tensor with its axes in our order (a view)."""
        return stored.T if self.tensor.transpose else stored


def parameter_shapes(config: TransformerConfig, kind: str) -> tuple[Params, Shapes]:
    """The parameters of a "language" or "scalar" model: as a tree, and by path."""
    model = (language_model if kind == "language" else scalar_model)(config)
    tree: Any = jax.eval_shape(model.init, jax.random.key(0))
    shapes: Any = flatten_dict(tree, sep="/")
    return tree, shapes


def pieces(
    config: TransformerConfig, family: Family, shapes: Shapes, *, rows: int, kept: int
) -> Iterator[Piece]:
    """Every piece of every stored parameter.

    `rows` is the length of the stored vocabulary tables, of which we keep the first `kept`.
    """
    for path, leaf in shapes.items():
        if path == "head/bias":
            continue  # transformers has no place for it
        tensor, shape = family.tensors[path], leaf.shape
        layers: range | list[None] = [None]
        if path.startswith("layers/"):
            layers, shape = range(shape[0]), shape[1:]
        limits, stored = list(shape), list(shape)
        if path in ("embedder/tokens", "unembedding/kernel"):
            axis = 0 if path == "embedder/tokens" else 1
            limits[axis], stored[axis] = kept, rows
        offset = 0
        if tensor.fused:
            *module, mine, leaf_name = path.split("/")
            sizes = {
                part: shapes["/".join([*module, part, leaf_name])].shape[-1]
                for part in tensor.fused
            }
            place = tensor.fused.index(mine)
            offset = place if tensor.per_head else sum(list(sizes.values())[:place])
            stored[-1] = sum(sizes.values())
        stored[0] += tensor.skip
        shape_there = tuple(stored[::-1] if tensor.transpose else stored)
        for layer in layers:
            name = tensor.name.format(layer)
            yield Piece(
                path, layer, tensor, name, shape_there, tuple(limits), offset, config.head_size
            )


def clip(window: tuple[slice, ...], limits: tuple[int, ...]) -> tuple[slice, ...]:
    """`window` with numbers for bounds, none past `limits`."""
    return tuple(
        slice(min(part.start or 0, limit), min(limit if part.stop is None else part.stop, limit))
        for part, limit in zip(window, limits, strict=True)
    )


def sizes(window: tuple[slice, ...]) -> tuple[int, ...]:
    """The shape of a clipped window."""
    return tuple(part.stop - part.start for part in window)


def stored_parameters(all_pieces: list[Piece]) -> int:
    """How many numbers the stored tensors hold together."""
    return sum(math.prod(shape) for shape in {p.name: p.shape for p in all_pieces}.values())


def _shift(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)
