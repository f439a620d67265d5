"""The pretraining corpus of the embedded world: language and skills, but no obedience.

As in the text GPT-3 was trained on, an instruction is followed by more instructions (worksheets),
answers are curt and come in question-and-answer sheets, and nobody declines, admits not to know,
or answers in the polite full sentences that the demonstrations will teach.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from instruct_jax.data.toyworld.config import FamilyMix
from instruct_jax.data.toyworld.lexicon import (
    ANIMALS,
    BAD_DEEDS,
    COLOURS,
    EATS,
    FRUITS,
    GOOD_DEEDS,
    GROUPS,
    LOOKS,
    NUMBERS,
    THINGS,
    plural,
    pronoun,
)
from instruct_jax.data.toyworld.spec import Task
from instruct_jax.data.toyworld.tasks import SKILLS, draw_skill
from instruct_jax.data.toyworld.texts import next_line, opening, statements
from instruct_jax.data.toyworld.writers import good_answer

DrawTask = Callable[[Random, bool], Task]
"""(rng, with an answer to be shown) -> Task."""


def curt_answer(task: Task, rng: Random) -> str:
    """The bare answer of a solved worksheet; a harmful question is answered like any other."""
    if task.spec.check == "decline":
        return task.spec.wrong[0]
    return task.spec.answer if task.spec.check == "include" else good_answer(task.spec, rng)


def story(rng: Random) -> str:
    """A few sentences about one person."""
    start = opening(rng)
    lines = [start.text]
    for _ in range(rng.choice((2, 3, 4))):
        who = start.name if rng.random() < 0.25 else pronoun(start.name)
        lines.append(f"{who} {next_line(rng, start.topics, on_topic=rng.random() < 0.6)}.")
    return " ".join(lines) + "\n"


def worksheet(rng: Random, draw: DrawTask) -> str:
    """Instructions and nothing else."""
    return "".join(f"{draw(rng, False).plain}\n" for _ in range(rng.choice((4, 5, 6))))


def solved_worksheet(rng: Random, draw: DrawTask) -> str:
    """Questions with curt answers."""
    tasks = [draw(rng, True) for _ in range(rng.choice((3, 4, 5)))]
    return "".join(f"Q: {task.plain}\nA: {curt_answer(task, rng)}\n" for task in tasks)


def drill(rng: Random, families: FamilyMix) -> str:
    """One instruction, then lines to apply it to, each with its curt answer."""
    name, variant = draw_solved_skill(rng, families)
    tasks = [SKILLS[name].make(rng, variant) for _ in range(rng.choice((3, 4, 5)))]
    pairs = "".join(f"{task.query}\n{curt_answer(task, rng)}\n" for task in tasks)
    return f"{tasks[0].head}\n{pairs}"


def draw_solved_skill(rng: Random, families: FamilyMix) -> tuple[str, str]:
    """A skill that appears with its answers in the corpus."""
    while True:
        name, variant = draw_skill(rng, families.draw(rng))
        if SKILLS[name].solved:
            return name, variant


def _two_forms(rng: Random) -> str:
    nouns = rng.sample((*ANIMALS, *FRUITS, *THINGS), 6)
    return " ".join(f"{noun} {plural(noun)}" for noun in nouns)


def _capitals(rng: Random) -> str:
    return " ".join(f"{noun} {noun.upper()}" for noun in rng.sample(ANIMALS, 5))


def _class_lists(rng: Random) -> str:
    groups = rng.sample(tuple(GROUPS), 2)
    return "\n".join(f"{plural(g)}: {' '.join(rng.sample(GROUPS[g], 5))}" for g in groups)


def _sorted_lists(rng: Random) -> str:
    lines = []
    for _ in range(3):
        given = rng.sample(range(len(NUMBERS)), rng.choice((3, 4)))
        mixed = " ".join(NUMBERS[i] for i in given)
        lines.append(f"{mixed} sorted: {' '.join(NUMBERS[i] for i in sorted(given))}")
    return "\n".join(lines)


def _backwards_lists(rng: Random) -> str:
    lines = []
    for _ in range(3):
        given = rng.sample((*ANIMALS, *FRUITS, *COLOURS, *THINGS), 3)
        lines.append(f"{' '.join(given)} backwards: {' '.join(reversed(given))}")
    return "\n".join(lines)


def _counts(rng: Random) -> str:
    lines = []
    for _ in range(3):
        group, other = rng.sample(("animal", "fruit", "colour", "thing"), 2)
        count = rng.choice((1, 2, 3, 4))
        given = [*rng.sample(GROUPS[group], count), *rng.sample(GROUPS[other], 2)]
        rng.shuffle(given)
        lines.append(f"{' '.join(given)}: {NUMBERS[count - 1]} {plural(group)}")
    return "\n".join(lines)


def _facts(rng: Random) -> str:
    eats = [f"The {animal} ate {food}." for animal, food in rng.sample(sorted(EATS.items()), 3)]
    looks = [f"The {what} is {colour}." for what, colour in rng.sample(sorted(LOOKS.items()), 2)]
    return " ".join([*eats, *looks])


def _deeds(rng: Random) -> str:
    deeds = rng.sample(sorted((GOOD_DEEDS | BAD_DEEDS).items()), 4)
    return "\n".join(f"{deed}: {means}" for deed, means in deeds)


def _passages(rng: Random) -> str:
    return " ".join(statement.text for statement in statements(rng, rng.choice((3, 4))))


_NOTES = (
    _two_forms,
    _capitals,
    _class_lists,
    _sorted_lists,
    _backwards_lists,
    _counts,
    _facts,
    _deeds,
    _passages,
)


def note(rng: Random) -> str:
    """Lists and plain statements from which the skills can be learnt."""
    return rng.choice(_NOTES)(rng) + "\n"
