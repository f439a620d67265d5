"""Win rates against a fixed baseline (EVAL-1)."""

import numpy as np
import pytest

from instruct_jax.evaluation.win_rate import (
    ask_judge,
    criteria_summary,
    preferences_from_scores,
    win_rate,
)

PROMPTS = [f"prompt {i}" for i in range(400)]


def test_a_tie_counts_half():
    rate = win_rate([1, 1, 0, 0.5, 0.5])
    assert rate.mean == 0.6
    assert (rate.wins, rate.ties, rate.losses) == (2, 2, 1)
    assert rate.low <= rate.mean <= rate.high


def test_scores_within_the_margin_are_ties():
    scores, baseline = [3.0, 2.0, 2.0, 2.4], [2.0, 3.0, 2.0, 2.0]
    assert preferences_from_scores(scores, baseline).tolist() == [1, 0, 0.5, 1]
    assert preferences_from_scores(scores, baseline, margin=0.5).tolist() == [1, 0, 0.5, 0.5]


def test_a_judge_that_always_takes_the_first_is_at_one_half():
    """The order is drawn per prompt, so a position bias cannot favour a model."""
    same = ["x"] * len(PROMPTS)
    verdicts = ask_judge(lambda p, first, second: 1.0, PROMPTS, same, same, seed=0)
    assert abs(verdicts.preferences.mean() - 0.5) < 0.08
    assert np.array_equal(verdicts.preferences == 1, verdicts.model_first)
    both = ask_judge(lambda *_: 1.0, PROMPTS, same, same, seed=0, both_orders=True)
    assert (both.preferences == 0.5).all()


def test_the_preference_is_for_the_model_in_either_order():
    def longer(prompt, first, second):
        return float(len(first) > len(second))

    responses = ["long answer"] * len(PROMPTS)
    verdicts = ask_judge(longer, PROMPTS, responses, ["short"] * len(PROMPTS), seed=3)
    assert (verdicts.preferences == 1).all()
    assert 0.4 < verdicts.model_first.mean() < 0.6
    again = ask_judge(longer, PROMPTS, responses, ["short"] * len(PROMPTS), seed=3)
    assert np.array_equal(again.model_first, verdicts.model_first)


def test_a_question_without_a_verdict_is_a_tie_and_is_counted():
    verdicts = ask_judge(
        lambda p, a, b: None if p == "prompt 1" else 1.0, PROMPTS[:3], ["a"] * 3, ["b"] * 3, seed=0
    )
    assert verdicts.preferences[1] == 0.5 and verdicts.failures == 1


def test_lists_that_do_not_match_and_impossible_preferences_are_refused():
    with pytest.raises(ValueError, match="2 prompts, 1 responses"):
        ask_judge(lambda *_: 1.0, ["a", "b"], ["x"], ["y", "z"], seed=0)
    with pytest.raises(ValueError, match="prompt 0: a preference of 7"):
        ask_judge(lambda *_: 7.0, ["a"], ["x"], ["y"], seed=0)
    with pytest.raises(ValueError, match="preferences"):
        win_rate([])


def test_the_criteria_are_summarised_apart():
    summary = criteria_summary({"sft": {"helpful": [1, 0, 1, 0], "harmless": [1, 1, 1, 1]}})
    assert summary["sft"]["helpful"].mean == 0.5
    assert tuple(summary["sft"]["harmless"]) == (1, 1, 1)
