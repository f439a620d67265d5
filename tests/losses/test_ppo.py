"""PPO: the score lands on the last token, nothing after it counts, clipping is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.losses import oracles
from tests.losses.jitted import (
    adaptive_kl_update,
    clip_scores,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    fixed_kl_update,
    generalized_advantages,
    kl_estimate,
    kl_shaped_rewards,
    masked_mean,
    missing_eos_scores,
    policy_clipped,
    reduce_loss,
)

ENDED_EARLY = jnp.array([[True, True, True, False, False]])
FULL_LENGTH = jnp.ones((1, 5), bool)


def shaped(where, score=1.0, lp=0.0, ref=0.0, kl_coef=0.02):
    shape = where.shape
    lp, ref = jnp.full(shape, lp), jnp.full(shape, ref)
    return kl_shaped_rewards(jnp.array([score]), lp, ref, where=where, kl_coef=kl_coef)


@pytest.mark.parametrize(("where", "last"), [(ENDED_EARLY, 2), (FULL_LENGTH, 4)])
def test_the_score_enters_at_the_last_valid_token_only(where, last):
    """T17: at the stop token of [a, b, EOS, PAD, PAD]; at T-1 of a full-length response."""
    np.testing.assert_array_equal(shaped(where), jnp.eye(5)[last][None])


def test_a_policy_equal_to_its_reference_is_rewarded_at_the_end_only():
    """T2."""
    np.testing.assert_array_equal(shaped(ENDED_EARLY, lp=-3.0, ref=-3.0), [[0, 0, 1, 0, 0]])


def test_rewards_sum_to_the_score_minus_the_kl_penalty(rng):
    """T18."""
    lp, ref = (jnp.asarray(rng.standard_normal((4, 6)), jnp.float32) for _ in range(2))
    scores = jnp.asarray(rng.standard_normal(4), jnp.float32)
    where = jnp.arange(6)[None] < jnp.array([[1], [3], [5], [6]])
    rewards = kl_shaped_rewards(scores, lp, ref, where=where, kl_coef=0.3)
    penalty = 0.3 * jnp.where(where, lp - ref, 0.0).sum(1)
    np.testing.assert_allclose(rewards.sum(1), scores - penalty, atol=1e-5)


def test_an_empty_response_receives_no_score():
    """T54."""
    assert not shaped(jnp.zeros((1, 5), bool)).any()


def test_advantages_golden():
    """T20."""
    advantages, returns = generalized_advantages(
        jnp.array([[-0.02, 0.01, 1.0]]),
        jnp.array([[0.5, 0.2, -0.1]]),
        where=jnp.ones((1, 3), bool),
    )
    np.testing.assert_allclose(advantages, [[0.39725, 0.755, 1.1]], atol=1e-6)
    np.testing.assert_allclose(returns, [[0.89725, 0.955, 1.0]], atol=1e-6)


def test_without_discount_the_returns_are_the_rewards_to_go(rng):
    """T20."""
    rewards, values = (jnp.asarray(rng.standard_normal((2, 5)), jnp.float32) for _ in range(2))
    _, returns = generalized_advantages(
        rewards, values, where=jnp.ones((2, 5), bool), discount=1.0, gae_lambda=1.0
    )
    to_go = jnp.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]
    np.testing.assert_allclose(returns, to_go, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    mask=st.lists(st.booleans(), min_size=6, max_size=6),
    discount=st.floats(0, 1),
    gae_lambda=st.floats(0, 1),
)
def test_the_scan_equals_the_sum_over_valid_steps_for_any_mask(mask, discount, gae_lambda):
    """T20."""
    rng = np.random.default_rng(sum(mask))
    rewards, values = rng.standard_normal((2, 1, 6))
    where = np.array([mask])
    got = jax.jit(generalized_advantages)(
        rewards.astype(np.float32),
        values.astype(np.float32),
        where=where,
        discount=np.float32(discount),
        gae_lambda=np.float32(gae_lambda),
    )
    want = oracles.generalized_advantages(
        rewards, values, where=where, discount=discount, gae_lambda=gae_lambda
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_shifting_the_score_shifts_the_advantages_by_the_discounted_shift():
    """T29: by c * (discount * lambda)^(E - t), at fixed values."""
    values = jnp.array([[0.3, -0.2, 0.5, 9.0, 9.0]])

    def advantages(score):
        rewards = shaped(ENDED_EARLY, score=score)
        return generalized_advantages(rewards, values, where=ENDED_EARLY, discount=0.9)[0]

    shift = advantages(3.0) - advantages(1.0)
    decay = 0.9 * 0.95
    np.testing.assert_allclose(shift, [[2 * decay**2, 2 * decay, 2, 0, 0]], atol=1e-6)


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient"),
    [(1.0, 1.3, -1.2, 0.0), (-1.0, 0.7, 0.8, 0.0), (-1.0, 1.3, 1.3, 1.3), (1.0, 0.7, -0.7, -0.7)],
)
def test_policy_clip_golden(advantage, ratio, loss, gradient):
    """T30: the gradient is exactly 0 in the clipped branches."""
    value, grad = jax.value_and_grad(
        lambda lp: clipped_policy_loss(lp, jnp.float32(0), jnp.float32(advantage))
    )(jnp.log(jnp.float32(ratio)))
    np.testing.assert_allclose(value, loss, rtol=1e-6)
    if gradient == 0:
        assert grad == 0
    else:
        np.testing.assert_allclose(grad, gradient, rtol=1e-6)


def test_at_ratio_one_the_loss_is_minus_the_advantage_and_its_gradient_too(rng):
    """T1 at the level of the loss: the first minibatch takes the plain policy gradient."""
    lp = -jnp.asarray(rng.exponential(1.0, (2, 4)), jnp.float32)
    adv = jnp.asarray(rng.standard_normal((2, 4)), jnp.float32)
    losses, pullback = jax.vjp(lambda lp: clipped_policy_loss(lp, lp, adv), lp)
    np.testing.assert_array_equal(losses, -adv)
    np.testing.assert_array_equal(pullback(jnp.ones_like(lp))[0], -adv)
    assert not policy_clipped(lp, lp, adv).any()


def test_value_clip_golden():
    """T31."""
    loss = clipped_value_loss(jnp.array([2.0]), jnp.array([1.0]), jnp.array([3.0]))
    np.testing.assert_allclose(loss, [1.62], rtol=1e-6)


def test_the_kl_coefficient_is_not_in_the_first_gradient():
    """T34: at policy = reference, beta 0 and beta 0.02 give one gradient."""
    rng = np.random.default_rng(0)
    lp = -jnp.asarray(rng.exponential(1.0, (2, 5)), jnp.float32)
    values = jnp.asarray(rng.standard_normal((2, 5)), jnp.float32)
    where = jnp.concatenate([ENDED_EARLY, FULL_LENGTH])

    def gradient(kl_coef):
        rewards = kl_shaped_rewards(jnp.array([1.0, -1.0]), lp, lp, where=where, kl_coef=kl_coef)
        advantages, _ = generalized_advantages(rewards, values, where=where)
        return jax.grad(lambda x: reduce_loss(clipped_policy_loss(x, lp, advantages), where=where))(
            lp
        )

    np.testing.assert_allclose(gradient(0.0), gradient(0.02), atol=1e-6)


@pytest.mark.parametrize("gap", [-80.0, 80.0])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_extreme_log_ratios_have_finite_losses_and_gradients(gap, advantage):
    """T54: log-ratios of ±80 nats in the policy loss and in every KL estimate."""
    old = jnp.array([-1.0])

    def total(lp):
        estimates = sum(kl_estimate(lp, old, kind=k) for k in ("k1", "k2", "k3"))
        return (clipped_policy_loss(lp, old, jnp.array([advantage])) + estimates).sum()

    value, grad = jax.jit(jax.value_and_grad(total))(old + gap)
    assert np.isfinite(value)
    assert np.isfinite(grad).all()


def test_kl_estimates_golden():
    """T26: at d = .1."""
    for kind, want in (("k1", 0.1), ("k2", 0.005), ("k3", 0.004837)):
        got = kl_estimate(jnp.array([-1.0]), jnp.array([-1.1]), kind=kind)
        np.testing.assert_allclose(got, [want], atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.floats(-100, 100, width=32))
def test_k3_is_never_negative(log_ratio):
    """T26: also where exp(-d) - 1 + d rounds."""
    assert kl_estimate(jnp.array([log_ratio]), jnp.zeros(1), kind="k3")[0] >= 0


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_the_mean_estimate_is_the_exact_kl(kind):
    """T26: within 3 standard errors over 1e5 samples of a small categorical."""
    rng = np.random.default_rng(0)
    p, q = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.2, 0.3, 0.3, 0.2])
    drawn = rng.choice(4, size=100_000, p=p)
    lp, ref = (jnp.asarray(np.log(w)[drawn], jnp.float32) for w in (p, q))
    estimates = np.asarray(kl_estimate(lp, ref, kind=kind), np.float64)
    error = estimates.std() / np.sqrt(estimates.size)
    assert abs(estimates.mean() - np.sum(p * np.log(p / q))) < 3 * error


def test_the_gradients_of_the_estimates_are_those_of_the_documented_divergences():
    """As losses: k1 has mean gradient 0, k2 that of KL(p||q), k3 that of KL(q||p)."""
    z, q = jnp.array([0.3, -0.5, 0.1]), jax.nn.softmax(jnp.array([-0.2, 0.4, 0.0]))
    p = jax.nn.softmax(z)

    def expected(kind):
        def loss(z):
            return (p * kl_estimate(jax.nn.log_softmax(z), jnp.log(q), kind=kind)).sum()

        return jax.jit(jax.grad(loss))(z)

    def kl(a, b):
        return (a * (jnp.log(a) - jnp.log(b))).sum()

    np.testing.assert_allclose(expected("k1"), jnp.zeros(3), atol=1e-6)
    forward = jax.jit(jax.grad(lambda z: kl(jax.nn.softmax(z), q)))(z)
    np.testing.assert_allclose(expected("k2"), forward, atol=1e-6)
    reverse = jax.jit(jax.grad(lambda z: kl(q, jax.nn.softmax(z))))(z)
    np.testing.assert_allclose(expected("k3"), reverse, atol=1e-6)


def test_adaptive_controller_golden_and_its_error_is_clipped():
    """T27."""

    def update(kl):
        return adaptive_kl_update(
            jnp.float32(0.15), jnp.float32(kl), target=6.0, horizon=10_000, batch_size=512
        )

    np.testing.assert_allclose(update(12.0), 0.151536, rtol=1e-6)
    assert update(12.0) == update(1e6)
    assert update(6.0) == jnp.float32(0.15)
    assert update(0.0) < 0.15


def test_fixed_controller_never_moves():
    """T27."""
    for kl in (-1.0, 0.0, 1e6):
        kept = fixed_kl_update(
            jnp.float32(0.02), jnp.float32(kl), target=6.0, horizon=1e4, batch_size=512
        )
        assert kept == jnp.float32(0.02)


def test_scores_are_clipped_on_request_only_and_without_their_kl_part():
    """T28."""
    score = jnp.array([9.0])
    np.testing.assert_array_equal(clip_scores(score), [9.0])
    clipped = clip_scores(score, limit=5.0)
    rewards = kl_shaped_rewards(
        clipped, jnp.zeros((1, 1)), jnp.full((1, 1), -20.0), where=jnp.ones((1, 1), bool),
        kl_coef=1.0,
    )  # fmt: skip
    np.testing.assert_array_equal(rewards, [[5.0 - 20.0]])


def test_missing_eos_rules():
    """T14, T15: the rule reads one flag a response and edits the score, never a token."""
    scores, ended = jnp.array([2.0, 2.0]), jnp.array([True, False])
    np.testing.assert_array_equal(missing_eos_scores(scores, ended), [2, 2])
    np.testing.assert_array_equal(missing_eos_scores(scores, ended, rule="replace"), [2, -1])
    np.testing.assert_array_equal(missing_eos_scores(scores, ended, rule="subtract"), [2, 1])
    with pytest.raises(ValueError, match="'drop'"):
        missing_eos_scores(scores, ended, rule="drop")


def test_explained_variance_reads_one_for_perfect_zero_for_constant_negative_for_worse():
    returns, where = jnp.array([1.0, 2.0, 3.0, 50.0]), jnp.array([True, True, True, False])
    for values, want in ((returns, 1.0), (jnp.full(4, 7.0), 0.0), (-returns, -3.0)):
        np.testing.assert_allclose(explained_variance(values, returns, where=where), want)
    assert explained_variance(returns, jnp.ones(4), where=where) == 0


def test_the_clip_fraction_counts_binding_clips_only():
    lp = jnp.log(jnp.array([[1.3, 1.3, 0.7, 0.7, 1.0]]))
    adv = jnp.array([[1.0, -1.0, 1.0, -1.0, 1.0]])
    flags = policy_clipped(lp, jnp.zeros_like(lp), adv)
    np.testing.assert_array_equal(flags, [[1, 0, 0, 1, 0]])
    np.testing.assert_allclose(masked_mean(flags, where=jnp.ones((1, 5), bool)), 0.4)
