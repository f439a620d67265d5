"""What a task is in the embedded world, and the key the gold judge reads.

A `Task` is one instruction in two wordings (a plain line; a head and a query for few-shot use) and
a `Spec`. A `Skill` is a function (rng, variant) -> Task: tasks of one variant share their head, so
they can stand in one few-shot prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Spec:
    """The key of a task, kept in `Prompt.meta["task"]`.

    `sentence` and `short` are frames with one `{}` for the answer: the asked form, which says what
    it answers, and a terser one. `check` names how the judge reads the answer: one right answer
    ("slot"), any members of a group, a line that includes words, a story's next line, or the two
    tasks whose right answer is not to answer: "unknown" and "decline", where `lie` is the frame of
    the answer that should not have been given and `wrong` are its fillings.
    """

    family: str
    check: str
    answer: str  # without the frame; for open tasks one good example
    sentence: str
    short: str
    wrong: tuple[str, ...] = ()
    lie: str = ""
    one_word: bool = False  # asked to answer in one word, so the frames are not wanted
    group: str = ""
    count: int = 0
    letter: str = ""
    avoid: str = ""
    include: tuple[str, ...] = ()
    name: str = ""
    opening: str = ""
    topics: tuple[str, ...] = ()
    given: tuple[str, ...] = ()  # the content words of a closed-domain text

    @classmethod
    def from_meta(cls, meta: Mapping[str, object]) -> Spec:
        """The spec of a prompt of this world; ValueError where there is none."""
        task = meta.get("task")
        if not isinstance(task, Mapping):
            raise ValueError("this prompt is not of the embedded world: its meta has no 'task'")
        known = cls.__dataclass_fields__
        values = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in task.items()
            if key in known
        }
        return cls(**values)  # type: ignore[arg-type]

    def to_meta(self) -> dict[str, object]:
        """The spec as plain values that survive JSON."""
        # vars and not asdict, which copies every value of every prompt: 0.3 s of 10,000.
        return {key: list(v) if isinstance(v, tuple) else v for key, v in vars(self).items()}

    @property
    def closed_domain(self) -> bool:
        """The answer may use nothing but the given text."""
        return bool(self.given)

    @property
    def constrained(self) -> bool:
        """The prompt states a constraint that can be checked."""
        return self.one_word or self.check in ("members", "include")


@dataclass(frozen=True)
class Task:
    """One instruction: as a plain line, and as a head and a query for a few-shot prompt."""

    plain: str
    head: str
    query: str
    spec: Spec


@dataclass(frozen=True)
class Skill:
    """A way to make tasks: (rng, variant) -> Task, and the paper's use case it stands for."""

    make: Callable[[Random, str], Task]
    use_case: str
    variants: tuple[str, ...] = ("",)
    weight: float = 1.0
    shots_of_any_variant: bool = False  # the head is the same for all variants
    shots: str = ""  # the skill that few-shot examples are drawn from, where not this one
    solved: bool = True  # appears with its answer in the pretraining corpus


def others(rng: Random, pool: tuple[str, ...], without: set[str], count: int) -> list[str]:
    """`count` words of the pool that are not in `without`."""
    return rng.sample([word for word in pool if word not in without], count)
