"""Simulated labelers: rankings of K completions with human-like disagreement (DATA-19, DATA-20).

A labeler sees u = grade + taste + g, where grade is the gold judge's overall 1-7, taste is the
labeler's own and g ~ Gumbel(0, noise). Differences of Gumbel variables are logistic, so
P(i before j) = sigmoid((u_i - u_j) / noise): the Bradley-Terry model that the reward model's loss
assumes. Completions whose u differ by less than `tie_width` are tied; equal texts always are.
Two labelers agree about as often as the paper's did: 73 % for training labelers, 77 % for held-out
ones. Training labelers put helpfulness first; held-out ones put truth and harmlessness first.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from random import Random
from typing import Literal, Protocol

from instruct_jax.data.rows import Comparison, Prompt

Group = Literal["train", "held_out"]


class Grades(Protocol):
    """What a judge says: each of helpful, honest, harmless in 0..1, overall in 1..7."""

    @property
    def helpful(self) -> float: ...
    @property
    def honest(self) -> float: ...
    @property
    def harmless(self) -> float: ...
    @property
    def overall(self) -> float: ...


class JudgeFn(Protocol):
    """judge(prompt, response, ended) -> Grades."""

    def __call__(self, prompt: Prompt, response: str, ended: bool = True, /) -> Grades: ...


@dataclass(frozen=True)
class SimulatedLabeler:
    """One labeler; `taste` adds points for (helpful, honest, harmless), `brevity` for each word."""

    judge: JudgeFn
    labeler_id: str
    noise: float
    tie_width: float = 0.2
    taste: tuple[float, float, float] = (0.0, 0.0, 0.0)
    brevity: float = 0.0

    def rank(
        self,
        prompt: Prompt,
        completions: Sequence[str],
        *,
        ended: Sequence[bool] | None = None,
        seed: int = 0,
    ) -> tuple[int, ...]:
        """Ranks of the K completions: 0 is the best, ties are equal, ranks have no gaps."""
        ended = [True] * len(completions) if ended is None else ended
        seen = [
            self._perceive(prompt, completion, end, seed)
            for completion, end in zip(completions, ended, strict=True)
        ]
        ranks = [0] * len(seen)
        rank, leader = -1, math.inf
        for k in sorted(range(len(seen)), key=lambda k: -seen[k]):
            if leader - seen[k] > self.tie_width:
                rank, leader = rank + 1, seen[k]
            ranks[k] = rank
        return tuple(ranks)

    def _perceive(self, prompt: Prompt, completion: str, ended: bool, seed: int) -> float:
        grades = self.judge(prompt, completion, ended)
        axes = (grades.helpful, grades.honest, grades.harmless)
        taste = sum(weight * axis for weight, axis in zip(self.taste, axes, strict=True))
        taste += self.brevity * len(completion.split())
        # Keyed by the text: a labeler has one opinion of it, wherever it stands in the list.
        text = f"{self.labeler_id}/{seed}/{ended}/{prompt.text}/{completion}"
        uniform = 1.0 - Random(text).random()
        return grades.overall + taste - self.noise * math.log(-math.log(uniform) + 1e-12)


def simulated_labelers(
    judge: JudgeFn, count: int, *, group: Group = "train", seed: int = 0, noise: float | None = None
) -> list[SimulatedLabeler]:
    """`count` labelers of a group, each with a taste; `noise` overrides the group's."""
    lean = {"train": (0.8, 0.0, 0.0), "held_out": (0.0, 0.4, 0.4)}[group]
    noise = {"train": 1.33, "held_out": 0.93}[group] if noise is None else noise
    labelers = []
    for i in range(count):
        rng = Random(f"labeler/{group}/{seed}/{i}")
        taste = tuple(max(0.0, rng.gauss(weight, 0.2)) for weight in lean)
        labelers.append(
            SimulatedLabeler(
                judge,
                f"{group}-{i:02d}",
                noise=noise,
                taste=(taste[0], taste[1], taste[2]),
                brevity=rng.gauss(0.0, 0.03),
            )
        )
    return labelers


