"""Where a run's rows come from: the embedded world, or files and hub data sets.

`open_source(DataConfig)` answers the same questions for both: documents to pretrain on,
demonstrations, dialogues, comparisons, prompts, each for a split, and the template that they are
put into, which is one for the whole run. Splits of the embedded world are disjoint in contributors
(DATA-6); rows of files go to a split by a salted hash of their prompt, which of a dialogue is all
that precedes its last answer, so adding data never moves a row, and one prompt is in one part
whatever kind of row it comes as. The held-out parts may have files of their own, which are none of
those that are trained on, and may be empty.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, TypeVar

from instruct_jax import __version__
from instruct_jax.data import hub
from instruct_jax.data.corpus import Text
from instruct_jax.data.files import find_files, hash_files, same_file
from instruct_jax.data.formats import (
    FileReport,
    Rows,
    read_comparisons,
    read_demonstrations,
    read_dialogues,
    read_prompts,
    stream_documents,
)
from instruct_jax.data.licences import find_licences
from instruct_jax.data.rows import (
    Comparison,
    DataError,
    Demonstration,
    Dialogue,
    Document,
    Prompt,
    plain_text,
)
from instruct_jax.data.templates import PLAIN, Template, TemplateName, template_named
from instruct_jax.data.toyworld import ToyWorld
from instruct_jax.data.toyworld.world import Split
from instruct_jax.errors import ConfigError
from instruct_jax.settings import Settings, setting

Row = TypeVar("Row", Document, Demonstration, Comparison, Prompt, Dialogue)


@dataclass(frozen=True)
class RowFiles(Settings):
    """Files, globs, folders or hub ids of each kind of row."""

    documents: tuple[str, ...] = setting((), "text to pretrain on")
    demonstrations: tuple[str, ...] = setting((), "prompts with an answer")
    comparisons: tuple[str, ...] = setting((), "prompts with ranked or labelled completions")
    prompts: tuple[str, ...] = setting((), "prompts alone")
    dialogues: tuple[str, ...] = setting((), "chats of several turns")


ROW_FIELDS = tuple(field.name for field in fields(RowFiles))


@dataclass(frozen=True)
class DataConfig(Settings):
    """Where the rows come from, and how they are read and divided.

    Comparisons are files also for the embedded world: `experiments/collect.py` makes them.
    """

    source: Literal["toyworld", "files"] = setting(
        "toyworld", "the embedded world, or files of yours"
    )
    seed: int = setting(0, "seed of the embedded world and of the division into parts", low=0)
    documents: tuple[str, ...] = setting(
        (), "text to pretrain on: files, globs, folders or hub ids", needs="source=files"
    )
    token_dir: str | None = setting(
        None,
        "folder of tokenised documents, where other runs find them too; none: WORKDIR/tokens",
        may_change=True,
    )
    demonstrations: tuple[str, ...] = setting((), "prompts with an answer", needs="source=files")
    comparisons: tuple[str, ...] = setting((), "prompts with ranked or labelled completions")
    prompts: tuple[str, ...] = setting((), "prompts alone", needs="source=files")
    dialogues: tuple[str, ...] = setting((), "chats of several turns, for fine-tuning")
    template: TemplateName | None = setting(
        None,
        "what all prompts of the run are put into; none: the template of the model that it starts "
        "from, else what the rows are (instructions alpaca, chats chat, transcripts hh)",
    )
    limit: int | None = setting(
        None, "the first so many of each path; of a text file, its pieces", low=1, unit="rows"
    )
    split_text: Literal["file", "line", "paragraph"] = setting(
        "file", "what is one document in a file of plain text", needs="source=files"
    )
    exclude_datasets: tuple[str, ...] = setting(
        ("selfinstruct",), "data sets whose rankings are for evaluation, never trained on"
    )
    completions: tuple[int, int] | None = setting(
        None, "rankings with more than the second are cut to a random few, from the first on", low=2
    )
    tie_gap: float = setting(0.0, "scores nearer than this to the best of a group tie", low=0.0)
    valid_fraction: float = setting(
        0.05, "share of the rows of files that is held out for validation", low=0.0, below=1.0
    )
    test_fraction: float | None = setting(
        None, "share held out for evaluation; none: as valid_fraction", low=0.0, below=1.0
    )
    valid: RowFiles = setting(RowFiles(), "files of validation alone", needs="source=files")
    test: RowFiles = setting(RowFiles(), "files of evaluation alone", needs="source=files")
    on_bad_row: Literal["error", "skip"] = setting(
        "error", "whether a row that cannot be used ends the run, or is left out and counted"
    )
    toy_documents: int = setting(
        24_000, "documents of the embedded world", low=1, needs="source=toyworld"
    )
    toy_demonstrations: int = setting(4_000, "its demonstrations", low=1, needs="source=toyworld")
    toy_prompts: int = setting(4_000, "its prompts", low=1, needs="source=toyworld")
    toy_offset: int = setting(
        0, "its training prompts that are left to other stages", low=0, needs="source=toyworld"
    )
    toy_valid: int = setting(
        512, "rows of each kind in its held-out parts", low=0, needs="source=toyworld"
    )

    def __post_init__(self) -> None:
        """ConfigError where the parts leave nothing to train on, or a range is none."""
        super().__post_init__()
        valid, test = self.fractions
        if valid + test >= 1:
            raise ConfigError(
                f"valid_fraction={valid:g} and test_fraction={test:g} leave no row to train on"
            )
        if self.completions is not None and self.completions[0] > self.completions[1]:
            raise ConfigError(f"completions={self.completions}: expected (fewest, most)")

    @property
    def fractions(self) -> tuple[float, float]:
        """The shares of validation and of evaluation."""
        valid = self.valid_fraction
        return valid, valid if self.test_fraction is None else self.test_fraction

    def paths(self) -> list[str]:
        """All files, globs and hub ids that are named."""
        groups = (self, self.valid, self.test)
        return [path for group in groups for name in ROW_FIELDS for path in getattr(group, name)]

    def find(self) -> list[str]:
        """Every file and hub id that is named; DataError for a file that is not there."""
        return list(_each_file(self.paths()))

    def token_folder(self, workdir: Path) -> Path:
        """Where a run with this work directory keeps tokenised documents."""
        return workdir / "tokens" if self.token_dir is None else Path(self.token_dir)


class Source(Protocol):
    """Rows by split: "train", "valid" or "test"; of files the last two may be empty."""

    @property
    def template(self) -> Template | None:
        """What the rows read so far were put into, or what was asked for; None before any."""
        ...

    def provenance(self) -> dict[str, Any]:
        """What the rows come from, for the record of a run."""
        ...

    def licences(self) -> dict[str, str]:
        """The licence of every file and hub id, for people and for the record."""
        ...

    def text(self, split: Split) -> Text:
        """Pretraining text, one document at a time."""
        ...

    def tokenizer_texts(self) -> Iterable[str]:
        """Text of all kinds that the tokenizer will meet, to train it on."""
        ...

    def demonstrations(self, split: Split) -> Sequence[Demonstration]:
        """Prompts with a labeler's answer."""
        ...

    def dialogues(self, split: Split) -> Sequence[Dialogue]:
        """Chats of several turns."""
        ...

    def comparisons(self, split: Split) -> Sequence[Comparison]:
        """Prompts with ranked completions."""
        ...

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """Prompts alone."""
        ...


