"""Files to rows: the format of each file is told from its columns.

`read_documents`, `read_demonstrations`, `read_comparisons`, `read_prompts` and `read_dialogues`
take a path, a glob, a folder or a hub id and give typed rows, with a verdict on every file in
`rows.report`. `layouts` lists the formats. A bad row is a DataError that says where it is and what
is wrong; with on_bad_row="skip" it is left out and counted. Nothing that is wrong is trained on.

Which template the rows are put into is said in `rendering`; each row names it.
"""

import difflib
import logging
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import BinaryIO, Literal, TypeVar

from instruct_jax.data.cases import Case, Format, Kind
from instruct_jax.data.fields import Fields
from instruct_jax.data.files import hash_files, open_records
from instruct_jax.data.layouts import FORMATS, read_cases
from instruct_jax.data.records import Record
from instruct_jax.data.rendering import (
    answer_of,
    known_template,
    prompt_of,
    template_of,
    turns_of,
)
from instruct_jax.data.rows import (
    Comparison,
    DataError,
    Demonstration,
    Dialogue,
    Document,
    Prompt,
    Turn,
    plain_text,
    printable,
    write_rows,
)
from instruct_jax.data.templates import PLAIN, Template, template_named
from instruct_jax.data.texts import Split, pieces

__all__ = [
    "Comparison",
    "DataError",
    "Demonstration",
    "Dialogue",
    "Document",
    "FileReport",
    "Prompt",
    "Rows",
    "Turn",
    "hash_files",
    "read_comparisons",
    "read_demonstrations",
    "read_dialogues",
    "read_documents",
    "read_prompts",
    "read_questions",
    "stream_documents",
    "write_rows",
]

logger = logging.getLogger(__name__)

OnBadRow = Literal["error", "skip"]
# Reasons that a verdict lists; sets of columns and reasons that are remembered of a file.
_SHOWN, _KNOWN = 8, 1000
# Whatever has the side of a prompt.
_ASKING: tuple[Kind, ...] = ("comparisons", "demonstrations", "prompts", "documents")
_HOPELESS = 10_000  # bad rows without a good one: the wrong file
T = TypeVar("T", Document, Demonstration, Comparison, Prompt, Dialogue)


@dataclass
class FileReport:
    """What was found in one file: its format, how many rows, what was wrong with the others."""

    path: str
    format: str = "unknown"
    rows: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    mended: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        def listed(counts: Counter[str]) -> str:
            most = counts.most_common(_SHOWN)
            more = ", ..." if len(counts) > _SHOWN else ""
            return ", ".join(f"{n} x {reason}" for reason, n in most) + more

        text = f"{self.path}: {self.format}, {self.rows} rows"
        text += f"; {self.bad.total()} bad rows skipped ({listed(self.bad)})" if self.bad else ""
        text += f"; {listed(self.mended)}" if self.mended else ""
        return printable(text)


class Rows(list[T]):
    """A list of rows with a verdict on every file they came from."""

    report: tuple[FileReport, ...] = ()


def read_documents(
    source: str | os.PathLike[str],
    *,
    template: Template | str | None = None,
    limit: int | None = None,
    on_bad_row: OnBadRow = "error",
    split: Split = "file",
) -> Rows[Document]:
    """Texts to pretrain on, from a "text" column or plain text files.

    A text file is one document, or one for each line or paragraph (`split`). A document has no
    prompt: `template` is here only because every reader takes it.
    """
    del template
    return _read(source, ("documents",), _document, limit, on_bad_row, split)


def stream_documents(
    source: str | os.PathLike[str],
    *,
    limit: int | None = None,
    on_bad_row: OnBadRow = "error",
    split: Split = "file",
    reports: list[FileReport],
    watch: Callable[[BinaryIO], object] | None = None,
) -> Generator[Document, None, None]:
    """The texts of `read_documents` one by one, long ones in pieces; no file is held in memory.

    Pieces end with a paragraph (`texts.PIECE` characters or a little more), so that a few books
    divide. `limit` counts rows of the file, of a text file its pieces. The verdict on every file is
    added to `reports` as it is opened; for `watch` see `files.open_records`.
    """
    split = "piece" if split == "file" else split
    rows = _stream(source, ("documents",), _document, limit, on_bad_row, split, reports, watch)
    with closing(rows):
        for row in rows:
            for piece in pieces(row.text):
                yield Document(piece, row.meta)


