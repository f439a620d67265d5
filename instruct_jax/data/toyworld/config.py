"""Every knob of the embedded world, as frozen dataclasses of plain numbers.

A mix is a set of weights: only their ratios count, and a weight of 0 leaves the item out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random


class Mix:
    """Base of the mixes: named weights one can draw from."""

    def weights(self) -> dict[str, float]:
        """Name -> weight."""
        return dict(vars(self))

    def draw(self, rng: Random) -> str:
        """A name by weight."""
        return draw(rng, self.weights())


def draw(rng: Random, weights: Mapping[str, float]) -> str:
    """A key drawn in proportion to its weight; ValueError when all weights are 0."""
    return rng.choices(list(weights), list(weights.values()))[0]


@dataclass(frozen=True)
class FamilyMix(Mix):
    """What is asked."""

    transform: float = 12.0  # plural, capitals, reversed
    sort: float = 9.0
    count: float = 8.0
    pick: float = 12.0  # which one is a fruit
    passage: float = 15.0  # answer from a text, which may not tell
    story: float = 10.0  # continue it
    constraint: float = 15.0  # name two but not red; in one word; with these words
    fact: float = 5.0
    how_to: float = 5.0
    decline: float = 9.0  # how to do what one should not


@dataclass(frozen=True)
class KindMix(Mix):
    """The paper's three prompt kinds (DATA-2)."""

    plain: float = 55.0
    few_shot: float = 20.0
    user_based: float = 25.0


@dataclass(frozen=True)
class CorpusMix(Mix):
    """Documents of the pretraining corpus, by number."""

    story: float = 15.0
    worksheet: float = 25.0  # instructions, no answers
    solved: float = 30.0  # questions with curt answers
    drill: float = 15.0  # one instruction, many lines, each with its curt answer
    note: float = 15.0  # lists and statements


@dataclass(frozen=True)
class SplitMix(Mix):
    """Shares of contributors, and of texts."""

    train: float = 70.0
    valid: float = 15.0
    test: float = 15.0


@dataclass(frozen=True)
class FlawMix(Mix):
    """Which flaw a flawed answer has, among those that can occur in its task."""

    ramble: float = 3.0  # a needless second sentence
    curt: float = 3.0  # the bare answer instead of a sentence
    sloppy: float = 1.5  # no capital, no full stop
    constraint: float = 4.0  # the stated constraint is missed
    wrong: float = 1.2  # a wrong answer
    comply: float = 6.0  # helps with what should be declined
    invent: float = 6.0  # answers what the text does not tell
    over_decline: float = 0.8  # declines what it could have answered


@dataclass(frozen=True)
class Writer:
    """How the writers of demonstrations err.

    A share `flawless` of their answers has no flaw, `two_flaws` of the rest has two. A share
    `restate` of their sentences takes the asked form, which says what it answers; the others are
    terser.
    """

    flawless: float = 0.46
    two_flaws: float = 0.2
    restate: float = 0.65
    flaws: FlawMix = field(default_factory=FlawMix)


@dataclass(frozen=True)
class JudgeWeights:
    """Points lost on the 1-7 scale for each fault; a grade of its own for the worst three."""

    wrong: float = 2.5
    invented: float = 3.0
    over_declined: float = 4.0
    constraint: float = 2.25
    rambling: float = 2.25
    curt: float = 1.25
    sloppy: float = 0.5
    terse: float = 0.5
    unended: float = 1.5
    no_attempt_grade: float = 1.0
    complied_grade: float = 1.5
    evasive_grade: float = 2.0  # neither declined nor complied with a harmful request


@dataclass(frozen=True)
class WorldConfig:
    """The world: what is asked, in which form, how people answer, how answers are judged."""

    families: FamilyMix = field(default_factory=FamilyMix)
    kinds: KindMix = field(default_factory=KindMix)
    corpus: CorpusMix = field(default_factory=CorpusMix)
    splits: SplitMix = field(default_factory=SplitMix)
    writer: Writer = field(default_factory=Writer)
    judge: JudgeWeights = field(default_factory=JudgeWeights)
    contributors: int = 240
    prompts_per_contributor: int = 200  # the cap of the paper's prompt pipeline (DATA-5)
    salt: str = "contributors"  # moves contributors and texts between the splits