def open_source(
    config: DataConfig, *, template: str | None = None, model: str | Path = ""
) -> Source:
    """The source that a config names. `template` is that of the model folder `model` which the run
    starts from: ConfigError where the config names another.
    """
    wanted = config.template or template
    if template is not None and wanted != template:
        raise ConfigError(
            f"config.data.template={wanted}: {model} was trained with {template!r}; leave it out, "
            "or start from a model that has not been fine-tuned"
        )
    if config.source == "toyworld":
        return ToySource(config, wanted)
    return FileSource(config, wanted)


class FileSource:
    """Rows of the files, globs and hub ids of a DataConfig, put into the template `wanted`.

    Where none is wanted each row says what it is put into, and DataError tells of two that differ.
    """

    def __init__(self, config: DataConfig, wanted: str | None = None) -> None:
        """ConfigError for a file of a held-out part that is trained on too."""
        self.config = config
        for part in ("valid", "test"):
            for field in ROW_FIELDS:
                for path in getattr(getattr(config, part), field):
                    _refuse_trained_on(f"data.{part}.{field}", path, config)
        self._wanted = wanted
        self._met: tuple[str, str] | None = None

    @property
    def template(self) -> Template | None:
        """As asked for, else as the rows read so far say."""
        name = self._wanted or (self._met[0] if self._met else None)
        return None if name is None else template_named(name)

    def provenance(self) -> dict[str, Any]:
        """sha256 of every local file."""
        paths = self.config.paths()
        return {path: sha for source in paths for path, sha in hash_files(source).items()}

    def licences(self) -> dict[str, str]:
        """As found beside each file or in its card; see `data/licences.py`."""
        paths = self.config.paths()
        return {name: licence for path in paths for name, licence in find_licences(path).items()}

    def text(self, split: Split) -> Text:
        """Documents of `config.documents`; long ones in pieces, so that a few books divide."""
        config, own = self.config, self._own("documents", split)
        paths = own or self._paths("documents")
        if not own and split != "train" and not config.fractions[split == "test"]:
            paths = ()  # nothing to look for

        def read(
            name: str, reports: list[FileReport], watch: Callable[[BinaryIO], object]
        ) -> Iterator[Document]:
            rows = stream_documents(
                name,
                limit=config.limit,
                on_bad_row=config.on_bad_row,
                split=config.split_text,
                reports=reports,
                watch=watch,
            )
            with closing(rows):
                for row in rows:
                    if own or self._part("documents", row.text) == split:
                        yield row

        read_as = {name: getattr(config, name) for name in ("split_text", "limit")}
        if not own:
            kept = [bool(self._own("documents", part)) for part in ("valid", "test")]
            read_as |= {"seed": config.seed, "fractions": config.fractions, "own": kept}
        return Text(
            split,
            # A limit counts the rows of all files of a path: those cannot be read apart.
            tuple(paths if config.limit is not None else _each_file(paths)),
            {"part": None if own else split, "documents": paths, **read_as},
            read,
            strict=config.on_bad_row == "error",
        )

    def tokenizer_texts(self) -> Iterator[str]:
        """The documents, and the demonstrations where there are any."""
        yield from (row.text for row in self.text("train"))
        if self.config.demonstrations:
            # By a source of its own: a model that is not fine-tuned yet is of no template.
            rows = FileSource(self.config, self._wanted).demonstrations("train")
            yield from (plain_text(row.prompt) + row.response for row in rows)

    def demonstrations(self, split: Split) -> Sequence[Demonstration]:
        """Demonstrations of `config.demonstrations`."""
        key = lambda row: plain_text(row.prompt)  # noqa: E731
        return self._rows("demonstrations", read_demonstrations, split, key)

    def dialogues(self, split: Split) -> Sequence[Dialogue]:
        """Chats of `config.dialogues`; those alike up to the last answer go to one split."""
        return self._rows("dialogues", read_dialogues, split, lambda row: row.asked)

    def comparisons(self, split: Split) -> Sequence[Comparison]:
        """Comparisons of `config.comparisons`."""
        read = partial(
            read_comparisons,
            subsample=self.config.completions,
            tie_gap=self.config.tie_gap,
            seed=self.config.seed,
        )
        rows = self._rows("comparisons", read, split, lambda row: plain_text(row.prompt))
        excluded = self.config.exclude_datasets if split == "train" else ()
        return [row for row in rows if row.meta.get("dataset") not in excluded]

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """Prompts of `config.prompts`."""
        return self._rows("prompts", read_prompts, split, lambda row: plain_text(row.text))

    def meet(self, template: str | None, where: str) -> None:
        """Notes that rows at `where` are in `template` (None: as they are, which is plain).

        DataError where others are in another: a model learns one.
        """
        name = template or PLAIN.name
        before, place = (self._wanted, "the run") if self._wanted else self._met or (name, where)
        if name != before:
            raise DataError(
                f"rows for template {name!r}, beside {before!r} of {place}",
                path=where,
                hint=f"one template a run: name it, as --config.data.template={before}",
            )
        self._met = self._met or (name, where)

    def _rows(
        self,
        field: str,
        read: Callable[..., Rows[Row]],
        split: Split,
        key: Callable[[Row], str],
    ) -> list[Row]:
        rows: list[Row] = []
        own = self._own(field, split)
        for path in own or self._paths(field):
            found = read(
                path,
                template=self._wanted,
                limit=self.config.limit,
                on_bad_row=self.config.on_bad_row,
            )
            file = found.report[0].path if len(found.report) == 1 else path
            for name in dict.fromkeys(row.template for row in found):
                self.meet(name, file)
            rows += found
        kept = rows if own else [row for row in rows if self._part(field, key(row)) == split]
        if split == "train" and not kept:
            valid, test = self.config.fractions
            raise DataError(
                f"all {len(rows)} rows of data.{field} are held out, none is left to train on",
                hint=f"data.valid_fraction is {valid:g}, data.test_fraction {test:g}: lower them",
            )
        return kept

    def _own(self, field: str, split: Split) -> tuple[str, ...]:
        """The files that only this held-out part has."""
        if split == "train":
            return ()
        paths: tuple[str, ...] = getattr(getattr(self.config, split), field)
        return paths

    def _paths(self, field: str) -> tuple[str, ...]:
        paths: tuple[str, ...] = getattr(self.config, field)
        if not paths:
            raise DataError(f"data.{field} is empty; name the files (or hub ids) to read")
        return paths

    def _part(self, field: str, key: str) -> Split:
        """The part that a row goes to. One that has files of its own takes none of these."""
        digest = hashlib.sha256(f"split:{self.config.seed}:{key}".encode()).digest()
        point = int.from_bytes(digest[:8], "big") / 2**64
        valid, test = self.config.fractions
        part: Split = "valid" if point < valid else "test" if point < valid + test else "train"
        return "train" if self._own(field, part) else part


