"""Rows of files and hub data sets, divided into three parts.

Rows go to a part by a salted hash of their prompt, which of a dialogue is all that precedes its
last answer, so adding data never moves a row, and one prompt is in one part whatever kind of row it
comes as. The held-out parts may have files of their own, which are none of those that are trained
on, and none of each other's, and may be empty. A file is read once, for all parts.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any, BinaryIO, TypeVar

import numpy as np

from instruct_jax.data.config import ROW_FIELDS, DataConfig, RowFiles, each_file
from instruct_jax.data.corpus import Text
from instruct_jax.data.files import hash_files, same_file
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
from instruct_jax.data.shares import Shares
from instruct_jax.data.templates import PLAIN, Template, template_named
from instruct_jax.data.toyworld.world import Split
from instruct_jax.errors import ConfigError

PARTS: tuple[Split, ...] = ("train", "valid", "test")
Row = TypeVar("Row", Document, Demonstration, Comparison, Prompt, Dialogue)


class FileSource:
    """Rows of the files, globs and hub ids of a DataConfig, put into the template `wanted`.

    Where none is wanted each row says what it is put into, and DataError tells of two that differ.
    """

    def __init__(self, config: DataConfig, wanted: str | None = None) -> None:
        """ConfigError for a file of a held-out part that is in another part too."""
        self.config = config
        trained_on = "which is trained on: name other files, or leave it out and a share is held"
        _refuse_shared("data.valid", config.valid, "data", config, f"{trained_on} out")
        _refuse_shared("data.test", config.test, "data", config, f"{trained_on} out")
        chosen_on = "which a model may be chosen by: what it is judged by is none of that"
        _refuse_shared("data.test", config.test, "data.valid", config.valid, chosen_on)
        self._wanted = wanted
        self._met: tuple[str, str] | None = None
        self._divided: dict[tuple[str, tuple[str, ...]], dict[Split, list[Any]]] = {}
        self._counts: dict[str, dict[Split, int]] = {}
        # Of training rows, of which path each is: all that were read, and those that are left.
        self._read_from: dict[str, list[int]] = {}
        self._origins: dict[str, list[int]] = {}

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

    def counts(self) -> dict[str, dict[str, int]]:
        """Rows of every kind that was read, in every part."""
        return {
            kind: {part: parts[part] for part in PARTS if part in parts}
            for kind, parts in self._counts.items()
        }

    def shares(self, kind: str, index: Any = None) -> Shares | None:
        """Of the training rows read last, or those `index` int[M] of them; None without weights."""
        weights = self.config.weights(kind)
        if weights is None:
            return None
        source = np.array(self._origins[kind], np.int64)
        if index is not None:
            source = source[np.asarray(index)]
        return Shares(source, weights, self.config.files(kind))

    def texts(self) -> list[Text]:
        """Training documents of each path apart."""
        return [self.text("train", only=path) for path in self._paths("documents")]

    def text(self, split: Split, *, only: str | None = None) -> Text:
        """Documents of `config.documents`, or of one path of these; long ones in pieces, so that a
        few books divide.
        """
        config, own = self.config, self._own("documents", split)
        paths = own or (self._paths("documents") if only is None else (only,))
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
            tuple(paths if config.limit is not None else each_file(paths)),
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

    def comparisons(
        self, split: Split, *, most: tuple[int, str] | None = None
    ) -> Sequence[Comparison]:
        """Comparisons of `config.comparisons`; for `most` see `read_comparisons`."""
        read = partial(
            read_comparisons,
            subsample=self.config.completions,
            tie_gap=self.config.tie_gap,
            seed=self.config.seed,
            most=most,
        )
        rows = self._rows("comparisons", read, split, lambda row: plain_text(row.prompt))
        if split == "train":
            excluded, origins = self.config.exclude_datasets, self._read_from["comparisons"]
            kept = [i for i, row in enumerate(rows) if row.meta.get("dataset") not in excluded]
            rows, self._origins["comparisons"] = [rows[i] for i in kept], [origins[i] for i in kept]
            self._counts["comparisons"]["train"] = len(rows)
        return rows

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
        own = self._own(field, split)
        paths = own or self._paths(field)
        if (field, paths) not in self._divided:
            shared = [part for part in PARTS if not self._own(field, part)]
            parts: dict[Split, list[Row]] = {part: [] for part in ([split] if own else shared)}
            origins = []
            for number, path in enumerate(paths):
                for row in self._read(path, read):
                    part = split if own else self._part(field, key(row))
                    parts[part].append(row)
                    if part == "train":
                        origins.append(number)
            self._divided[field, paths] = parts
            if not own:
                self._read_from[field] = self._origins[field] = origins
            self._counts.setdefault(field, {}).update({part: len(parts[part]) for part in parts})
        parts = self._divided[field, paths]
        if split == "train" and not parts["train"]:
            valid, test = self.config.fractions
            raise DataError(
                f"all {sum(map(len, parts.values()))} rows of data.{field} are held out, none is "
                "left to train on",
                hint=f"data.valid_fraction is {valid:g}, data.test_fraction {test:g}: lower them",
            )
        return parts[split]

    def _read(self, path: str, read: Callable[..., Rows[Row]]) -> Rows[Row]:
        found = read(
            path,
            template=self._wanted,
            limit=self.config.limit,
            on_bad_row=self.config.on_bad_row,
        )
        file = found.report[0].path if len(found.report) == 1 else path
        for name in dict.fromkeys(row.template for row in found):
            self.meet(name, file)
        return found

    def _own(self, field: str, split: Split) -> tuple[str, ...]:
        """The files that only this held-out part has."""
        if split == "train":
            return ()
        paths: tuple[str, ...] = getattr(getattr(self.config, split), field)
        return paths

    def _paths(self, field: str) -> tuple[str, ...]:
        paths = self.config.files(field)
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


def _refuse_shared(
    group: str, held_out: RowFiles, other: str, files: RowFiles | DataConfig, why: str
) -> None:
    """ConfigError where a file of the group `held_out` is one of `files`, or a copy of it."""
    for field, beside in itertools.product(ROW_FIELDS, ROW_FIELDS):
        others = files.files(beside) if isinstance(files, DataConfig) else getattr(files, beside)
        for path, another in itertools.product(getattr(held_out, field), others):
            same = same_file(path, another)
            if same is not None:
                raise ConfigError(
                    f"config.{group}.{field}: {same[0]} is the file {same[1]} of {other}.{beside}, "
                    f"{why}"
                )
