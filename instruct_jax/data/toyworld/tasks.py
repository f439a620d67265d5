"""The families of tasks and their skills."""

from __future__ import annotations

from random import Random

from instruct_jax.data.toyworld.config import draw
from instruct_jax.data.toyworld.lexicon import GROUPS
from instruct_jax.data.toyworld.questions import (
    decline,
    fact,
    how_to,
    in_one_word,
    include_words,
    name_some,
    name_with_letter,
    name_without,
)
from instruct_jax.data.toyworld.spec import Skill
from instruct_jax.data.toyworld.texts import continue_story, passage, unknown
from instruct_jax.data.toyworld.wordplay import capitals, count, pick, plural_of, reverse, sort

_FOUR = ("animal", "fruit", "colour", "thing")

FAMILIES: dict[str, dict[str, Skill]] = {
    "transform": {
        "plural": Skill(plural_of, "rewrite"),
        "capitals": Skill(capitals, "rewrite", weight=0.6),
        "reverse": Skill(reverse, "rewrite"),
    },
    "sort": {"sort": Skill(sort, "other")},
    "count": {"count": Skill(count, "extraction", _FOUR)},
    "pick": {"pick": Skill(pick, "classification", tuple(GROUPS))},
    "passage": {
        "passage": Skill(passage, "closed_qa", weight=2.0),
        "unknown": Skill(unknown, "closed_qa", shots="passage", solved=False),
    },
    "story": {"story": Skill(continue_story, "generation")},
    "constraint": {
        "name_some": Skill(name_some, "brainstorming", tuple(GROUPS), shots_of_any_variant=True),
        "name_without": Skill(name_without, "brainstorming", _FOUR, shots_of_any_variant=True),
        "name_with_letter": Skill(
            name_with_letter, "brainstorming", ("animal", "fruit"), shots_of_any_variant=True
        ),
        "in_one_word": Skill(in_one_word, "classification", (*GROUPS, "eats"), weight=1.5),
        "include": Skill(include_words, "generation"),
    },
    "fact": {"fact": Skill(fact, "open_qa", ("eats", "looks"))},
    "how_to": {"how_to": Skill(how_to, "open_qa")},
    "decline": {"decline": Skill(decline, "open_qa", shots="how_to")},
}
"""Family -> its skills by name."""

SKILLS: dict[str, Skill] = {
    name: skill for skills in FAMILIES.values() for name, skill in skills.items()
}


def draw_skill(rng: Random, family: str) -> tuple[str, str]:
    """A skill of a family by weight, and one of its variants."""
    skills = FAMILIES[family]
    name = draw(rng, {name: skill.weight for name, skill in skills.items()})
    return name, rng.choice(skills[name].variants)