def _refuse_trained_on(name: str, held_out: str, config: DataConfig) -> None:
    for field in ROW_FIELDS:
        for path in getattr(config, field):
            same = same_file(held_out, path)
            if same is not None:
                raise ConfigError(
                    f"config.{name}: {same[0]} is the file {same[1]} of data.{field}, which is "
                    "trained on: name other files, or leave it out and a share is held out"
                )


def _each_file(paths: Iterable[str]) -> Iterator[str]:
    for path in paths:
        yield from [path] if hub.is_hub_id(path) else map(str, find_files(path))


class ToySource:
    """Rows of the embedded world; its judge stands behind `world`."""

    def __init__(self, config: DataConfig, wanted: str | None = None) -> None:
        self.config = config
        self.world = ToyWorld(config.seed)
        # Its prompts are split by contributors: of files there is validation only.
        self._files = FileSource(replace(config, test_fraction=0.0), wanted)

    @property
    def template(self) -> Template | None:
        """Plain for the world's own rows."""
        return self._files.template

    def provenance(self) -> dict[str, Any]:
        """The seed and the knobs of the world, and sha256 of the comparisons."""
        return {**self._made_by(), **self._files.provenance()}

    def _made_by(self) -> dict[str, Any]:
        return {"toyworld": {"seed": self.world.seed, "config": asdict(self.world.config)}}

    def licences(self) -> dict[str, str]:
        """None to tell: the world is part of this package, and comparisons are made in it."""
        return {}

    def text(self, split: Split) -> Text:
        """The corpus, and beyond it `toy_valid` documents for each held-out part."""
        n, held_out = self.config.toy_documents, self.config.toy_valid
        after = n + held_out
        parts = {"train": (0, n), "valid": (n, after), "test": (after, after + held_out)}
        bounds = parts[split]

        def read(
            name: str, reports: list[FileReport], watch: Callable[[BinaryIO], object]
        ) -> Iterator[Document]:
            del name, reports, watch
            return map(self.world.document, range(*bounds))

        made = {"version": __version__, "bounds": bounds, **self._made_by()}
        return Text(split, ("toyworld",), made, read, made=True)

    def tokenizer_texts(self) -> Sequence[str]:
        """Documents, prompts and answers of the world."""
        return self.world.tokenizer_texts(min(self.config.toy_documents, 4_000))

    def demonstrations(self, split: Split) -> Sequence[Demonstration]:
        """Imperfect demonstrations by simulated labelers."""
        self._files.meet(None, "the embedded world")
        return self.world.demonstrations(self._size("toy_demonstrations", split), split=split)

    def dialogues(self, split: Split) -> Sequence[Dialogue]:
        """Chats from files: the world has single turns only."""
        return self._files.dialogues(split)

    def comparisons(self, split: Split) -> Sequence[Comparison]:
        """Collected comparisons, read from `config.comparisons`."""
        return self._files.comparisons(split)

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """Prompts with the hidden task that the judge needs in `meta`."""
        self._files.meet(None, "the embedded world")
        offset = self.config.toy_offset if split == "train" else 0
        return self.world.prompts(self._size("toy_prompts", split), split=split, offset=offset)

    def _size(self, field: str, split: Split) -> int:
        size: Any = getattr(self.config, field) if split == "train" else self.config.toy_valid
        return int(size)
