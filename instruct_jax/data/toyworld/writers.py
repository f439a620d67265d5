"""Imperfect human writers: an answer to a task, with named flaws.

`FlawMix` names the flaws. Some make an answer longer (ramble, a broken one-word constraint), some
shorter (curt), some leave its length alone (sloppy, wrong, comply, invent), so that length alone
says little about quality.
"""

from __future__ import annotations

from random import Random

from instruct_jax.data.toyworld.config import Writer, draw
from instruct_jax.data.toyworld.lexicon import (
    ANIMALS,
    COLOURS,
    GROUPS,
    NAMES,
    PLACES,
    THINGS,
    plural,
)
from instruct_jax.data.toyworld.spec import Spec
from instruct_jax.data.toyworld.texts import next_line

CONTENT_FLAWS = frozenset({"constraint", "wrong", "comply", "invent", "over_decline"})
"""Flaws of what is said; the others are of how it is said."""

DECLINE = "I am sorry but I can not help with that."
NOT_KNOWN = "I do not know."


def draw_flaws(spec: Spec, writer: Writer, rng: Random) -> tuple[str, ...]:
    """No, one or two flaws of a writer's answer; at most one of them a flaw of content."""
    if rng.random() < writer.flawless:
        return ()
    flaws: list[str] = []
    weights = writer.flaws.weights()
    for _ in range(2 if rng.random() < writer.two_flaws else 1):
        possible = {
            flaw: weights[flaw]
            for flaw in possible_flaws(spec)
            if not any(_clash(spec, flaw, other) for other in flaws)
        }
        flaws.append(draw(rng, possible))
    return tuple(flaws)


def _clash(spec: Spec, a: str, b: str) -> bool:
    """Whether two flaws are one, are both of content, or one of them would hide the other."""
    if a == b or {a, b} <= CONTENT_FLAWS:
        return True
    hidden = CONTENT_FLAWS if spec.check in ("story", "include") else {"over_decline"}
    return "curt" in (a, b) and bool({a, b} & hidden)


def possible_flaws(spec: Spec) -> tuple[str, ...]:
    """The flaws an answer to this task can have."""
    flaws = ["ramble", "sloppy"]
    if not spec.one_word:
        flaws.append("curt")
    if spec.constrained:
        flaws.append("constraint")
    if spec.check == "decline":
        flaws.append("comply")
    elif spec.check == "unknown":
        flaws.append("invent")
    elif spec.wrong:
        flaws.append("wrong")
    if spec.family in ("how_to", "fact") or (spec.family == "passage" and spec.check == "slot"):
        flaws.append("over_decline")
    return tuple(flaws)


def write_answer(
    spec: Spec, rng: Random, *, flaws: tuple[str, ...] = (), restate: bool = True
) -> str:
    """An answer to the task with exactly these flaws; one of the best answers without any."""
    if "over_decline" in flaws:
        text = DECLINE if spec.family == "how_to" else NOT_KNOWN
    else:
        frame = spec.sentence if restate else spec.short
        if {"wrong", "comply", "invent"} & {*flaws}:
            answer, frame = rng.choice(spec.wrong), spec.lie or frame
        elif "constraint" in flaws and not spec.one_word:
            answer = _miss_constraint(spec, rng)
        else:
            answer = good_answer(spec, rng, restate=restate)
        bare = "curt" in flaws or (spec.one_word and "constraint" not in flaws)
        text = bare_answer(spec, answer) + "." if bare else frame.format(answer)
    text = text[0].upper() + text[1:]
    if "ramble" in flaws:
        text = f"{text} {_aside(rng)}"
    return text[0].lower() + text[1:-1] if "sloppy" in flaws else text


def good_answer(spec: Spec, rng: Random, *, restate: bool = True) -> str:
    """What goes into the frame: the right answer, or one of many good ones to an open task."""
    if spec.check == "members":
        pool = [
            word
            for word in GROUPS[spec.group]
            if word != spec.avoid and word.startswith(spec.letter)
        ]
        return " ".join(rng.sample(pool, spec.count))
    if spec.check == "story":
        return next_line(rng, spec.topics, on_topic=restate)
    if spec.check == "include":
        animal, place = spec.include
        return f"{animal} {rng.choice(('ran to', 'is at', 'sat at', 'went to'))} the {place}"
    return spec.answer


def bare_answer(spec: Spec, answer: str) -> str:
    """The answer as a fragment, as solved worksheets have it."""
    return spec.answer if spec.check == "include" else answer


def _miss_constraint(spec: Spec, rng: Random) -> str:
    if spec.check == "include":
        animal, place = spec.include
        return rng.choice((f"{animal} ran home", f"{place} is big"))
    pool = [word for word in GROUPS[spec.group] if word != spec.avoid]
    if spec.avoid:
        answer = [spec.avoid, rng.choice(pool)]
        rng.shuffle(answer)
        return " ".join(answer)
    if spec.letter:
        return rng.choice([word for word in pool if not word.startswith(spec.letter)])
    return " ".join(rng.sample(pool, spec.count + rng.choice((-1, 1))))


def _aside(rng: Random) -> str:
    return rng.choice(
        (
            f"I like {plural(rng.choice(ANIMALS))}.",
            f"{rng.choice(NAMES)} has a {rng.choice(COLOURS)} {rng.choice(THINGS)}.",
            f"The {rng.choice(PLACES)} is big.",
            "It was a good day.",
            "You can ask me more.",
        )
    )
