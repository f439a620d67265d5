import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from instruct_jax.training.optim import (
    Shape,
    adafactor,
    adamw,
    ema_update,
    is_matrix,
    lion,
    muon,
    schedule,
)

adam_tf_style = functools.partial(adamw, tf_style=True)


def update(tx, *arguments):
    with jax.numpy_dtype_promotion("standard"):  # optax is not written for strict promotion
        return tx.update(*arguments)


def rates(counts, *args, **kwargs):
    rate = schedule(*args, **kwargs)
    return [float(rate(s)) for s in counts]


def test_cosine_ends_at_a_tenth_of_the_peak():
    """T33: the golden values of SFT-2."""
    np.testing.assert_allclose(
        rates((0, 500, 1000, 2000), 9.65e-6, "cosine", steps=1000),
        np.array([1.0, 0.55, 0.1, 0.1]) * 9.65e-6,
        rtol=1e-6,
    )


@pytest.mark.parametrize("shape", typing.get_args(Shape))
def test_a_schedule_with_warmup_is_continuous_and_never_zero(shape):
    values = np.array(rates(range(112), 1.0, shape, steps=110, warmup=10))
    assert values[0] == pytest.approx(1 / 11) and values[10] == pytest.approx(1.0)
    assert values.argmax() == 10 and np.abs(np.diff(values)).max() < 0.1
    np.testing.assert_allclose(values[110:], 1.0 if shape == "constant" else 0.1, rtol=1e-6)


def test_warmup_is_linear_from_a_tenth_then_constant():
    """T33: the golden values of PPO-3."""
    found = rates((0, 5, 10, 11, 500), 2.0, warmup=10, start=0.1)
    np.testing.assert_allclose(found, [0.2, 1.1, 2.0, 2.0, 2.0], rtol=1e-6)
    assert rates([0], 2.0) == [2.0]


def test_linear_falls_evenly_and_a_stable_rate_at_the_end_alone():
    found = rates((0, 50, 100, 101), 2.0, "linear", steps=100, final=0.0)
    np.testing.assert_allclose(found, [2.0, 1.0, 0.0, 0.0], atol=1e-6)
    shape: dict = {"shape": "warmup_stable_decay", "steps": 100, "warmup": 10, "decay": 0.2}
    found = rates((10, 79, 80, 90, 100, 200), 2.0, final=0.1, **shape)
    np.testing.assert_allclose(found, [2.0, 2.0, 2.0, 1.1, 0.2, 0.2], rtol=1e-6)


@pytest.mark.parametrize("shape", typing.get_args(Shape))
def test_a_schedule_is_traced_on_the_optimizers_count(shape):
    rate = schedule(1e-3, shape, steps=8, warmup=2)
    np.testing.assert_allclose(jax.jit(rate)(jnp.int32(3)), rate(3), rtol=1e-6)


@pytest.mark.parametrize("b2", [0.95, 0.999])
@pytest.mark.parametrize("gradient", [1e-6, -3e-5, 0.5])
def test_first_step_of_both_adams_is_the_analytic_one(b2, gradient):
    """T41: lr * g / (|g| + eps), and with eps / sqrt(1 - b2) in TensorFlow's form."""
    params, grads = {"w": jnp.zeros(3)}, {"w": jnp.full(3, gradient)}
    for make, eps in ((adamw, 1e-5), (adam_tf_style, 1e-5 / np.sqrt(1 - b2))):
        tx = make(0.01, b2=b2, eps=1e-5, clip=None)
        step, _ = update(tx, grads, tx.init(params), params)
        expected = -0.01 * gradient / (abs(gradient) + eps)
        np.testing.assert_allclose(step["w"], np.full(3, expected), rtol=1e-4)


def test_adam_tf_style_with_no_eps_is_adam(rng):
    grads = [{"w": jnp.asarray(rng.normal(size=5), jnp.float32)} for _ in range(5)]
    params, steps = {"w": jnp.zeros(5)}, []
    for make in (adamw, adam_tf_style):
        tx = make(0.1, eps=1e-30, clip=None)
        state = tx.init(params)
        for g in grads:
            step, state = update(tx, g, state, params)
        steps.append(step["w"])
    np.testing.assert_allclose(*steps, rtol=1e-5)


def test_weight_decay_is_decoupled_and_spares_biases_and_scales():
    params = {
        "layers": {
            "kernel": jnp.ones((2, 3, 3)),
            "bias": jnp.ones((2, 3)),
            "scale": jnp.ones((2, 3)),
        },
        "head": {"kernel": jnp.ones((3, 1)), "bias": jnp.ones(1)},
    }
    assert [k for k, v in _paths(is_matrix(params)) if v] == ["head/kernel", "layers/kernel"]
    tx = adamw(0.5, weight_decay=0.1)
    step, _ = update(tx, jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(step["layers"]["kernel"], np.full((2, 3, 3), -0.05), rtol=1e-6)
    assert not step["layers"]["bias"].any() and not step["layers"]["scale"].any()


def _paths(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(p, simple=True, separator="/"), v) for p, v in leaves]


def test_the_clip_is_on_the_norm_of_all_leaves_together():
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([0.0, 4.0])}
    clipped, _ = optax.clip_by_global_norm(1.0).update(grads, optax.EmptyState())
    for make in (adamw, adam_tf_style):
        tx = make(1.0, clip=1.0)
        (_, adam, *_) = update(tx, grads, tx.init(params), params)[1]
        np.testing.assert_allclose(adam.mu["a"], 0.1 * clipped["a"], rtol=1e-6)
        np.testing.assert_allclose(adam.mu["b"], [0.0, 0.08], rtol=1e-6)


