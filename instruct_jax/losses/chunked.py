r"""Log-probabilities from hidden states, without ever holding float[B, T, V].

At V = 50,257 the logits of a batch are its largest array by far, and the dense path keeps several
copies of it. Here a loop walks over `chunk` positions at a time: it makes the logits of the chunk,
float[chunk, V], reduces them and drops them. The backward pass keeps only the log-normaliser and
the entropy of each position, makes the logits again, and adds up the gradient of the head in
float32. That costs one more product with the head than the dense path, 4 instead of 3, and saves
the passes over float[B, T, V] in memory that is far away. Where one chunk holds every position its
logits are kept instead: nothing is made twice, and it is the dense path.

With `where`, only those positions are read out. They are sorted to the front, in static shapes, and
the loop ends with the last chunk that holds one: the products with the head are paid for targets
alone. In fine-tuning most positions are prompt or padding.

With :math:`z = h W / \tau` (or :math:`c \tanh(h W / c) / \tau` under a soft cap c) restricted to
the real vocabulary, :math:`\ell = \log \sum_v e^{z_v}`, :math:`p_v = e^{z_v - \ell}`, the gradients
behind the custom rule are

.. math:: \partial \log p_y / \partial z_v = 1[v = y] - p_v, \qquad
          \partial \ell / \partial z_v = p_v, \qquad
          \partial H / \partial z_v = -p_v (\log p_v + H)

Positions are chunked, not the vocabulary, which can stay sharded over tensor: the reductions over V
become all-reduces of one number a position. Rows that are spread over G devices are G `row_blocks`,
each with its own order and its own sum for the head, so that no hidden state leaves its device.

The entropy, the mean log-probability and the hits are made only where they are asked for. A loss
that is a sum of cross-entropies needs none of this for each position: `chunked_cross_entropy_sum`
makes its gradient where it makes the logits, with 3 products.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from instruct_jax.losses._array import nan_unless, scalar, token_ids, visible
from instruct_jax.losses._chunks import Order, targets_first
from instruct_jax.losses._mesh import alike, on_auto_axes
from instruct_jax.losses._readout import (
    Ask,
    CrossEntropySum,
    statistics_of,
    sums_of,
)

CHUNK_LOGITS = 2**24
"""Most logits at a time in each block of rows, where no chunk is given: 64 MiB in float32, 333
positions of GPT-2's vocabulary. tests/losses/test_chunked.py has the limits of memory and time."""


