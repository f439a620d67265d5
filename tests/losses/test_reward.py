"""Rankings: every prompt weighs the same, ties say nothing, only differences count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.losses.jitted import (
    best_of_k_loss,
    centering_loss,
    pair_counts,
    pairwise_loss,
    ranking_loss,
)


def test_ranking_golden():
    """T45: r = (2, 1, 0) ranked 1 > 2 > 3."""
    loss = ranking_loss(jnp.array([[2.0, 1.0, 0.0]]), jnp.array([[0, 1, 2]]))
    np.testing.assert_allclose(loss, [0.25115046], rtol=1e-6)


@pytest.mark.parametrize("k", [2, 4, 9])
def test_a_prompt_weighs_the_same_for_every_number_of_completions(k):
    """T45: equal scores give log 2 for K = 4 and for K = 9."""
    loss = ranking_loss(jnp.zeros((1, k)), jnp.arange(k)[None])
    np.testing.assert_allclose(loss, [np.log(2)], rtol=1e-6)


def test_ties_make_no_pair():
    """T45: with 'valid' a tie leaves the other pairs' mean, with 'comb' it dilutes it."""
    scores, ranks = jnp.array([[2.0, 2.0, 0.0]]), jnp.array([[0, 0, 1]])
    untied = pairwise_loss(jnp.array([2.0]), jnp.array([0.0]))
    np.testing.assert_allclose(ranking_loss(scores, ranks), untied, rtol=1e-6)
    comb = ranking_loss(scores, ranks, pair_norm="comb")
    np.testing.assert_allclose(comb, untied * 2 / 3, rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    scores=st.lists(st.floats(-20, 20, width=32), min_size=4, max_size=4),
    ranks=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    order=st.permutations(range(4)),
    shift=st.floats(-50, 50, width=32),
)
def test_permuting_completions_or_shifting_scores_changes_no_ranking_loss(
    scores, ranks, order, shift
):
    """T45, T29."""
    scores, ranks = jnp.array([scores], jnp.float32), jnp.array([ranks])
    base = ranking_loss(scores, ranks)
    order = jnp.array(order)
    np.testing.assert_allclose(
        ranking_loss(scores[:, order], ranks[:, order]), base, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(ranking_loss(scores + shift, ranks), base, rtol=1e-3, atol=1e-4)


def test_absent_completions_have_no_say_whatever_their_score():
    scores, ranks = jnp.array([[2.0, 1.0, 0.0]]), jnp.array([[0, 1, 2]])
    padded = jnp.pad(scores, [(0, 0), (0, 2)], constant_values=jnp.nan)
    more = jnp.pad(ranks, [(0, 0), (0, 2)])
    where = jnp.arange(5)[None] < 3
    for norm in ("valid", "comb"):

        def total(r, norm=norm):
            return ranking_loss(r, more, where=where, pair_norm=norm).sum()

        value, grad = jax.jit(jax.value_and_grad(total))(padded)
        np.testing.assert_allclose(value, ranking_loss(scores, ranks, pair_norm=norm).sum())
        assert not grad[:, 3:].any()
        assert np.isfinite(grad).all()


@pytest.mark.parametrize("gap", [-80.0, 80.0])
def test_extreme_scores_have_finite_losses_and_gradients(gap):
    """T54: the wrong order by 80 costs 80, with gradient 1."""
    value, grad = jax.value_and_grad(lambda c: pairwise_loss(c, jnp.zeros(1)).sum())(
        jnp.array([gap])
    )
    np.testing.assert_allclose(value, max(-gap, 0), atol=1e-6)
    np.testing.assert_allclose(grad, [-1.0 if gap < 0 else 0.0], atol=1e-6)


@pytest.mark.parametrize("norm", ["valid", "comb"])
def test_a_prompt_without_pairs_has_loss_and_gradient_zero(norm):
    """T54: all tied, and nothing there at all."""
    ranks = jnp.zeros((2, 3), jnp.int32)
    where = jnp.array([[True] * 3, [False] * 3])

    def total(r):
        return ranking_loss(r, ranks, where=where, pair_norm=norm).sum()

    value, grad = jax.jit(jax.value_and_grad(total))(jnp.array([[1.0, 2.0, 3.0], [jnp.nan] * 3]))
    assert value == 0
    assert not grad.any()


def test_the_best_of_k_loss_of_an_empty_row_is_finite():
    """T54."""
    where = jnp.zeros((1, 3), bool)
    value, grad = jax.value_and_grad(
        lambda r: best_of_k_loss(r, jnp.array([0]), where=where).sum()
    )(jnp.full((1, 3), jnp.nan))
    assert np.isfinite(value)
    assert not grad.any()


def test_two_completions_make_the_three_losses_one(rng):
    scores = jnp.asarray(rng.standard_normal((5, 2)), jnp.float32)
    pair = pairwise_loss(scores[:, 0], scores[:, 1])
    ranks = jnp.tile(jnp.array([[0, 1]]), (5, 1))
    np.testing.assert_allclose(ranking_loss(scores, ranks), pair, rtol=1e-5)
    np.testing.assert_allclose(best_of_k_loss(scores, jnp.zeros(5, int)), pair, rtol=1e-5)


def test_centering_fixes_the_zero_point_and_leaves_the_difference():
    def total(pair):
        return (pairwise_loss(pair[0], pair[1]) + 0.1 * centering_loss(pair[0], pair[1])).sum()

    @jax.jit
    def descend(pair):
        return jax.lax.fori_loop(0, 200, lambda _, p: p - jax.grad(total)(p), pair)

    pair = descend(jnp.array([[5.0], [4.0]]))
    assert abs(float(pair.sum())) < 1e-3
    assert pair[0, 0] > pair[1, 0]


def test_equal_scores_are_counted_apart_from_wrong_ones():
    """RM-6."""
    counts = pair_counts(jnp.array([[1.0, 1.0, 2.0]]), jnp.array([[0, 1, 2]]))
    assert [int(c[0]) for c in counts] == [0, 1, 3]


def test_an_unknown_normaliser_is_named():
    with pytest.raises(ValueError, match="'all'"):
        ranking_loss(jnp.zeros((1, 2)), jnp.zeros((1, 2), jnp.int32), pair_norm="all")
