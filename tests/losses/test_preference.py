"""Direct preference losses: what each is known for, checked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.losses.jitted import (
    cpo_loss,
    dpo_loss,
    dpo_sft_loss,
    implicit_rewards,
    ipo_loss,
    kto_loss,
    kto_reference_kl,
    orpo_loss,
    pairwise_loss,
    robust_dpo_loss,
    sequence_log_probs,
    simpo_loss,
)


def four(rng, scale=2.0):
    return tuple(jnp.asarray(-9 + scale * rng.standard_normal(5), jnp.float32) for _ in range(4))


def with_gap(gap):
    """Log-probs whose log-ratio gap is `gap`."""
    zero = jnp.zeros(1)
    return jnp.array([gap], jnp.float32), zero, zero, zero


def test_dpo_is_the_reward_models_loss_on_the_implicit_rewards(rng):
    chosen, rejected, ref_chosen, ref_rejected = four(rng)
    rewards = [
        implicit_rewards(*pair, beta=0.3)
        for pair in ((chosen, ref_chosen), (rejected, ref_rejected))
    ]
    loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.3)
    np.testing.assert_allclose(loss, pairwise_loss(*rewards), rtol=1e-5)


def test_a_policy_equal_to_its_reference_pays_log_two(rng):
    chosen, rejected, *_ = four(rng)
    for function in (dpo_loss, robust_dpo_loss):
        loss = function(chosen, rejected, chosen, rejected)
        np.testing.assert_allclose(loss, jnp.full(5, np.log(2)), rtol=1e-5)


def test_conservative_dpo_is_least_at_the_log_odds_of_a_right_label():
    best = np.log(0.9 / 0.1) / 0.1

    def loss(gap):
        return dpo_loss(*with_gap(gap), label_smoothing=0.1)[0]

    assert loss(best) < min(loss(best - 1), loss(best + 1))
    # Plain DPO has no such point: it pushes the margin without end.
    assert dpo_loss(*with_gap(100.0))[0] > dpo_loss(*with_gap(200.0))[0]


def test_robust_dpo_is_unbiased_under_flipped_labels(rng):
    """The mean over labels flipped at the known rate is the clean loss."""
    chosen, rejected, ref_chosen, ref_rejected = four(rng)
    right = robust_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, flip_rate=0.3)
    wrong = robust_dpo_loss(rejected, chosen, ref_rejected, ref_chosen, flip_rate=0.3)
    clean = dpo_loss(chosen, rejected, ref_chosen, ref_rejected)
    np.testing.assert_allclose(0.7 * right + 0.3 * wrong, clean, rtol=1e-4)


@pytest.mark.parametrize("rate", [-0.1, 0.5, 0.9])
def test_a_flip_rate_that_carries_no_signal_is_refused(rate):
    with pytest.raises(ValueError, match="flip_rate"):
        robust_dpo_loss(*with_gap(0.0), flip_rate=rate)


def test_ipo_stops_at_its_margin():
    np.testing.assert_allclose(ipo_loss(*with_gap(2.5), beta=0.2), [0.0], atol=1e-10)
    assert ipo_loss(*with_gap(9.0), beta=0.2) > 0


def test_kto_raises_the_good_and_lowers_the_bad_within_bounds():
    log_probs = jnp.array([-500.0, 0.0, 500.0])
    for good, sign in ((True, -1), (False, 1)):
        desirable = jnp.full(3, good)

        def total(lp, desirable=desirable):
            return kto_loss(lp, jnp.zeros(3), desirable, jnp.float32(0.0)).sum()

        losses = kto_loss(log_probs, jnp.zeros(3), desirable, jnp.float32(0.0))
        assert 0 <= losses.min() <= losses.max() <= 1
        gradient = jax.grad(total)(log_probs)
        assert np.sign(gradient[1]) == sign
        assert np.isfinite(gradient).all()


def test_the_reference_point_of_kto_is_never_negative_and_has_no_gradient():
    zero = jnp.zeros(2)
    assert kto_reference_kl(jnp.array([-3.0, 1.0]), zero) == 0
    np.testing.assert_allclose(kto_reference_kl(jnp.array([3.0, 1.0]), zero), 2.0)
    assert not jax.grad(kto_reference_kl)(jnp.array([3.0, 1.0]), zero).any()
    kept = kto_reference_kl(jnp.array([3.0, 99.0]), zero, where=jnp.array([True, False]))
    np.testing.assert_allclose(kept, 3.0)


def test_without_their_preference_term_orpo_and_cpo_are_fine_tuning(rng):
    chosen, rejected, *_ = four(rng)
    np.testing.assert_allclose(orpo_loss(chosen, rejected, weight=0.0), -chosen)
    constant = cpo_loss(chosen, rejected, beta=0.0)
    np.testing.assert_allclose(constant, np.log(2) - chosen, rtol=1e-6)


def test_the_odds_ratio_of_a_certain_response_is_finite():
    """A mean log-prob of 0 has infinite odds."""

    def total(chosen):
        return orpo_loss(chosen, jnp.full(2, -80.0)).sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(jnp.array([0.0, -1e-9]))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_simpo_is_centred_at_its_margin():
    means = jnp.array([-1.0]), jnp.array([-2.0])
    np.testing.assert_allclose(simpo_loss(*means, beta=2.0, gamma=2.0), [np.log(2)], rtol=1e-6)


def test_dpo_with_sft_adds_the_likelihood_a_token(rng):
    arguments = four(rng)
    lengths = jnp.array([1.0, 2.0, 3.0, 4.0, 5.0])
    added = dpo_sft_loss(*arguments, lengths, sft_weight=0.5) - dpo_loss(*arguments)
    np.testing.assert_allclose(added, -0.5 * arguments[0] / lengths, rtol=1e-4)


@pytest.mark.parametrize("gap", [-8000.0, -80.0, 80.0, 8000.0])
def test_extreme_gaps_have_finite_losses_and_gradients(gap):
    """T54 for the preference losses."""

    def total(chosen):
        _, zero, *_ = with_gap(gap)
        with_reference = sum(
            f(chosen, zero, zero, zero).sum() for f in (dpo_loss, robust_dpo_loss, ipo_loss)
        )
        means = jnp.minimum(chosen, 0.0)
        return with_reference + (cpo_loss(chosen, zero) + simpo_loss(means, zero)).sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(jnp.array([gap]))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_token_log_probs_in_place_of_sequence_log_probs_are_refused():
    tokens = jnp.zeros((2, 3))
    with pytest.raises(AssertionError):
        dpo_loss(tokens, tokens, tokens, tokens)


def test_a_response_without_tokens_has_log_prob_zero():
    where = jnp.zeros((1, 2), bool)
    for mean in (False, True):
        assert sequence_log_probs(jnp.full((1, 2), -jnp.inf), where=where, mean=mean) == 0