def _document(case: Case) -> Document:
    if not isinstance(case.prompt, str):
        raise ValueError("a document is a text, not a chat or an instruction")
    return Document(case.prompt, case.meta)


def read_demonstrations(
    source: str | os.PathLike[str],
    *,
    template: Template | str | None = None,
    limit: int | None = None,
    on_bad_row: OnBadRow = "error",
) -> Rows[Demonstration]:
    """Prompts with their response; of a chat, the last assistant turn is the response."""
    wanted = _template(template)

    def convert(case: Case) -> Demonstration:
        if not case.target:
            raise ValueError("the answer has weight 0: nothing to learn here")
        style = template_of(case, wanted)
        answer = answer_of(case, _only_answer(case), style)
        return Demonstration(prompt_of(case, style), answer, case.meta, _name(style))

    return _read(source, ("demonstrations",), convert, limit, on_bad_row)


def read_dialogues(
    source: str | os.PathLike[str],
    *,
    template: Template | str | None = None,
    limit: int | None = None,
    on_bad_row: OnBadRow = "error",
) -> Rows[Dialogue]:
    """Demonstrations as turns, for `encode_dialogues`; a whole prompt is one user turn.

    What the template refuses is a bad row.
    """
    wanted = _template(template)

    def convert(case: Case) -> Dialogue:
        style = template_of(case, wanted)
        prompt = turns_of(case)
        turns = (*prompt, Turn("assistant", _only_answer(case), case.target))
        if not any(turn.target for turn in turns if turn.role == "assistant"):
            raise ValueError("every answer has weight 0: nothing to learn here")
        (style or PLAIN).segments(turns)
        asked = plain_text(prompt_of(case, style))
        return Dialogue(turns, case.meta, _name(style), asked)

    return _read(source, ("demonstrations",), convert, limit, on_bad_row)


def read_comparisons(
    source: str | os.PathLike[str],
    *,
    template: Template | str | None = None,
    limit: int | None = None,
    on_bad_row: OnBadRow = "error",
    subsample: tuple[int, int] | None = None,
    tie_gap: float = 0.0,
    seed: int = 0,
    most: tuple[int, str] | None = None,
) -> Rows[Comparison]:
    """Ranked completions: pairs, K-wise rankings, scores; one row for each annotator. Or single
    ones with a label.

    `subsample` (low, high): of a row with more than `high` completions, K of low..high are kept;
    which ones depends on (seed, prompt) alone. `tie_gap`: where the file has scores (AlpacaEval:
    the judge's logit), completions less than this below the best of their group are tied with it.
    `most`: with more completions than these a row is bad, and the field that says so.
    """
    if subsample is not None and not 2 <= subsample[0] <= subsample[1]:
        raise ValueError(f"subsample {subsample} is no range of at least 2 completions")
    wanted = _template(template)

    def convert(case: Case) -> Comparison:
        style = template_of(case, wanted)
        prompt = prompt_of(case, style)
        kept = _subsample(len(case.answers), subsample, f"{seed}:{plain_text(prompt)}")
        if most is not None and len(kept) > most[0]:
            raise ValueError(
                f"{len(kept)} completions, over {most[1]}={most[0]}: raise it, or cut rankings to "
                f"a random few with config.data.completions=2,{most[0]}"
            )
        return Comparison(
            prompt,
            tuple(answer_of(case, case.answers[i], style) for i in kept),
            _ranks(case, kept, tie_gap),
            case.labeler,
            tuple(case.sources[i] for i in kept) if case.sources else (),
            case.meta,
            case.label,
            _name(style),
        )

    return _read(source, ("comparisons",), convert, limit, on_bad_row)


