"""The training state and the one update that every stage makes of it.

A loss function returns sums and counts, never means. Sums are added over micro-batches (by
`accumulate_gradients`) and over devices (by XLA, since every array is global), and divided once, by
the global count. So the loss and the gradient do not depend on how a batch is split (JAX-4, JAX-5).

The update is guarded. Where the gradient is not finite, or larger than a limit, or where anything
that the update would make of the state is not finite (an `eps` of 0, an overflow, an optimizer of
the user's), the step keeps parameters, optimizer (its count too) and average bit for bit, and is
counted. It takes the old state or the new: multiplying the update by zero would let a NaN through.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from instruct_jax.training.hosts import fetch, place
from instruct_jax.training.mesh import (
    PartitionRules,
    batch_sharding,
    replicated,
    tree_shardings,
)
from instruct_jax.training.optim import ema_update

Metrics = dict[str, Array]
# (params, batch, key) -> (sum of the loss f32[], its count f32[], metrics); a metric is (sum f32[],
# count f32[]), whose mean is reported, or f32[], of which the largest is
LossFn = Callable[[Any, Any, Array], tuple[Array, Array, dict[str, Array | tuple[Array, Array]]]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that an update changes.

    `step` int32[] counts the batches seen, `skipped` int32[] those that made no update,
    `skipped_in_a_row` int32[] the latest of them without a break. `ema` is the float32 average of
    the parameters, or None.
    """

    step: Array
    params: Any
    opt_state: optax.OptState
    ema: Any
    skipped: Array
    skipped_in_a_row: Array

    @property
    def updates(self) -> Array:
        """The updates made, int32[]: the optimizer's count, which drives the schedule."""
        return self.step - self.skipped


def init_state(params: Any, tx: optax.GradientTransformation, *, ema: bool = False) -> TrainState:
    """The state before the first update, in buffers of its own: donating it spares `params`."""
    params = jax.tree.map(jnp.copy, params)
    return TrainState(
        step=jnp.zeros([], jnp.int32),
        params=params,
        opt_state=tx.init(params),
        ema=jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params) if ema else None,
        skipped=jnp.zeros([], jnp.int32),
        skipped_in_a_row=jnp.zeros([], jnp.int32),
    )


class Gradients(NamedTuple):
    """Means over the whole batch: loss f32[], grads like the parameters, metrics of f32[]."""

    loss: Array
    grads: Any
    metrics: Metrics


class Forms(NamedTuple):
    """Smaller shapes that a micro-batch may fit, where a part of its arrays is padding."""

    smallest: Callable[[Any], Array]
    """rows -> int32[], which of the `cuts` loses nothing but padding"""
    cuts: tuple[Callable[[Any], Any], ...]
    """rows -> rows, each to a shape of its own"""


WHOLE = Forms(lambda rows: jnp.int32(0), (lambda rows: rows,))


