"""Where rounding, clamps and infinities used to decide: each with the value that is right there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.losses.jitted import (
    chunked_cross_entropy_sum,
    chunked_token_log_probs,
    chunked_token_statistics,
    explained_variance,
    fit_gold_scores,
    gold_score,
    grpo_advantages,
    gspo_loss,
    kl_estimate,
    labeler_ranking_loss,
    masked_whiten,
    pairwise_loss,
    peak_distance,
    plackett_luce_loss,
    preference_loss,
    ranking_loss,
    reduce_loss,
    rloo_advantages,
    token_cross_entropy,
    token_entropy,
    token_log_probs,
)

CONSTANTS = (0.1, 1 / 3, 123.456, -7e5, 3e-6)


@pytest.mark.parametrize("constant", CONSTANTS)
def test_what_is_all_equal_has_no_deviation_to_divide_by(constant):
    """A mean of n copies rounds; divided by that rounding, advantages would be of order 1."""
    rewards, where = jnp.full((3, 7), constant, jnp.float32), jnp.arange(7) < 6
    where = jnp.broadcast_to(where, rewards.shape)
    for scale in ("group", "batch", "none"):
        for epsilon in (0.0, 1e-4):
            advantages = grpo_advantages(rewards, where=where, scale=scale, epsilon=epsilon)
            assert not advantages.any()
    assert not rloo_advantages(rewards, where=where).any()
    assert not masked_whiten(rewards, where=where).any()
    kept = masked_whiten(rewards, where=where, shift_mean=False)
    np.testing.assert_array_equal(kept, jnp.where(where, rewards, 0.0))
    values = jnp.asarray(np.random.default_rng(0).standard_normal((3, 7)), jnp.float32)
    assert explained_variance(values, rewards, where=where) == 0
    assert explained_variance(rewards - 1.0, rewards, where=where) == 0
    gradient = jax.grad(lambda r: grpo_advantages(r, where=where)[0, 0])(rewards)
    assert np.isfinite(gradient).all()


def test_values_that_are_off_by_a_constant_explain_all():
    returns = jnp.array([0.1, 0.7, 0.3])
    explained = explained_variance(returns + 0.5, returns, where=jnp.ones(3, bool))
    np.testing.assert_allclose(explained, 1.0, atol=1e-6)


def test_a_gold_curve_of_equal_scores_explains_nothing():
    fit = fit_gold_scores(jnp.linspace(0.0, 1.0, 7), jnp.full(7, 0.1), kind="bon")
    assert fit.r_squared == 0


@pytest.mark.parametrize("log_ratio", [-21.0, -80.0, -500.0])
def test_beyond_its_clamp_k3_is_constant_and_does_not_pull_the_wrong_way(log_ratio):
    """Its true slope there is below -1e9; +1, that of the unclamped half, would be uphill."""
    value, slope = jax.value_and_grad(lambda d: kl_estimate(d, jnp.float32(0), kind="k3"))(
        jnp.float32(log_ratio)
    )
    assert slope == 0
    np.testing.assert_allclose(value, np.exp(20.0) - 21.0, rtol=1e-6)


@pytest.mark.parametrize("log_ratio", [21.0, 80.0])
def test_on_the_other_side_k3_grows_as_the_log_ratio_does(log_ratio):
    value, slope = jax.value_and_grad(lambda d: kl_estimate(d, jnp.float32(0), kind="k3"))(
        jnp.float32(log_ratio)
    )
    np.testing.assert_allclose((value, slope), (log_ratio - 1.0, 1.0), rtol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4, 1e6])
def test_an_offset_of_all_logits_costs_no_digit(offset):
    """Powers of two below the offset's last bit: the logits are exact, whatever is added."""
    small = np.array([[[0.0, 1.0, -2.0, 3.0, 0.5]]]) * (4 if abs(offset) > 1e5 else 1)
    small = np.round(small * 16) / 16
    logits, tokens = jnp.asarray(small + offset, jnp.float32), jnp.array([[2]])
    exact = small - np.log(np.exp(small).sum())
    entropy = -(np.exp(exact) * exact).sum()
    smooth = -0.9 * exact[0, 0, 2] - 0.1 * exact.mean()
    head, one = logits[0], jnp.ones((1, 1, 1))
    chunked = chunked_token_statistics(one, head, tokens)
    close = {"rtol": 2e-6, "atol": 2e-6}
    np.testing.assert_allclose(token_log_probs(logits, tokens), exact[..., 2], **close)
    np.testing.assert_allclose(token_entropy(logits)[0, 0], entropy, **close)
    loss = token_cross_entropy(logits, tokens, label_smoothing=0.1)
    np.testing.assert_allclose(loss[0, 0], smooth, **close)
    np.testing.assert_allclose(chunked.log_probs, exact[..., 2], **close)
    np.testing.assert_allclose(chunked.entropy[0, 0], entropy, **close)
    np.testing.assert_allclose(chunked.mean_log_prob[0, 0], exact.mean(), **close)
    where = jnp.ones((1, 1), bool)
    summed = chunked_cross_entropy_sum(one, head, tokens, where=where).loss
    np.testing.assert_allclose(summed, -exact[0, 0, 2], **close)
    to_logits = np.array([0, 0, 1, 0, 0]) - np.exp(exact[0, 0])
    for gradient in (
        jax.grad(lambda z: token_log_probs(z, tokens).sum())(logits)[0, 0],
        jax.grad(lambda w: chunked_token_log_probs(one, w, tokens).sum())(head)[0],
        -jax.grad(lambda w: chunked_cross_entropy_sum(one, w, tokens, where=where).loss)(head)[0],
    ):
        np.testing.assert_allclose(gradient, to_logits, **close)


