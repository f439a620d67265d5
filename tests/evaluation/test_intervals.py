"""Means with bootstrap intervals."""

import numpy as np
import pytest

from instruct_jax.evaluation.intervals import bootstrap_mean, bootstrap_ratio


def test_the_interval_covers_the_truth_as_often_as_it_says(rng):
    """300 experiments on 60 prompts: about 95 % of the intervals hold the mean."""
    covered = 0
    for seed in range(300):
        interval = bootstrap_mean(rng.random(60) < 0.3, resamples=400, seed=seed)
        assert interval.low <= interval.mean <= interval.high
        covered += interval.low <= 0.3 <= interval.high
    assert 0.90 <= covered / 300 <= 0.98


def test_the_interval_agrees_with_the_normal_one(rng):
    values = rng.random(2000)
    interval = bootstrap_mean(values)
    assert interval.margin == pytest.approx(1.96 * values.std() / np.sqrt(2000), rel=0.06)


def test_the_same_data_give_the_same_interval(rng):
    values = rng.random(50)
    assert bootstrap_mean(values) == bootstrap_mean(values)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values)


def test_a_prompt_is_resampled_with_all_its_samples(rng):
    """Ten equal copies of each measurement say no more than one."""
    values = rng.random(80)
    copies = np.repeat(values[:, None], 10, axis=1)
    once, again = bootstrap_mean(values), bootstrap_mean(copies)
    np.testing.assert_allclose(again, once)
    assert bootstrap_mean(copies.ravel()).margin < 0.5 * once.margin


def test_prompts_without_a_pair_weigh_nothing():
    interval = bootstrap_ratio([3.0, 0.0, 1.0], [4, 0, 4])
    assert interval.mean == 0.5
    assert np.isnan(bootstrap_ratio([0.0], [0])).all()


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        bootstrap_mean([0.1, np.nan])
    with pytest.raises(ValueError, match="one length"):
        bootstrap_ratio([0.1, 0.2], [1])
