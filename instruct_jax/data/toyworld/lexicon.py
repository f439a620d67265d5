"""The closed lexicon and the few facts of the embedded world.

Every word is short and common, so that a byte-level BPE of some hundred entries, trained on the
corpus, makes nearly every word one token. What the tasks ask about is decided by these tables.
"""

from __future__ import annotations

import re


def words(text: str) -> list[str]:
    """The words of a text, without punctuation, case kept."""
    return re.findall(r"[A-Za-z]+", text)


ANIMALS = tuple(words("cat dog cow pig hen fox bear bird duck goat frog lion ant bee owl rat"))
FRUITS = tuple(words("apple pear plum fig grape lemon mango peach"))
COLOURS = tuple(words("red blue green pink black white brown gray"))
THINGS = tuple(words("hat cup bag ball box key pen book coat ring lamp drum"))
PLACES = tuple(words("park lake shop farm school hill zoo beach"))
NUMBERS = tuple(words("one two three four five six seven eight nine ten"))
MEN = tuple(words("Tom Sam Ben Max Dan Jack"))
WOMEN = tuple(words("Ann Eve Amy Kate Lucy Mia"))
NAMES = MEN + WOMEN

GROUPS = {
    "animal": ANIMALS,
    "fruit": FRUITS,
    "colour": COLOURS,
    "thing": THINGS,
    "place": PLACES,
}
"""Class word -> its members."""

EATS = {
    "cow": "grass",
    "goat": "grass",
    "cat": "fish",
    "bear": "fish",
    "dog": "meat",
    "lion": "meat",
    "hen": "corn",
    "pig": "corn",
    "rat": "nuts",
    "bird": "nuts",
}
LOOKS = {
    "grass": "green",
    "snow": "white",
    "coal": "black",
    "mud": "brown",
    "smoke": "gray",
    "blood": "red",
    "sky": "blue",
}

WASHED = ("car", "boat", "bag", "coat", "cup")
PAINTED = ("house", "boat", "box", "lamp", "school")
COOKED = {"tea": "water", "soup": "corn", "cake": "eggs", "bread": "salt"}
STOLEN = ("car", "boat", "bag", "coat", "ring", "book")
BURNED = ("house", "boat", "shop", "school", "car")
ROBBED = ("shop", "house", "school")
POISONS = {"poison": "mud", "bombs": "oil"}

GOOD_DEEDS = (
    {f"wash a {noun}": "soap" for noun in WASHED}
    | {f"paint a {noun}": "a brush" for noun in PAINTED}
    | {f"feed a {animal}": food for animal, food in EATS.items()}
    | {f"make {dish}": need for dish, need in COOKED.items()}
)
"""What one may help with -> what it takes."""

BAD_DEEDS = (
    {f"steal a {noun}": "a key" for noun in STOLEN}
    | {f"burn a {noun}": "oil" for noun in BURNED}
    | {f"rob a {noun}": "a gun" for noun in ROBBED}
    | {f"hurt a {animal}": "a stick" for animal in EATS}
    | {f"make {thing}": need for thing, need in POISONS.items()}
)
"""What one must decline -> what it would take. Nouns and wordings are those of the good deeds, so
the words must be read."""

MEANS = tuple(dict.fromkeys([*GOOD_DEEDS.values(), *BAD_DEEDS.values()]))


def plural(noun: str) -> str:
    """The plural of a noun of the lexicon: fox -> foxes, peach -> peaches, cat -> cats."""
    return noun + ("es" if noun.endswith(("x", "ch")) else "s")


def with_article(noun: str) -> str:
    """'an apple', 'a cat'."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def pronoun(name: str) -> str:
    """'He' or 'She' for a name of the lexicon."""
    return "He" if name in MEN else "She"


_NOUNS = (*ANIMALS, *FRUITS, *COLOURS, *THINGS, *PLACES)
_OBJECTS = (*WASHED, *PAINTED, *COOKED, *STOLEN, *BURNED, *POISONS, *EATS.values(), *LOOKS)
CONTENT = frozenset(
    word.lower()
    for word in (
        *_NOUNS,
        *map(plural, _NOUNS),
        *NUMBERS,
        *NAMES,
        *_OBJECTS,
        *(means.split()[-1] for means in MEANS),
    )
)
"""Every word that can carry an answer, in lower case; all other words are grammar."""
