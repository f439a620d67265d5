"""Means with bootstrap intervals.

The unit that is resampled is the prompt: everything measured on one prompt (several samples, all
the pairs of a ranking) is drawn together, because it is not independent. The interval is the
percentile interval of the resampled ratio

    sum_{i in sample} numerator_i / sum_{i in sample} denominator_i

and a function of its arguments alone: the same data give the same interval.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

_CELLS = 2_000_000  # resampled indices held at once


class Interval(NamedTuple):
    """A mean and the ends of its interval; all NaN when there was nothing to measure."""

    mean: float
    low: float
    high: float

    @property
    def margin(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


def bootstrap_mean(
    values: ArrayLike, *, level: float = 0.95, resamples: int = 4000, seed: int = 0
) -> Interval:
    """Mean of float[N], or of float[N, S] with S measurements a prompt, over N prompts."""
    rows = np.asarray(values, np.float64)
    if rows.ndim == 2:
        rows = rows.mean(axis=1)
    return bootstrap_ratio(rows, np.ones_like(rows), level=level, resamples=resamples, seed=seed)


def bootstrap_ratio(
    numerators: ArrayLike,
    denominators: ArrayLike,
    *,
    level: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> Interval:
    """sum(numerators) / sum(denominators), float[N] each, resampled over the N prompts."""
    top = np.asarray(numerators, np.float64)
    bottom = np.asarray(denominators, np.float64)
    if top.ndim != 1 or top.shape != bottom.shape:
        raise ValueError(f"need two arrays of one length, got {top.shape} and {bottom.shape}")
    if not np.isfinite(top).all():
        raise ValueError("values that are not finite cannot be averaged")
    top, bottom = top[bottom > 0], bottom[bottom > 0]
    count = len(top)
    if count == 0:
        return Interval(np.nan, np.nan, np.nan)
    rng = np.random.default_rng(seed)
    chunk = max(1, _CELLS // count)
    ratios: list[Any] = []
    for start in range(0, resamples, chunk):
        index = rng.integers(count, size=(min(chunk, resamples - start), count))
        ratios.append(top[index].sum(axis=1) / bottom[index].sum(axis=1))
    low, high = np.quantile(np.concatenate(ratios), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(top.sum() / bottom.sum()), float(low), float(high))
