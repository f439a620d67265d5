"""Metrics of a reward model (RM-6)."""

import numpy as np
import pytest

from instruct_jax.evaluation.reward_model import (
    accuracy_by,
    evaluate_rewards,
    fit_length_baseline,
    length_correlations,
    ordered_pairs,
    pair_metrics,
)


def by_loops(scores, ranks, where):
    """Accuracy, share of ties, log-loss and pairs, the slow way."""
    wins = ties = total = loss = 0
    for row, order, present in zip(scores, ranks, where, strict=True):
        for i in range(len(row)):
            for j in range(len(row)):
                if present[i] and present[j] and order[i] < order[j]:
                    total += 1
                    wins += row[i] > row[j]
                    ties += row[i] == row[j]
                    loss += np.log1p(np.exp(-(row[i] - row[j])))
    return wins / total, ties / total, loss / total, total


def test_pairs_are_counted_as_loops_count_them(rng):
    scores = rng.integers(0, 6, (40, 5)).astype(np.float32)
    ranks = rng.integers(0, 4, (40, 5))
    where = rng.random((40, 5)) < 0.8
    metrics = pair_metrics(scores, ordered_pairs(ranks, where))
    accuracy, tied, log_loss, pairs = by_loops(scores, ranks, where)
    assert metrics.accuracy.mean == pytest.approx(accuracy)
    assert metrics.tied == pytest.approx(tied)
    assert metrics.log_loss == pytest.approx(log_loss)
    assert metrics.pairs == pairs


def test_ties_make_no_pair_and_equal_scores_are_counted_apart():
    """T45: a tie of the labeler is no pair; a tie of the scores is not a win."""
    metrics = pair_metrics([[1.0, 1.0, 0.0]], ordered_pairs([[0, 1, 1]]))
    assert metrics.pairs == 2
    assert metrics.accuracy.mean == 0.5
    assert metrics.tied == 0.5


def test_permuting_the_completions_changes_nothing(rng):
    scores, ranks = rng.normal(size=(20, 4)), rng.integers(0, 4, (20, 4))
    order = rng.permutation(4)
    one = pair_metrics(scores, ordered_pairs(ranks))
    two = pair_metrics(scores[:, order], ordered_pairs(ranks[:, order]))
    assert two.accuracy == one.accuracy
    assert two.log_loss == pytest.approx(one.log_loss)
    assert two.ece == pytest.approx(one.ece)


def test_a_calibrated_score_has_no_calibration_error(rng):
    """Labels drawn from sigmoid(r_a - r_b): every bin is on the diagonal."""
    scores = rng.normal(scale=1.5, size=(40_000, 2))
    first_wins = rng.random(40_000) < 1 / (1 + np.exp(scores[:, 1] - scores[:, 0]))
    pairs = ordered_pairs(np.stack([~first_wins, first_wins], axis=1).astype(int))
    metrics = pair_metrics(scores, pairs)
    assert metrics.ece < 0.01
    for b in metrics.calibration:
        assert b.low <= b.predicted < b.high + 1e-9
        assert b.observed == pytest.approx(b.predicted, abs=0.03)
    for b in metrics.confidence:
        assert b.observed == pytest.approx(b.predicted, abs=0.03)
    assert sum(b.pairs for b in metrics.calibration) == 2 * metrics.pairs
    assert sum(b.pairs for b in metrics.confidence) == metrics.pairs
    assert metrics.accuracy.mean > 0.75
    # Scores four times as far apart order the pairs alike but claim too much.
    over = pair_metrics(4 * scores, pairs)
    assert over.accuracy == metrics.accuracy
    assert over.ece > 0.1 and over.log_loss > metrics.log_loss


def test_flipped_labels_bound_accuracy_and_calibration(rng):
    """T48: 25 % flips bring a perfect ranker to 75 %; scaled to that, it is calibrated."""
    better = np.where(rng.random(20_000) < 0.75, 0, 1)
    pairs = ordered_pairs(np.stack([better, 1 - better], axis=1))
    scores = np.tile([np.log(3.0), 0.0], (20_000, 1))
    metrics = pair_metrics(scores, pairs)
    assert metrics.accuracy.mean == pytest.approx(0.75, abs=0.01)
    assert metrics.ece < 0.03


