"""Where a run's rows come from: the embedded world, or files and hub data sets.

`open_source(DataConfig)` answers the same four questions for both: documents to pretrain on,
demonstrations, comparisons, prompts, each for a split. Splits of the embedded world are disjoint in
contributors (DATA-6); rows of files go to a split by a salted hash of their prompt, so adding data
never moves a row and the completions of one prompt never straddle the border.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

from instruct_jax.data.files import hash_files
from instruct_jax.data.formats import (
    read_comparisons,
    read_demonstrations,
    read_dialogues,
    read_documents,
    read_prompts,
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
    demonstrations: tuple[str, ...] = ()
    comparisons: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    dialogues: tuple[str, ...] = ()  # chats of several turns, for fine-tuning
    template: str | None = None
    limit: int | None = None
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


class Source(Protocol):
    """Rows by split: "train", "valid" or "test" (files have one held-out part for both)."""

    def provenance(self) -> dict[str, Any]:
        """What the rows come from, for the record of a run."""
        ...

    def licences(self) -> dict[str, str]:
        """The licence of every file and hub id, for people and for the record."""
        ...

    def documents(self, split: Split) -> Sequence[Document]:
        """Pretraining text."""
        ...

    def tokenizer_texts(self) -> Sequence[str]:
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

    def documents(self, split: Split) -> Sequence[Document]:
        """Documents of `config.documents`; long ones in pieces, so that a few books divide."""

        def read(path: str, **options: Any) -> list[Document]:
            rows = read_documents(path, split=self.config.split_text, **options)
            return [piece for row in rows for piece in _pieces(row)]

        return self._rows("documents", read, split, lambda row: row.text)

    def tokenizer_texts(self) -> Sequence[str]:
        """The documents, and the demonstrations where there are any."""
        texts = [row.text for row in self.documents("train")]
        if self.config.demonstrations:
            texts += [row.prompt + row.response for row in self.demonstrations("train")]
        return texts

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
        paths = getattr(self.config, field)
        if not paths:
            raise DataError(f"data.{field} is empty; name the files (or hub ids) to read")
        rows: list[Row] = []
        for path in paths:
            rows += read(
                path,
                template=self.config.template,
                limit=self.config.limit,
                on_bad_row=self.config.on_bad_row,
            )
        held_out = split != "train"
        return [row for row in rows if self._is_held_out(key(row)) == held_out]

    def _is_held_out(self, text: str) -> bool:
        digest = hashlib.sha256(f"split:{self.config.seed}:{text}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.config.valid_fraction * 2**64


def _pieces(document: Document, *, size: int = 20_000) -> list[Document]:
    """The document cut at paragraph ends, into pieces of `size` characters or a little more."""
    pieces, start = [], 0
    while (end := document.text.find("\n\n", start + size)) >= 0:
        pieces.append(Document(document.text[start : end + 2], document.meta))
        start = end + 2
    return [*pieces, Document(document.text[start:], document.meta)]


class ToySource:
    """Rows of the embedded world; its judge stands behind `world`."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.world = ToyWorld(config.seed)
        self._files = FileSource(config)

    def provenance(self) -> dict[str, Any]:
        """The seed and the knobs of the world, and sha256 of the comparisons."""
        world = {"seed": self.world.seed, "config": asdict(self.world.config)}
        return {"toyworld": world, **self._files.provenance()}

    def licences(self) -> dict[str, str]:
        """None to tell: the world is part of this package, and comparisons are made in it."""
        return {}

    def documents(self, split: Split) -> Sequence[Document]:
        """The corpus; its last `toy_valid` documents are held out."""
        n, held_out = self.config.toy_documents, self.config.toy_valid
        corpus = self.world.pretraining_corpus(n + held_out)
        return corpus[:n] if split == "train" else corpus[n:]

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