def read_prompts(
    source: str | os.PathLike[str],
    *,
    template: Template | str | None = None,
    limit: int | None = None,
    on_bad_row: OnBadRow = "error",
) -> Rows[Prompt]:
    """Prompts: files of prompts, lines of text, or the prompt side of any other format."""
    wanted = _template(template)

    def convert(case: Case) -> Prompt:
        style = template_of(case, wanted)
        # An answer that stands beside a prompt is what rewards may compare others with.
        beside = {"reference": case.answers[0]} if len(case.answers) == 1 else {}
        return Prompt(prompt_of(case, style), beside | dict(case.meta), _name(style))

    return _read(source, _ASKING, convert, limit, on_bad_row, "line")


def read_questions(
    source: str | os.PathLike[str],
    *,
    limit: int | None = None,
    on_bad_row: OnBadRow = "error",
) -> Rows[Dialogue]:
    """What `read_prompts` reads as turns, in no template yet; the last one is a question."""

    def convert(case: Case) -> Dialogue:
        turns = turns_of(case)
        if turns[-1].role == "assistant":
            raise ValueError("the last turn is the assistant's: there is nothing to answer")
        return Dialogue(turns, case.meta)

    return _read(source, _ASKING, convert, limit, on_bad_row, "line")


def _read(
    source: str | os.PathLike[str],
    kinds: tuple[Kind, ...],
    convert: Callable[[Case], T],
    limit: int | None,
    on_bad_row: OnBadRow,
    split: Split = "file",
) -> Rows[T]:
    reports: list[FileReport] = []
    rows: Rows[T] = Rows(_stream(source, kinds, convert, limit, on_bad_row, split, reports))
    rows.report = tuple(reports)
    return rows


def _stream(
    source: str | os.PathLike[str],
    kinds: tuple[Kind, ...],
    convert: Callable[[Case], T],
    limit: int | None,
    on_bad_row: OnBadRow,
    split: Split,
    reports: list[FileReport],
    watch: Callable[[BinaryIO], object] | None = None,
) -> Generator[T, None, None]:
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f'on_bad_row {on_bad_row!r} is neither "error" nor "skip"')
    left = math.inf if limit is None else limit
    for path, records in open_records(source, split=split, watch=watch):
        report = FileReport(path)
        reports.append(report)
        formats: dict[tuple[str, ...], Format] = {}
        first_error = None
        with closing(records):
            for record in records:
                if left <= 0:
                    break
                try:
                    made = _convert(record, kinds, convert, formats, report)
                except DataError as error:
                    if on_bad_row == "error":
                        a_row = formats or isinstance(record, DataError)  # else: the whole file
                        raise (error.or_skip() if a_row else error) from None
                    first_error = first_error or error
                    if report.rows == 0 and report.bad.total() >= _HOPELESS:
                        break
                    reason = f"{error.field}: {error.reason}" if error.field else error.reason
                    known = reason in report.bad or len(report.bad) < _KNOWN
                    report.bad[reason if known else "other reasons"] += 1
                    continue
                made = made[: None if limit is None else int(left)]
                report.rows += len(made)
                left -= len(made)
                yield from made
        if report.rows == 0 and left > 0:
            # Not one good row: a wrong file rather than one with bad rows.
            raise first_error or DataError("no rows", path=path)
        (logger.warning if report.bad else logger.info)("%s", report)


def _convert(
    record: Record | DataError,
    kinds: tuple[Kind, ...],
    convert: Callable[[Case], T],
    formats: dict[tuple[str, ...], Format],
    report: FileReport,
) -> list[T]:
    """The rows of one record; `formats` remembers the verdict on each set of columns."""
    if isinstance(record, DataError):
        raise record
    columns = tuple(record.fields)
    if columns not in formats:
        if len(formats) >= _KNOWN:
            formats.clear()
        formats[columns] = found = _detect(record, kinds)
        report.format = found.name if report.format == "unknown" else report.format
    try:
        cases = read_cases(formats[columns], Fields(record, report.mended))
        made = [convert(known_template(case)) for case in cases]
    except ValueError as error:  # what a template refuses
        raise record.error(str(error)) from None
    # Several annotators of one prompt give one prompt, several instances of a task stay several.
    return [row for i, row in enumerate(made) if row not in made[:i]]


