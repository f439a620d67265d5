"""Simulated labelers: rankings, agreement, groups, and what can be learnt from the labels."""

from dataclasses import replace
from itertools import combinations
from random import Random

import numpy as np
import pytest

from instruct_jax.data.rows import Comparison, Prompt
from instruct_jax.data.toyworld import Spec, ToyWorld
from instruct_jax.feedback import (
    SimulatedLabeler,
    accuracy,
    agreement,
    collect_rankings,
    labeler_folds,
    simulated_labelers,
)

K = 4


@pytest.fixture(scope="module")
def world():
    return ToyWorld(0)


@pytest.fixture(scope="module")
def prompts(world):
    return world.prompts(1000)


@pytest.fixture(scope="module")
def completions(world, prompts):
    """What an SFT policy would write: demonstrations, one in four wrong where one can be."""

    def completion(prompt, k):
        flaws = tuple(world.demonstrate(prompt, draw=k).meta["flaws"])
        spec, rng = Spec.from_meta(prompt.meta), Random(f"{k}/{prompt.text}")
        open_task = spec.check not in ("slot", "members")
        if not open_task and not {"wrong", "constraint", "over_decline"} & {*flaws}:
            flaws += ("wrong",) if rng.random() < 0.25 else ()
        return world.answer(prompt, flaws=flaws, restate=rng.random() < 0.65, draw=k)

    return [[completion(prompt, k) for k in range(K)] for prompt in prompts]


@pytest.fixture(scope="module")
def gold(world, prompts, completions):
    return [
        [world.judge(prompt, text).overall for text in texts]
        for prompt, texts in zip(prompts, completions, strict=True)
    ]


def mean_agreement(world, prompts, completions, group) -> float:
    labelers = simulated_labelers(world.judge, 4, group=group)
    rankings = [collect_rankings(prompts, completions, [labeler]) for labeler in labelers]
    return float(np.mean([agreement(a, b).rate for a, b in combinations(rankings, 2)]))


# --- one labeler ------------------------------------------------------------------------------


def exact(world) -> SimulatedLabeler:
    return SimulatedLabeler(world.judge, "exact", noise=0.0)


def test_without_noise_and_taste_the_ranking_is_the_judges(world, prompts, completions, gold):
    for prompt, texts, grades in zip(prompts[:200], completions, gold, strict=False):
        order = sorted(set(grades), reverse=True)
        ranks = exact(world).rank(prompt, texts)
        assert ranks == tuple(order.index(grade) for grade in grades)


def test_ranks_begin_at_zero_and_have_no_gaps(world, prompts, completions):
    """DATA-19."""
    rows = collect_rankings(prompts, completions, simulated_labelers(world.judge, 3))
    for row in rows:
        assert sorted(set(row.ranks)) == list(range(len(set(row.ranks))))
        assert len(row.ranks) == len(row.completions) == K


def test_equal_texts_tie_and_their_place_does_not_matter(world, prompts, completions):
    labeler = simulated_labelers(world.judge, 1)[0]
    prompt, texts = prompts[0], [*completions[0], completions[0][0]]
    ranks = labeler.rank(prompt, texts)
    assert ranks[0] == ranks[-1]
    assert labeler.rank(prompt, texts[::-1]) == ranks[::-1]


def test_close_grades_tie(world, prompts):
    prompt = next(p for p in prompts if p.meta["family"] == "pick")
    texts = [world.answer(prompt), world.answer(prompt, restate=False)]
    assert exact(world).rank(prompt, texts) == (0, 1)
    assert replace(exact(world), tie_width=0.6).rank(prompt, texts) == (0, 0)


def test_an_unended_completion_ranks_below_its_ended_twin(world, prompts):
    prompt = prompts[1]
    text = world.answer(prompt)
    assert exact(world).rank(prompt, [text, text], ended=[False, True]) == (1, 0)


def test_a_longer_list_than_flags_is_an_error(world, prompts):
    with pytest.raises(ValueError, match="shorter"):
        exact(world).rank(prompts[0], ["a", "b"], ended=[True])


# --- many labelers ----------------------------------------------------------------------------


def test_labels_are_a_function_of_the_seed(world, prompts, completions):
    labelers = simulated_labelers(world.judge, 5)
    a, b, c = (
        collect_rankings(prompts[:50], completions[:50], labelers, seed=seed) for seed in (0, 0, 1)
    )
    assert a == b != c
    assert labelers == simulated_labelers(world.judge, 5)


def test_rows_carry_labeler_source_and_meta(world, prompts, completions):
    """DATA-19."""
    labelers = simulated_labelers(world.judge, 3)
    sources = [["sft", "sft", "ppo", "human"]] * 10
    rows = collect_rankings(prompts[:10], completions[:10], labelers, sources=sources)
    assert {row.labeler for row in rows} == {labeler.labeler_id for labeler in labelers}
    assert rows[0].sources == ("sft", "sft", "ppo", "human")
    assert rows[0].prompt == prompts[0].text and rows[0].meta == prompts[0].meta
    with pytest.raises(ValueError, match="no labeler"):
        collect_rankings(prompts, completions, [])


def test_two_training_labelers_agree_about_as_often_as_the_papers(world, prompts, completions):
    """DATA-20: 72.6 %."""
    assert 0.70 <= mean_agreement(world, prompts, completions, "train") <= 0.76


