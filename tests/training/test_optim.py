import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from instruct_jax.training.optim import (
    adam_tf_style,
    adamw,
    cosine_schedule,
    ema_update,
    is_matrix,
    warmup_constant_schedule,
)


def update(tx, *arguments):
    with jax.numpy_dtype_promotion("standard"):  # optax is not written for strict promotion
        return tx.update(*arguments)


def test_cosine_ends_at_a_tenth_of_the_peak():
    """T33: the golden values of SFT-2."""
    schedule = cosine_schedule(9.65e-6, steps=1000)
    np.testing.assert_allclose(
        [schedule(s) for s in (0, 500, 1000, 2000)],
        np.array([1.0, 0.55, 0.1, 0.1]) * 9.65e-6,
        rtol=1e-6,
    )


def test_cosine_with_warmup_is_continuous_and_never_zero():
    schedule = cosine_schedule(1.0, steps=110, warmup=10)
    values = np.array([schedule(s) for s in range(111)])
    assert values[0] == pytest.approx(1 / 11) and values[10] == pytest.approx(1.0)
    assert values.argmax() == 10 and np.abs(np.diff(values)).max() < 0.1
    assert values[110] == pytest.approx(0.1)


def test_warmup_is_linear_from_a_tenth_then_constant():
    """T33: the golden values of PPO-3."""
    schedule = warmup_constant_schedule(2.0, warmup=10)
    np.testing.assert_allclose(
        [schedule(i) for i in (0, 5, 10, 11, 500)], [0.2, 1.1, 2.0, 2.0, 2.0], rtol=1e-6
    )
    assert warmup_constant_schedule(2.0, warmup=0)(0) == 2.0


@pytest.mark.parametrize(
    "schedule", [cosine_schedule(1e-3, steps=8), warmup_constant_schedule(1e-3, warmup=4)]
)
def test_a_schedule_is_traced_on_the_optimizers_count(schedule):
    count = jnp.int32(3)
    np.testing.assert_allclose(jax.jit(schedule)(count), schedule(3), rtol=1e-6)


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
