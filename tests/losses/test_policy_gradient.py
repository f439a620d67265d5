"""What the losses say that they do with a ratio far from 1, and what a cut episode is worth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.losses.jitted import (
    chunked_divergence,
    cispo_loss,
    clipped_policy_loss,
    dpo_loss,
    forward_kl,
    generalized_advantages,
    gspo_loss,
    gspo_token_loss,
    implicit_rewards,
    ipo_loss,
    masked_mean,
    preference_loss,
    reinforce_loss,
    sampler_mismatch_weights,
    sapo_loss,
)


def drawn(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def slopes(loss, ratios, advantage):
    """The derivative of a loss by the log-probability, at these ratios."""
    old = jnp.zeros_like(ratios)
    advantages = jnp.full_like(ratios, advantage)
    return jax.grad(lambda lp: loss(lp, old, advantages).sum())(jnp.log(ratios))


def test_far_from_one_cispo_keeps_a_bounded_gradient_and_sapo_lets_it_fade():
    ratios = jnp.array([1.0, 3.0, 20.0])
    np.testing.assert_allclose(slopes(clipped_policy_loss, ratios, 1.0), [-1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(slopes(cispo_loss, ratios, 1.0), [-1, -3, -5], rtol=1e-5)
    soft = slopes(sapo_loss, ratios, 1.0)
    np.testing.assert_allclose(soft[0], -1.0, rtol=1e-6)
    assert -1.5 < soft[1] < 0
    assert abs(soft[2]) < 1e-5
    # The sharper gate of negative advantages is further closed at the same ratio.
    assert slopes(sapo_loss, ratios, -1.0)[1] < -soft[1]


def test_at_ratio_one_all_of_them_are_the_policy_gradient(rng):
    lp, advantages = -jnp.abs(drawn(rng, 2, 5)), drawn(rng, 2, 5)
    wanted = jax.grad(lambda x: reinforce_loss(x, advantages, jnp.zeros_like(x)).sum())(lp)
    for loss in (clipped_policy_loss, cispo_loss, sapo_loss):
        found = jax.grad(lambda x, f=loss: f(x, lp, advantages).sum())(lp)
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_gspo_per_token_is_gspo_where_a_response_has_one_advantage(rng):
    """In the mean over its tokens: value and gradient, clipped or not."""
    lp, where = (
        -jnp.abs(drawn(rng, 6, 5)),
        jnp.arange(5)[None] < jnp.array([[5], [3], [1], [5], [2], [0]]),
    )
    old, advantages = lp + 0.02 * drawn(rng, 6, 5), drawn(rng, 6)

    def whole(x):
        return gspo_loss(x, old, advantages, where=where)

    def by_token(x):
        each = jnp.broadcast_to(advantages[:, None], x.shape)
        return masked_mean(gspo_token_loss(x, old, each, where=where), where=where, axis=1)

    np.testing.assert_allclose(by_token(lp), whole(lp), rtol=1e-5)
    found, wanted = (jax.jacrev(f)(lp) for f in (by_token, whole))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)
    assert np.any(wanted)


def test_an_episode_that_was_cut_off_is_worth_the_value_of_where_it_stopped():
    """It is the first half of the episode that went on, if that is what the second is worth."""
    rewards, values = jnp.array([[0.1, 0.2, 0.3, 0.4]]), jnp.array([[1.0, 0.8, 0.6, 0.4]])
    options = {"discount": 0.9, "gae_lambda": 0.0}
    whole, _ = generalized_advantages(rewards, values, where=jnp.ones((1, 4), bool), **options)
    first = jnp.array([[True, True, False, False]])
    cut, _ = generalized_advantages(rewards, values, where=first, bootstrap=values[:, 2], **options)
    np.testing.assert_allclose(cut[:, :2], whole[:, :2], rtol=1e-6)
    ended, _ = generalized_advantages(rewards, values, where=first, **options)
    np.testing.assert_allclose(cut[0, 1] - ended[0, 1], 0.9 * 0.6, rtol=1e-6)


def test_a_discount_of_zero_ends_an_episode_inside_of_a_row(rng):
    rewards, values = drawn(rng, 1, 6), drawn(rng, 1, 6)
    discount = jnp.array([[0.9, 0.9, 0.0, 0.9, 0.9, 0.9]])
    joined = generalized_advantages(
        rewards, values, where=jnp.ones((1, 6), bool), discount=discount
    )
    for part in (slice(0, 3), slice(3, 6)):
        alone = generalized_advantages(
            rewards[:, part], values[:, part], where=jnp.ones((1, 3), bool), discount=0.9
        )
        for a, b in zip(joined, alone, strict=True):
            np.testing.assert_allclose(a[:, part], b, rtol=1e-5, atol=1e-6)


def test_masked_weights_are_unbiased_where_they_keep_all_and_truncated_ones_never_exceed(rng):
    """Over all sequences of two tokens: the mean weight of a sampler's draws is 1."""
    trainer, sampler = (jax.nn.log_softmax(drawn(rng, 3)) for _ in range(2))
    first, second = (x.ravel() for x in jnp.meshgrid(jnp.arange(3), jnp.arange(3)))
    lp, drawn_lp = (jnp.stack([p[first], p[second]], axis=1) for p in (trainer, sampler))
    weights = sampler_mismatch_weights(lp, drawn_lp, level="sequence", outside="mask", high=1e6)
    probability = jnp.exp(drawn_lp.sum(1))
    np.testing.assert_allclose((probability * weights[:, 0]).sum(), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(weights[:, 0], weights[:, 1])
    assert sampler_mismatch_weights(lp, drawn_lp, low=0.5, high=1.1).max() <= jnp.float32(1.1)
    with pytest.raises(ValueError, match="low 2"):
        sampler_mismatch_weights(lp, drawn_lp, low=2.0, high=1.0)


def test_the_family_has_dpo_and_ipo_in_it_and_adds_up(rng):
    four = tuple(-9 + 2 * drawn(rng, 5) for _ in range(4))
    np.testing.assert_allclose(preference_loss(*four), dpo_loss(*four), rtol=1e-6)
    np.testing.assert_allclose(
        preference_loss(*four, form="square", beta=0.2), ipo_loss(*four, beta=0.2), rtol=1e-5
    )
    mixed = preference_loss(*four, form={"hinge": 2.0, "apo_zero": 0.5})
    parts = 2 * preference_loss(*four, form="hinge") + 0.5 * preference_loss(*four, form="apo_zero")
    np.testing.assert_allclose(mixed, parts, rtol=1e-6)


def test_a_small_alpha_is_the_reverse_kl_and_every_divergence_agrees_near_the_reference(rng):
    lp, ref = -9 + 0.01 * drawn(rng, 5), jnp.full(5, -9.0)
    wanted = implicit_rewards(lp, ref)
    np.testing.assert_allclose(
        implicit_rewards(lp, ref, divergence="alpha", alpha=1e-3), wanted, rtol=1e-3, atol=1e-7
    )
    for divergence, slope in (("forward_kl", 1.0), ("js", 0.5), ("alpha", 1.0)):
        found = implicit_rewards(lp, ref, divergence=divergence)
        np.testing.assert_allclose(found, slope * wanted, rtol=0.05, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "dpo"}, "form must be one of logistic"),
        ({"form": "hinge", "label_smoothing": 0.1}, "reads no label_smoothing"),
        ({"form": "nca", "margin": 1.0}, "reads no gap"),
        ({"form": "exo", "label_smoothing": 0.0}, "inside"),
        ({"divergence": "tv"}, "'tv'"),
        ({"form": {}}, "no loss"),
    ],
)
def test_what_a_form_does_not_read_is_refused(settings, message):
    four = (jnp.zeros(2),) * 4
    with pytest.raises(ValueError, match=message):
        preference_loss(*four, **settings)


def test_distillation_from_states_holds_no_logits_of_a_batch():
    """Under a sixteenth of one float32[B, T, V] beside the gradient of the head."""
    hidden = jax.ShapeDtypeStruct((4, 512, 64), jnp.float32)
    head = jax.ShapeDtypeStruct((64, 50_257), jnp.float32)

    def loss(hidden, head, taught, teacher):
        return chunked_divergence(hidden, head, taught, teacher, chunk=16).sum()

    def dense(hidden, head, taught, teacher):
        return forward_kl(hidden @ head, taught @ teacher).sum()

    small, large = (
        jax.jit(jax.grad(f, (0, 1)))
        .lower(hidden, head, hidden, head)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for f in (loss, dense)
    )
    logits = 4 * 512 * 50_257 * 4
    assert small - 2 * 64 * 50_257 * 4 < logits / 16
    assert large > logits
