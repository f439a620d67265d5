"""Paths in what a run records, which is published with its model: none tells of the machine.

A path is written as it leads there from the folder of the record, "$HERE/../sft/model", or from the
user's home, "~/rows.jsonl"; so runs that are moved together still name each other. What the user
wrote relative to the current directory stays as it is.
"""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

HERE = "$HERE"
# Where a path begins in a text such as "('sft=/a/b','ppo=/c')"; not in a URL or within a path.
_BEFORE = r"(?<![^\s=,;:'\"(\[{])"


def published(value: Any, folder: Path) -> Any:
    """`value`, of JSON's types, with every absolute path in its texts, keys too, written so."""
    rules = _rules(folder.resolve())

    def told(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {told(key): told(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [told(item) for item in value]
        if isinstance(value, str) and os.sep in value:
            for pattern, instead in rules:
                value = pattern.sub(lambda _, instead=instead: instead, value)
        return value

    return told(value)


def _rules(folder: Path) -> list[tuple[re.Pattern[str], str]]:
    """What stands for what, the nearest first."""
    above = enumerate((folder, *folder.parents))
    *near, (_, root) = [(str(place), HERE + "/.." * i) for i, place in above]
    known = [*near, (str(Path("~").expanduser().resolve()), "~")]
    rules = [(rf"{_BEFORE}{re.escape(place)}(?![^/\s,;:'\")\]}}])", to) for place, to in known]
    # What shares nothing with the folder but the root.
    rules.append((rf"{_BEFORE}/(?=[^/\s])", f"{root}/"))
    return [(re.compile(pattern), to) for pattern, to in rules]


def expanded(text: str, folder: Path) -> str:
    """The text that `published` was given; a path through ".." comes back without it."""
    home, here = str(Path("~").expanduser()), folder.resolve()
    text = re.sub(rf"{_BEFORE}~(?=/|$)", lambda _: home, text)

    def place(found: re.Match[str]) -> str:
        above = (here, *here.parents)
        return str(above[min(len(found[1]) // len("/.."), len(above) - 1)]).rstrip("/")

    return re.sub(rf"{re.escape(HERE)}((?:/\.\.(?![^/]))*)", place, text)


def given_back(texts: Iterable[str], folder: Path) -> dict[str, str]:
    """Which text each was that `published` has written, by what it has written."""
    return {published(text, folder): text for text in texts}
