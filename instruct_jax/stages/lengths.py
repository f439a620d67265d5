"""Rows in parts, and by length: short responses are not computed as wide as the longest one.

Arrays have the response last: float[B, R], or float[B, P + R] with its prompt before it. With
several widths the rows of a batch are put in an order in which each of its parts holds rows of
about one length, and a part is computed at the least width that has room for its longest response.
What is cut off is padding behind the last token of every row, which no token sees, so nothing
changes but the time. With one width the order is the rows' own, and nothing is cut.

The widths are static and compiled side by side, under one `lax.switch`: no program is compiled
again, and the host learns no length.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from instruct_jax.training.state import Forms, join_rows, split_rows


def response_widths(response: int, buckets: int) -> tuple[int, ...]:
    """`buckets` widths up to `response`, evenly spaced.

    >>> response_widths(64, 4)
    (16, 32, 48, 64)
    """
    return tuple(sorted({-(-response * i // buckets) for i in range(1, buckets + 1)}))


def by_length(where: jax.Array, parts: int, *, buckets: int) -> jax.Array:
    """int32[B], the rows of bool[B, R] in an order whose `split_rows` parts go by length."""
    if buckets == 1:
        return jnp.arange(len(where), dtype=jnp.int32)
    ranks = jnp.argsort(where.sum(1, dtype=jnp.int32)).astype(jnp.int32)
    return ranks.reshape(parts, -1).T.reshape(-1)


def shorter_forms(where_of: Callable[[Any], jax.Array], response: int, buckets: int) -> Forms:
    """The widths for `accumulate_gradients`; `where_of(rows)` is bool[B, R]."""
    widths = response_widths(response, buckets)

    def smallest(rows: Any) -> jax.Array:
        longest = where_of(rows).sum(1, dtype=jnp.int32).max()
        return (longest > jnp.array(widths[:-1], jnp.int32)).sum(dtype=jnp.int32)

    return Forms(smallest, tuple(partial(_cut, columns=response - width) for width in widths))


def read_in_parts(
    read: Callable[[Any], Any],
    rows: Any,
    where_of: Callable[[Any], jax.Array],
    *,
    parts: int,
    buckets: int,
) -> Any:
    """`read(rows)`, a tree of float[B] and float[B, R], one part of the rows after the other.

    Each part is read in the smallest form it fits; what was cut off is 0. A part takes the memory
    of B / parts rows.
    """
    where = where_of(rows)
    forms = shorter_forms(where_of, where.shape[1], buckets)

    def one_part(part: Any) -> Any:
        if buckets == 1:
            return read(part)

        def in_form(cut: Callable[[Any], Any], rows: Any) -> Any:
            out, whole = read(cut(rows)), jax.eval_shape(read, rows)
            return jax.tree.map(_widened, out, whole)

        branches = [partial(in_form, cut) for cut in forms.cuts]
        return jax.lax.switch(forms.smallest(part), branches, part)

    if parts == 1:
        return one_part(rows)
    if buckets == 1:  # no row moves, between devices neither
        return join_rows(jax.lax.map(one_part, split_rows(rows, parts)))
    order = by_length(where, parts, buckets=buckets)
    done = jax.lax.map(one_part, split_rows(jax.tree.map(lambda x: x[order], rows), parts))
    back = jnp.argsort(order)
    return jax.tree.map(lambda x: x[back], join_rows(done))


def _cut(rows: Any, *, columns: int) -> Any:
    return jax.tree.map(lambda x: x[:, : x.shape[1] - columns], rows)


def _widened(x: jax.Array, whole: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.pad(x, [(0, b - a) for a, b in zip(x.shape, whole.shape, strict=True)])
