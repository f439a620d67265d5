"""One token from one row of logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax.sampling import Sampling, draw, truncate

LOGITS = np.array([1.3, -0.4, 0.0, 2.1, -2.0, 0.7, -1.1, 0.2], np.float32)
# Chi-square, 7 degrees of freedom: P(X > 24.32) = 1e-3.
CHI_SQUARE_LIMIT = 24.32


def test_draws_follow_the_softmax():
    """T8: 1e5 draws from eight logits pass a chi-square test at p > 1e-3."""
    count = 100_000
    keys = jax.random.split(jax.random.key(3), count)
    drawn = draw(keys, jnp.broadcast_to(jnp.asarray(LOGITS), (count, 8)))
    probs = np.exp(LOGITS.astype(np.float64)) / np.exp(LOGITS.astype(np.float64)).sum()
    observed = np.bincount(np.asarray(drawn), minlength=8)
    statistic = ((observed - count * probs) ** 2 / (count * probs)).sum()
    assert statistic < CHI_SQUARE_LIMIT
    # The test can fail: a temperature of 0.95 is told apart.
    cooler = np.exp(LOGITS / 0.95) / np.exp(LOGITS / 0.95).sum()
    assert ((observed - count * cooler) ** 2 / (count * cooler)).sum() > CHI_SQUARE_LIMIT


@pytest.mark.parametrize("columns", [100, 128, 1000])
def test_a_draw_is_the_first_entry_past_its_uniform_number(columns):
    """y = min { i : sum_{j<=i} p_j > u }, in float64, across blocks of columns."""
    keys = jax.random.split(jax.random.key(1), 200)
    logits = 2 * jax.random.normal(jax.random.key(2), (200, columns))
    uniforms = np.asarray(jax.vmap(jax.random.uniform)(keys), np.float64)
    weights = np.exp(np.asarray(logits, np.float64))
    cumulative = np.cumsum(weights, axis=1) / weights.sum(axis=1, keepdims=True)
    np.testing.assert_array_equal(
        draw(keys, logits), (cumulative > uniforms[:, None]).argmax(axis=1)
    )


def test_an_entry_without_probability_is_never_drawn():
    """T10: neither excluded columns nor those whose weight underflows to zero, at either end."""
    logits = np.full((20_000, 50), -1e9, np.float32)
    logits[:, 10:20] = np.linspace(-8, 8, 10)
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 20_000), jnp.asarray(logits)))
    assert drawn.min() >= 10 and drawn.max() < 20


def test_a_draw_depends_on_its_own_row_only():
    keys = jax.random.split(jax.random.key(1), 16)
    logits = jax.random.normal(jax.random.key(2), (16, 33)) * 2
    together = draw(keys, logits)
    alone = [int(draw(keys[i : i + 1], logits[i : i + 1])[0]) for i in range(16)]
    assert together.tolist() == alone


@pytest.mark.parametrize("top_k", [1, 3, 8, 50])
def test_top_k_keeps_the_k_largest(top_k):
    kept = np.asarray(truncate(jnp.asarray(LOGITS)[None], top_k=top_k))[0] > -1e8
    assert set(np.flatnonzero(kept)) == set(np.argsort(-LOGITS)[:top_k])


def test_top_k_keeps_ties():
    kept = np.asarray(truncate(jnp.array([[1.0, 2.0, 1.0, 0.0]]), top_k=2))[0] > -1e8
    assert kept.tolist() == [True, True, True, False]


@pytest.mark.parametrize("top_p", [1e-6, 0.2, 0.5, 0.9, 0.999, 1.0])
def test_top_p_keeps_the_smallest_set_with_that_mass(top_p):
    probs = np.exp(LOGITS.astype(np.float64)) / np.exp(LOGITS.astype(np.float64)).sum()
    order = np.argsort(-probs)
    needed = int(np.searchsorted(np.cumsum(probs[order]), top_p)) + 1
    kept = np.asarray(truncate(jnp.asarray(LOGITS)[None], top_p=top_p))[0] > -1e8
    assert set(np.flatnonzero(kept)) == set(order[:needed])


def test_top_p_looks_at_what_top_k_left():
    """With two tokens left, 0.6 of their mass is the first one alone."""
    logits = jnp.log(jnp.array([[0.3, 0.2, 0.25, 0.25]]))
    kept = np.asarray(truncate(logits, top_k=2, top_p=0.3))[0] > -1e8
    assert kept[0] and not kept[1]
    assert kept.sum() == 1


@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.3, 0.9, 1.0])
def test_min_p_keeps_what_is_probable_beside_the_first(min_p):
    probs = np.exp(LOGITS.astype(np.float64))
    kept = np.asarray(truncate(jnp.asarray(LOGITS)[None], min_p=min_p))[0] > -1e8
    assert set(np.flatnonzero(kept)) == set(np.flatnonzero(probs >= min_p * probs.max()))


def test_what_ended_a_response_is_told_from_its_budget():
    sampling = Sampling(stop_ids=(9, 4), stop_sequences=((1, 2), (3, 1, 2), (4, 5)))
    endings = {(3, 9): 1, (7, 1, 2): 2, (3, 1, 2): 3, (2,): 0, (1, 2, 3): 0, (): 0, (4, 5): 2}
    assert {response: sampling.ending(response) for response in endings} == endings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(temperature=float("nan")), "temperature must be >= 0"),
        (dict(min_p=1.5), r"min_p must be in \[0, 1\], got 1.5"),
        (dict(stop_sequences=((3,), ())), "a stop sequence is empty"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(stop_ids=(0,), **settings)
