"""What a configuration says of a run's rows: where they come from, how they are divided."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from instruct_jax.data import hub
from instruct_jax.data.files import find_files
from instruct_jax.data.shares import read_weights, split_weight
from instruct_jax.data.templates import TemplateName
from instruct_jax.errors import ConfigError
from instruct_jax.settings import Settings, setting


@dataclass(frozen=True)
class RowFiles(Settings):
    """Files, globs, folders or hub ids of each kind of row."""

    def __post_init__(self) -> None:
        """ConfigError for a weight: what is held out is read whole."""
        super().__post_init__()
        for name in ROW_FIELDS:
            if read_weights(getattr(self, name), name):
                raise ConfigError(f"{name}: held-out files are read whole and have no weights")

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
        (),
        "text to pretrain on: files, globs, folders or hub ids, each with *WEIGHT or none",
        needs="source=files",
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
        for name in ROW_FIELDS:
            read_weights(getattr(self, name), name)
        if self.completions is not None and self.completions[0] > self.completions[1]:
            raise ConfigError(f"completions={self.completions}: expected (fewest, most)")

    @property
    def fractions(self) -> tuple[float, float]:
        """The shares of validation and of evaluation."""
        valid = self.valid_fraction
        return valid, valid if self.test_fraction is None else self.test_fraction

    def files(self, kind: str) -> tuple[str, ...]:
        """The files, globs and hub ids of a kind of row to train on, without weights."""
        return tuple(split_weight(name)[0] for name in getattr(self, kind))

    def weights(self, kind: str) -> tuple[int, ...] | None:
        """Those of these files, as whole numbers; None where they have none."""
        return read_weights(getattr(self, kind), kind)

    def paths(self) -> list[str]:
        """All files, globs and hub ids that are named."""
        held_out = [getattr(part, kind) for part in (self.valid, self.test) for kind in ROW_FIELDS]
        own = [self.files(kind) for kind in ROW_FIELDS]
        return [path for paths in (*own, *held_out) for path in paths]

    def find(self) -> list[str]:
        """Every file and hub id that is named; DataError for a file that is not there."""
        return list(each_file(self.paths()))

    def token_folder(self, workdir: Path) -> Path:
        """Where a run with this work directory keeps tokenised documents."""
        return workdir / "tokens" if self.token_dir is None else Path(self.token_dir)


def each_file(paths: Iterable[str]) -> Iterator[str]:
    """Every file of paths, globs and folders, and every hub id; DataError where there is none."""
    for path in paths:
        yield from [path] if hub.is_hub_id(path) else map(str, find_files(path))