def accumulate_gradients(
    loss_fn: LossFn,
    params: Any,
    batch: Any,
    key: Array,
    *,
    micro_batches: int = 1,
    forms: Forms = WHOLE,
) -> Gradients:
    """The gradient of the mean loss over a tree of [micro_batches * B, ...] arrays.

    A metric is (sum, count), whose mean is reported, or one number, of which the largest is.
    Micro-batch m gets `fold_in(key, m)`. Sums are kept in float32. A mean over a count of zero is
    NaN, so that an empty batch is skipped and not taken for a perfect one. With `forms` each
    micro-batch is computed in the smallest that it fits.
    """

    def loss_sum(params: Any, rows: Any, key: Array) -> tuple[Array, Any]:
        total, count, metrics = loss_fn(params, rows, key)
        return total, (count, metrics)

    def sums(rows: Any, index: Array) -> Any:
        # A branch has its gradient within: were the switch differentiated, each branch would keep
        # what the backward pass of the others needs.
        branches = [lambda rows, i, cut=cut: sums_of(cut(rows), i) for cut in forms.cuts]
        return jax.lax.switch(forms.smallest(rows), branches, rows, index)

    def sums_of(rows: Any, index: Array) -> Any:
        value_and_grad = jax.value_and_grad(loss_sum, has_aux=True)
        (total, (count, metrics)), grads = value_and_grad(
            params, rows, jax.random.fold_in(key, index)
        )
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (total, count, metrics, grads))

    if micro_batches == 1:
        totals = sums(batch, jnp.uint32(0))
    else:
        rows = split_rows(batch, micro_batches)
        indices = jnp.arange(micro_batches, dtype=jnp.uint32)
        first = jax.tree.map(lambda x: x[0], (rows, indices))
        shapes = jax.eval_shape(sums, *first)
        nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        nothing[2].update(
            {k: jnp.full_like(v, -jnp.inf) for k, v in nothing[2].items() if not _is_mean(v)}
        )
        totals, _ = jax.lax.scan(
            lambda totals, micro: (_add(totals, sums(*micro)), None), nothing, (rows, indices)
        )
    total, count, metrics, grads = totals
    return Gradients(
        loss=total / count,
        grads=jax.tree.map(lambda g, p: (g / count).astype(p.dtype), grads, params),
        metrics={k: v[0] / v[1] if _is_mean(v) else v for k, v in metrics.items()},
    )


def _is_mean(metric: Any) -> bool:
    return isinstance(metric, tuple)


def _add(totals: Any, new: Any) -> Any:
    """Sums added, extremes compared."""
    (*sums, metrics, grads), (*new_sums, new_metrics, new_grads) = totals, new
    metrics = {
        name: jax.tree.map(jnp.add if _is_mean(old) else jnp.maximum, old, new_metrics[name])
        for name, old in metrics.items()
    }
    return *jax.tree.map(jnp.add, sums, new_sums), metrics, jax.tree.map(jnp.add, grads, new_grads)


def split_rows(tree: Any, parts: int) -> Any:
    """[parts * B, ...] -> [parts, B, ...]; part m takes rows m, m + parts, m + 2 * parts, ...

    The rows are spread over devices in contiguous blocks. Strided parts take the same share of
    every block, so each micro-batch is again spread over all devices and no row moves; contiguous
    parts would each lie on a few devices, and be sent to the others.
    """

    def split(x: Array) -> Array:
        if x.shape[0] % parts:
            raise ValueError(f"{parts} micro-batches do not divide a batch of {x.shape[0]} rows")
        return jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)

    return jax.tree.map(split, tree)


