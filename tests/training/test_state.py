import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from instruct_jax.training.mesh import batch_sharding, make_mesh, shard_batch
from instruct_jax.training.optim import adamw, ema_update, schedule
from instruct_jax.training.state import (
    accumulate_gradients,
    apply_gradients,
    compile_step,
    fingerprint,
    global_norm,
    init_state,
    make_train_step,
    shard_state,
    split_rows,
    state_shardings,
)
from tests.training import tiny

KEY = jax.random.key(0)


def same_bits(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in leaves)


def assert_close(a, b, rtol=1e-6, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


# --- sums and the one division -----------------------------------------------------------------


def test_the_denominator_is_global_over_micro_batches():
    """T24: 100 tokens at .5 and 900 at .3 give .32, not .40."""
    mask = np.zeros((2, 900), bool)
    mask[0, :100], mask[1, :] = True, True
    batch = {"value": np.array([0.5, 0.3], np.float32), "mask": mask}

    def loss_fn(params, batch, key):
        counts = batch["mask"].sum(-1, dtype=jnp.float32)
        total = params["w"] * jnp.sum(batch["value"] * counts)
        return total, counts.sum(), {"value": (total, counts.sum())}

    for micro_batches in (1, 2):
        out = accumulate_gradients(
            loss_fn, {"w": jnp.ones([])}, batch, KEY, micro_batches=micro_batches
        )
        for mean in (out.loss, out.grads["w"], out.metrics["value"]):
            assert float(mean) == pytest.approx(0.32, abs=1e-6)


@pytest.mark.parametrize("mesh", ["data:8", "fsdp:8", "data:2,fsdp:2,tensor:2"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_three_updates_are_those_of_one_device(mesh, micro_batches):
    """T24: devices and micro-batches change nothing (<= 1e-6)."""
    tx = adamw(1e-2, eps=1e-3, weight_decay=0.1)
    results = []
    for spec, parts in (("data:1", 1), (mesh, micro_batches)):
        target = make_mesh(spec)
        state = shard_state(init_state(tiny.init(KEY), tx, ema=True), target, tiny.RULES)
        step = make_train_step(tiny.loss_fn, tx, micro_batches=parts, ema_decay=0.9)
        step = compile_step(step, target, state)
        for i in range(3):
            state, metrics = step(state, shard_batch(tiny.batch(i), target), KEY)
        results.append(jax.device_get((state, metrics)))
    assert_close(*results)


def test_a_micro_batch_lies_where_its_rows_lie():
    mesh = make_mesh("data:2,fsdp:4")
    x = jax.ShapeDtypeStruct((32, 3), jnp.float32, sharding=batch_sharding(mesh))
    program = jax.jit(lambda x: split_rows(x, 4)).lower(x).compile()
    for collective in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert collective not in program.as_text()
    assert program.output_shardings.shard_shape((4, 8, 3)) == (4, 1, 3)


def test_micro_batches_partition_the_batch():
    parts = split_rows(np.arange(12), 3)
    np.testing.assert_array_equal(parts, [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]])
    with pytest.raises(ValueError, match="5 micro-batches do not divide a batch of 12 rows"):
        split_rows(np.arange(12), 5)


def test_every_micro_batch_has_its_own_key():
    def loss_fn(params, batch, key):
        return params["w"] * jax.random.uniform(key), jnp.float32(1.0), {}

    params, batch = {"w": jnp.ones([])}, {"x": np.zeros(4)}
    two = accumulate_gradients(loss_fn, params, batch, KEY, micro_batches=2)
    expected = [jax.random.uniform(jax.random.fold_in(KEY, m)) for m in range(2)]
    assert float(two.loss) == pytest.approx(float(np.mean(expected)), rel=1e-6)


# --- the guard ---------------------------------------------------------------------------------


@pytest.fixture
def guarded():
    tx = adamw(1e-2)
    step = jax.jit(make_train_step(tiny.loss_fn, tx, ema_decay=0.9, skip_above=1e4))
    state, _ = step(init_state(tiny.init(KEY), tx, ema=True), tiny.batch(0), KEY)
    return step, state


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e6])
def test_a_bad_minibatch_is_skipped_and_changes_nothing(guarded, value):
    """T44, R9: NaN, infinity and a spike; the optimizer's count and the average stay as well."""
    step, state = guarded
    bad = tiny.batch(1)
    bad["y"][0, 0] = value
    after, metrics = step(state, bad, KEY)
    for name in ("params", "opt_state", "ema"):
        assert same_bits(getattr(state, name), getattr(after, name))
    assert (int(after.step), int(after.skipped), int(after.updates)) == (2, 1, 1)
    assert metrics["skipped"] == 1 and not float(metrics["grad_norm"]) < 1e4
    good, metrics = step(after, tiny.batch(2), KEY)
    assert metrics["skipped"] == 0 and int(good.skipped) == 1
    assert same_bits(good.params, step(state, tiny.batch(2), KEY)[0].params)