def default_chunk(width: int, columns: int) -> int:
    """Positions at a time in each block of rows, for a head float[width, columns].

    A chunk reads and writes the gradient of the head, which is 12 D V bytes beside 6 n D V
    operations: at n = 2 D positions that is a small part of the work anywhere.
    """
    return max(64, min(2 * width, CHUNK_LOGITS // columns))


def chunk_length(chunk: int | None, positions: int, head: jax.Array) -> int:
    """Positions at a time of so many in each block, for a head float[D, V]; at least 1."""
    if chunk is None:
        chunk = default_chunk(*head.shape)
        # Chunks of one length: the last is no shorter, so little of it is padding.
        chunk = -(-positions // -(-positions // chunk)) if positions else 1
    chex.assert_scalar_positive(chunk)
    return min(chunk, max(positions, 1))


class TokenStatistics(NamedTuple):
    """What one pass over the logits gives at each position; each float[B, T].

    `mean_log_prob` is the plain mean over the vocabulary, of which label smoothing is made. `hits`
    is 1 where no token is likelier, 0 elsewhere, and has no gradient; like the entropy and the mean
    it is None where it was not asked for.
    """

    log_probs: jax.Array
    entropy: jax.Array | None
    log_normalizer: jax.Array
    mean_log_prob: jax.Array | None
    hits: jax.Array | None = None


def chunked_token_statistics(
    hidden: chex.Array,
    head: chex.Array,
    tokens: chex.Array,
    *,
    where: chex.Array | None = None,
    chunk: int | None = None,
    temperature: chex.Numeric = 1.0,
    vocab_size: int | None = None,
    softcap: float | None = None,
    row_blocks: int = 1,
    moments: bool = True,
    hits: bool = False,
) -> TokenStatistics:
    r"""Log-probability, entropy, log-normaliser and mean log-probability, chunk by chunk.

    The product with the head runs in the dtype of `hidden` and accumulates in float32; the rest
    is float32 (float64 for float64 inputs). These four are differentiable with respect to
    `hidden` and `head`; the gradient with respect to `temperature` is stopped.

    Not done: no shift, no reduction.

    Args:
      hidden: float[B, T, D], the states that the head is applied to.
      head: float[D, V]; a tied embedding goes in transposed. Its gradient has its dtype.
      tokens: int[B, T]; `hidden[:, t]` scores `tokens[:, t]`.
      where: bool[B, T], the positions to read out; elsewhere all is 0. None reads out all.
      chunk: positions of each block at a time, by default `default_chunk`. The peak is about
        3 * row_blocks * chunk * V * 4 bytes, and in the backward pass once more float32[D, V], the
        addend of the head's gradient.
      temperature: tau > 0, float[].
      vocab_size: number of real columns of the head; None takes all.
      softcap: c, of logits that the model caps; None caps nothing.
      row_blocks: G, the devices that B is spread over, in contiguous blocks of rows.
      moments: whether to make the entropy and the mean log-probability.
      hits: whether to make the hits.

    Returns:
      TokenStatistics of float[B, T]; the log-probability is NaN for an id outside of [0, V), and so
      is its gradient.

    Raises:
      ValueError: `row_blocks` does not divide B.

    >>> stats = chunked_token_statistics(
    ...     jnp.ones((1, 3, 2)), jnp.zeros((2, 8)), jnp.array([[0, 1, 2]]), chunk=2)
    >>> print(jnp.exp(stats.entropy).round(4))
    [[8. 8. 8.]]
    """
    return _statistics(
        hidden,
        head,
        tokens,
        where=where,
        chunk=chunk,
        temperature=temperature,
        vocab_size=vocab_size,
        softcap=softcap,
        row_blocks=row_blocks,
        moments=moments,
        hits=hits,
    )


def chunked_token_log_probs(
    hidden: chex.Array,
    head: chex.Array,
    tokens: chex.Array,
    *,
    where: chex.Array | None = None,
    chunk: int | None = None,
    temperature: chex.Numeric = 1.0,
    vocab_size: int | None = None,
    softcap: float | None = None,
    row_blocks: int = 1,
) -> jax.Array:
    r"""`token_log_probs(hidden @ head, tokens)`, chunk by chunk.

    .. math:: \log p_t = z_{t, y_t} - \log \sum_{v < V} \exp z_{t, v}, \qquad
              z_t = h_t W / \tau

    Not done: no shift, no reduction.

    Args:
      hidden: float[B, T, D].
      head: float[D, V].
      tokens: int[B, T]; `hidden[:, t]` scores `tokens[:, t]`.
      where: bool[B, T], the positions to read out; elsewhere the entry is 0.
      chunk: positions of each block at a time.
      temperature: tau > 0, float[].
      vocab_size: number of real columns of the head.
      softcap: c, of logits that the model caps.
      row_blocks: the devices that B is spread over.

    Returns:
      float[B, T], at most 0; NaN, and so is its gradient, for an id outside of [0, V).

    >>> log_probs = chunked_token_log_probs(
    ...     jnp.ones((1, 3, 2)), jnp.zeros((2, 8)), jnp.array([[0, 1, 2]]), chunk=2)
    >>> print(jnp.exp(log_probs))
    [[0.125 0.125 0.125]]
    """
    return _statistics(
        hidden,
        head,
        tokens,
        where=where,
        chunk=chunk,
        temperature=temperature,
        vocab_size=vocab_size,
        softcap=softcap,
        row_blocks=row_blocks,
    ).log_probs


def chunked_next_token_loss(
    hidden: chex.Array,
    head: chex.Array,
    tokens: chex.Array,
    *,
    where: chex.Array | None = None,
    chunk: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
    softcap: float | None = None,
    row_blocks: int = 1,
) -> jax.Array:
    """`next_token_loss(hidden @ head, tokens)`, chunk by chunk: the shift by one is here.

    Entry t is the loss of `tokens[:, t + 1]` given `hidden[:, t]`.

    Not done: no reduction.

    Args:
      hidden: float[B, T, D], of the whole sequence; the last position predicts nothing.
      head: float[D, V].
      tokens: int[B, T].
      where: bool[B, T], the tokens that are targets, cut to `where[:, 1:]`; the loss of any other
        is 0.
      chunk: positions of each block at a time.
      label_smoothing: see `token_cross_entropy`.
      z_loss: see `token_cross_entropy`.
      vocab_size: number of real columns of the head.
      softcap: c, of logits that the model caps.
      row_blocks: the devices that B is spread over.

    Returns:
      float[B, T - 1].

    >>> loss = chunked_next_token_loss(
    ...     jnp.ones((1, 3, 2)), jnp.zeros((2, 8)), jnp.array([[0, 1, 2]]), chunk=2)
    >>> print(jnp.exp(loss).round(4))
    [[8. 8.]]
    """
    hidden, tokens = jnp.asarray(hidden), jnp.asarray(tokens)
    chex.assert_equal_shape_prefix([hidden, tokens], 2)
    read = _statistics(
        hidden[:, :-1],
        head,
        tokens[:, 1:],
        where=None if where is None else jnp.asarray(where)[:, 1:],
        chunk=chunk,
        vocab_size=vocab_size,
        softcap=softcap,
        row_blocks=row_blocks,
        moments=label_smoothing != 0.0,
    )
    target = read.log_probs
    if read.mean_log_prob is not None:
        target = (1.0 - label_smoothing) * target + label_smoothing * read.mean_log_prob
    return z_loss * jnp.square(read.log_normalizer) - target


def chunked_cross_entropy_sum(
    hidden: chex.Array,
    head: chex.Array,
    tokens: chex.Array,
    *,
    where: chex.Array,
    chunk: int | None = None,
    vocab_size: int | None = None,
    softcap: float | None = None,
    row_blocks: int = 1,
    hits: bool = False,
) -> CrossEntropySum:
    r"""The summed cross-entropy of the positions `where`, its gradient made of the same logits.

    .. math:: -\sum_{b, t \in \text{where}} \log p(y_{b, t} \mid h_{b, t})

    What a language model is trained on. The loss is linear in the losses of its positions, so their
    gradient is known up to one factor while the logits of a chunk are there: nothing is made twice,
    and differentiating costs 3 products with the head, not 4. Without differentiation it is 1.

    Not done: no shift, no mean. The caller divides by its own count.

    Args:
      hidden: float[B, T, D], the states that the head is applied to.
      head: float[D, V]; a tied embedding goes in transposed. Its gradient has its dtype.
      tokens: int[B, T]; `hidden[:, t]` scores `tokens[:, t]`.
      where: bool[B, T], the positions that are summed.
      chunk: positions of each block at a time, by default `default_chunk`.
      vocab_size: number of real columns of the head; None takes all.
      softcap: c, of logits that the model caps; None caps nothing.
      row_blocks: G, the devices that B is spread over, in contiguous blocks of rows.
      hits: whether to count the tokens that none is likelier than.

    Returns:
      CrossEntropySum of float[]; NaN, and so is its gradient, where an id of `where` is outside of
      [0, V).

    Raises:
      ValueError: `row_blocks` does not divide B.

    >>> loss, _ = chunked_cross_entropy_sum(
    ...     jnp.ones((1, 3, 2)), jnp.zeros((2, 8)), jnp.array([[0, 1, 2]]),
    ...     where=jnp.array([[True, False, True]]))
    >>> print(jnp.exp(loss).round(4))
    64.0
    """
    options = {"chunk": chunk, "vocab_size": vocab_size, "softcap": softcap}

    def summed(*arrays: jax.Array) -> CrossEntropySum:
        read = _readout(*arrays, row_blocks=row_blocks, hits=hits, **options)
        sums = sums_of(read.hidden, read.head, read.tokens, read.where, read.order, read.ask)
        known = (read.known | ~read.where).all()
        return sums._replace(loss=nan_unless(known, sums.loss))

    return on_auto_axes(summed, *(jnp.asarray(x) for x in (hidden, head, tokens, where)))


class _Readout(NamedTuple):
    """Checked arguments in blocks of rows [G, N, ...]."""

    hidden: jax.Array
    head: jax.Array
    tokens: jax.Array
    known: jax.Array  # bool[G, N], ids that the head has
    where: jax.Array  # bool[G, N]
    order: Order | None
    ask: Ask


def _readout(
    hidden: jax.Array,
    head: jax.Array,
    tokens: jax.Array,
    where: jax.Array | None,
    *,
    chunk: int | None,
    vocab_size: int | None,
    softcap: float | None,
    row_blocks: int,
    moments: bool = False,
    hits: bool = False,
) -> _Readout:
    """Checks the arguments of a public function and brings them into blocks."""
    chex.assert_type([hidden, head, tokens], [float, float, int])
    chex.assert_rank([hidden, head, tokens], [3, 2, 2])
    chex.assert_shape(tokens, hidden.shape[:2])
    chex.assert_axis_dimension(head, 0, hidden.shape[2])
    vocab_size = head.shape[1] if vocab_size is None else vocab_size
    chex.assert_scalar_in(vocab_size, 1, head.shape[1])
    if tokens.shape[0] % row_blocks:
        raise ValueError(f"{row_blocks} row blocks do not divide {tokens.shape[0]} rows")
    positions = tokens.size // row_blocks
    chunk = chunk_length(chunk, positions, head)
    ask = Ask(chunk, vocab_size, softcap, moments, hits)

    def blocks(x: jax.Array) -> jax.Array:
        return x.reshape(row_blocks, positions, *x.shape[2:])

    order, selected = None, where is not None
    if where is None:
        where = jnp.ones(tokens.shape, jnp.bool_)
    else:
        # A product has no mask: 0 times the NaN of a hidden state would be in the head's gradient.
        (hidden,) = visible(where, hidden, rank=2)
    tokens, known = token_ids(tokens, head.shape[1])
    hidden, head, tokens, known, where = alike(hidden, head, tokens, known, where)
    tokens, known, where = (blocks(x) for x in (tokens, known, where))
    if selected and ask.chunk < positions:
        order = targets_first(where)
    return _Readout(blocks(hidden), head, tokens, known, where, order, ask)


def _statistics(
    hidden: chex.Array,
    head: chex.Array,
    tokens: chex.Array,
    *,
    where: chex.Array | None,
    temperature: chex.Numeric = 1.0,
    **options: Any,
) -> TokenStatistics:
    """What a public function asks for at each position, float[B, T]."""

    def computed(
        hidden: jax.Array,
        head: jax.Array,
        tokens: jax.Array,
        where: jax.Array | None,
        temperature: jax.Array,
    ) -> TokenStatistics:
        read = _readout(hidden, head, tokens, where, **options)
        accumulator = jnp.float64 if read.hidden.dtype == jnp.float64 else jnp.float32
        temperature = jax.lax.stop_gradient(scalar(temperature, jnp.zeros([], accumulator)))
        _, temperature = alike(read.hidden, temperature)
        made = statistics_of(read.hidden, read.head, read.tokens, temperature, read.order, read.ask)
        entropy, mean_log_prob = (None, None) if made.moments is None else made.moments
        statistics = TokenStatistics(
            nan_unless(read.known, made.log_probs),
            entropy,
            jax.lax.stop_gradient(made.largest) + made.log_total,
            mean_log_prob,
            made.hits,
        )
        return jax.tree.map(
            lambda x: jnp.where(read.where, x, 0.0).reshape(tokens.shape), statistics
        )

    arrays = [None if x is None else jnp.asarray(x) for x in (hidden, head, tokens, where)]
    return on_auto_axes(computed, *arrays, jnp.asarray(temperature), rows=arrays[2])
