"""Means over valid tokens are exact however a batch is cut, and padding has no say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from tests.losses.jitted import (
    clipped_policy_loss,
    grpo_advantages,
    loss_sum_and_count,
    masked_mean,
    masked_whiten,
    reduce_loss,
    sum_and_count,
)

ROWS, STEPS = 16, 5


def ragged(rng):
    x = jnp.asarray(rng.standard_normal((ROWS, STEPS)), jnp.float32)
    return x, jnp.asarray(rng.random((ROWS, STEPS)) < 0.6)


def test_whitening_golden_with_the_mean_kept():
    """T22, T23: 1.2, 1.3, ... 2.0, biased variance."""
    x = jnp.linspace(1.2, 2.0, 9).reshape(3, 3)
    white = masked_whiten(x, where=jnp.ones((3, 3), bool), shift_mean=False)
    want = [0.0508, 0.4381, 0.8254, 1.2127, 1.6, 1.9873, 2.3746, 2.7619, 3.1492]
    np.testing.assert_allclose(white.ravel(), want, atol=1e-4)
    np.testing.assert_allclose(white.mean(), x.mean(), rtol=1e-6)


def test_whitened_valid_entries_have_mean_zero_and_variance_one(rng):
    """T22: and the padding reads 0."""
    x, where = ragged(rng)
    white = np.asarray(masked_whiten(5 + 3 * x, where=where))
    assert abs(white[where].mean()) < 1e-6
    assert abs(white[where].var() - 1) < 1e-5
    assert not white[~np.asarray(where)].any()


def test_micro_batches_of_unequal_token_counts_give_the_mean_over_tokens():
    """T24: 100 tokens at .5 and 900 at .3 give .32; the mean of the two means is .40."""
    parts = [
        sum_and_count(jnp.full((1, n), value), where=jnp.ones((1, n), bool))
        for n, value in ((100, 0.5), (900, 0.3))
    ]
    total, count = (sum(part) for part in zip(*parts, strict=True))
    np.testing.assert_allclose(total / count, 0.32, rtol=1e-6)


@pytest.mark.parametrize("reduction", ["token_mean", "seq_mean", "seq_sum_const"])
@pytest.mark.parametrize("parts", [2, 4])
def test_a_loss_and_its_gradient_do_not_depend_on_the_number_of_micro_batches(
    rng, reduction, parts
):
    """T24: sums and counts are added over micro-batches, and there is one division."""
    lp, where = ragged(rng)
    adv = ragged(rng)[0]

    @jax.jit
    def grad_of_sum(lp, adv, where):
        def loss(lp):
            losses = clipped_policy_loss(lp, jnp.zeros_like(lp), adv)
            return loss_sum_and_count(losses, where=where, reduction=reduction)

        return jax.value_and_grad(loss, has_aux=True)(lp)

    (total, count), grad = grad_of_sum(lp, adv, where)
    split = (jnp.split(a, parts) for a in (lp, adv, where))
    pieces = [grad_of_sum(*piece) for piece in zip(*split, strict=True)]
    counts = sum(c for (_, c), _ in pieces)
    np.testing.assert_allclose(
        sum(t for (t, _), _ in pieces) / counts, total / count, rtol=1e-6, atol=1e-6
    )
    pieced = jnp.concatenate([g for _, g in pieces]) / counts
    np.testing.assert_allclose(pieced, grad / count, rtol=1e-6, atol=1e-7)


def test_whitening_and_losses_do_not_depend_on_the_number_of_devices(rng):
    """T24: statistics are global under jit over a sharded batch."""
    x, where = ragged(rng)

    def both(x, where):
        white = masked_whiten(x, where=where)
        return white, reduce_loss(clipped_policy_loss(x, 0.5 * x, white), where=where)

    one = jax.jit(both)(x, where)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    eight = jax.jit(both)(jax.device_put(x, rows), jax.device_put(where, rows))
    for a, b in zip(one, eight, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_reductions_differ_on_a_ragged_batch_as_documented():
    """T25: one row of 4 tokens at 1, one row of 1 token at 6."""
    losses = jnp.array([[1.0, 1.0, 1.0, 1.0], [6.0, 0.0, 0.0, 0.0]])
    where = jnp.array([[True] * 4, [True, False, False, False]])
    got = {
        reduction: float(reduce_loss(losses, where=where, reduction=reduction))
        for reduction in ("token_mean", "seq_mean", "seq_sum_const")
    }
    assert got == {"token_mean": 2.0, "seq_mean": 3.5, "seq_sum_const": 1.25}


@pytest.mark.parametrize("reduction", ["token_mean", "seq_mean", "seq_sum_const"])
def test_empty_rows_do_not_dilute_a_reduction(rng, reduction):
    """A row added to fill a batch has no valid token and no weight."""
    losses, where = ragged(rng)
    more, there = (jnp.concatenate([a, jnp.zeros((8, STEPS), a.dtype)]) for a in (losses, where))
    np.testing.assert_allclose(
        reduce_loss(more, where=there, reduction=reduction),
        reduce_loss(losses, where=where, reduction=reduction),
        rtol=1e-6,
    )


@pytest.mark.parametrize("function", [masked_mean, masked_whiten, reduce_loss])
def test_nothing_valid_gives_zero_and_a_zero_gradient(function):
    """T54."""
    x, where = jnp.array([[jnp.nan, 1.0]]), jnp.zeros((1, 2), bool)
    value, grad = jax.value_and_grad(lambda x: function(x, where=where).sum())(x)
    assert value == 0
    assert not grad.any()


def test_masks_must_be_boolean_and_of_the_same_shape():
    x = jnp.ones((2, 3))
    with pytest.raises(AssertionError):
        masked_mean(x, where=jnp.ones((2, 3)))
    with pytest.raises(AssertionError):
        masked_mean(x, where=jnp.ones((2, 1), bool))


def test_an_unknown_reduction_is_named():
    with pytest.raises(ValueError, match="'mean'"):
        reduce_loss(jnp.ones((1, 1)), where=jnp.ones((1, 1), bool), reduction="mean")


@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(
        st.tuples(st.floats(-1e3, 1e3, width=32), st.booleans()), min_size=6, max_size=6
    ),
    shift=st.floats(-100, 100, width=32),
)
def test_a_masked_mean_is_linear_and_between_the_extremes(values, shift):
    x = jnp.array([v for v, _ in values], jnp.float32)
    where = jnp.array([w for _, w in values])
    mean = float(masked_mean(x, where=where))
    valid = [v for v, w in values if w]
    if not valid:
        assert mean == 0
        return
    assert min(valid) - 1e-3 <= mean <= max(valid) + 1e-3
    np.testing.assert_allclose(
        masked_mean(x + shift, where=where), mean + shift, rtol=1e-5, atol=1e-3
    )


@pytest.mark.parametrize("size", [1e20, 1e29, 3e38])
def test_what_overflows_is_not_taken_for_nothing_to_learn(size):
    """R21: rewards near 1e29 gave advantages of 0 without a word; NaN is noticed and skipped."""
    x = jnp.array([[size, -size, 0.0, jnp.nan]])
    where = jnp.array([[True, True, True, False]])
    white = masked_whiten(x, where=where)
    assert jnp.isnan(white[0, :3]).all() and white[0, 3] == 0
    kept = masked_whiten(x, where=where, shift_mean=False)
    assert jnp.isnan(kept[0, :3]).all() and kept[0, 3] == 0
    equal = masked_whiten(jnp.full((1, 4), min(size, 1e38)), where=where)
    assert (equal == 0).all()  # there is nothing to learn, whatever the size
    for scale in ("group", "batch"):
        advantages = grpo_advantages(x, where=where, scale=scale)
        assert jnp.isnan(advantages[0, :3]).all() and advantages[0, 3] == 0
