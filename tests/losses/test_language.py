"""Token log-probabilities: scaled, normalised over real tokens only, shifted only by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.losses.jitted import (
    kl_estimate,
    next_token_loss,
    token_cross_entropy,
    token_entropy,
    token_log_probs,
)


def drawn(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def test_log_probs_are_taken_at_the_temperature_of_the_sampler(rng):
    """T4: with equal temperatures the KL is 0; leaving the division out of one is seen."""
    logits, tokens = 3 * drawn(rng, 2, 9, 11), jnp.asarray(rng.integers(0, 11, (2, 9)))
    cool = token_log_probs(logits, tokens, temperature=0.7)
    again = token_log_probs(logits, tokens, temperature=0.7)
    assert np.abs(kl_estimate(cool, again)).max() == 0
    assert np.abs(kl_estimate(cool, token_log_probs(logits, tokens))).mean() > 1e-2


def test_padded_columns_are_outside_the_normaliser(rng):
    """T10: cut, masked here or masked in the model, the log-probs are the same."""
    logits, tokens = drawn(rng, 2, 3, 8), jnp.asarray(rng.integers(0, 5, (2, 3)))
    want = token_log_probs(logits[..., :5], tokens)
    masked = jnp.where(jnp.arange(8) < 5, logits, -1e9)
    np.testing.assert_allclose(token_log_probs(logits, tokens, vocab_size=5), want, atol=1e-6)
    np.testing.assert_allclose(token_log_probs(masked, tokens), want, atol=1e-6)
    np.testing.assert_allclose(token_entropy(masked), token_entropy(logits[..., :5]), atol=1e-6)
    grad = jax.jit(jax.grad(lambda z: token_log_probs(z, tokens, vocab_size=5).sum()))(logits)
    assert not grad[..., 5:].any()


def test_only_the_next_token_loss_shifts(rng):
    logits, tokens = drawn(rng, 2, 4, 6), jnp.asarray(rng.integers(0, 6, (2, 4)))
    shifted = -token_log_probs(logits[:, :-1], tokens[:, 1:])
    np.testing.assert_allclose(next_token_loss(logits, tokens), shifted, rtol=1e-6)
    # The last logits predict nothing and the first token is given.
    changed = next_token_loss(logits.at[:, -1].set(9.0), tokens.at[:, 0].set(0))
    np.testing.assert_array_equal(changed, next_token_loss(logits, tokens))


def test_the_last_target_of_a_sequence_is_counted():
    """T12: three tokens, the stop token among them, give two targets."""
    losses = next_token_loss(jnp.zeros((1, 3, 4)), jnp.array([[1, 2, 3]]))
    np.testing.assert_allclose(losses, jnp.full((1, 2), np.log(4)), rtol=1e-6)


def test_ids_outside_the_vocabulary_are_nan_and_harmless_behind_a_mask():
    logits, tokens = jnp.zeros((1, 3, 4)), jnp.array([[1, 4, -100]])
    np.testing.assert_array_equal(np.isnan(token_log_probs(logits, tokens)), [[0, 1, 1]])
    where = tokens == 1
    grad = jax.grad(lambda z: jnp.where(where, token_log_probs(z, tokens), 0.0).sum())(logits)
    assert np.isfinite(grad).all()
    assert not grad[:, 1:].any()


@pytest.mark.parametrize("scale", [80.0, 1e4, 1e30])
def test_huge_logits_give_finite_values_and_gradients(scale):
    logits = scale * jnp.array([[[1.0, -1.0, 0.0], [-1.0, -1.0, -1.0]]])
    tokens = jnp.array([[1, 2]])

    def total(z):
        return (token_log_probs(z, tokens) + token_entropy(z)).sum()

    value, grad = jax.jit(jax.value_and_grad(total))(logits)
    assert np.isfinite(value)
    assert np.isfinite(grad).all()


def test_impossible_tokens_do_not_break_the_entropy():
    logits = jnp.array([[[0.0, 0.0, -jnp.inf]]])
    value, grad = jax.value_and_grad(lambda z: token_entropy(z).sum())(logits)
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    assert np.isfinite(grad).all()


def test_half_precision_logits_are_scaled_in_float32():
    """NUM-3: rounding the quotient to bfloat16 would cost 4e-3 of the logit."""
    logits = jnp.array([[[10.0, 3.0]]], jnp.bfloat16)
    tokens = jnp.array([[1]])
    exact = token_log_probs(logits.astype(jnp.float32), tokens, temperature=0.7)
    half = token_log_probs(logits, tokens, temperature=0.7)
    assert half.dtype == jnp.float32
    np.testing.assert_array_equal(half, exact)


def test_label_smoothing_is_cross_entropy_with_a_smoothed_target(rng):
    logits, tokens = drawn(rng, 1, 4, 6), jnp.asarray(rng.integers(0, 6, (1, 4)))
    target = 0.8 * jax.nn.one_hot(tokens, 6) + 0.2 / 6
    want = -(target * jax.nn.log_softmax(logits)).sum(-1)
    np.testing.assert_allclose(
        token_cross_entropy(logits, tokens, label_smoothing=0.2), want, rtol=1e-5
    )


def test_wrong_ranks_and_dtypes_are_refused():
    logits, tokens = jnp.zeros((2, 3, 4)), jnp.zeros((2, 3), jnp.int32)
    for bad in ((logits[0], tokens[0]), (logits, tokens[:, :2]), (logits, tokens.astype(float))):
        with pytest.raises(AssertionError):
            token_log_probs(*bad)
