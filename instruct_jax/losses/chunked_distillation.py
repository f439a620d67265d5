r"""The divergences of `distillation` from hidden states, without ever holding float[B, T, V].

A loop makes the logits of `chunk` positions of student and teacher, reduces them to one number a
position and drops them. The backward pass makes them again, differentiates the divergence with
respect to the student's logits, and adds up the gradient of the head in float32: 6 products with a
head in all, where the dense path has 4 and holds four arrays of logits.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from instruct_jax.losses._array import keep, scalar, visible
from instruct_jax.losses._chunks import (
    Order,
    in_order,
    in_place,
    live_chunks,
    part,
    targets_first,
    write,
)
from instruct_jax.losses._mesh import alike, on_auto_axes, zeros
from instruct_jax.losses._readout import (
    Ask,
    add_gradient,
    logits_of,
    no_gradient,
    scaled,
    to_products,
    within_range,
)
from instruct_jax.losses.chunked import chunk_length
from instruct_jax.losses.distillation import Divergence, divergence


def chunked_divergence(
    student_hidden: chex.Array,
    student_head: chex.Array,
    teacher_hidden: chex.Array,
    teacher_head: chex.Array,
    *,
    where: chex.Array | None = None,
    kind: Divergence = "forward_kl",
    beta: float = 0.5,
    chunk: int | None = None,
    temperature: chex.Numeric = 1.0,
    vocab_size: int | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    row_blocks: int = 1,
) -> jax.Array:
    r"""`forward_kl`, `reverse_kl` or `generalized_jsd` of two read-outs, chunk by chunk.

    .. math:: D(p_t, q_t), \qquad p_t = \mathrm{softmax}(h^T_t W^T / \tau), \quad
              q_t = \mathrm{softmax}(h^S_t W^S / \tau)

    Source: as in `distillation`. Student and teacher may differ in width; the vocabulary is one.

    Stop-gradient on the teacher and the temperature. Not done: no shift, no reduction.

    Args:
      student_hidden: float[B, T, D], the states that the student's head is applied to.
      student_head: float[D, V]; a tied embedding goes in transposed. Its gradient has its dtype.
      teacher_hidden: float[B, T, E].
      teacher_head: float[E, V].
      where: bool[B, T], the positions to read out; elsewhere the entry is 0. None reads out all.
      kind: "forward_kl", "reverse_kl" or "jsd".
      beta: weight of the teacher in "jsd".
      chunk: positions of each block at a time, by default `default_chunk` of the student.
      temperature: tau, float[], of both.
      vocab_size: number of real columns of the heads; None takes all.
      student_softcap: c, of logits that the student caps; None caps nothing.
      teacher_softcap: the same of the teacher.
      row_blocks: G, the devices that B is spread over, in contiguous blocks of rows.

    Returns:
      float[B, T].

    Raises:
      ValueError: `row_blocks` does not divide B, an unknown kind, or a beta outside of (0, 1).

    >>> hidden, head = jnp.ones((1, 3, 2)), jnp.array([[0.0, 1.0], [1.0, 0.0]])
    >>> print(chunked_divergence(hidden, head, 2 * hidden, head, chunk=2))
    [[0. 0. 0.]]
    """
    options = {"chunk": chunk, "vocab_size": vocab_size, "row_blocks": row_blocks}
    softcaps = student_softcap, teacher_softcap

    def computed(*arrays: jax.Array) -> jax.Array:
        call = _checked(*arrays, softcaps=softcaps, **options)
        found = _divergences(*call.student, *call.fixed, call.order, (*call.asks, kind, beta))
        return keep(arrays[4], found.reshape(arrays[0].shape[:2]))

    student, *others = map(
        jnp.asarray, (student_hidden, student_head, teacher_hidden, teacher_head)
    )
    mask = None if where is None else jnp.asarray(where)
    position = jax.lax.stop_gradient(student)[..., 0]  # [B, T], what the result is sharded like
    return on_auto_axes(computed, student, *others, mask, jnp.asarray(temperature), rows=position)


class _Call(NamedTuple):
    """Checked arguments in blocks of rows [G, N, ...]."""

    student: tuple[jax.Array, jax.Array]  # hidden states and head
    fixed: tuple[jax.Array, jax.Array, jax.Array]  # the teacher's, and the temperature
    order: Order | None
    asks: tuple[Ask, Ask]


def _checked(
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    where: jax.Array | None,
    temperature: jax.Array,
    *,
    chunk: int | None,
    vocab_size: int | None,
    softcaps: tuple[float | None, float | None],
    row_blocks: int,
) -> _Call:
    """Checks the arguments and brings them into blocks."""
    states, heads = (student_hidden, teacher_hidden), (student_head, teacher_head)
    chex.assert_type([*states, *heads], float)
    chex.assert_rank([*states, *heads], [3, 3, 2, 2])
    chex.assert_equal_shape_prefix(states, 2)
    chex.assert_axis_dimension(student_head, 0, student_hidden.shape[2])
    chex.assert_axis_dimension(teacher_head, 0, teacher_hidden.shape[2])
    chex.assert_equal(student_head.shape[1], teacher_head.shape[1])
    vocab_size = student_head.shape[1] if vocab_size is None else vocab_size
    chex.assert_scalar_in(vocab_size, 1, student_head.shape[1])
    rows, length = student_hidden.shape[:2]
    if rows % row_blocks:
        raise ValueError(f"{row_blocks} row blocks do not divide {rows} rows")
    positions = rows * length // row_blocks
    chunk = chunk_length(chunk, positions, student_head)
    states = visible(where, *states, rank=2)
    wide = any(x.dtype == jnp.float64 for x in (*states, *heads))
    tau = scalar(temperature, jnp.zeros([], jnp.float64 if wide else jnp.float32))
    mask = jnp.ones((rows, length), bool) if where is None else where
    student, taught, head, teacher_head, mask, tau = alike(*states, *heads, mask, tau)

    def blocks(x: jax.Array) -> jax.Array:
        return x.reshape(row_blocks, positions, *x.shape[2:])

    order = None
    if where is not None and chunk < positions:
        order = targets_first(blocks(mask))
    fixed = jax.lax.stop_gradient((blocks(taught), teacher_head, tau))
    own, of_teacher = (Ask(chunk, vocab_size, cap, moments=False, hits=False) for cap in softcaps)
    return _Call((blocks(student), head), fixed, order, (own, of_teacher))


Asked = tuple[Ask, Ask, Divergence, float]


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _divergences(
    hidden: jax.Array,
    head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    temperature: jax.Array,
    order: Order | None,
    asked: Asked,
) -> jax.Array:
    """float[G, N]; 0 behind the last live chunk."""
    return _forward(hidden, head, teacher_hidden, teacher_head, temperature, order, asked)[0]


def _of_logits(logits: jax.Array, taught: jax.Array, asked: Asked) -> jax.Array:
    """float[G, n] of the logits float[G, n, V] of both."""
    student, teacher = (jax.nn.log_softmax(x, axis=-1) for x in (logits, taught))
    return divergence(student, teacher, kind=asked[2], beta=asked[3])


def _forward(
    hidden: jax.Array,
    head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    temperature: jax.Array,
    order: Order | None,
    asked: Asked,
) -> tuple[jax.Array, Any]:
    ask, teacher_ask, *_ = asked
    weights = head.astype(hidden.dtype), teacher_head.astype(teacher_hidden.dtype)
    rows = [in_order(x, order, ask.chunk) for x in (hidden, teacher_hidden)]
    positions = hidden.shape[1]

    def one_chunk(i: jax.Array, done: jax.Array) -> jax.Array:
        own, taught = (part(x, i=i, chunk=ask.chunk) for x in rows)
        logits = logits_of(own, weights[0], temperature, ask)
        wanted = logits_of(taught, weights[1], temperature, teacher_ask)
        return write(done, _of_logits(logits, wanted, asked), i=i)

    nothing = zeros(rows[0].shape[:2], temperature.dtype, like=rows[0])
    done = jax.lax.fori_loop(0, live_chunks(order, positions, ask.chunk), one_chunk, nothing)
    kept = hidden, head, teacher_hidden, teacher_head, temperature, order
    return in_place(done, order, positions), kept


def _backward(asked: Asked, kept: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    """Gradients of the student's hidden states and head, from logits that are made once more."""
    hidden, head, teacher_hidden, teacher_head, temperature, order = kept
    ask, teacher_ask, *_ = asked
    weights = head.astype(hidden.dtype), teacher_head.astype(teacher_hidden.dtype)
    cotangent, unit = within_range(cotangent, hidden.dtype)
    by_position = hidden, teacher_hidden, cotangent
    rows = [in_order(x, order, ask.chunk) for x in by_position]

    def one_chunk(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> Any:
        own, taught, weight = (part(x, i=i, chunk=ask.chunk) for x in rows)
        logits = logits_of(own, weights[0], temperature, ask)
        wanted = logits_of(taught, weights[1], temperature, teacher_ask)
        _, pull = jax.vjp(lambda x: _of_logits(x, wanted, asked), logits)
        to_logits = to_products(logits, *pull(weight), temperature=temperature, ask=ask)
        return add_gradient(sums, i, own, weights[0], to_logits)

    live = live_chunks(order, hidden.shape[1], ask.chunk)
    nothing = no_gradient(rows[0], head, temperature.dtype)
    to_head, to_hidden = jax.lax.fori_loop(0, live, one_chunk, nothing)
    to_hidden = scaled(in_place(to_hidden, order, hidden.shape[1]), unit, hidden.dtype)
    return to_hidden, scaled(to_head.sum(axis=0).T, unit, head.dtype), None, None, None, None


_divergences.defvjp(_forward, _backward)