def test_a_loss_that_is_not_finite_is_skipped_even_with_a_finite_gradient():
    def loss_fn(params, batch, key):
        return params["w"] + jnp.inf, jnp.float32(1.0), {}

    tx = adamw(1e-2)
    state = init_state({"w": jnp.ones([])}, tx)
    after, metrics = make_train_step(loss_fn, tx)(state, {"x": np.zeros(2)}, KEY)
    assert metrics["skipped"] == 1 and same_bits(after.params, state.params)


def of_the_user():
    """An optimizer that keeps the best gradient so far, infinite at first, and divides by it."""

    def init(params):
        return {"best": jnp.float32(jnp.inf)}

    def update(updates, state, params=None):
        best = jnp.minimum(state["best"], global_norm(updates))
        rate = -0.1 / (best - 2.0)
        return jax.tree.map(lambda g: g.astype(jnp.float32) * rate, updates), {"best": best}

    return optax.GradientTransformation(init, update)


# What makes of a finite gradient a state that is not finite, and the gradients [used, unused].
POISONS = {
    "an eps of 0 where a gradient is 0": (adamw(1e-2, eps=0.0), None, 1.0),
    "b1 of 1": (adamw(1e-2, b1=1.0), None, 1.0),
    "b2 of 1 in TensorFlow's form": (adamw(1e-2, b2=1.0, eps=0.0, tf_style=True), None, 1.0),
    "the average's decay is no number": (adamw(1e-2), float("nan"), 1.0),
    "a learning rate that overflows": (adamw(lambda _: jnp.float32(3e38)), 0.9, 1.0),
    "a learning rate that is no number": (adamw(float("nan")), None, 1.0),
    "a second moment that overflows alone": (adamw(1e-2, clip=None), None, 1e22),
    "an optimizer of the user's": (of_the_user(), None, 2.0),
}


