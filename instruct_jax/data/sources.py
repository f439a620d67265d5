"""Where a run's rows come from: the embedded world, or files and hub data sets.

`open_source(DataConfig)` answers the same four questions for both: documents to pretrain on,
demonstrations, comparisons, prompts, each for a split. Splits of the embedded world are disjoint in
contributors (DATA-6); rows of files go to a split by a salted hash of their prompt, so adding data
never moves a row and the completions of one prompt never straddle the border.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, TypeVar

from instruct_jax import __version__
from instruct_jax.data import hub
from instruct_jax.data.corpus import Text
from instruct_jax.data.files import find_files, hash_files
from instruct_jax.data.formats import (
    FileReport,
    read_comparisons,
    read_demonstrations,
    read_dialogues,
    read_prompts,
    stream_documents,
)
from instruct_jax.data.licences import find_licences
from instruct_jax.data.rows import Comparison, DataError, Demonstration, Dialogue, Document, Prompt
from instruct_jax.data.toyworld import ToyWorld
from instruct_jax.data.toyworld.world import Split
from instruct_jax.errors import ConfigError

ROW_FIELDS = ("documents", "demonstrations", "comparisons", "prompts", "dialogues")
Row = TypeVar("Row", Document, Demonstration, Comparison, Prompt, Dialogue)


@dataclass(frozen=True)
class DataConfig:
    """`source` is "toyworld" (the `toy_` sizes) or "files" (paths, globs or hub ids of each row
    type).

    Comparisons are files in both cases: in the embedded world `experiments/collect.py` makes them.
    """

    source: str = "toyworld"
    seed: int = 0
    documents: tuple[str, ...] = ()
    # The folder of tokenised documents, where other runs find them too; None: WORKDIR/tokens.
    token_dir: str | None = None
    demonstrations: tuple[str, ...] = ()
    comparisons: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    dialogues: tuple[str, ...] = ()  # chats of several turns, for fine-tuning
    template: str | None = None
    limit: int | None = None  # rows of each path; of a text file, its pieces
    # How a file of plain text is cut into documents: "file", "line" or "paragraph".
    split_text: Literal["file", "line", "paragraph"] = "file"
    # Rankings of these data sets are evaluation sets, never trained on.
    exclude_datasets: tuple[str, ...] = ("selfinstruct",)
    # Rankings with more completions than this many are cut to a random few; near ties are ties.
    completions: tuple[int, int] | None = None
    tie_gap: float = 0.0
    valid_fraction: float = 0.05
    on_bad_row: str = "error"
    toy_documents: int = 24_000
    toy_demonstrations: int = 4_000
    toy_prompts: int = 4_000
    toy_offset: int = 0  # training prompts of the world left to other stages
    toy_valid: int = 512

    def token_folder(self, workdir: Path) -> Path:
        """Where a run with this work directory keeps tokenised documents."""
        return workdir / "tokens" if self.token_dir is None else Path(self.token_dir)


class Source(Protocol):
    """Rows by split: "train", "valid" or "test" (files have one held-out part for both)."""

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


def open_source(config: DataConfig) -> Source:
    """The source a config names; ConfigError for an unknown one."""
    if config.source == "toyworld":
        return ToySource(config)
    if config.source == "files":
        return FileSource(config)
    raise ConfigError(f"data.source {config.source!r} is neither 'toyworld' nor 'files'")


class FileSource:
    """Rows of the files, globs and hub ids of a DataConfig."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config

    def provenance(self) -> dict[str, Any]:
        """sha256 of every local file."""
        paths = [p for field in ROW_FIELDS for p in getattr(self.config, field)]
        return {path: sha for source in paths for path, sha in hash_files(source).items()}

    def licences(self) -> dict[str, str]:
        """As found beside each file or in its card; see `data/licences.py`."""
        paths = [p for field in ROW_FIELDS for p in getattr(self.config, field)]
        return {name: licence for path in paths for name, licence in find_licences(path).items()}

    def text(self, split: Split) -> Text:
        """Documents of `config.documents`; long ones in pieces, so that a few books divide."""
        config, held_out = self.config, split != "train"
        paths = self._paths("documents")

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
                yield from (row for row in rows if self._is_held_out(row.text) == held_out)

        fields = ("documents", "seed", "valid_fraction", "split_text", "limit")
        return Text(
            "valid" if held_out else "train",
            # A limit counts the rows of all files of a path: those cannot be read apart.
            tuple(paths if config.limit is not None else _each_file(paths)),
            {"held_out": held_out, **{field: getattr(config, field) for field in fields}},
            read,
            strict=config.on_bad_row == "error",
        )

    def tokenizer_texts(self) -> Iterator[str]:
        """The documents, and the demonstrations where there are any."""
        yield from (row.text for row in self.text("train"))
        if self.config.demonstrations:
            yield from (row.prompt + row.response for row in self.demonstrations("train"))

    def demonstrations(self, split: Split) -> Sequence[Demonstration]:
        """Demonstrations of `config.demonstrations`."""
        return self._rows("demonstrations", read_demonstrations, split, lambda row: row.prompt)

    def dialogues(self, split: Split) -> Sequence[Dialogue]:
        """Chats of `config.dialogues`; those with the same first message go to one split."""

        def read(path: str, *, template: str | None, **options: Any) -> list[Dialogue]:
            return read_dialogues(path, **options)  # the template is the encoder's part here

        return self._rows("dialogues", read, split, lambda row: row.turns[0].text)

    def comparisons(self, split: Split) -> Sequence[Comparison]:
        """Comparisons of `config.comparisons`."""
        read = partial(
            read_comparisons,
            subsample=self.config.completions,
            tie_gap=self.config.tie_gap,
            seed=self.config.seed,
        )
        rows = self._rows("comparisons", read, split, lambda row: row.prompt)
        excluded = self.config.exclude_datasets if split == "train" else ()
        return [row for row in rows if row.meta.get("dataset") not in excluded]

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """Prompts of `config.prompts`."""
        return self._rows("prompts", read_prompts, split, lambda row: row.text)

    def _rows(
        self,
        field: str,
        read: Callable[..., Sequence[Row]],
        split: Split,
        key: Callable[[Row], str],
    ) -> list[Row]:
        rows: list[Row] = []
        for path in self._paths(field):
            rows += read(
                path,
                template=self.config.template,
                limit=self.config.limit,
                on_bad_row=self.config.on_bad_row,
            )
        held_out = split != "train"
        return [row for row in rows if self._is_held_out(key(row)) == held_out]

    def _paths(self, field: str) -> tuple[str, ...]:
        paths: tuple[str, ...] = getattr(self.config, field)
        if not paths:
            raise DataError(f"data.{field} is empty; name the files (or hub ids) to read")
        return paths

    def _is_held_out(self, text: str) -> bool:
        digest = hashlib.sha256(f"split:{self.config.seed}:{text}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.config.valid_fraction * 2**64


def _each_file(paths: Iterable[str]) -> Iterator[str]:
    for path in paths:
        yield from [path] if hub.is_hub_id(path) else map(str, find_files(path))


class ToySource:
    """Rows of the embedded world; its judge stands behind `world`."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.world = ToyWorld(config.seed)
        self._files = FileSource(config)

    def provenance(self) -> dict[str, Any]:
        """The seed and the knobs of the world, and sha256 of the comparisons."""
        return {**self._made_by(), **self._files.provenance()}

    def _made_by(self) -> dict[str, Any]:
        return {"toyworld": {"seed": self.world.seed, "config": asdict(self.world.config)}}

    def licences(self) -> dict[str, str]:
        """None to tell: the world is part of this package, and comparisons are made in it."""
        return {}

    def text(self, split: Split) -> Text:
        """The corpus; its last `toy_valid` documents are held out."""
        n, held_out = self.config.toy_documents, self.config.toy_valid
        bounds = (0, n) if split == "train" else (n, n + held_out)

        def read(
            name: str, reports: list[FileReport], watch: Callable[[BinaryIO], object]
        ) -> Iterator[Document]:
            del name, reports, watch
            return map(self.world.document, range(*bounds))

        made = {"version": __version__, "bounds": bounds, **self._made_by()}
        return Text("train" if split == "train" else "valid", ("toyworld",), made, read, made=True)

    def tokenizer_texts(self) -> Sequence[str]:
        """Documents, prompts and answers of the world."""
        return self.world.tokenizer_texts(min(self.config.toy_documents, 4_000))

    def demonstrations(self, split: Split) -> Sequence[Demonstration]:
        """Imperfect demonstrations by simulated labelers."""
        return self.world.demonstrations(self._size("toy_demonstrations", split), split=split)

    def dialogues(self, split: Split) -> Sequence[Dialogue]:
        """Chats from files: the world has single turns only."""
        return self._files.dialogues(split)

    def comparisons(self, split: Split) -> Sequence[Comparison]:
        """Collected comparisons, read from `config.comparisons`."""
        return self._files.comparisons(split)

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """Prompts with the hidden task that the judge needs in `meta`."""
        offset = self.config.toy_offset if split == "train" else 0
        return self.world.prompts(self._size("toy_prompts", split), split=split, offset=offset)

    def _size(self, field: str, split: Split) -> int:
        size: Any = getattr(self.config, field) if split == "train" else self.config.toy_valid
        return int(size)
