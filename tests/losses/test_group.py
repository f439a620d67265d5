"""Critic-free advantages are centred and unbiased; the variants differ where their papers say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.losses.jitted import (
    clipped_policy_loss,
    grpo_advantages,
    grpo_loss,
    gspo_loss,
    reduce_loss,
    reinforce_loss,
    reinforce_plus_plus_advantages,
    rloo_advantages,
    sampler_mismatch_weights,
)


def drawn(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


@settings(max_examples=25, deadline=None)
@given(
    rewards=st.lists(st.floats(-5, 5, width=32), min_size=4, max_size=4),
    order=st.permutations(range(4)),
    shift=st.floats(-5, 5, width=32),
)
def test_group_advantages_are_centred_and_know_no_order_and_no_shift(rewards, order, shift):
    rewards, order = jnp.array([rewards], jnp.float32), jnp.array(order)
    for advantages in (
        rloo_advantages(rewards),
        grpo_advantages(rewards, scale="none"),
    ):
        assert abs(float(advantages.sum())) < 1e-4
    rloo = rloo_advantages(rewards)
    np.testing.assert_allclose(rloo_advantages(rewards[:, order]), rloo[:, order], atol=1e-4)
    np.testing.assert_allclose(rloo_advantages(rewards + shift), rloo, atol=1e-4)


def test_grpo_advantages_have_unit_deviation_in_each_group_and_rloo_keeps_the_scale(rng):
    rewards = drawn(rng, 3, 8) * jnp.array([[0.1], [1.0], [10.0]])
    scaled = np.asarray(grpo_advantages(rewards, epsilon=0.0))
    np.testing.assert_allclose(scaled.std(1, ddof=1), np.ones(3), rtol=1e-5)
    centred = grpo_advantages(rewards, scale="none")
    np.testing.assert_allclose(rloo_advantages(rewards), centred * 8 / 7, rtol=1e-5, atol=1e-6)


def test_equal_rewards_teach_nothing_and_break_nothing():
    """A group that is all right or all wrong: deviation 0, advantage 0, finite gradient."""
    rewards = jnp.ones((2, 4))
    for scale in ("group", "batch", "none"):
        assert not grpo_advantages(rewards, scale=scale).any()
    gradient = jax.grad(lambda r: grpo_advantages(r)[0, 0])(rewards)
    assert np.isfinite(gradient).all()
    assert not rloo_advantages(rewards[:, :1]).any()


def test_completions_without_a_reward_are_left_out():
    rewards = jnp.array([[1.0, 3.0, jnp.nan], [jnp.nan, 7.0, jnp.nan]])
    where = ~jnp.isnan(rewards)
    np.testing.assert_allclose(rloo_advantages(rewards, where=where), [[-2, 2, 0], [0, 0, 0]])
    grpo = grpo_advantages(rewards, where=where, scale="none")
    np.testing.assert_allclose(grpo, [[-1, 1, 0], [0, 0, 0]])


def test_an_unknown_scale_is_named():
    with pytest.raises(ValueError, match="'std'"):
        grpo_advantages(jnp.ones((1, 2)), scale="std")


def test_the_leave_one_out_gradient_is_the_true_gradient():
    """Averaged over all pairs of samples of a three-armed bandit, exactly."""
    logits, payoff = jnp.array([0.2, -0.4, 0.5]), jnp.array([1.0, 0.0, 3.0])
    probabilities = jax.nn.softmax(logits)
    truth = jax.grad(lambda z: (jax.nn.softmax(z) * payoff).sum())(logits)
    first, second = (x.ravel() for x in jnp.meshgrid(jnp.arange(3), jnp.arange(3)))
    arms = jnp.stack([first, second], axis=1)
    weight = probabilities[first] * probabilities[second]
    advantages = rloo_advantages(payoff[arms])

    def objective(z):
        log_probs = jax.nn.log_softmax(z)[arms]
        losses = reinforce_loss(log_probs, advantages, jnp.zeros_like(advantages))
        return -(losses.mean(1) * weight).sum()

    np.testing.assert_allclose(jax.jit(jax.grad(objective))(logits), truth, atol=1e-6)


def test_a_baseline_changes_no_expected_gradient():
    logits, payoff = jnp.array([0.2, -0.4, 0.5]), jnp.array([1.0, 0.0, 3.0])
    probabilities = jax.nn.softmax(logits)

    @jax.jit
    def expected(baseline):
        def objective(z):
            losses = reinforce_loss(jax.nn.log_softmax(z), payoff, jnp.full(3, baseline))
            return (losses * probabilities).sum()

        return jax.grad(objective)(logits)

    np.testing.assert_allclose(expected(0.0), expected(5.0), atol=1e-6)


def test_reinforce_plus_plus_credits_a_token_with_what_follows(rng):
    rewards, where = drawn(rng, 2, 4), jnp.ones((2, 4), bool)
    changed = rewards.at[0, 0].add(1.0)
    a, b = (reinforce_plus_plus_advantages(r, where=where) for r in (rewards, changed))
    # All later tokens of the row move together, by the new mean and deviation only.
    np.testing.assert_allclose(np.corrcoef(a[0, 1:], b[0, 1:])[0, 1], 1.0, rtol=1e-5)
    assert abs(float(a.mean())) < 1e-6


def test_dr_grpo_gives_a_token_the_same_weight_at_every_length():
    """T25: seq_mean favours tokens of short rows, a constant divisor does not."""
    where = jnp.array([[True, True, True, True], [True, False, False, False]])
    log_probs, advantages = jnp.zeros((2, 4)), jnp.ones(2)

    def gradient(reduction):
        def loss(lp):
            return reduce_loss(
                grpo_loss(lp, log_probs, log_probs, advantages, kl_coef=0.0),
                where=where,
                reduction=reduction,
            )

        return jax.jit(jax.grad(loss))(log_probs)

    biased, even = gradient("seq_mean"), gradient("seq_sum_const")
    np.testing.assert_allclose(biased[1, 0] / biased[0, 0], 4.0)
    np.testing.assert_allclose(even[1, 0] / even[0, 0], 1.0)


def test_clip_higher_lets_unlikely_tokens_grow_further():
    """DAPO: at ratio 1.25 the symmetric clip has no gradient, the higher one has."""
    log_probs = jnp.log(jnp.array([[1.25]]))
    zero = jnp.zeros((1, 1))

    def gradient(clip_high):
        def loss(lp):
            return grpo_loss(lp, zero, zero, jnp.ones(1), clip_high=clip_high, kl_coef=0.0).sum()

        return jax.jit(jax.grad(loss))(log_probs)

    assert gradient(None) == 0
    assert gradient(0.28) < 0


def test_dual_clip_bounds_the_loss_of_bad_tokens():
    ratios = jnp.log(jnp.array([1.0, 4.0, 1e4]))
    losses = clipped_policy_loss(ratios, jnp.zeros(3), -jnp.ones(3), dual_clip=3.0)
    np.testing.assert_allclose(losses, [1.0, 3.0, 3.0], rtol=1e-6)
    good = clipped_policy_loss(ratios, jnp.zeros(3), jnp.ones(3), dual_clip=3.0)
    np.testing.assert_allclose(good, clipped_policy_loss(ratios, jnp.zeros(3), jnp.ones(3)))


def test_gspo_clips_whole_responses():
    """One far token is diluted by the length; one shared shift moves every token alike."""
    old, where = jnp.zeros((1, 4)), jnp.ones((1, 4), bool)
    alone = jnp.array([[0.4, 0.0, 0.0, 0.0]])
    losses = [
        gspo_loss(lp, old, jnp.ones(1), where=where, clip=0.2, clip_high=0.2)[0]
        for lp in (alone, jnp.full((1, 4), 0.1), jnp.full((1, 4), 0.4))
    ]
    np.testing.assert_allclose(losses, [-np.exp(0.1), -np.exp(0.1), -1.2], rtol=1e-6)


def test_importance_weights_are_one_for_an_exact_sampler_and_capped_for_a_poor_one():
    trainer = jnp.array([-1.0, -1.0, -1.0])
    sampler = jnp.array([-1.0, -81.0, 79.0])
    weights = sampler_mismatch_weights(trainer, sampler)
    np.testing.assert_allclose(weights, [1.0, 2.0, 0.0], atol=1e-6)
    assert not jax.grad(lambda x: sampler_mismatch_weights(x, sampler).sum())(trainer).any()
