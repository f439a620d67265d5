"""Metrics of a reward model from its scores and the labelers' ranks (RM-6); numpy only.

A pair (w, l) is two completions of one prompt that the labeler put in order, w above l; ties make
no pair. With d = r_w - r_l:

    accuracy  share of pairs with d > 0; pairs with d = 0 are `tied`, and count as wrong
    log_loss  mean of log(1 + exp(-d))
    ece       sum over ten bins of |mean predicted - observed| weighted by pairs, where each pair
              enters twice, as sigmoid(d) that came true and as sigmoid(-d) that did not

Intervals resample prompts, not pairs. Anything that scores can be measured: the reward model, a
length-only baseline (`fit_length_baseline`), or the gold judge, whose accuracy on the same ranks is
the labelers' ceiling.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from instruct_jax.evaluation.intervals import Interval, bootstrap_ratio

BINS = 10


class Pairs(NamedTuple):
    """The M ordered pairs of N rankings: completion `better[m]` of `prompt[m]` beat `worse[m]`."""

    prompt: np.ndarray  # int64[M]
    better: np.ndarray  # int64[M]
    worse: np.ndarray  # int64[M]

    def margins(self, scores: ArrayLike) -> np.ndarray:
        """d = r_w - r_l, float64[M], from scores float[N, K]."""
        values = np.asarray(scores, np.float64)
        return values[self.prompt, self.better] - values[self.prompt, self.worse]


class Bin(NamedTuple):
    """Pairs whose predicted probability lies in [low, high): how often they came true."""

    low: float
    high: float
    pairs: int
    predicted: float | None  # mean predicted probability, None in an empty bin
    observed: float | None  # share that came true, None in an empty bin


class PairMetrics(NamedTuple):
    """How well scores order M pairs; see the top of the file for the definitions."""

    accuracy: Interval
    tied: float
    log_loss: float
    ece: float
    pairs: int
    prompts: int
    confidence: tuple[Bin, ...]  # five bins of the probability given to the likelier answer
    calibration: tuple[Bin, ...]  # ten bins of the probability given to either answer


class RewardReport(NamedTuple):
    """All of RM-6 for one reward model on one set of rankings."""

    metrics: PairMetrics
    mean_better: float
    mean_worse: float
    mean_demonstration: float | None
    length_correlation: float | None  # over all completions
    length_correlation_within: float | None  # between the completions of one prompt
    by_sources: dict[str, Interval]  # "a / b": the two models that wrote the pair
    by_dataset: dict[str, Interval]


def ordered_pairs(ranks: ArrayLike, where: ArrayLike | None = None) -> Pairs:
    """The pairs of rankings int[N, K] (0 best, equal ranks tie) among completions `where`."""
    order = np.asarray(ranks)
    present = np.ones(order.shape, bool) if where is None else np.asarray(where, bool)
    better = order[:, :, None] < order[:, None, :]
    return Pairs(*np.nonzero(better & present[:, :, None] & present[:, None, :]))


def pair_metrics(scores: ArrayLike, pairs: Pairs, *, seed: int = 0) -> PairMetrics:
    """Metrics of scores float[N, K] on `pairs`. Raises ValueError when there is no pair."""
    margins = pairs.margins(scores)
    if len(margins) == 0:
        raise ValueError("no ordered pair: every ranking is a tie or a single completion")
    predicted = _sigmoid(np.concatenate([margins, -margins]))
    true = np.arange(2 * len(margins)) < len(margins)
    calibration = _bins(predicted, true, np.linspace(0, 1, BINS + 1))
    # The likelier answer of a tied pair is neither: it counts half.
    confidence = _bins(
        np.concatenate([_sigmoid(np.abs(margins))] * 2),
        np.concatenate([margins >= 0, margins > 0]),
        np.linspace(0.5, 1, BINS // 2 + 1),
    )
    return PairMetrics(
        accuracy=_accuracy(margins > 0, pairs.prompt, seed=seed),
        tied=float((margins == 0).mean()),
        log_loss=float(np.logaddexp(0, -margins).mean()),
        ece=_expected_error(calibration),
        pairs=len(margins),
        prompts=len(np.unique(pairs.prompt)),
        confidence=tuple(b._replace(pairs=b.pairs // 2) for b in confidence),
        calibration=calibration,
    )


def accuracy_by(
    scores: ArrayLike, pairs: Pairs, groups: Sequence[str], *, seed: int = 0
) -> dict[str, Interval]:
    """Accuracy within each group of pairs, `groups` naming the group of each of the M pairs."""
    correct, names = pairs.margins(scores) > 0, np.asarray(groups)
    return {
        str(name): _accuracy(correct[names == name], pairs.prompt[names == name], seed=seed)
        for name in np.unique(names)
    }


def evaluate_rewards(
    scores: ArrayLike,
    ranks: ArrayLike,
    *,
    where: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    sources: ArrayLike | None = None,
    datasets: Sequence[str] | None = None,
    demonstration_scores: ArrayLike | None = None,
    seed: int = 0,
) -> RewardReport:
    """Everything RM-6 asks for: scores float[N, K] against ranks int[N, K].

    `lengths` (numbers) and `sources` (names) are [N, K], `datasets` names the origin of each of the
    N prompts, `demonstration_scores` are the rewards of demonstrations (0 on average after RM-4).
    """
    values = np.asarray(scores, np.float64)
    present = np.ones(values.shape, bool) if where is None else np.asarray(where, bool)
    pairs = ordered_pairs(ranks, present)
    by_sources: dict[str, Interval] = {}
    if sources is not None:
        names = np.asarray(sources)
        a, b = names[pairs.prompt, pairs.better], names[pairs.prompt, pairs.worse]
        labels = [" / ".join(sorted(pair)) for pair in zip(a, b, strict=True)]
        by_sources = accuracy_by(values, pairs, labels, seed=seed)
    by_dataset: dict[str, Interval] = {}
    if datasets is not None:
        by_dataset = accuracy_by(
            values, pairs, np.asarray(datasets)[pairs.prompt].tolist(), seed=seed
        )
    correlations: tuple[float | None, float | None] = (None, None)
    if lengths is not None:
        correlations = length_correlations(values, lengths, where=present)
    return RewardReport(
        metrics=pair_metrics(values, pairs, seed=seed),
        mean_better=float(values[pairs.prompt, pairs.better].mean()),
        mean_worse=float(values[pairs.prompt, pairs.worse].mean()),
        mean_demonstration=(
            None
            if demonstration_scores is None
            else float(np.asarray(demonstration_scores, np.float64).mean())
        ),
        length_correlation=correlations[0],
        length_correlation_within=correlations[1],
        by_sources=by_sources,
        by_dataset=by_dataset,
    )


def length_correlations(
    scores: ArrayLike, lengths: ArrayLike, *, where: ArrayLike
) -> tuple[float, float]:
    """Pearson correlation of score and length, over all completions and within prompts.

    Within prompts both are taken relative to their mean over the prompt's completions, so that easy
    prompts with short answers do not look like a taste for brevity. 0 where nothing varies.
    """
    present = np.asarray(where, bool)
    count = np.maximum(present.sum(axis=1, keepdims=True), 1)
    pooled, centred = [], []
    for array in (scores, lengths):
        values = np.where(present, np.asarray(array, np.float64), 0.0)
        pooled.append(values[present])
        centred.append((values - values.sum(axis=1, keepdims=True) / count)[present])
    return _correlation(*pooled), _correlation(*centred)


class LengthBaseline(NamedTuple):
    """A reward that sees nothing but the length: r = weight * length."""

    weight: float

    def scores(self, lengths: ArrayLike) -> np.ndarray:
        """float64[N, K] from lengths [N, K]."""
        return self.weight * np.asarray(lengths, np.float64)

    def accuracy(self, lengths: ArrayLike, pairs: Pairs, *, seed: int = 0) -> Interval:
        """Accuracy on `pairs`, equal lengths counted half: a coin decides what length cannot."""
        margins = pairs.margins(self.scores(lengths))
        return _accuracy((np.sign(margins) + 1) / 2, pairs.prompt, seed=seed)


def fit_length_baseline(lengths: ArrayLike, pairs: Pairs) -> LengthBaseline:
    """Maximum likelihood of sigmoid(weight * (length_w - length_l)) on the pairs of training.

    Its accuracy on validation is what a reward model must beat to have read anything. The gradient
    is increasing in the weight, so bisection finds its zero; lengths that separate the pairs end at
    the bound.
    """
    differences = pairs.margins(lengths)
    scale = float(np.sqrt(np.mean(differences**2))) if len(differences) else 0.0
    if scale == 0.0:
        return LengthBaseline(0.0)
    unit = differences / scale
    low, high = -30.0, 30.0
    for _ in range(60):
        weight = (low + high) / 2
        rising = (unit * _sigmoid(-weight * unit)).mean() > 0
        low, high = (weight, high) if rising else (low, weight)
    return LengthBaseline((low + high) / 2 / scale)


def _accuracy(correct: np.ndarray, prompt: np.ndarray, *, seed: int) -> Interval:
    _, index = np.unique(prompt, return_inverse=True)
    wins = np.bincount(index, weights=correct.astype(np.float64))
    return bootstrap_ratio(wins, np.bincount(index), seed=seed)


def _bins(predicted: np.ndarray, true: np.ndarray, edges: np.ndarray) -> tuple[Bin, ...]:
    index = np.clip(np.searchsorted(edges, predicted, side="right") - 1, 0, len(edges) - 2)
    bins = []
    for i, (low, high) in enumerate(pairwise(edges)):
        inside = index == i
        bins.append(
            Bin(
                low=float(low),
                high=float(high),
                pairs=int(inside.sum()),
                predicted=float(predicted[inside].mean()) if inside.any() else None,
                observed=float(true[inside].mean()) if inside.any() else None,
            )
        )
    return tuple(bins)


def _expected_error(bins: Sequence[Bin]) -> float:
    total = sum(b.pairs for b in bins)
    errors = (b.pairs * abs(b.predicted - b.observed) for b in bins if b.predicted is not None)
    return sum(errors) / total


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    spread = a.std() * b.std()
    # Centring leaves rounding noise where nothing varies.
    if spread <= 1e-12 * (1 + np.abs(a).max(initial=0)) * (1 + np.abs(b).max(initial=0)):
        return 0.0
    return float(((a - a.mean()) * (b - b.mean())).mean() / spread)
