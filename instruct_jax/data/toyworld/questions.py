"""Open questions, how-to questions, some to decline, and requests with a stated constraint."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from instruct_jax.data.toyworld.lexicon import (
    ANIMALS,
    BAD_DEEDS,
    COLOURS,
    EATS,
    GOOD_DEEDS,
    GROUPS,
    LOOKS,
    MEANS,
    NUMBERS,
    PLACES,
    plural,
    with_article,
)
from instruct_jax.data.toyworld.spec import Spec, Task, others
from instruct_jax.data.toyworld.wordplay import pick


def fact(rng: Random, variant: str) -> Task:
    """What an animal eats, or what colour something is."""
    if variant == "eats":
        topic = rng.choice(tuple(EATS))
        answer, question = EATS[topic], f"What does {with_article(topic)} eat?"
        sentence = f"{with_article(topic).capitalize()} eats {{}}."
        wrong = others(rng, tuple(dict.fromkeys(EATS.values())), {answer}, 2)
    else:
        topic = rng.choice(tuple(LOOKS))
        answer, question = LOOKS[topic], f"What colour is {topic}?"
        sentence = f"The colour of {topic} is {{}}."
        wrong = others(rng, COLOURS, {answer}, 2)
    plain = rng.choice((question, question, f"Tell me: {question}"))
    spec = Spec(
        family="fact",
        check="slot",
        answer=answer,
        wrong=tuple(wrong),
        sentence=sentence,
        short="It is {}.",
    )
    return Task(plain, "Answer the question.", question, spec)


_ASK_HOW = ("How do I {}?", "Tell me how to {}.", "What do I need to {}?")


def how_to(rng: Random, _: str) -> Task:
    """What a good deed takes."""
    deed = rng.choice(tuple(GOOD_DEEDS))
    answer = GOOD_DEEDS[deed]
    spec = Spec(
        family="how_to",
        check="slot",
        answer=answer,
        wrong=tuple(others(rng, MEANS, {answer}, 2)),
        sentence=f"To {deed} you need {{}}.",
        short="You need {}.",
    )
    plain = rng.choice(_ASK_HOW).format(deed)
    return Task(plain, "Answer the question.", f"How do I {deed}?", spec)


def decline(rng: Random, _: str) -> Task:
    """A bad deed, asked for in the words of the good ones."""
    deed = rng.choice(tuple(BAD_DEEDS))
    spec = Spec(
        family="decline",
        check="decline",
        answer="no",
        wrong=(BAD_DEEDS[deed],),
        sentence="I am sorry but I can not help with that.",
        short="I can not help with that.",
        lie=f"To {deed} you need {{}}.",
    )
    plain = rng.choice(_ASK_HOW).format(deed)
    return Task(plain, "Answer the question.", f"How do I {deed}?", spec)


def name_some(rng: Random, group: str) -> Task:
    """So many members of a group."""
    count = rng.choice((2, 3))
    number, many = NUMBERS[count - 1], plural(group)
    plain = rng.choice(("Name {} {}.", "Give me {} {}.", "Tell me {} {}."))
    spec = Spec(
        family="constraint",
        check="members",
        answer=" ".join(rng.sample(GROUPS[group], count)),
        wrong=(" ".join(_outsiders(rng, group, count)),),
        sentence=f"{number.capitalize()} {many} are {{}}.",
        short="They are {}.",
        group=group,
        count=count,
    )
    query = f"{number} {many}"
    return Task(plain.format(number, many), "Name what I ask for.", query, spec)


def name_without(rng: Random, group: str) -> Task:
    """Two members of a group, but not a certain one."""
    avoid = rng.choice(GROUPS[group])
    many = plural(group)
    plain = rng.choice(("Name two {} but not {}.", "Tell me two {}. Do not say {}."))
    spec = Spec(
        family="constraint",
        check="members",
        answer=" ".join(others(rng, GROUPS[group], {avoid}, 2)),
        wrong=(" ".join(_outsiders(rng, group, 2)),),
        sentence=f"Two {many} are {{}}.",
        short="They are {}.",
        group=group,
        count=2,
        avoid=avoid,
    )
    return Task(
        plain.format(many, avoid), "Name what I ask for.", f"two {many} but not {avoid}", spec
    )


def name_with_letter(rng: Random, group: str) -> Task:
    """A member of a group that begins with a letter."""
    answer = rng.choice(GROUPS[group])
    letter, one = answer[0], with_article(group)
    plain = rng.choice(("Name {} that begins with {}.", "Give me {} that begins with {}."))
    spec = Spec(
        family="constraint",
        check="members",
        answer=answer,
        wrong=(_outsiders(rng, group, 1)[0],),
        sentence=f"{one.capitalize()} with {letter} is {{}}.",
        short="It is {}.",
        group=group,
        count=1,
        letter=letter,
    )
    return Task(plain.format(one, letter), "Name what I ask for.", f"{one} with {letter}", spec)


def _outsiders(rng: Random, group: str, count: int) -> list[str]:
    return rng.sample([w for g, ws in GROUPS.items() if g != group for w in ws], count)


def in_one_word(rng: Random, variant: str) -> Task:
    """A pick or a fact, to be answered in one word."""
    task = pick(rng, variant) if variant in GROUPS else fact(rng, variant)
    plain = rng.choice((f"In one word: {task.plain}", f"{task.plain} Answer in one word."))
    spec = replace(task.spec, family="constraint", one_word=True)
    return Task(plain, f"{task.head} Answer in one word.", task.query, spec)


def include_words(rng: Random, _: str) -> Task:
    """A line that has two given words."""
    animal, place = rng.choice(ANIMALS), rng.choice(PLACES)
    plain = rng.choice(("Write a line with {} and {}.", "Use the words {} and {} in a line."))
    spec = Spec(
        family="constraint",
        check="include",
        answer=f"{animal} at the {place}",
        sentence="The {}.",
        short="The {}.",
        include=(animal, place),
    )
    return Task(plain.format(animal, place), "Use the words in a line.", f"{animal} {place}", spec)
