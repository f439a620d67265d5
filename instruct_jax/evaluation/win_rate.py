"""Win rate against a fixed baseline, and helpful / honest / harmless summaries (EVAL-1, G4-8).

One sample a prompt and model; a win counts 1, a tie 1/2, a loss 0:

    win rate = mean over prompts of preference(model, baseline),    95 % bootstrap over prompts

A model compared with a second sample of itself is at 1/2. The prompts must come from contributors
that training never saw; that is the caller's choice of rows.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from instruct_jax.evaluation.intervals import Interval, bootstrap_mean

Judge = Callable[[str, str, str], float | None]
"""(prompt, first response, second response) -> preference for the first in [0, 1], or no verdict"""


class WinRate(NamedTuple):
    """`mean` counts ties half; `low` and `high` are its 95 % interval."""

    mean: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int


def win_rate(preferences: ArrayLike, *, seed: int = 0) -> WinRate:
    """From preferences float[N] in [0, 1], one a prompt; above 1/2 is a win, 1/2 a tie."""
    values = np.asarray(preferences, np.float64)
    if values.ndim != 1 or len(values) == 0 or values.min() < 0 or values.max() > 1:
        raise ValueError("preferences must be a non-empty float[N] in [0, 1]")
    wins, losses = int((values > 0.5).sum()), int((values < 0.5).sum())
    interval = bootstrap_mean(values, seed=seed)
    return WinRate(*interval, wins=wins, ties=len(values) - wins - losses, losses=losses)


def preferences_from_scores(
    scores: ArrayLike, baseline: ArrayLike, *, margin: float = 0.0
) -> np.ndarray:
    """Preferences float64[N] of a judge that scores each response alone.

    1 where scores exceed the baseline by more than `margin`, 0 where they fall short by more, 1/2
    elsewhere. Order cannot matter to such a judge.
    """
    difference = np.asarray(scores, np.float64) - np.asarray(baseline, np.float64)
    return np.where(np.abs(difference) <= margin, 0.5, (difference > 0).astype(np.float64))


class Verdicts(NamedTuple):
    """What a pairwise judge said of N prompts; prompts without a verdict count as ties."""

    preferences: np.ndarray  # float64[N], for the model over the baseline
    model_first: np.ndarray  # bool[N], the order it was shown in (first, when shown in both)
    failures: int  # questions that had no verdict


def ask_judge(
    judge: Judge,
    prompts: Sequence[str],
    responses: Sequence[str],
    baseline: Sequence[str],
    *,
    seed: int,
    both_orders: bool = False,
) -> Verdicts:
    """Ask a judge that sees two responses side by side, in an order drawn per prompt.

    With `both_orders` each prompt is asked twice and the answers averaged, so a judge that always
    takes the first is at 1/2 on every prompt instead of on average. Raises ValueError for lists of
    different lengths and for a preference outside [0, 1].
    """
    if not len(prompts) == len(responses) == len(baseline):
        raise ValueError(
            f"{len(prompts)} prompts, {len(responses)} responses, {len(baseline)} of the baseline"
        )
    model_first = np.random.default_rng(seed).random(len(prompts)) < 0.5
    preferences = np.full(len(prompts), 0.5)
    failures = 0
    for i, (prompt, ours, theirs) in enumerate(zip(prompts, responses, baseline, strict=True)):
        answers = []
        for first in (model_first[i], not model_first[i])[: 2 if both_orders else 1]:
            verdict = judge(prompt, ours, theirs) if first else judge(prompt, theirs, ours)
            if verdict is None:
                failures += 1
                verdict = 0.5
            if not 0 <= verdict <= 1:
                raise ValueError(f"prompt {i}: a preference of {verdict} is not in [0, 1]")
            answers.append(verdict if first else 1 - verdict)
        preferences[i] = np.mean(answers)
    return Verdicts(preferences, model_first, failures)


def criteria_summary(
    scores: Mapping[str, Mapping[str, ArrayLike]], *, seed: int = 0
) -> dict[str, dict[str, Interval]]:
    """Mean and interval of every criterion of every model.

    `scores[model][criterion]` is float[N], as in {"sft": {"helpful": ..., "honest": ...,
    "harmless": ...}}. The three are reported apart: they need not agree (G4-8).
    """
    return {
        model: {name: bootstrap_mean(values, seed=seed) for name, values in criteria.items()}
        for model, criteria in scores.items()
    }
