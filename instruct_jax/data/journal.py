"""What is written down of the tokens of a corpus: how many of a part are safe, and checksums."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from instruct_jax.data.tokens import block_sums
from instruct_jax.errors import CheckpointError
from instruct_jax.files import hash_of_file, read_object

PLAN, TOKENS, SUMS = "plan.json", ".tokens", ".sums"


@dataclass(frozen=True)
class Journal:
    """How much of a part is safely in its file; `bad` are the verdicts on files with bad rows.

    `part` says whose it is, and `sums` has the sha256 of the checksums; older ones have neither.
    """

    documents: int = 0
    tokens: int = 0
    complete: bool = False
    bad: tuple[str, ...] = ()
    part: str = ""
    sums: str = ""

    def after(self, documents: int, tokens: int) -> "Journal":
        """With so many more."""
        counts = {"documents": self.documents + documents, "tokens": self.tokens + tokens}
        return dataclasses.replace(self, **counts)


def read_journal(tokens: Path, part: str) -> Journal:
    """That of the part whose tokens are in a file; an empty one where there is none."""
    path = tokens.with_suffix(".json")
    if not path.exists():
        return Journal(part=part)
    journal = Journal(**read_object(path))
    check_owner(path, journal.part, part)
    return journal


def sums_of(tokens: Path, journal: Journal) -> Path | None:
    """The checksums of a part; CheckpointError where they are not those of its journal."""
    if not journal.sums:  # made by an older version, or not complete
        return None
    path = tokens.with_suffix(SUMS)
    if not path.exists() or hash_of_file(path) != journal.sums:
        raise CheckpointError(f"{path} is not the file that the journal beside it names")
    return path


def check_owner(path: Path, said: str | None, wanted: str) -> None:
    """CheckpointError where a file says that it is of something else; older ones do not say."""
    if said and said != wanted:
        raise CheckpointError(f"{path} is of {said}")


def check_tokens(directory: Path) -> None:
    """Reads all the tokens in the folder of a corpus. CheckpointError or DataError where they are
    not as they were written; those of a part that is not complete are not looked at.
    """
    plan = read_object(directory / PLAN, "parts")
    check_owner(directory / PLAN, plan.get("corpus"), directory.name)
    for i in range(len(plan["parts"])):
        path = directory / f"{i:05}{TOKENS}"
        journal = read_journal(path, f"{directory.name}/{i}")
        if path.with_suffix(SUMS).exists() and not path.with_suffix(".json").exists():
            raise CheckpointError(f"{path.with_suffix('.json')} is gone")
        sums = sums_of(path, journal)
        if journal.complete and sums is not None:
            dtype = np.dtype("<u2" if path.stat().st_size <= 2 * journal.tokens else "<u4")
            if block_sums(path, dtype) != sums.read_bytes():
                raise CheckpointError(f"{path} is not as it was written")