def join_rows(tree: Any) -> Any:
    """[parts, B, ...] -> [parts * B, ...], the inverse of `split_rows`."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), tree)


def fingerprint(tree: Any) -> str:
    """A hash of every bit of the arrays of `tree` and of where it stands, 16 hexadecimal digits.

    The same on any mesh: it is computed where the arrays are, a sum of integers. It tells apart
    what was changed by mistake, not by an adversary.
    """
    return "".join(f"{word:08x}" for word in fetch(_hash(tree)))


@jax.jit
def _hash(tree: Any) -> Array:
    """uint32[2]."""
    total = jnp.zeros(2, jnp.uint32)
    for i, leaf in enumerate(jax.tree.leaves(tree)):
        bits = _words(leaf).reshape(-1)
        place = jax.lax.iota(jnp.uint32, bits.size)
        salts = jnp.array([2 * i, 2 * i + 1], jnp.uint32)
        words = _scrambled(bits[None] ^ _scrambled(place[None] * jnp.uint32(31) + salts[:, None]))
        total = _scrambled(total + words.sum(axis=1, dtype=jnp.uint32))
    return total


def _words(leaf: Array) -> Array:
    """The bits of each element, uint32 of the same shape (of 8-byte elements, one word more)."""
    if leaf.dtype == jnp.bool_ or jnp.issubdtype(leaf.dtype, jnp.integer):
        return leaf.astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")
    if leaf.dtype.itemsize == 8:
        bits = jax.lax.bitcast_convert_type(bits, jnp.uint32)
    return bits.astype(jnp.uint32)


def _scrambled(x: Array) -> Array:
    """A bijection of uint32 that spreads every bit over all (the finish of MurmurHash3)."""
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> jnp.uint32(16))


def global_norm(tree: Any) -> Array:
    """The Euclidean norm of all leaves together, f32[]; not finite when any element is not."""
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, start=jnp.float32(0.0)))


def _stays_finite(old: Any, new: Any) -> Array:
    """bool[]: no element of `new`, a tree of which the first part is parameters, has ceased to be
    finite. One that never was may be an optimizer's start, as the best loss so far; of a parameter
    the loss shows it.

    One pass a parameter, over it with its moments and its average: of a reduction each, XLA keeps
    in memory what they share.
    """
    owner = _parameter_of(old[0])
    checks: dict[Any, Array] = {}
    paths, _ = jax.tree_util.tree_flatten_with_path(new)
    for (path, after), before in zip(paths, jax.tree.leaves(old), strict=True):
        if jnp.issubdtype(after.dtype, jnp.inexact):
            fine = jnp.isfinite(after) | ~jnp.isfinite(before)
            place = owner(path, after)
            place = path if place is None else place
            checks[place] = checks[place] & fine if place in checks else fine
    return jnp.array([True] if not checks else [fine.all() for fine in checks.values()]).all()


def _parameter_of(params: Any) -> Callable[[tuple[Any, ...], Any], tuple[Any, ...] | None]:
    """(path, leaf) of a state -> the path in `params` of the parameter that it belongs to and has
    the shape of: itself, a moment or an average; None where it is no such leaf.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    shapes = {path: leaf.shape for path, leaf in leaves}

    def owner(path: tuple[Any, ...], leaf: Any) -> tuple[Any, ...] | None:
        # A moment's path ends with its parameter's: (1, mu) + (decoder, kernel). True under masks
        # as well.
        ends = (path[start:] for start in range(len(path) + 1))
        return next((end for end in ends if shapes.get(end) == leaf.shape), None)

    return owner


def apply_gradients(
    state: TrainState,
    grads: Any,
    tx: optax.GradientTransformation,
    *,
    loss: Array | None = None,
    ema_decay: float | None = None,
    skip_above: float = math.inf,
) -> tuple[TrainState, Metrics]:
    """One guarded update.

    It is skipped unless `loss` (where given) is finite, the norm of `grads` is below `skip_above`,
    which is infinite by default, and parameters, optimizer state and average are finite after it.
    Metrics: grad_norm before clipping, skipped (0 or 1), skipped_in_a_row.

    `tx` is computed twice, once for what it makes to be looked at, which is not kept: holding the
    new state beside the old would take the memory of both.
    """
    if ema_decay is not None and state.ema is None:
        raise ValueError("ema_decay is given, but the state has no ema (init_state(..., ema=True))")
    norm = global_norm(grads)
    accepted = norm < skip_above  # false for NaN and infinity too
    if loss is not None:
        accepted &= jnp.isfinite(loss)

    def update() -> tuple[Any, Any, Any]:
        with jax.numpy_dtype_promotion("standard"):  # optax takes powers of an integer count
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        ema = state.ema if ema_decay is None else ema_update(state.ema, params, ema_decay)
        return params, opt_state, ema

    kept = state.params, state.opt_state, state.ema
    accepted &= _stays_finite(kept, update())
    # A branch: a select of every leaf would keep a second copy of the state alive.
    params, opt_state, ema = jax.lax.cond(accepted, update, lambda: kept)
    skipped = (~accepted).astype(jnp.int32)
    in_a_row = jnp.where(accepted, 0, state.skipped_in_a_row + 1)
    state = replace(
        state,
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        ema=ema,
        skipped=state.skipped + skipped,
        skipped_in_a_row=in_a_row,
    )
    return state, {
        "grad_norm": norm,
        "skipped": skipped.astype(jnp.float32),
        "skipped_in_a_row": in_a_row.astype(jnp.float32),
    }