def test_the_interval_resamples_prompts_not_pairs(rng):
    """36 pairs of one prompt are right or wrong together, so they are no 36 measurements."""
    sign = np.where(rng.random(100) < 0.7, 1.0, -1.0)
    scores = sign[:, None] * np.arange(9)[None, :]
    metrics = pair_metrics(scores, ordered_pairs(np.tile(np.arange(8, -1, -1), (100, 1))))
    assert metrics.pairs == 3600 and metrics.prompts == 100
    assert metrics.accuracy.margin == pytest.approx(1.96 * np.sqrt(0.21 / 100), rel=0.2)


def test_accuracy_is_told_apart_by_source_and_data_set():
    report = evaluate_rewards(
        [[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]],
        [[0, 1, 2], [0, 1, 2]],
        sources=[["a", "b", "c"], ["a", "b", "c"]],
        datasets=["x", "y"],
        demonstration_scores=[0.5, -0.5],
    )
    assert {k: v.mean for k, v in report.by_sources.items()} == {
        "a / b": 0.5, "a / c": 0.5, "b / c": 0.5,
    }  # fmt: skip
    assert {k: v.mean for k, v in report.by_dataset.items()} == {"x": 1.0, "y": 0.0}
    assert report.mean_better == report.mean_worse == 1.0
    assert report.mean_demonstration == 0.0
    assert report.length_correlation is None


def test_correlation_within_prompts_ignores_what_differs_between_them():
    """Long prompts score high here, but within each prompt the longer answer scores lower."""
    lengths = np.array([[1, 2, 3], [11, 12, 13], [21, 22, 23]])
    scores = lengths.mean(axis=1, keepdims=True) - 0.1 * lengths
    pooled, within = length_correlations(scores, lengths, where=np.ones((3, 3), bool))
    assert pooled > 0.9
    assert within == pytest.approx(-1.0)
    assert length_correlations(scores * 0, lengths, where=np.ones((3, 3), bool)) == (0.0, 0.0)
    expected = np.corrcoef(scores.ravel(), lengths.ravel())[0, 1]
    assert pooled == pytest.approx(expected)


def test_absent_completions_do_not_enter_the_correlation():
    where = np.array([[True, True, False]] * 4)
    lengths = np.array([[1, 2, 900]] * 4)
    scores = np.array([[0.0, 1.0, -70.0]] * 4)
    assert length_correlations(scores, lengths, where=where)[1] == pytest.approx(1.0)


def test_the_length_baseline_learns_its_direction_on_the_training_pairs(rng):
    def rankings(count, taste):
        lengths = rng.integers(1, 60, (count, 2))
        margin = taste * (lengths[:, 0] - lengths[:, 1])
        first = rng.random(count) < 1 / (1 + np.exp(-margin))
        return lengths, ordered_pairs(np.stack([~first, first], axis=1).astype(int))

    for taste in (0.05, -0.05):
        lengths, pairs = rankings(5000, taste)
        baseline = fit_length_baseline(lengths, pairs)
        assert baseline.weight == pytest.approx(taste, rel=0.15)
        lengths, pairs = rankings(2000, taste)
        assert baseline.accuracy(lengths, pairs).mean > 0.65
        assert pair_metrics(baseline.scores(lengths), pairs).ece < 0.04


def test_equal_lengths_are_a_coin_flip_for_the_baseline():
    """Counting them as wrong would make the baseline easier to beat than it is."""
    pairs = ordered_pairs([[0, 1]] * 4)
    lengths = [[5, 5], [5, 5], [6, 5], [6, 5]]
    baseline = fit_length_baseline(lengths, pairs)
    assert baseline.accuracy(lengths, pairs).mean == 0.75
    assert fit_length_baseline([[5, 5]] * 4, pairs).weight == 0.0


def test_separable_lengths_end_at_a_finite_weight():
    pairs = ordered_pairs([[0, 1]] * 3)
    assert np.isfinite(fit_length_baseline([[2, 1], [9, 1], [5, 3]], pairs).weight)


def test_groups_and_rankings_without_a_pair():
    with pytest.raises(ValueError, match="no ordered pair"):
        pair_metrics([[1.0, 2.0]], ordered_pairs([[0, 0]]))
    pairs = ordered_pairs([[0, 1], [0, 1]])
    assert accuracy_by([[1.0, 0.0]] * 2, pairs, ["a", "a"])["a"].mean == 1.0