def test_half_of_the_average_is_replaced_in_86_updates():
    """T40: from 0 towards 1 at 0.992, 86 updates give .499; float32 also for bfloat16 weights."""
    ema = {"w": jnp.zeros(3)}
    for _ in range(86):
        ema = ema_update(ema, {"w": jnp.ones(3, jnp.bfloat16)}, 0.992)
    assert ema["w"].dtype == jnp.float32
    np.testing.assert_allclose(ema["w"], np.full(3, 1 - 0.992**86), rtol=1e-5)
    assert float(ema["w"][0]) == pytest.approx(0.499, abs=5e-4)


# --- each is optax's ----------------------------------------------------------------------------

RATE = schedule(0.05, "cosine", steps=6, warmup=2)
L, D, F = 3, 6, 10


def stacked(rng):
    """A model of three layers, of which the second has large weights."""
    scale = np.array([1.0, 30.0, 0.1], np.float32)[:, None, None]
    kernel = jnp.asarray(rng.normal(size=(L, D, F)) * scale, jnp.float32)
    return {
        "layers": {"kernel": kernel, "bias": jnp.asarray(rng.normal(size=(L, F)), jnp.float32)},
        "table": jnp.asarray(rng.normal(size=(F, D)), jnp.float32),
    }


def path_of(tx, params, grads):
    """The parameters after each update with these gradients."""
    state, found = tx.init(params), []
    for g in grads:
        updates, state = update(tx, g, state, params)
        params = optax.apply_updates(params, updates)
        found.append(params)
    return found


def layer(tree, i):
    return {"layers": jax.tree.map(lambda x: x[i], tree["layers"]), "table": tree["table"]}


def plain(name, tree):
    """The optimizer as optax hands it out, on one layer."""
    decayed = is_matrix(tree)
    if name == "adamw":
        return optax.adamw(RATE, b2=0.95, weight_decay=0.1, mask=decayed)
    if name == "lion":
        return optax.lion(RATE, weight_decay=0.1, mask=decayed)
    if name == "adafactor":
        return optax.adafactor(RATE, min_dim_size_to_factor=4)
    return optax.contrib.muon(
        RATE,
        weight_decay=0.1,
        consistent_rms=0.2,
        muon_weight_dimension_numbers={
            "layers": {"kernel": optax.contrib.MuonDimensionNumbers(), "bias": None},
            "table": None,
        },
    )


OURS = {
    "adamw": lambda: adamw(RATE, weight_decay=0.1, clip=None),
    "lion": lambda: lion(RATE, weight_decay=0.1, clip=None),
    "adafactor": lambda: adafactor(RATE, min_factored=4, clip=None),
    "muon": lambda: muon(RATE, weight_decay=0.1, clip=None),
}


@pytest.mark.parametrize("name", OURS)
def test_each_optimizer_is_optaxs_of_every_layer_by_itself(name, rng):
    params = stacked(rng)
    grads = [stacked(rng) for _ in range(6)]
    found = path_of(OURS[name](), params, grads)
    for i in range(L):
        alone = layer(params, i)
        expected = path_of(plain(name, alone), alone, [layer(g, i) for g in grads])
        for ours, theirs in zip(found, expected, strict=True):
            ours, theirs = layer(ours, i), dict(theirs)
            if name == "muon":  # of the rest optax makes Nesterov's Adam; ours is adamw
                ours, theirs = ours["layers"]["kernel"], theirs["layers"]["kernel"]
            for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
                np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_muon_moves_what_is_in_no_layer_as_adamw_does(rng):
    params, grads = stacked(rng), [stacked(rng) for _ in range(4)]
    ends = [path_of(OURS[name](), params, grads)[-1] for name in ("muon", "adamw")]
    for tree in ends:
        del tree["layers"]["kernel"]
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_update_of_muon_is_nearly_orthogonal_and_of_the_size_said(rng):
    """All singular values near sqrt(max(D, F)) rms, so that its elements have that as their RMS."""
    params, grads = stacked(rng), stacked(rng)
    tx = muon(1.0, rms=0.2, clip=None)
    step, _ = update(tx, grads, tx.init(params), params)
    values = np.linalg.svd(step["layers"]["kernel"], compute_uv=False)
    assert values.shape == (L, D)
    assert (values > 0.6 * 0.2 * F**0.5).all() and (values < 1.3 * 0.2 * F**0.5).all()


@pytest.mark.parametrize("name", OURS)
def test_the_clip_and_the_decay_are_those_of_adam(name, rng):
    """A gradient beyond the clip is one of that norm; matrices without a gradient only shrink."""
    make = {"adamw": adamw, "lion": lion, "adafactor": adafactor, "muon": muon}[name]
    params, grads = stacked(rng), stacked(rng)
    clipped, _ = optax.clip_by_global_norm(0.5).update(grads, optax.EmptyState())
    ends = [
        path_of(make(0.1, clip=clip), params, [g, jax.tree.map(jnp.zeros_like, g)])[-1]
        for clip, g in ((0.5, grads), (None, clipped))
    ]
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    tx = make(0.5, weight_decay=0.1)
    step, _ = update(tx, jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(step["table"], -0.05 * params["table"], rtol=1e-6)
    assert not step["layers"]["bias"].any()
