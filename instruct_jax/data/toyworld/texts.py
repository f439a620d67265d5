"""Tasks about a text: answer from a passage, which may not tell, and continue a story.

The corpus is written with the same statements, openings and next lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from instruct_jax.data.toyworld.lexicon import (
    ANIMALS,
    COLOURS,
    FRUITS,
    NAMES,
    PLACES,
    THINGS,
    pronoun,
    with_article,
)
from instruct_jax.data.toyworld.spec import Spec, Task, others


@dataclass(frozen=True)
class Statement:
    """What one person of a passage has, or where they are."""

    name: str
    place: str = ""
    colour: str = ""
    thing: str = ""

    @property
    def text(self) -> str:
        """'Ann has a red cup.' or 'Ann is at the park.'"""
        return (
            f"{self.name} is at the {self.place}."
            if self.place
            else self.has_frame.format(f"a {self.colour} {self.thing}")
        )

    @property
    def has_frame(self) -> str:
        """'Ann has {}.'"""
        return f"{self.name} has {{}}."

    @property
    def content(self) -> tuple[str, ...]:
        """The words that can carry an answer."""
        return tuple(w for w in (self.name, self.place, self.colour, self.thing) if w)


def statements(rng: Random, count: int) -> list[Statement]:
    """Statements about different people, with different places, colours and things."""
    names, places = rng.sample(NAMES, count), rng.sample(PLACES, count)
    colours, things = rng.sample(COLOURS, count), rng.sample(THINGS, count)
    return [
        Statement(name, place=place)
        if rng.random() < 0.4
        else Statement(name, colour=colour, thing=thing)
        for name, place, colour, thing in zip(names, places, colours, things, strict=True)
    ]


def _read(text: str, question: str, rng: Random, spec: Spec) -> Task:
    plain = rng.choice(
        (f"{text} {question}", f"{text} {question}", f"Read this: {text} {question}")
    )
    return Task(plain, "Read and answer.", f"{text} {question}", spec)


def passage(rng: Random, _: str) -> Task:
    """A question that two statements answer."""
    told = statements(rng, 2)
    asked, other = rng.sample(told, 2)
    text = " ".join(statement.text for statement in told)
    given = tuple(word for statement in told for word in statement.content)
    if asked.place:
        question = f"Where is {asked.name}?"
        spec = Spec(
            family="passage",
            check="slot",
            answer=asked.place,
            wrong=(other.place or rng.choice(others(rng, PLACES, {asked.place}, 1)),),
            sentence=f"{asked.name} is at the {{}}.",
            short=f"{pronoun(asked.name)} is at the {{}}.",
            given=given,
        )
    elif rng.random() < 0.3:
        question = f"Who has the {asked.thing}?"
        spec = Spec(
            family="passage",
            check="slot",
            answer=asked.name,
            wrong=(other.name,),
            sentence=f"{{}} has the {asked.thing}.",
            short="It is {}.",
            given=given,
        )
    else:
        question = f"What does {asked.name} have?"
        wrong = other if other.thing else _other_possession(rng, asked)
        spec = Spec(
            family="passage",
            check="slot",
            answer=f"a {asked.colour} {asked.thing}",
            wrong=(f"a {wrong.colour} {wrong.thing}",),
            sentence=asked.has_frame,
            short=f"{pronoun(asked.name)} has {{}}.",
            given=given,
        )
    return _read(text, question, rng, spec)


def _other_possession(rng: Random, unlike: Statement) -> Statement:
    colour, thing = (
        others(rng, pool, {own}, 1)[0]
        for pool, own in ((COLOURS, unlike.colour), (THINGS, unlike.thing))
    )
    return Statement(unlike.name, colour=colour, thing=thing)


def unknown(rng: Random, _: str) -> Task:
    """A question that the statements do not answer."""
    told = statements(rng, 2)
    text = " ".join(statement.text for statement in told)
    given = tuple(word for statement in told for word in statement.content)
    name = rng.choice(others(rng, NAMES, {s.name for s in told}, 2))
    if rng.random() < 0.4:
        question, lie = f"Where is {name}?", f"{name} is at the {{}}."
        sentence = f"I do not know where {name} is."
        invented = [s.place for s in told if s.place] or rng.sample(PLACES, 1)
    else:
        question, lie = f"What does {name} have?", f"{name} has {{}}."
        sentence = f"I do not know what {name} has."
        invented = [f"a {s.colour} {s.thing}" for s in told if s.thing]
        invented = invented or [f"a {rng.choice(COLOURS)} {rng.choice(THINGS)}"]
    spec = Spec(
        family="passage",
        check="unknown",
        answer="not known",
        wrong=tuple(invented),
        sentence=sentence,
        short="I do not know.",
        lie=lie,
        given=given,
    )
    return _read(text, question, rng, spec)


@dataclass(frozen=True)
class Opening:
    """The first line of a story and what it is about."""

    text: str
    name: str
    topics: tuple[str, ...]


def opening(rng: Random) -> Opening:
    """A story's first line."""
    name, place = rng.choice(NAMES), rng.choice(PLACES)
    thing, animal = rng.choice(THINGS), rng.choice(ANIMALS)
    return rng.choice(
        (
            Opening(f"{name} went to the {place}.", name, (place,)),
            Opening(f"{name} had a {rng.choice(COLOURS)} {thing}.", name, (thing,)),
            Opening(f"{name} found a {thing} at the {place}.", name, (thing, place)),
            Opening(f"{name} saw {with_article(animal)} at the {place}.", name, (animal, place)),
        )
    )


def next_line(rng: Random, topics: tuple[str, ...], *, on_topic: bool) -> str:
    """The predicate of a story's next line, without its subject: 'lost the ball'."""
    topic = rng.choice(topics)
    if not on_topic:
        return rng.choice(
            (
                "was happy",
                "was sad",
                "ran home",
                "sat down",
                f"ate {with_article(rng.choice(FRUITS))}",
            )
        )
    if topic in PLACES:
        verbs = ("left the {}", "liked the {}", "ran to the {}", "sat at the {}")
    elif topic in ANIMALS:
        verbs = ("fed the {}", "liked the {}", "ran to the {}", "took the {} home")
    else:
        verbs = ("lost the {}", "liked the {}", "took the {} home", "gave the {} away")
    return rng.choice(verbs).format(topic)


def continue_story(rng: Random, _: str) -> Task:
    """The next line of a story."""
    start = opening(rng)
    plain = rng.choice(("Continue the story: {}", "What happens next? {}", "Go on: {}"))
    other = rng.choice(others(rng, NAMES, {start.name}, 3))
    spec = Spec(
        family="story",
        check="story",
        answer=next_line(rng, start.topics, on_topic=True),
        wrong=tuple(f"{other} {next_line(rng, start.topics, on_topic=True)}" for _ in "ab"),
        sentence=f"{pronoun(start.name)} {{}}.",
        short=f"{pronoun(start.name)} {{}}.",
        lie="{}.",
        name=start.name,
        opening=start.text,
        topics=start.topics,
    )
    return Task(plain.format(start.text), "Continue the story.", start.text, spec)
