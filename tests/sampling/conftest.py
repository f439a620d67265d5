"""A language model that is a table: the next token depends on the fed token alone."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax.models.transformer import Model, TransformerConfig


def _unused(*args: object, **kwargs: object) -> jax.Array:
    raise AssertionError("the sampler only decodes")


class TableModel:
    """`model` reads its logits from a table; `steps` counts the steps of the loop."""

    def __init__(self, vocab_size: int) -> None:
        self.steps = 0
        self.model = Model(
            config=TransformerConfig(
                vocab_size=vocab_size, num_layers=1, d_model=8, num_heads=1, max_length=4096
            ),
            init=_unused,
            apply=_unused,
            hidden=_unused,
            readout=_unused,
            head=_unused,
            decode=self._decode,
        )

    def _decode(self, params, tokens, cache, *, mask):
        if tokens.shape[1] == 1:
            jax.debug.callback(self._count)
        return params["table"][tokens], cache

    def _count(self) -> None:
        self.steps += 1

    def params(self, rows: np.ndarray) -> dict[str, Any]:
        """float32[V, V] logits, with the padding rows and columns that a real model has."""
        size = len(rows)
        table = np.full((size + 3, size + 3), -1e9, np.float32)
        table[:size, :size] = rows
        table[size:, 0] = 0.0  # what a PAD would be continued with, were it ever fed
        return {"table": jnp.asarray(table), "layers": ()}


@pytest.fixture
def table_model() -> Callable[[int], TableModel]:
    """`table_model(vocab_size)` -> a fresh TableModel."""
    return TableModel
