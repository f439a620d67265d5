"""Licences of data sets, shown when one is opened and kept in a run's record (DATA-21).

A local file's licence is what stands, in this order, in FILE.license beside it (one line, as the
REUSE specification has it), in the row of the file in a Markdown table with the columns "file" and
"licence" of a MANIFEST.md in its folder or one above, or in the front matter ("license: ...") of a
README.md, the card of a downloaded data set. A hub id's is in the card of the local copy, or, for
some data sets of this field, in the table below. Nothing is looked up over the network, and what is
found is what somebody wrote down: read the terms themselves before you publish.
"""

import os
import re
from pathlib import Path

from instruct_jax.data import hub
from instruct_jax.data.files import find_files

NOT_STATED = "not stated"
_MOST = 2**22  # characters of a file about others

# As their cards said in 2026.
_OF_HUB_IDS = {
    "anthropic/hh-rlhf": "MIT",
    "databricks/databricks-dolly-15k": "CC BY-SA 3.0",
    "openassistant/oasst1": "Apache-2.0",
    "openassistant/oasst2": "Apache-2.0",
    "tatsu-lab/alpaca": "CC BY-NC 4.0",
    "vicgalle/alpaca-gpt4": "CC BY-NC 4.0",
}
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---", re.DOTALL)
_LICENCE = re.compile(r"^licen[cs]e:[ \t]*[\"']?([^\"'\n]+)", re.MULTILINE)


def find_licences(source: str | os.PathLike[str]) -> dict[str, str]:
    """{file or hub id: its licence, or "not stated"} of a path, glob, folder or hub id."""
    name = os.fspath(source)
    if hub.is_hub_id(name):
        card = hub.local_card(name)
        found = _of_card(card) if card is not None else None
        repository = hub.repository_of(name).lower()
        return {name: found or _OF_HUB_IDS.get(repository, NOT_STATED)}
    return {str(path): _of_file(path) or NOT_STATED for path in find_files(name)}


def _of_file(path: Path) -> str | None:
    beside = path.with_name(path.name + ".license")
    if (text := _text_of(beside)) is not None:
        lines = text.strip().splitlines()
        return lines[0].removeprefix("SPDX-License-Identifier:").strip() if lines else None
    folder = path if path.is_dir() else path.parent
    for above in (folder, *folder.resolve().parents[:2]):
        manifest = above / "MANIFEST.md"
        if (text := _text_of(manifest)) is not None:
            return _of_manifest(text, above, os.path.realpath(path))
    return _of_card(folder / "README.md")


def _of_manifest(text: str, folder: Path, path: str) -> str | None:
    """The licence in the row of `path`, whose "file" is relative to the manifest's folder."""
    columns: list[str] = []
    for line in text.splitlines():
        if not line.startswith("|"):
            continue
        cells = [cell.strip().strip("`") for cell in line.strip().strip("|").split("|")]
        lower = [cell.lower() for cell in cells]
        if "file" in lower and ("licence" in lower or "license" in lower):
            columns = [name.replace("license", "licence") for name in lower]
        elif columns and len(cells) == len(columns):
            row = dict(zip(columns, cells, strict=True))
            if os.path.realpath(folder / row["file"].replace("\0", "")) == path:
                return row["licence"]
    return None


def _of_card(card: Path) -> str | None:
    front = _FRONT_MATTER.match(_text_of(card) or "")
    found = _LICENCE.search(front[1]) if front else None
    return found[1].strip() if found else None


def _text_of(path: Path) -> str | None:
    """A file that may be there; what it does not say readably, nobody said."""
    try:
        if not path.is_file():
            return None
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(_MOST)
    except OSError:
        return None