def _detect(record: Record, kinds: tuple[Kind, ...]) -> Format:
    """The format of a record; DataError, with a suggestion for a misspelt column, if none is."""
    columns = set(record.fields)
    known = [f for kind in kinds for f in FORMATS if f.kind == kind]
    for found in known:
        if columns.issuperset(found.required):
            near = _misspelt(columns, found, found.optional)
            if near is not None:
                raise _suggestion(record, *near)
            return found
    by_case = {name.lower(): name for name in columns}
    for found in known:
        if by_case.keys() >= set(found.required):
            name = next(name for name in found.required if name not in columns)
            raise _suggestion(record, by_case[name], name)
    # One column away: the format with the most columns right is the likeliest.
    nearly = [f for f in known if len(set(f.required) - columns) == 1]
    nearly.sort(key=lambda f: -len(f.required))
    for found in nearly:
        near = _misspelt(columns, found, found.required)
        if near is not None:
            raise _suggestion(record, *near)
    for other in (f for f in FORMATS if columns.issuperset(f.required)):
        raise record.error(f"expected {' or '.join(kinds)}, found {other.kind} ({other.name})")
    for found in nearly:
        if len(found.required) > 1:
            (missing,) = set(found.required) - columns
            raise record.error(f'"{missing}" is missing', hint=f"format {found.name}")
    known_columns = "; ".join(dict.fromkeys("+".join(f.required) for f in known))
    raise record.error(
        f"unknown columns {', '.join(sorted(columns)) or '(none)'}", hint=f"known: {known_columns}"
    )


def _misspelt(columns: set[str], found: Format, names: Sequence[str]) -> tuple[str, str] | None:
    """(a column, the name it was meant to be) when one of `names` is absent and nearly there."""
    names_of_others = (name for other in FORMATS for name in other.required)
    others = sorted(columns.difference(found.required, found.optional, names_of_others))
    for name in names:
        close = difflib.get_close_matches(name, others, n=1, cutoff=0.8)
        if name not in columns and close:
            return close[0], name
    return None


def _suggestion(record: Record, wrong: str, right: str) -> DataError:
    return record.error("unknown column", field=wrong, hint=f'did you mean "{right}"?')


def _template(template: Template | str | None) -> Template | None:
    return template_named(template) if isinstance(template, str) else template


def _name(style: Template | None) -> str | None:
    return None if style is None else style.name


def _only_answer(case: Case) -> str:
    if not case.answers:
        raise ValueError("the last turn is not the assistant's")
    return case.answers[0]


def _subsample(n: int, bounds: tuple[int, int] | None, key: str) -> list[int]:
    if bounds is None or n <= bounds[1]:
        return list(range(n))
    draw = random.Random(key)  # seeded by sha512 of the text: the same on every machine
    return sorted(draw.sample(range(n), draw.randint(*bounds)))


def _ranks(case: Case, kept: list[int], tie_gap: float) -> tuple[int, ...]:
    """Ranks 0, 1, ... of the kept answers, ties equal.

    With scores, a group of ties starts at its best answer and reaches `tie_gap` below it, so that
    a chain of small gaps does not tie the best with the worst.
    """
    if case.ranks is not None:
        levels = sorted({case.ranks[i] for i in kept})
        return tuple(levels.index(case.ranks[i]) for i in kept)
    scores = case.scores or ()
    ranks: dict[int, int] = {}
    leader, rank = None, -1
    for i in sorted(kept, key=lambda i: -scores[i]):
        if leader is None or (scores[i] != leader and leader - scores[i] >= tie_gap):
            leader, rank = scores[i], rank + 1
        ranks[i] = rank
    return tuple(ranks[i] for i in kept)
