"""What makes the mask of whole rows: segments, and branches of a common beginning."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Finite, so a row with no visible key averages its values instead of dividing zero by zero.
MASKED = -1e9

# The segment of padding.
PADDING = -1


class Rows(NamedTuple):
    """Who belongs together; causality and windows are of slots, and not in here.

    Arrays may also be parts of rows, with the slots last.
    """

    segments: jax.Array  # int32[B, T], `PADDING` at padding
    branches: jax.Array | None = None  # int32[B, T], 0 in the common beginning

    @classmethod
    def of(
        cls, mask: jax.Array, segment_ids: jax.Array | None, branches: jax.Array | None
    ) -> "Rows":
        """The rows of a model's arguments; `mask` bool[B, T] is true at real tokens."""
        ids = jnp.zeros(mask.shape, jnp.int32) if segment_ids is None else segment_ids
        return cls(jnp.where(mask, ids, PADDING), branches)

    def padded(self, count: int) -> "Rows":
        """With `count` slots of padding at the end."""
        grow = functools.partial(jnp.pad, pad_width=((0, 0), (0, count)))
        segments = grow(self.segments, constant_values=PADDING)
        return Rows(segments, None if self.branches is None else grow(self.branches))

    def meets(self, keys: "Rows") -> jax.Array:
        """bool[..., T, S], whether query t and key s are of one segment, and the key of the query's
        branch or the common beginning.
        """
        mask = self.segments[..., :, None] == keys.segments[..., None, :]
        if self.branches is None or keys.branches is None:
            return mask
        own = self.branches[..., :, None] == keys.branches[..., None, :]
        return mask & (own | (keys.branches == 0)[..., None, :])
