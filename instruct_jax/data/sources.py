"""Where a run's rows come from: the embedded world, or files and hub data sets.

`open_source(DataConfig)` answers the same questions for both: documents to pretrain on,
demonstrations, dialogues, comparisons, prompts, each for a split, and the template that they are
put into, which is one for the whole run. Splits of the embedded world are disjoint in contributors
(DATA-6); how files are divided is said in `file_source`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from instruct_jax import __version__
from instruct_jax.data.config import ROW_FIELDS, DataConfig
from instruct_jax.data.corpus import Text
from instruct_jax.data.file_source import FileSource
from instruct_jax.data.formats import FileReport
from instruct_jax.data.rows import Comparison, Demonstration, Dialogue, Document, Prompt
from instruct_jax.data.shares import Shares
from instruct_jax.data.templates import Template
from instruct_jax.data.toyworld import ToyWorld
from instruct_jax.data.toyworld.world import Split
from instruct_jax.errors import ConfigError


class Source(Protocol):
    """Rows by split: "train", "valid" or "test"; of files the last two may be empty."""

    config: DataConfig

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

    def counts(self) -> dict[str, dict[str, int]]:
        """Rows of every kind but text that was read so far, in every part that is known."""
        ...

    def shares(self, kind: str, index: Any = None) -> Shares | None:
        """Of which file each training row read last is, or each of those `index` int[M]; None where
        the files have no weights.
        """
        ...

    def text(self, split: Split) -> Text:
        """Pretraining text, one document at a time."""
        ...

    def texts(self) -> Sequence[Text]:
        """Training text of each source apart."""
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

    def comparisons(
        self, split: Split, *, most: tuple[int, str] | None = None
    ) -> Sequence[Comparison]:
        """Prompts with ranked completions, of which no row may have more than (K, field)."""
        ...

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """Prompts alone."""
        ...


def open_source(
    config: DataConfig,
    *,
    template: str | None = None,
    model: str | Path = "",
    weighed: Sequence[str] = (),
) -> Source:
    """The source that a config names. `template` is that of the model folder `model` which the run
    starts from: ConfigError where the config names another, and where it has weights of files whose
    rows the caller does not draw by them; `weighed` are the kinds that it does.
    """
    for kind in ROW_FIELDS:
        if kind not in weighed and config.weights(kind):
            raise ConfigError(
                f"config.data.{kind}: nothing here is drawn by weights, leave them out"
            )
    wanted = config.template or template
    if template is not None and wanted != template:
        raise ConfigError(
            f"config.data.template={wanted}: {model} was trained with {template!r}; leave it out, "
            "or start from a model that has not been fine-tuned"
        )
    if config.source == "toyworld":
        return ToySource(config, wanted)
    return FileSource(config, wanted)


class ToySource:
    """Rows of the embedded world; its judge stands behind `world`."""

    def __init__(self, config: DataConfig, wanted: str | None = None) -> None:
        self.config = config
        self.world = ToyWorld(config.seed)
        # Its prompts are split by contributors: of files there is validation only.
        self._files = FileSource(replace(config, test_fraction=0.0), wanted)
        self._made: dict[str, dict[str, int]] = {}

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

    def counts(self) -> dict[str, dict[str, int]]:
        """Those of the world that were made, and those of files."""
        return {**self._made, **self._files.counts()}

    def shares(self, kind: str, index: Any = None) -> Shares | None:
        """Those of files: the world's own rows are one source."""
        return self._files.shares(kind, index)

    def texts(self) -> list[Text]:
        """The corpus is one source."""
        return [self.text("train")]

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

    def comparisons(
        self, split: Split, *, most: tuple[int, str] | None = None
    ) -> Sequence[Comparison]:
        """Collected comparisons, read from `config.comparisons`."""
        return self._files.comparisons(split, most=most)

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """Prompts with the hidden task that the judge needs in `meta`."""
        self._files.meet(None, "the embedded world")
        offset = self.config.toy_offset if split == "train" else 0
        return self.world.prompts(self._size("toy_prompts", split), split=split, offset=offset)

    def _size(self, field: str, split: Split) -> int:
        size: Any = getattr(self.config, field) if split == "train" else self.config.toy_valid
        self._made.setdefault(field.removeprefix("toy_"), {})[split] = int(size)
        return int(size)