def collect_rankings(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[str]],
    labelers: Sequence[SimulatedLabeler],
    *,
    seed: int = 0,
    sources: Sequence[Sequence[str]] | None = None,
    ended: Sequence[Sequence[bool]] | None = None,
) -> list[Comparison]:
    """Each prompt's K completions ranked by one labeler, drawn in turn from a shuffled list.

    `sources[i][k]` names the model behind a completion, `ended[i][k]` says whether it stopped by
    itself. ValueError when the lengths differ or there is no labeler.
    """
    if not labelers:
        raise ValueError("there is no labeler")
    order = list(labelers)
    Random(f"labeling/{seed}").shuffle(order)
    rows = []
    for i, (prompt, texts) in enumerate(zip(prompts, completions, strict=True)):
        labeler = order[i % len(order)]
        ranks = labeler.rank(prompt, texts, ended=None if ended is None else ended[i], seed=seed)
        rows.append(
            Comparison(
                prompt.text,
                tuple(texts),
                ranks,
                labeler=labeler.labeler_id,
                sources=() if sources is None else tuple(sources[i]),
                meta=dict(prompt.meta),
            )
        )
    return rows


@dataclass(frozen=True)
class Rate:
    """A share of pairs, how many pairs it is taken over, and its standard error."""

    rate: float
    pairs: int

    @property
    def standard_error(self) -> float:
        """Of a binomial share; pairs of one prompt are not independent, so a little too small."""
        return math.sqrt(self.rate * (1.0 - self.rate) / max(self.pairs, 1))


def agreement(first: Sequence[Comparison], second: Sequence[Comparison]) -> Rate:
    """How often two rankings of the same completions order a pair alike, ties left out.

    ValueError where the rows are not of the same prompts and completions, in the same order.
    """
    alike = total = 0
    for a, b in zip(first, second, strict=True):
        if (a.prompt, a.completions) != (b.prompt, b.completions):
            raise ValueError(f"the rankings are of different completions: {a.prompt!r}")
        for i, j in _ordered_pairs(a):
            if b.ranks[i] != b.ranks[j]:
                alike += b.ranks[i] < b.ranks[j]
                total += 1
    return Rate(alike / max(total, 1), total)


def accuracy(rows: Sequence[Comparison], scores: Sequence[Sequence[float]]) -> Rate:
    """How often a score orders a pair as its labeler did, ties of the labeler left out.

    A tie of the scores counts one half. With the gold judge's grades as scores this is the ceiling
    of any reward model on these labels.
    """
    right, total = 0.0, 0
    for row, values in zip(rows, scores, strict=True):
        for i, j in _ordered_pairs(row):
            right += 0.5 if values[i] == values[j] else float(values[i] > values[j])
            total += 1
    return Rate(right / max(total, 1), total)


def labeler_folds(
    rows: Sequence[Comparison], folds: int = 5, *, seed: int = 0
) -> list[tuple[list[Comparison], list[Comparison]]]:
    """(train, test) rows for each of `folds` groups of labelers of about equal data (RM-7).

    No labeler is on both sides. ValueError when there are fewer labelers than folds.
    """
    sizes = Counter(row.labeler for row in rows)
    if len(sizes) < folds:
        raise ValueError(f"{len(sizes)} labelers cannot make {folds} groups")
    order = sorted(sizes, key=str)
    Random(f"folds/{seed}").shuffle(order)
    groups: list[set[str | None]] = [set() for _ in range(folds)]
    for labeler in sorted(order, key=lambda name: -sizes[name]):
        min(groups, key=lambda group: sum(sizes[name] for name in group)).add(labeler)
    return [
        ([r for r in rows if r.labeler not in group], [r for r in rows if r.labeler in group])
        for group in groups
    ]


def _ordered_pairs(row: Comparison) -> Iterator[tuple[int, int]]:
    """Index pairs (better, worse) of a ranking, without its ties."""
    for i, j in combinations(range(len(row.ranks)), 2):
        if row.ranks[i] != row.ranks[j]:
            yield (i, j) if row.ranks[i] < row.ranks[j] else (j, i)
