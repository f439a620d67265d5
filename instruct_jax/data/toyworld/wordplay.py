"""Tasks on single words and short lists: transform, sort, count, pick."""

from __future__ import annotations

from random import Random

from instruct_jax.data.toyworld.lexicon import (
    ANIMALS,
    COLOURS,
    FRUITS,
    GROUPS,
    NUMBERS,
    THINGS,
    plural,
)
from instruct_jax.data.toyworld.spec import Spec, Task, others


def plural_of(rng: Random, _: str) -> Task:
    """cat -> cats."""
    noun = rng.choice((*ANIMALS, *FRUITS, *THINGS))
    plain = rng.choice(
        ("Give the plural of {}.", "What is the plural of {}?", "Make the word {} plural.")
    )
    spec = Spec(
        family="transform",
        check="slot",
        answer=plural(noun),
        wrong=(noun, *(plural(word) for word in others(rng, ANIMALS, {noun}, 1))),
        sentence=f"The plural of {noun} is {{}}.",
        short="It is {}.",
    )
    return Task(plain.format(noun), "Make the word plural.", noun, spec)


def capitals(rng: Random, _: str) -> Task:
    """cat -> CAT."""
    noun = rng.choice(ANIMALS)
    plain = rng.choice(("Write {} in capitals.", "Put the word {} in capitals."))
    spec = Spec(
        family="transform",
        check="slot",
        answer=noun.upper(),
        wrong=(noun, *(w.upper() for w in others(rng, ANIMALS, {noun}, 1))),
        sentence=f"In capitals {noun} is {{}}.",
        short="It is {}.",
    )
    return Task(plain.format(noun), "Write in capitals.", noun, spec)


def reverse(rng: Random, _: str) -> Task:
    """Three words backwards."""
    given = rng.sample((*ANIMALS, *FRUITS, *COLOURS, *THINGS), 3)
    plain = rng.choice(("Reverse the words: {}.", "Write these words backwards: {}."))
    shuffled = [given[1], given[2], given[0]]
    spec = Spec(
        family="transform",
        check="slot",
        answer=" ".join(reversed(given)),
        wrong=(" ".join(given), " ".join(shuffled)),
        sentence="The words backwards are {}.",
        short="They are {}.",
    )
    return Task(plain.format(" ".join(given)), "Reverse the words.", " ".join(given), spec)


def sort(rng: Random, _: str) -> Task:
    """Three or four numbers in order."""
    length = 3 if rng.random() < 0.75 else 4
    given = rng.sample(range(len(NUMBERS)), length)
    while given == sorted(given):
        rng.shuffle(given)
    query = " ".join(NUMBERS[i] for i in given)
    plain = rng.choice(("Sort the numbers: {}.", "Put in order: {}.", "Sort these: {}."))
    mixed = list(reversed(sorted(given)))
    spec = Spec(
        family="sort",
        check="slot",
        answer=" ".join(NUMBERS[i] for i in sorted(given)),
        wrong=(query, " ".join(NUMBERS[i] for i in mixed)),
        sentence="In order they are {}.",
        short="They are {}.",
    )
    return Task(plain.format(query), "Sort the numbers.", query, spec)


def count(rng: Random, group: str) -> Task:
    """How many words are of the group `group`."""
    count = rng.choice((1, 2, 2, 3, 3, 4))
    length = rng.choice((4, 5))
    rest = tuple(w for g in ("animal", "fruit", "colour", "thing") if g != group for w in GROUPS[g])
    given = [*rng.sample(GROUPS[group], count), *rng.sample(rest, max(length - count, 1))]
    rng.shuffle(given)
    query = " ".join(given)
    many = plural(group)
    plain = rng.choice(("How many {} are here: {}?", "Count the {}: {}."))
    spec = Spec(
        family="count",
        check="slot",
        answer=NUMBERS[count - 1],
        wrong=tuple(others(rng, NUMBERS[:5], {NUMBERS[count - 1]}, 2)),
        sentence=f"The count of {many} is {{}}.",
        short="It is {}.",
    )
    return Task(plain.format(many, query), f"Count the {many}.", query, spec)


def pick(rng: Random, group: str) -> Task:
    """The one word of three that is of the group `group`."""
    answer = rng.choice(GROUPS[group])
    rest = tuple(w for g, members in GROUPS.items() if g != group for w in members)
    wrong = rng.sample(rest, 2)
    given = [answer, *wrong]
    rng.shuffle(given)
    query = " ".join(given)
    plain = rng.choice(("Which one is a {}: {}?", "Find the {}: {}.", "Pick the {} from {}."))
    if group == "animal":
        plain = plain.replace("is a ", "is an ")
    spec = Spec(
        family="pick",
        check="slot",
        answer=answer,
        wrong=tuple(wrong),
        sentence=f"The {group} is {{}}.",
        short="It is {}.",
    )
    return Task(plain.format(group, query), f"Find the {group}.", query, spec)