@pytest.mark.parametrize("name", POISONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_what_an_update_would_make_is_looked_at_before_it_is_kept(name, dtype):
    """R21: parameters, optimizer and average stay to the bit, and it is counted as skipped."""
    tx, decay, size = POISONS[name]
    if dtype == jnp.float16 and size > 1e4:
        size = 1e3
    params = {"used": jnp.full(4, jnp.finfo(dtype).min), "unused": jnp.ones(3, dtype)}
    state = init_state(params, tx, ema=decay is not None)
    grads = {"used": jnp.full(4, size / 2, dtype), "unused": jnp.zeros(3, dtype)}
    after, metrics = jax.jit(lambda s: apply_gradients(s, grads, tx, ema_decay=decay))(state)
    for part in ("params", "opt_state", "ema"):
        assert same_bits(getattr(state, part), getattr(after, part))
    assert (int(after.step), int(after.skipped), int(after.updates)) == (1, 1, 0)
    assert metrics["skipped"] == 1 and metrics["skipped_in_a_row"] == 1


def test_what_is_infinite_from_the_start_does_not_hold_up_an_optimizer():
    """As the best loss so far of `optax.contrib.reduce_on_plateau`."""
    tx = of_the_user()
    state = init_state({"w": jnp.ones(2)}, tx)
    for updates in (1, 2):
        state, metrics = apply_gradients(state, {"w": jnp.ones(2)}, tx)
        assert metrics["skipped"] == 0 and int(state.updates) == updates


def test_the_look_at_an_update_takes_no_memory():
    """Parameters, moments and average are looked at in one pass: no second copy of any."""
    tx = adamw(1e-3, weight_decay=0.1)
    params = {"a": jnp.ones((512, 512)), "b": jnp.ones((4, 256, 256))}
    state = init_state(params, tx, ema=True)

    def temporaries(update):
        compiled = jax.jit(update, donate_argnums=0).lower(state, params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def bare(state, grads):
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
        new = optax.apply_updates(state.params, updates)
        average = ema_update(state.ema, new, 0.9)
        return dataclasses.replace(state, params=new, opt_state=opt_state, ema=average)

    guarded = temporaries(lambda s, g: apply_gradients(s, g, tx, ema_decay=0.9))
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    assert guarded <= temporaries(bare) + size + 4096  # the gradient, clipped, goes into a branch


def test_an_empty_batch_is_skipped(guarded):
    step, state = guarded
    empty = tiny.batch(1)
    empty["mask"][:] = False
    after, metrics = step(state, empty, KEY)
    assert metrics["skipped"] == 1 and same_bits(after.params, state.params)


def test_skips_without_a_break_are_counted(guarded):
    step, state = guarded
    bad = tiny.batch(1)
    bad["x"][:] = np.nan
    counts = []
    for batch in (bad, bad, tiny.batch(2), bad):
        state, metrics = step(state, batch, KEY)
        counts.append((int(state.skipped), int(metrics["skipped_in_a_row"])))
    assert counts == [(1, 1), (2, 2), (2, 0), (3, 1)]


def test_the_schedule_counts_updates_and_not_batches():
    """T33: a skipped batch leaves the learning rate where it was."""
    tx = adamw(schedule(1.0, warmup=10, start=0.1), eps=1e-12, clip=None)
    state = init_state({"w": jnp.zeros([])}, tx)
    for gradient in (jnp.nan, jnp.nan, 1.0):
        before = state
        state, _ = apply_gradients(state, {"w": jnp.float32(gradient)}, tx)
    assert float(before.params["w"] - state.params["w"]) == pytest.approx(0.1, rel=1e-5)


# --- PPO-ptx: two gradients, one update --------------------------------------------------------

PTX_TX = adamw(1e-3, eps=1e-12, clip=None)


def ptx_loss(params, batch, key):
    total, count, _ = tiny.loss_fn(params, batch | {"y": -2.0 * batch["y"]}, key)
    return 3.0 * total, count, {}


@jax.jit
def pg_gradients(params):
    return accumulate_gradients(tiny.loss_fn, params, tiny.batch(0, rows=8), KEY).grads


@jax.jit
def ptx_gradients(params):
    batch = tiny.batch(1, rows=64)
    return accumulate_gradients(ptx_loss, params, batch, KEY, micro_batches=8).grads


@jax.jit
def apply(state, grads):
    return apply_gradients(state, grads, PTX_TX)[0]


def summed(params, coefficient):
    return jax.tree.map(
        lambda pg, ptx: pg + coefficient * ptx, pg_gradients(params), ptx_gradients(params)
    )


def moved(state, grads):
    moves = jax.tree.map(jnp.subtract, apply(state, grads).params, state.params)
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(moves)])


def test_the_ptx_gradient_is_the_sum_and_there_is_one_update():
    """T36: the input gradient of the single update is dL_pg + g * dL_ptx."""
    state = init_state(tiny.init(KEY), PTX_TX)

    def objective(params):
        means = []
        for loss, step, rows in ((tiny.loss_fn, 0, 8), (ptx_loss, 1, 64)):
            total, count, _ = loss(params, tiny.batch(step, rows=rows), KEY)
            means.append(total / count)
        return means[0] + 27.8 * means[1]

    grads = summed(state.params, 27.8)
    assert_close(grads, jax.jit(jax.grad(objective))(state.params), rtol=1e-5, atol=1e-5)
    after = apply(state, grads)
    assert int(after.updates) == 1 and int(after.opt_state[1].count) == 1