def test_a_scaled_loss_in_float16_keeps_its_gradient():
    """The factor of loss scaling, and a head's sum over many positions, are past 65,504."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(8 + rng.standard_normal((1, 4096, 4)), jnp.float16)
    head = jnp.asarray(0.01 * rng.standard_normal((4, 6)), jnp.float16)
    tokens = jnp.zeros((1, 4096), jnp.int32)
    where = jnp.ones(tokens.shape, bool)

    def of(function, scale, dtype):
        def loss(hidden, head):
            return scale * function(hidden.astype(dtype), head.astype(dtype)) / tokens.size

        return jax.jit(jax.grad(loss, (0, 1)))

    for function in (
        lambda h, w: chunked_cross_entropy_sum(h, w, tokens, where=where, chunk=512).loss,
        lambda h, w: -chunked_token_log_probs(h, w, tokens, chunk=512).sum(),
    ):
        for scale in (1.0, 2.0**12, 2.0**29):
            found = of(function, scale, jnp.float16)(hidden, head)
            exact = of(function, scale, jnp.float32)(
                hidden.astype(jnp.float32), head.astype(jnp.float32)
            )
            for a, b in zip(found, exact, strict=True):
                reach = np.abs(b) < 6e4
                np.testing.assert_allclose(
                    np.asarray(a, np.float32)[reach], np.asarray(b)[reach], rtol=0.05, atol=2e-6
                )


def test_one_infinite_score_decides_its_pairs_and_breaks_no_other():
    ranks = jnp.array([[0, 1, 2]])
    for scores, loss in (
        ([np.inf, 1.0, 0.0], np.log1p(np.exp(-1.0)) / 3),
        ([1.0, 0.0, -np.inf], np.log1p(np.exp(-1.0)) / 3),
        ([1.0, np.inf, 0.0], np.inf),
    ):
        scores = jnp.array([scores], jnp.float32)
        np.testing.assert_allclose(ranking_loss(scores, ranks), [loss], rtol=1e-6)
        gradient = jax.grad(lambda r: ranking_loss(r, ranks).sum())(scores)
        assert np.isfinite(gradient).all()
    top = jnp.array([[np.inf, 1.0, 0.0]])
    np.testing.assert_allclose(plackett_luce_loss(top, ranks), [np.log1p(np.exp(-1.0))], rtol=1e-6)
    both, trust = jnp.array([[[0, 1, 2], [2, 1, 0]]]), jnp.array([[1.0, 0.0]])
    found = labeler_ranking_loss(top, both, trust)
    np.testing.assert_allclose(found, ranking_loss(top, ranks), rtol=1e-6)


@pytest.mark.parametrize("margin", [np.zeros((3, 1)), np.zeros((1, 3)), np.zeros(1)])
def test_a_margin_of_another_shape_is_refused_and_not_spread(margin):
    three = jnp.zeros(3)
    with pytest.raises(AssertionError):
        pairwise_loss(three, three, margin=jnp.asarray(margin, jnp.float32))
    with pytest.raises(AssertionError):
        preference_loss(three, three, three, three, margin=jnp.asarray(margin, jnp.float32))
    assert pairwise_loss(three, three, margin=jnp.float32(1)).shape == (3,)


def test_settings_that_are_arrays_of_another_shape_are_refused():
    lp = jnp.zeros((2, 3))
    with pytest.raises(AssertionError):
        token_log_probs(jnp.zeros((2, 3, 4)), jnp.zeros((2, 3), int), temperature=jnp.ones(4))
    with pytest.raises(AssertionError):
        chunked_token_log_probs(
            jnp.zeros((2, 3, 4)), jnp.zeros((4, 5)), lp.astype(int), temperature=jnp.ones((2, 3))
        )


@pytest.mark.parametrize("kind", ["bon", "rl"])
@pytest.mark.parametrize("alpha", [-2.0, 0.0, 1.5])
@pytest.mark.parametrize("beta", [-0.5, 0.0, 0.5])
def test_the_peak_is_where_the_curve_is_highest_whatever_its_signs(kind, alpha, beta):
    peak = float(peak_distance(jnp.float32(alpha), jnp.float32(beta), kind=kind))
    grid = jnp.linspace(0.0, 400.0, 400_001)
    scores = np.asarray(gold_score(grid, jnp.float32(alpha), jnp.float32(beta), kind=kind))
    if peak == np.inf:
        assert scores.argmax() == len(grid) - 1
        assert scores[-1] > scores[len(grid) // 2]
    else:
        np.testing.assert_allclose(grid[scores.argmax()], peak, atol=2e-3)
    slopes = jax.grad(
        lambda a, b: jnp.where(jnp.isfinite(p := peak_distance(a, b, kind=kind)), p, 0.0), (0, 1)
    )(jnp.float32(alpha), jnp.float32(beta))
    assert np.isfinite(slopes).all()


def test_one_clip_alone_is_not_mixed_with_the_papers_other_one():
    where, zero = jnp.ones((1, 1), bool), jnp.zeros((1, 1))
    far, advantage = jnp.full((1, 1), 0.5), jnp.ones(1)

    def bound(**clips):
        return -float(gspo_loss(far, zero, advantage, where=where, **clips)[0])

    np.testing.assert_allclose(bound(), 1 + 4e-4, rtol=1e-6)
    np.testing.assert_allclose(bound(clip=0.1), 1.1, rtol=1e-6)
    np.testing.assert_allclose(bound(clip=0.1, clip_high=0.2), 1.2, rtol=1e-6)
    np.testing.assert_allclose(bound(clip_high=0.3), 1.3, rtol=1e-6)


def test_a_token_weighs_the_same_in_seq_sum_const_however_long_the_others_are():
    """As its docstring says: of `token_mean` that does not hold."""
    losses = jnp.ones((2, 4))

    def weight(reduction, length):
        where = jnp.stack([jnp.arange(4) < 1, jnp.arange(4) < length])
        gradient = jax.grad(lambda x: reduce_loss(x, where=where, reduction=reduction))(losses)
        return float(gradient[0, 0])

    assert weight("seq_sum_const", 1) == weight("seq_sum_const", 4)
    assert weight("token_mean", 1) > weight("token_mean", 4)