def test_held_out_labelers_agree_more_often(world, prompts, completions):
    """DATA-20: 77.3 %."""
    assert 0.75 <= mean_agreement(world, prompts, completions, "held_out") <= 0.80


def test_training_labelers_lean_to_help_and_held_out_ones_to_truth_and_harmlessness(world):
    """DATA-20, EVAL-1."""
    train = np.mean([lab.taste for lab in simulated_labelers(world.judge, 20)], axis=0)
    held_out = simulated_labelers(world.judge, 20, group="held_out")
    final = np.mean([labeler.taste for labeler in held_out], axis=0)
    assert train[0] > final[0] and (train[1:] < final[1:]).all()
    assert len({labeler.taste for labeler in held_out}) == 20


def test_agreement_counts_pairs_that_neither_tied():
    a = Comparison("p", ("x", "y", "z"), (0, 1, 1), "a")
    b = Comparison("p", ("x", "y", "z"), (0, 2, 1), "b")
    c = Comparison("p", ("x", "y", "z"), (2, 0, 1), "c")
    assert (agreement([a], [b]).rate, agreement([a], [b]).pairs) == (1.0, 2)
    assert (agreement([b], [c]).rate, agreement([b], [c]).pairs) == (0.0, 3)
    assert agreement([a], [a]).standard_error == 0.0
    with pytest.raises(ValueError, match="different completions"):
        agreement([a], [replace(b, prompt="q")])


def test_accuracy_gives_half_for_a_tie_of_the_score():
    row = Comparison("p", ("x", "y", "z"), (0, 1, 1), "a")
    assert accuracy([row], [[2.0, 1.0, 2.0]]).rate == 0.75
    assert accuracy([row], [[2.0, 1.0, 2.0]]).pairs == 2


def test_no_labeler_is_on_both_sides_of_a_fold(world, prompts, completions):
    """RM-7: five groups of about equal data."""
    rows = collect_rankings(prompts, completions, simulated_labelers(world.judge, 11))
    folds = labeler_folds(rows, 5)
    assert sum(len(test) for _, test in folds) == len(rows)
    for train, test in folds:
        assert len(train) + len(test) == len(rows)
        assert not {row.labeler for row in train} & {row.labeler for row in test}
        assert 0.1 < len(test) / len(rows) < 0.3
    with pytest.raises(ValueError, match="cannot make 12 groups"):
        labeler_folds(rows, 12)


# --- what the labels teach --------------------------------------------------------------------


def fitted_accuracy(rows, features, *, train: int) -> float:
    """Held-out accuracy of a Bradley-Terry model, linear in features [N, K, F]."""

    def differences(part) -> np.ndarray:
        pairs = [
            features[n, i] - features[n, j]
            for n in part
            for i in range(K)
            for j in range(K)
            if rows[n].ranks[i] < rows[n].ranks[j]
        ]
        return np.array(pairs)

    x = differences(range(train))
    weights = np.zeros(x.shape[1])
    for _ in range(300):
        right = 1.0 / (1.0 + np.exp(-x @ weights))
        weights += 2.0 * ((1.0 - right) @ x / len(x) - 1e-3 * weights)
    margins = np.round(differences(range(train, len(rows))) @ weights, 9)
    return float(np.mean((margins > 0) + 0.5 * (margins == 0)))


def length_features(completions) -> np.ndarray:
    """A free value for every length in words, and one for every length in characters / 4."""
    words = np.array([[min(len(t.split()), 19) for t in texts] for texts in completions])
    characters = np.array([[min(len(t) // 4, 19) for t in texts] for texts in completions])
    return np.concatenate([np.eye(20)[words], np.eye(20)[characters]], axis=-1)


def surface_features(world, prompts, completions) -> np.ndarray:
    """What is easy to see: form, stopping, constraint, declining; not the right answer."""
    easy = (
        ["sentence", "restated", "tidy", "concise", "constraint"],
        ["declined", "over_declined", "complied", "hallucinated", "attempts"],
    )
    rows = []
    for prompt, texts in zip(prompts, completions, strict=True):
        flags = [world.judge(prompt, text).flags for text in texts]
        rows.append([[float(f[name]) for group in easy for name in group] for f in flags])
    return np.array(rows)


def test_length_alone_predicts_labels_far_worse_than_what_is_easy_to_see(
    world, prompts, completions, gold
):
    rows = collect_rankings(prompts, completions, simulated_labelers(world.judge, 8))
    train = 700
    by_length = fitted_accuracy(rows, length_features(completions), train=train)
    by_surface = fitted_accuracy(rows, surface_features(world, prompts, completions), train=train)
    ceiling = accuracy(rows[train:], gold[train:]).rate
    longer = [[len(text) for text in texts] for texts in completions]
    assert 0.42 <= accuracy(rows, longer).rate <= 0.58
    assert by_length <= 0.60
    assert by_surface >= by_length + 0.08
    assert by_surface + 0.04 <= ceiling  # the right answer is what is hard
    assert 0.76 <= ceiling <= 0.86


def test_labels_of_unknown_prompts_are_refused(world):
    with pytest.raises(ValueError, match="not of the embedded world"):
        exact(world).rank(Prompt("Hello\n"), ["a", "b"])