def test_a_ptx_coefficient_of_zero_is_ppo():
    """T36: bit-equal."""
    state = init_state(tiny.init(KEY), PTX_TX)
    ppo = apply(state, pg_gradients(state.params))
    assert same_bits(apply(state, summed(state.params, 0.0)), ppo)


def test_only_the_summed_gradient_gives_the_ptx_coefficient_a_meaning():
    """T37: a separate update is blind to the coefficient; the single update turns with it."""
    state = init_state(tiny.init(KEY), PTX_TX)
    alone = ptx_gradients(state.params)
    doubled = jax.tree.map(lambda g: 2.0 * g, alone)
    np.testing.assert_allclose(moved(state, alone), moved(state, doubled), rtol=1e-4)
    one, two = (moved(state, summed(state.params, g)) for g in (0.1, 0.2))
    assert one @ two / np.linalg.norm(one) / np.linalg.norm(two) < 0.999


# --- precision ---------------------------------------------------------------------------------


def test_small_updates_reach_float32_masters_and_are_lost_in_bfloat16():
    """T53, NUM-1: after one Adam step at 1e-6, > 99 % of the masters and < 10 % of bf16 moved."""

    def loss_fn(params, batch, key):
        hidden = batch["x"].astype(jnp.bfloat16) @ params["w"].astype(jnp.bfloat16)
        return jnp.square(hidden.astype(jnp.float32)).sum(), jnp.float32(hidden.size), {}

    weights = 0.02 * jax.random.normal(KEY, (64, 64))
    batch = {"x": np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)}
    step = make_train_step(loss_fn, adamw(1e-6))
    moved = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        state = init_state({"w": weights.astype(dtype)}, adamw(1e-6))
        after, _ = step(state, batch, KEY)
        assert after.params["w"].dtype == dtype
        moved[dtype] = float((after.params["w"] != state.params["w"]).mean())
    assert moved[jnp.float32] > 0.99 and moved[jnp.bfloat16] < 0.1


def test_the_average_is_float32_and_follows_every_update():
    tx = adamw(1e-2)
    params = tiny.init(KEY)
    state = init_state(params, tx, ema=True)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    averages = jax.tree.leaves(init_state(half, tx, ema=True).ema)
    assert {x.dtype for x in averages} == {np.dtype(np.float32)}
    after, _ = apply_gradients(state, jax.tree.map(jnp.ones_like, params), tx, ema_decay=0.992)
    expected = jax.tree.map(lambda e, p: 0.992 * e + 0.008 * p, state.ema, after.params)
    assert_close(after.ema, expected)
    kept, _ = apply_gradients(state, jax.tree.map(jnp.ones_like, params), tx)
    assert same_bits(kept.ema, state.ema)
    with pytest.raises(ValueError, match="the state has no ema"):
        apply_gradients(init_state(params, tx), params, tx, ema_decay=0.992)


# --- placement, donation, compilation ----------------------------------------------------------


def test_moments_and_average_are_sharded_like_their_parameter():
    mesh = make_mesh("data:2,fsdp:2,tensor:2")
    tx = adamw(1e-2, weight_decay=0.1)

    def make(key):
        return init_state(tiny.init(key), tx, ema=True)

    shardings = state_shardings(jax.eval_shape(make, KEY), mesh, tiny.RULES)
    for state in (
        shard_state(make(KEY), mesh, tiny.RULES),
        jax.jit(make, out_shardings=shardings)(KEY),
    ):
        adam = state.opt_state[1]
        expected = jax.tree.map(lambda x: x.sharding, state.params)
        for like in (adam.mu, adam.nu, state.ema):
            assert jax.tree.map(lambda x: x.sharding, like) == expected
        assert adam.mu["hidden"]["kernel"].addressable_shards[0].data.shape == (4, 8)
        assert adam.count.sharding.is_fully_replicated