TrainStep = Callable[[TrainState, Any, Array], tuple[TrainState, Metrics]]


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    micro_batches: int = 1,
    ema_decay: float | None = None,
    skip_above: float = math.inf,
) -> TrainStep:
    """The pure `step(state, batch, key) -> (state, metrics)` of one loss and one optimizer."""

    def step(state: TrainState, batch: Any, key: Array) -> tuple[TrainState, Metrics]:
        loss, grads, metrics = accumulate_gradients(
            loss_fn, state.params, batch, key, micro_batches=micro_batches
        )
        state, guard = apply_gradients(
            state, grads, tx, loss=loss, ema_decay=ema_decay, skip_above=skip_above
        )
        return state, {"loss": loss, **metrics, **guard}

    return step


def compile_step(step: Callable[..., Any], mesh: Mesh, state: Any, *fixed: Any) -> Any:
    """`step` under jit on `mesh`: state donated and kept where it is, rows of the batch spread.

    `state` is a state placed by `shard_state`, or its shardings. Every leaf of a batch has its rows
    first. `fixed` are placed trees that the step reads and never changes: with them it is
    step(state, *fixed, batch, key). They are arguments of the program, never constants inside it,
    and the caller still gives (state, batch, key).
    """

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda x: x if isinstance(x, Sharding) else x.sharding, tree)

    compiled = jax.jit(
        step,
        in_shardings=(placed(state), *map(placed, fixed), batch_sharding(mesh), replicated(mesh)),
        out_shardings=(placed(state), replicated(mesh)),
        donate_argnums=0,
    )
    return (lambda state, *inputs: compiled(state, *fixed, *inputs)) if fixed else compiled


def state_shardings(state: TrainState, mesh: Mesh, rules: PartitionRules) -> TrainState:
    """The sharding of every leaf of `state` (arrays, or shapes from `jax.eval_shape`).

    Moments and average are sharded like their parameter, the means of a moment over one of its axes
    (Adafactor's) like what is left of it. jit alone would replicate the moments, whatever the
    sharding of the parameters, so a state too large for one device is born with

        make = lambda key: init_state(model.init(key), tx)
        abstract = jax.eval_shape(make, key)
        jax.jit(make, out_shardings=state_shardings(abstract, mesh, rules))(key)
    """
    shardings = tree_shardings(mesh, rules, state.params)
    paths, _ = jax.tree_util.tree_flatten_with_path(state.params)
    placed = {
        path: (leaf.shape, sharding)
        for (path, leaf), sharding in zip(paths, jax.tree.leaves(shardings), strict=True)
    }
    owner = _parameter_of(state.params)

    def like_parameter(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        place = owner(path, leaf)
        if place is not None:
            return placed[place][1]
        ends = (path[start:] for start in range(len(path) + 1))
        shape, sharding = next((placed[end] for end in ends if end in placed), ((), None))
        if sharding is None:
            return replicated(mesh)
        by_row = ".v_row" in map(str, path)
        return NamedSharding(mesh, _without_an_axis(sharding.spec, shape, leaf.shape, last=by_row))

    return jax.tree_util.tree_map_with_path(like_parameter, state)


def _without_an_axis(
    spec: PartitionSpec, shape: tuple[int, ...], rest: tuple[int, ...], *, last: bool
) -> PartitionSpec:
    """Of an array of shape `rest` which is one of `shape` without an axis; of any other, whole.

    Of axes of one length it is the `last`, or the first.
    """
    gone = [axis for axis in range(len(shape)) if shape[:axis] + shape[axis + 1 :] == rest]
    if not gone:
        return PartitionSpec()
    axes = [*spec, *[None] * (len(shape) - len(spec))]
    del axes[gone[-1] if last else gone[0]]
    return PartitionSpec(*axes)


def shard_state(state: TrainState, mesh: Mesh, rules: PartitionRules) -> TrainState:
    """Puts `state` on `mesh`, in buffers of its own: donating it spares what was given."""
    return place(state, state_shardings(state, mesh, rules))
