"""The five kinds of row that data comes in, and how rows are written to a file.

Rows are frozen and hold text, not tokens. `template` names the template that a row was put into by
its reader; None where the text is as the file has it. `meta` carries whatever else a record had:
contributor, use case, the hidden task of a judge; nothing in training reads it.
"""

import dataclasses
import gzip
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from instruct_jax.errors import UserError
from instruct_jax.files import finite, hash_of_file, replacing, write_text

Meta = Mapping[str, Any]
HASH_SUFFIX = ".sha256"
_EXCERPT, _REASON = 60, 300  # characters that a message shows at most


def _meta() -> Any:
    return field(default_factory=dict, hash=False)


class Turn(NamedTuple):
    """One message of a dialogue; `role` is "system", "user" or "assistant".

    An assistant's turn that is no `target` is read by the model but not learnt ("weight": 0).
    """

    role: str
    text: str
    target: bool = True


class Segment(NamedTuple):
    """A piece of a dialogue as a template has it; a token EOS ends those that the assistant wrote
    ("ours"), which are learnt where they are a `target`.
    """

    text: str
    ours: bool = False
    target: bool = True


# A whole prompt as the model sees it; of several turns its segments, the last one a question.
PromptText = str | tuple[Segment, ...]


def plain_text(text: PromptText) -> str:
    """A prompt as people read it, without the tokens EOS between turns."""
    return text if isinstance(text, str) else "".join(segment.text for segment in text)


@dataclass(frozen=True)
class Document:
    """Text to pretrain on."""

    text: str
    meta: Meta = _meta()


@dataclass(frozen=True)
class Demonstration:
    """A whole prompt, as the model sees it, and the response that follows it directly."""

    prompt: PromptText
    response: str
    meta: Meta = _meta()
    template: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Comparison:
    """K completions of one prompt, ranked: `ranks[k]` is 0 for the best, equal ranks are ties.

    `labeler` ranked them; `sources[k]` is the model that wrote completion k, or empty. A single
    completion, judged alone, has a `label`: whether it was approved of.
    """

    prompt: PromptText
    completions: tuple[str, ...]
    ranks: tuple[int, ...]
    labeler: str | None = None
    sources: tuple[str, ...] = ()
    meta: Meta = _meta()
    label: bool | None = None
    template: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Prompt:
    """A prompt alone, as the model sees it."""

    text: PromptText
    meta: Meta = _meta()
    template: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Dialogue:
    """Turns that end with the assistant's; the earlier ones are its prompt, whose text as people
    read it is `asked`: that of a demonstration of the same row.
    """

    turns: tuple[Turn, ...]
    meta: Meta = _meta()
    template: str | None = field(default=None, compare=False)
    asked: str = field(default="", compare=False)


Row = Document | Demonstration | Comparison | Prompt | Dialogue


class DataError(UserError):
    """Unusable data, in one line: path:line:column: field "x": reason: excerpt (hint)."""

    def __init__(
        self,
        reason: str,
        *,
        path: str | os.PathLike[str] | None = None,
        line: int | None = None,
        column: int | None = None,
        field: str | None = None,
        excerpt: str | None = None,
        hint: str | None = None,
    ) -> None:
        """Every part beside `reason` may be missing; `excerpt` is cut and its controls escaped."""
        self.reason, self.path, self.line, self.column = reason, path, line, column
        self.field, self.hint = field, hint
        self._excerpt = excerpt = None if excerpt is None else _cut(excerpt)
        self.excerpt = None if excerpt is None else json.dumps(excerpt, ensure_ascii=False)
        place = ":".join(str(part) for part in (path, line, column) if part is not None)
        name = f'field "{_cut(field)}"' if field else ""
        parts = [place, name, _cut(reason, _REASON), self.excerpt or ""]
        text = ": ".join(part for part in parts if part)
        super().__init__(printable(f"{text} ({hint})" if hint else text))

    def or_skip(self) -> "DataError":
        """The same, of a row that could be left out."""
        return DataError(
            self.reason,
            path=self.path,
            line=self.line,
            column=self.column,
            field=self.field,
            excerpt=self._excerpt,
            hint="; ".join(filter(None, [self.hint, "data.on_bad_row=skip leaves such rows out"])),
        )


def _cut(text: str, most: int = _EXCERPT) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def printable(text: str) -> str:
    """In one line, and without half a surrogate pair, which no terminal could be sent."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


def write_rows(path: str | os.PathLike[str], rows: Iterable[Row]) -> int:
    """Writes JSONL (gzip when the name ends in .gz) that the readers read back equal; how many.

    The file appears whole or not at all: it is written beside its place and then moved there. Its
    sha256 stands in FILE.sha256, as `sha256sum` writes it: a copy that was cut at the end of a line
    is whole by its looks, and the readers tell it by that.
    """
    path = Path(path)
    beside = path.with_name(path.name + HASH_SUFFIX)
    count = 0
    with replacing(path) as partial:
        with partial.open("wb") as file:
            # No name and no time in the gzip header: equal rows give equal bytes.
            zipped = path.suffix == ".gz"
            with gzip.GzipFile("", "wb", fileobj=file, mtime=0) if zipped else file as packed:
                for row in rows:
                    line = json.dumps(finite(_record(row)), ensure_ascii=False)
                    packed.write(line.encode("utf-8") + b"\n")
                    count += 1
        digest = hash_of_file(partial)
        # Between these steps there is no hash, never a wrong one.
        beside.unlink(missing_ok=True)
    write_text(beside, f"{digest}  {path.name}\n")
    return count


def _record(row: Row) -> dict[str, Any]:
    """The row as a record whose columns tell its format."""
    values: dict[str, Any] = {f.name: getattr(row, f.name) for f in dataclasses.fields(row)}
    if isinstance(row, Prompt):
        values["prompt"] = values.pop("text")  # "text" alone is a document
    if isinstance(values.get("prompt"), tuple):  # question, answer, question ...
        values["prompt"] = [segment.text for segment in values["prompt"]]
    if isinstance(row, Dialogue):
        values = {"messages": list(map(_message, row.turns)), "meta": row.meta}
    if isinstance(row, Comparison) and row.label is not None:
        (values["completion"],) = values.pop("completions")
        del values["ranks"]
    return {name: value for name, value in values.items() if value not in (None, (), {})}


def _message(turn: Turn) -> dict[str, Any]:
    return {"role": turn.role, "content": turn.text} | ({} if turn.target else {"weight": 0})