def test_a_donated_state_leaves_the_callers_parameters_alone():
    """JAX-8: the reference model may be the very arrays that the policy was made from."""
    mesh, tx, params = make_mesh("data:1"), adamw(1e-2), tiny.init(KEY)
    before = jax.device_get(params)
    first = shard_state(init_state(params, tx, ema=True), mesh, tiny.RULES)
    step = compile_step(make_train_step(tiny.loss_fn, tx, ema_decay=0.9), mesh, first)
    step(first, tiny.batch(0), KEY)
    assert first.params["head"]["kernel"].is_deleted()
    assert same_bits(params, before)


@pytest.mark.parametrize("place", [shard_batch, lambda batch, mesh: batch])
def test_a_step_is_compiled_once(place):
    """T56: over updates and skips; batches on the mesh or from NumPy."""
    mesh, tx = make_mesh("data:2,fsdp:2,tensor:2"), adamw(1e-2)
    state = shard_state(init_state(tiny.init(KEY), tx, ema=True), mesh, tiny.RULES)
    traces = []

    def loss_fn(params, batch, key):
        traces.append(1)
        return tiny.loss_fn(params, batch, key)

    step = compile_step(make_train_step(loss_fn, tx, ema_decay=0.9), mesh, state)
    for i in range(4):
        batch = tiny.batch(i)
        if i == 1:
            batch["y"][:] = np.nan
        state, _ = step(state, place(batch, mesh), jax.random.fold_in(KEY, i))
    assert len(traces) == 1 and int(state.skipped) == 1


def test_the_same_run_twice_gives_the_same_bits():
    """R8: same layout, same bits."""
    mesh, tx = make_mesh("data:2,fsdp:4"), adamw(1e-2)
    step = make_train_step(tiny.loss_fn, tx, micro_batches=2)
    runs = []
    for _ in range(2):
        state = shard_state(init_state(tiny.init(KEY), tx), mesh, tiny.RULES)
        run = compile_step(step, mesh, state)
        for i in range(20):
            state, _ = run(state, tiny.batch(i), jax.random.fold_in(KEY, i))
        runs.append(state)
    assert same_bits(*runs)


def test_fields_of_the_state_are_what_a_checkpoint_holds():
    names = [f.name for f in dataclasses.fields(init_state(tiny.init(KEY), adamw(1.0)))]
    assert names == ["step", "params", "opt_state", "ema", "skipped", "skipped_in_a_row"]


def test_a_metric_that_is_one_number_is_the_largest_of_all_micro_batches() -> None:
    def loss(params: Any, rows: Any, key: Any) -> Any:
        values = params["w"] * rows
        return (
            values.sum(),
            jnp.float32(len(rows)),
            {
                "mean": (rows.sum(), jnp.float32(len(rows))),
                "largest": rows.max(),
            },
        )

    params, rows = {"w": jnp.float32(2.0)}, -jnp.arange(1.0, 9.0, dtype=jnp.float32)
    for micro_batches in (1, 2, 4):
        result = accumulate_gradients(
            loss, params, rows, jax.random.key(0), micro_batches=micro_batches
        )
        assert result.metrics == {"mean": -4.5, "largest": -1.0}


def test_a_fingerprint_sees_every_bit_and_its_place_on_any_mesh():
    tree = {"a": jnp.arange(48, dtype=jnp.float32).reshape(8, 6), "b": jnp.int8([1, -1, 0, 2])}
    own = fingerprint(tree)
    assert own == fingerprint(jax.tree.map(jnp.copy, tree)) and len(own) == 16
    for spec in ("data:8", "data:2,fsdp:2"):
        assert fingerprint(tree | shard_batch({"a": tree["a"]}, make_mesh(spec))) == own
    changed = [
        tree | {"a": tree["a"].at[7, 5].add(4e-6)},
        tree | {"a": tree["a"][::-1]},
        tree | {"a": tree["a"].at[0, 0].set(-0.0)},
        tree | {"b": jnp.int8([-1, 1, 0, 2])},
        {"a": tree["a"]},
    ]
    assert len({own, *map(fingerprint, changed)}) == 1 + len(changed)
