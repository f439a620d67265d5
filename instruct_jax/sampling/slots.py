"""The slots: rows that decode together, and the loop that moves them on by one token.

Each turn feeds the last token of every row to the cached model and draws the next one:

    logits_t, cache = decode(y_{t-1}, cache)        y_t ~ softmax(logits_t / temperature)

All rows write in the same column, the head. A row is the run of columns that ends there: its
prompt, then its response so far, with padding to the left of it (PPO-4). So one slice a layer is
written in place for all rows, whatever their ages, and a row that joins has its prompt put before
the head. Where the rows of a batch differ in age, nothing of a row depends on its column:
positions count its real tokens, and token t is drawn with fold_in(row key, t).

- A row ends with its first end or stop token, or with the last one of a stop sequence, which
  counts; all that follows is PAD (T11). A row that uses up its budget keeps its last token as
  sampled (T15). End tokens inside a prompt stop nothing (T14).
- The loop leaves when no more than `until` rows of a block live, or when the columns are used up
  (JAX-2).

Everything here is pure and traced: `sampler.generate` compiles it as one program, `engine.Engine`
as a program for each piece.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from instruct_jax.models.sharding import ROWS, WHOLE, axes_size, constrain, row_blocks
from instruct_jax.models.transformer import Model, init_cache
from instruct_jax.sampling.choose import Sampling, choose


class Slots(NamedTuple):
    """S rows over C cache columns; a slot that is not live holds a row that ended, or none."""

    tokens: jax.Array  # int32[S, C+1]; the cache has read the columns before the head
    log_probs: jax.Array  # float32[S, C+1], the sampler's own, of the tokens it drew
    keys: jax.Array  # typed keys [S]
    length: jax.Array  # int32[S], tokens of the response so far
    budget: jax.Array  # int32[S], tokens of the response at most
    minimum: jax.Array  # int32[S], tokens before a stop id may come
    live: jax.Array  # bool[S]
    head: jax.Array  # int32[], the column of the token that is fed next
    cache: Any  # rows on axis 0, columns on axis 2 of keys and values and 1 of the mask


def prefill(model: Model, params: Any, prompts: jax.Array, mask: jax.Array, *, columns: int) -> Any:
    """A cache of `columns` that has read all but the last token of left-padded int32[B, P].

    The last one is the first that `advance` feeds. No logits are read, so XLA drops the vocabulary
    projection.
    """
    cache = init_cache(model.config, prompts.shape[0], columns)
    if prompts.shape[1] > 1:
        _, cache = model.decode(params, prompts[:, :-1], cache, mask=mask[:, :-1])
    return cache


def advance(
    model: Model,
    params: Any,
    slots: Slots,
    sampling: Sampling,
    *,
    until: jax.Array | int = 0,
    turns: jax.Array | int | None = None,
    blocks: int = 1,
) -> Slots:
    """Decodes until no more than `until` rows of any of the contiguous `blocks` live, the columns
    are used up, or `turns` tokens of each row were drawn.
    """
    columns = slots.cache.mask.shape[1]
    end = columns if turns is None else jnp.minimum(columns, slots.head + turns)

    def body(slots: Slots) -> Slots:
        fed = jax.lax.dynamic_slice_in_dim(slots.tokens, slots.head, 1, axis=1)
        live = slots.live
        logits, cache = model.decode(params, fed, slots.cache, mask=live[:, None])
        token, log_prob = choose(logits[:, 0], slots.keys, slots.length, slots.minimum, sampling)
        token = jnp.where(live, token, model.config.pad_id)
        log_prob = jnp.where(live, log_prob, 0.0)
        head = slots.head + 1
        write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=head, axis=1)
        tokens = write(slots.tokens, token[:, None])
        length = slots.length + live.astype(jnp.int32)
        ended = jnp.isin(token, jnp.array(sampling.stop_ids)) | (length >= slots.budget)
        for sequence in sampling.stop_sequences:
            ended |= _ends_with(tokens, head, length, sequence) & (length >= slots.minimum)
        return slots._replace(
            tokens=tokens,
            log_probs=write(slots.log_probs, log_prob[:, None]),
            length=length,
            live=live & ~ended,
            head=head,
            cache=cache,
        )

    def unfinished(slots: Slots) -> jax.Array:
        live = slots.live.reshape(blocks, -1).sum(axis=1, dtype=jnp.int32)
        return (live.max() > until) & (slots.head < end)

    return jax.lax.while_loop(unfinished, body, slots)


def advance_shrinking(
    model: Model, params: Any, slots: Slots, sampling: Sampling, *, halvings: int
) -> Slots:
    """Decodes until no row lives, and up to `halvings` times in half as many slots, as soon as no
    more are needed.

    Rows that are spread over devices stay on theirs: each has a block of its own, and all shrink
    when the fullest can. What the cache has read is not brought back, only what was drawn.
    """
    rows = len(slots.live)
    blocks = row_blocks(rows)
    half = rows // blocks // 2
    if not halvings or half * 2 * blocks != rows or not half:
        return advance(model, params, slots, sampling)
    slots = advance(model, params, slots, sampling, until=half, blocks=blocks)
    order = jnp.argsort(~slots.live.reshape(blocks, -1), axis=1, stable=True)[:, :half]

    def taken(x: jax.Array) -> jax.Array:
        if not x.ndim:
            return x
        of_blocks = x.reshape(blocks, -1, *x.shape[1:])
        return jax.vmap(lambda x, i: x[i])(of_blocks, order).reshape(-1, *x.shape[1:])

    def put(x: jax.Array, new: jax.Array) -> jax.Array:
        of_blocks = x.reshape(blocks, -1, *x.shape[1:])
        new = new.reshape(blocks, half, *x.shape[1:])
        return jax.vmap(lambda x, i, new: x.at[i].set(new))(of_blocks, order, new).reshape(x.shape)

    few = spread_rows(jax.tree.map(taken, slots))
    few = advance_shrinking(model, params, few, sampling, halvings=halvings - 1)
    return slots._replace(
        tokens=put(slots.tokens, few.tokens),
        log_probs=put(slots.log_probs, few.log_probs),
        length=put(slots.length, few.length),
        live=put(slots.live, few.live),
        head=few.head,
    )


def empty_slots(cache: Any, *, rows: int, columns: int, head: jax.Array, key: jax.Array) -> Slots:
    """`rows` free slots with the layers of `cache`, a cache of any size."""

    def buffer(x: jax.Array) -> jax.Array:
        return jnp.zeros((rows, x.shape[1], columns, *x.shape[3:]), x.dtype)

    zeros = jnp.zeros((rows,), jnp.int32)
    return Slots(
        tokens=jnp.zeros((rows, columns + 1), jnp.int32),
        log_probs=jnp.zeros((rows, columns + 1), jnp.float32),
        keys=jnp.broadcast_to(key, (rows,)),
        length=zeros,
        budget=zeros,
        minimum=zeros,
        live=jnp.zeros((rows,), jnp.bool_),
        head=head,
        cache=cache._replace(
            keys=jax.tree.map(buffer, cache.keys),
            values=jax.tree.map(buffer, cache.values),
            mask=jnp.zeros((rows, columns), jnp.bool_),
            index=head,
        ),
    )


class Arrivals(NamedTuple):
    """k rows that join: row i takes slot `slot[i]` with prompt `prompt[i]` of the D given."""

    prompts: jax.Array  # int32[D, P], left-padded
    prompt: jax.Array  # int32[k]
    slot: jax.Array  # int32[k]; a slot named twice is given the same row twice
    keys: jax.Array  # uint32[k, ...], the data of their keys
    budget: jax.Array  # int32[k]
    minimum: jax.Array  # int32[k]


def admit(slots: Slots, arrivals: Arrivals, prefix: Any) -> Slots:
    """Puts the rows that arrive into their slots, their last prompt token at the head.

    `prefix` is the cache of P - 1 columns that `prefill` made of the D prompts; the head must have
    that many columns before it. A prompt is read once and copied to each of its rows.
    """
    at, source = arrivals.slot, arrivals.prompt
    first = slots.head - prefix.mask.shape[1]

    def put(buffer: jax.Array, new: jax.Array, column_axis: int) -> jax.Array:
        # One window of all heads and P columns a row: XLA writes it in place, which indexing by
        # rows and columns would not.
        numbers = jax.lax.ScatterDimensionNumbers(
            update_window_dims=tuple(range(1, buffer.ndim)),
            inserted_window_dims=(0,),
            scatter_dims_to_operand_dims=(0, column_axis),
        )
        corners = jnp.stack([at, jnp.broadcast_to(first, at.shape)], axis=1)
        return jax.lax.scatter(buffer, corners, new[source], numbers)

    columns = partial(put, column_axis=1)
    kept = slots.cache
    cache = kept._replace(
        keys=jax.tree.map(partial(put, column_axis=2), kept.keys, prefix.keys),
        values=jax.tree.map(partial(put, column_axis=2), kept.values, prefix.values),
        mask=columns(kept.mask.at[at].set(False), prefix.mask),
    )
    keys = jax.random.wrap_key_data(arrivals.keys, impl=jax.random.key_impl(slots.keys))
    return slots._replace(
        tokens=columns(slots.tokens, arrivals.prompts),
        keys=slots.keys.at[at].set(keys),
        length=slots.length.at[at].set(0),
        budget=slots.budget.at[at].set(arrivals.budget),
        minimum=slots.minimum.at[at].set(arrivals.minimum),
        live=slots.live.at[at].set(True),
        cache=cache,
    )


def move(slots: Slots, head: jax.Array, *, columns: int) -> Slots:
    """The same rows over `columns` cache columns, with the head in column `head`.

    What does not fit is dropped on the left: rows longer than `head` lose their beginning.
    """

    def shifted(x: jax.Array, size: int, axis: int) -> jax.Array:
        pad = [(columns, columns) if i == axis else (0, 0) for i in range(x.ndim)]
        start = columns + slots.head - head
        return jax.lax.dynamic_slice_in_dim(jnp.pad(x, pad), start, size, axis=axis)

    cache = slots.cache
    of_layers = partial(jax.tree.map, lambda x: shifted(x, columns, 2))
    return slots._replace(
        tokens=shifted(slots.tokens, columns + 1, 1),
        log_probs=shifted(slots.log_probs, columns + 1, 1),
        head=head,
        cache=cache._replace(
            keys=of_layers(cache.keys),
            values=of_layers(cache.values),
            mask=shifted(cache.mask, columns, 1),
            index=head,
        ),
    )


def spread_rows(tree: Any) -> Any:
    """`tree` with its rows over data and fsdp of the ambient mesh, where they divide."""

    def spread(x: jax.Array) -> jax.Array:
        divided = x.ndim and x.shape[0] % axes_size(ROWS) == 0
        return constrain(x, ROWS, *[WHOLE] * (x.ndim - 1)) if divided else x

    return jax.tree.map(spread, tree)


def _ends_with(
    tokens: jax.Array, head: jax.Array, length: jax.Array, sequence: tuple[int, ...]
) -> jax.Array:
    """bool[S]: whether the last tokens of the responses are `sequence`."""
    size = len(sequence)
    if size > tokens.shape[1]:
        return jnp.zeros(length.shape, jnp.bool_)
    last = jax.lax.dynamic_slice_in_dim(tokens, head + 1 - size, size, axis=1)
    return (length >= size) & (last == jnp.array(sequence, jnp.int32)[None, :]).all(axis=1)
