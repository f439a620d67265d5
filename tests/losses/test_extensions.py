"""Rankings by several labelers, distillation and over-optimisation curves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.losses.jitted import (
    best_of_n_kl,
    diverging_pairwise_loss,
    fit_gold_scores,
    forward_kl,
    generalized_jsd,
    gold_score,
    labeler_ranking_loss,
    peak_distance,
    plackett_luce_loss,
    ranking_loss,
    reverse_kl,
)


def drawn(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def test_plackett_luce_sums_to_one_over_all_rankings(rng):
    """It is a distribution over the 24 orders of four completions."""
    import itertools

    orders = jnp.array(list(itertools.permutations(range(4))))
    scores = jnp.tile(drawn(rng, 1, 4), (24, 1))
    total = jnp.exp(-plackett_luce_loss(scores, orders)).sum()
    np.testing.assert_allclose(total, 1.0, rtol=1e-5)


def test_plackett_luce_of_two_is_the_pairwise_loss_and_a_tie_says_nothing(rng):
    scores = drawn(rng, 3, 2)
    ranks = jnp.tile(jnp.array([[0, 1]]), (3, 1))
    np.testing.assert_allclose(
        plackett_luce_loss(scores, ranks), ranking_loss(scores, ranks), rtol=1e-5
    )
    assert not plackett_luce_loss(scores, jnp.zeros_like(ranks)).any()


@pytest.mark.parametrize("gap", [-80.0, 80.0])
def test_plackett_luce_is_finite_for_extreme_and_absent_scores(gap):
    """T54."""
    scores, ranks = jnp.array([[gap, 0.0, jnp.nan]]), jnp.array([[0, 1, 2]])
    where = jnp.array([[True, True, False]])

    def total(r):
        return plackett_luce_loss(r, ranks, where=where).sum()

    value, gradient = jax.value_and_grad(total)(scores)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    assert gradient[0, 2] == 0


def test_one_trusted_labeler_is_the_plain_ranking_loss(rng):
    scores, ranks = drawn(rng, 2, 4), jnp.array([[0, 1, 2, 3], [3, 2, 1, 0]])
    both = jnp.stack([ranks, ranks[:, ::-1]], axis=1)
    trust = jnp.array([[2.0, 0.0], [1.0, 0.0]])
    np.testing.assert_allclose(
        labeler_ranking_loss(scores, both, trust), ranking_loss(scores, ranks), rtol=1e-6
    )


def test_labelers_of_opposite_opinion_ask_for_equal_scores():
    ranks, trust = jnp.array([[[0, 1], [1, 0]]]), jnp.ones((1, 2))

    def total(r):
        return labeler_ranking_loss(r, ranks, trust).sum()

    assert not jax.grad(total)(jnp.zeros((1, 2))).any()
    assert jax.grad(total)(jnp.array([[1.0, 0.0]]))[0, 0] > 0


def test_scores_before_the_first_difference_have_no_say(rng):
    """RM-8: and equal sequences have loss 0."""
    tokens = jnp.array([[5, 6, 7, 8]])
    others = jnp.array([[5, 6, 9, 8]])
    chosen, rejected, where = drawn(rng, 1, 4), drawn(rng, 1, 4), jnp.ones((1, 4), bool)
    gradient = jax.grad(
        lambda c: diverging_pairwise_loss(c, rejected, tokens, others, where=where).sum()
    )(chosen)
    np.testing.assert_array_equal(gradient != 0, [[False, False, True, True]])
    same = diverging_pairwise_loss(chosen, rejected, tokens, tokens, where=where)
    np.testing.assert_array_equal(same, [0.0])


def test_divergences_are_zero_for_equals_positive_otherwise_and_teach_the_student_only(rng):
    student, teacher = drawn(rng, 2, 3, 5), drawn(rng, 2, 3, 5)
    for divergence in (forward_kl, reverse_kl, generalized_jsd):
        np.testing.assert_allclose(divergence(student, student + 1), jnp.zeros((2, 3)), atol=1e-6)
        assert (divergence(student, teacher) > 0).all()
        gradient = jax.grad(lambda t, f=divergence: f(student, t).sum())(teacher)
        assert not gradient.any()


def test_the_jsd_is_symmetric_at_one_half_and_bounded_by_log_two(rng):
    student, teacher = 50 * drawn(rng, 2, 3, 5), 50 * drawn(rng, 2, 3, 5)
    value = generalized_jsd(student, teacher)
    np.testing.assert_allclose(value, generalized_jsd(teacher, student), rtol=1e-4, atol=1e-5)
    assert value.max() <= np.log(2) + 1e-5


@pytest.mark.parametrize(("beta", "limit"), [(1e-4, forward_kl), (1 - 1e-4, reverse_kl)])
def test_the_scaled_jsd_tends_to_the_two_divergences(rng, beta, limit):
    with jax.enable_x64(True):
        student, teacher = rng.standard_normal((2, 1, 2, 4))
        scaled = generalized_jsd(student, teacher, beta=beta) / min(beta, 1 - beta)
        np.testing.assert_allclose(scaled, limit(student, teacher), rtol=1e-2)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_the_ends_of_the_jsd_are_refused(beta):
    with pytest.raises(ValueError, match="forward_kl"):
        generalized_jsd(jnp.zeros((1, 1, 2)), jnp.zeros((1, 1, 2)), beta=beta)


def test_best_of_n_kl_golden():
    n = jnp.array([1, 2, 4, 16, 64])
    np.testing.assert_allclose(best_of_n_kl(n), [0, 0.1931, 0.6363, 1.8351, 3.1745], atol=1e-4)


@pytest.mark.parametrize("kind", ["bon", "rl"])
def test_a_gold_curve_is_recovered_and_highest_at_its_peak(kind):
    alpha, beta = jnp.float32(1.5), jnp.float32(0.6)
    distances = jnp.linspace(0, 8, 40)
    fit = fit_gold_scores(distances, gold_score(distances, alpha, beta, kind=kind), kind=kind)
    np.testing.assert_allclose(fit, [1.5, 0.6, 1.0], rtol=1e-3)
    peak = peak_distance(fit.alpha, fit.beta, kind=kind)
    near = gold_score(peak + jnp.array([-0.1, 0.0, 0.1]), alpha, beta, kind=kind)
    assert near.argmax() == 1
    assert gold_score(jnp.zeros(1), alpha, beta, kind=kind)[0] == 0


def test_a_curve_that_never_bends_has_its_peak_at_infinity():
    for kind in ("bon", "rl"):
        assert peak_distance(jnp.float32(1.0), jnp.float32(-0.1), kind=kind) == np.inf
