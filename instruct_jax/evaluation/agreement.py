"""How far labelers agree: the ceiling of anything that is trained on them (DATA-20, RM-7).

A labeler who flips a pair with probability e agrees with the truth on 1 - e of the pairs and with
another such labeler on (1 - e)^2 + e^2. The paper's labelers agreed with one another on 72.6 %.
"""

import numpy as np
from numpy.typing import ArrayLike

from instruct_jax.evaluation.intervals import Interval, bootstrap_ratio


def rank_agreement(
    ranks: ArrayLike, others: ArrayLike, *, where: ArrayLike | None = None, seed: int = 0
) -> Interval:
    """Share of the pairs that both rankings order, which they order alike.

    int[N, K] twice, 0 best, equal ranks are ties; bool[N, K] `where` marks the completions that are
    there. A pair that either of them ties says nothing. Interval over the N prompts.
    """
    first, second = np.asarray(ranks), np.asarray(others)
    if first.shape != second.shape or first.ndim != 2:
        raise ValueError(f"need two int[N, K] rankings, got {first.shape} and {second.shape}")
    present = np.ones(first.shape, bool) if where is None else np.asarray(where, bool)
    i, j = np.triu_indices(first.shape[1], k=1)
    a = np.sign(first[:, i] - first[:, j])
    b = np.sign(second[:, i] - second[:, j])
    ordered = (a != 0) & (b != 0) & present[:, i] & present[:, j]
    return bootstrap_ratio((ordered & (a == b)).sum(axis=1), ordered.sum(axis=1), seed=seed)
