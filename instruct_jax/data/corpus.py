"""Text of any size as files of tokens: tokenised once, a few megabytes at a time, and read by rows.

    FOLDER/NAME-KEY/plan.json       what the tokens are of: files, their sizes and sha256; parts
                                    (paths as in paths.py)
    FOLDER/NAME-KEY/00000.tokens    the documents of part 0, EOS after each; uint16 or uint32
    FOLDER/NAME-KEY/00000.json      how much of part 0 is safely there, and whether that is all
    FOLDER/NAME-KEY/00000.sums      once it is: checksums of its blocks, for whoever reads them

KEY is a hash of the tokenizer and of the settings that choose the documents, so corpora lie side by
side in one folder and are found again. Files that have changed since are noticed, never used in
silence: a run that goes on would go on with other text.

A part is a run of source files, or one large file; several processes make the parts that are theirs
(`Corpus.make`). Ids are appended to a part and then, every COMMIT_TOKENS, counted in its journal;
what a killed process left behind the last count is cut off by the next, which reads the part's text
again from its start but tokenises only what is missing. So the tokens are the same, byte for byte,
however often the work was stopped. Rows of any length are cut from the parts end to end.
"""

import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from instruct_jax.data import hub
from instruct_jax.data.files import hash_files, list_files, remember_hashes
from instruct_jax.data.formats import FileReport
from instruct_jax.data.journal import (
    PLAN,
    SUMS,
    TOKENS,
    Journal,
    check_owner,
    read_journal,
    sums_of,
)
from instruct_jax.data.progress import Progress
from instruct_jax.data.rows import DataError, Document
from instruct_jax.data.tokenizer import Tokenizer
from instruct_jax.data.tokens import Part, TokenRows, block_sums, token_batches
from instruct_jax.errors import CheckpointError
from instruct_jax.files import hash_of_file, read_object, write_bytes, write_json
from instruct_jax.paths import expanded, given_back, published

FORMAT = 1
PART_BYTES = 256 * 2**20
MAX_PARTS = 256  # every part is an open file of the process that reads
COMMIT_TOKENS = 4 * 2**20
POLL_SECONDS = 1.0

# Of every name its files, each with size and time of change.
Groups = Mapping[str, Mapping[str, dict[str, Any]]]
Read = Callable[[str, list[FileReport], Callable[[BinaryIO], object]], Iterator[Document]]


@dataclass(frozen=True)
class Text:
    """The documents of one split of a source, for `Corpus`.

    `names` are files, globs or hub ids, each read apart from the others, and in this order, by
    `read(name, reports, watch)` (arguments of `formats.stream_documents`). `settings` are JSON
    values: all else that decides which documents come. Behind the names of a text that is `made` by
    the program there are no files. With `strict`, tokens made without the bad rows are refused.
    """

    name: str
    names: tuple[str, ...]
    settings: Mapping[str, Any]
    read: Read
    made: bool = False
    strict: bool = True

    def __iter__(self) -> Iterator[Document]:
        reports: list[FileReport] = []
        return itertools.chain.from_iterable(
            self.read(name, reports, lambda file: None) for name in self.names
        )


class Corpus:
    """The tokens of a Text in a folder: `plan()` by one process, then `make()` by one or several,
    then `rows(length)`.
    """

    def __init__(self, text: Text, tokenizer: Tokenizer, folder: str | os.PathLike[str]) -> None:
        identity = json.dumps([tokenizer.fingerprint, text.settings], sort_keys=True)
        key = hashlib.sha256(identity.encode()).hexdigest()[:12]
        self.text = text
        self.tokenizer = tokenizer
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        self.directory = Path(folder) / f"{text.name}-{key}"

    def plan(self) -> None:
        """Divides the text into parts, or finds it divided.

        DataError where the files are not those whose tokens are here; where these are not all made
        yet, they are begun anew.
        """
        path = self.directory / PLAN
        groups = self._groups(self.text.names)
        found = {p: stat for group in groups.values() for p, stat in group.items()}
        if path.exists():
            before = self._read_plan(found)
            change = _change(before["files"], groups)
            complete = all(self._journal(i).complete for i in range(len(before["parts"])))
            if change is None and (complete or found.keys() == before["files"].keys()):
                return
            if complete:
                raise DataError(
                    f"{change} since its tokens were made",
                    path=self.directory,
                    hint="restore it; or, for a new run on the new text, delete this folder",
                )
            shutil.rmtree(self.directory)
        for file, sha256 in _hashes(groups).items():
            found[file]["sha256"] = sha256
        with _named(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        parts = _parts(self.text.names, _sizes(groups))
        plan = {"format": FORMAT, "corpus": self.directory.name, "files": found, "parts": parts}
        with _locked(self.directory, os.O_RDONLY):  # of runs that begin together one writes it
            if not path.exists():
                _write_json(path, published(plan, self.directory))

    def make(self, share: int = 0, of: int = 1) -> None:
        """Tokenises what is missing of the parts share, share + of, ...; shows how far it is.

        DataError at a row that cannot be used. To be called by all processes with their own share;
        then each may `wait` for the others.
        """
        plan = self._read_plan()
        mine = range(share, len(plan["parts"]), of)
        groups = self._groups(name for i in mine for name in plan["parts"][i])
        with Progress(f"tokens of {self.text.name}", _sizes(groups)) as progress:
            for i in mine:
                names = plan["parts"][i]
                with _locked(self._path(i), os.O_RDWR | os.O_CREAT):
                    try:
                        self._make_part(i, names, progress)
                    except DataError:
                        if of == 1:
                            self._leave_nothing()
                        raise
                progress.end(names)

    def wait(self) -> None:
        """Returns when all parts are made. The files tell: no collective waits for an hour."""
        for i in range(len(self._read_plan()["parts"])):
            while not self._journal(i).complete:
                time.sleep(POLL_SECONDS)

    def rows(self, length: int, *, required: bool = True) -> TokenRows:
        """The text in rows of `length` tokens; DataError where it is not all made, and for less
        than one row unless none is `required`.
        """
        journals = [self._journal(i) for i in range(len(self._read_plan()["parts"]))]
        if not all(journal.complete for journal in journals):
            raise DataError("its tokens are not all made", path=self.directory)
        bad = [report for journal in journals for report in journal.bad]
        if bad and self.text.strict:
            hint = "mend them and delete this folder, or accept it with on_bad_row=skip"
            row = expanded(bad[0], self.directory)
            raise DataError(f"made without bad rows: {row}", path=self.directory, hint=hint)
        total = sum(journal.tokens for journal in journals)
        if total < length and required:
            hint = "give more text, or a smaller length"
            if not total:
                hint = (
                    "all of it is held out: lower data.valid_fraction, or cut plain text into more "
                    "documents with data.split_text=paragraph"
                )
            raise DataError(f"{total} tokens of text do not fill one row of {length}", hint=hint)
        parts = [
            Part(self._path(i), journal.tokens, self._sums(i, journal))
            for i, journal in enumerate(journals)
        ]
        limit = self.tokenizer.vocab_size
        return TokenRows(parts, self.dtype, length, vocab_size=limit)

    def _sums(self, i: int, journal: Journal) -> Path | None:
        with self._named_damage(self._path(i)):
            return sums_of(self._path(i), journal)

    def _make_part(self, i: int, names: Sequence[str], progress: Progress) -> None:
        done = self._journal(i)
        if done.complete:
            return
        reports: list[FileReport] = []

        def documents() -> Generator[Document, None, None]:
            for name in names:
                yield from self.text.read(name, reports, progress.watch)
                progress.end([name])

        committed = done.tokens
        with _named(self._path(i)), open(self._path(i), "r+b") as file:
            size = done.tokens * self.dtype.itemsize
            if file.seek(0, os.SEEK_END) < size:
                hint = "delete this folder"
                raise DataError("shorter than its journal says", path=self._path(i), hint=hint)
            file.truncate(size)
            file.seek(size)
            with closing(documents()) as text:
                missing = itertools.islice(text, done.documents, None)
                for count, ids in token_batches(missing, self.tokenizer, self.dtype):
                    file.write(ids.data)
                    done = done.after(count, len(ids))
                    progress.show(len(ids))
                    if done.tokens - committed >= COMMIT_TOKENS:
                        self._commit(i, done, file)
                        committed = done.tokens
            bad = tuple(str(report) for report in reports if report.bad)
            self._commit(i, done, file)  # before there are sums, of which no journal tells yet
            sums = self._path(i).with_suffix(SUMS)
            write_bytes(sums, block_sums(self._path(i), self.dtype))
            whole = {"complete": True, "bad": bad, "sums": hash_of_file(sums)}
            self._commit(i, dataclasses.replace(done, **whole), file)

    def _commit(self, i: int, journal: Journal, file: BinaryIO) -> None:
        """The order is the point: a journal never counts what the file does not hold."""
        file.flush()
        os.fsync(file.fileno())
        told = published(vars(journal), self.directory)
        _write_json(self._path(i).with_suffix(".json"), told)

    def _leave_nothing(self) -> None:
        """Takes back what a mistake in the first rows left behind."""
        if not any(f.suffix == ".json" and f.stem != "plan" for f in self.directory.iterdir()):
            shutil.rmtree(self.directory)
            with suppress(OSError):
                self.directory.parent.rmdir()  # where nothing else is in it

    def _groups(self, names: Iterable[str]) -> Groups:
        return {name: {} if self.text.made else _files_of(name) for name in names}

    def _read_plan(self, files: Iterable[str] = ()) -> dict[str, Any]:
        """The plan, its paths as they were given in the text's names and in `files`."""
        path = self.directory / PLAN
        if not path.exists():
            hint = "every process must see the same folder"
            raise DataError("no plan of tokens here", path=path, hint=hint)
        with self._named_damage(path):
            plan = read_object(path, "format", "files", "parts")
        if plan["format"] != FORMAT:
            raise DataError(f"format {plan['format']}, this version reads {FORMAT}", path=path)
        with self._named_damage(path):
            check_owner(path, plan.get("corpus"), self.directory.name)
        given = given_back((*self.text.names, *files), self.directory)

        def back(path: str) -> str:
            return given.get(path) or expanded(path, self.directory)

        plan["files"] = {back(path): stat for path, stat in plan["files"].items()}
        plan["parts"] = [[back(name) for name in part] for part in plan["parts"]]
        remember_hashes(plan["files"])
        return plan

    def _journal(self, i: int) -> Journal:
        with self._named_damage(self._path(i).with_suffix(".json")):
            return read_journal(self._path(i), f"{self.directory.name}/{i}")

    @contextmanager
    def _named_damage(self, path: Path) -> Iterator[None]:
        """CheckpointError with what to do about it."""
        try:
            yield
        except (CheckpointError, TypeError) as error:
            told = error if isinstance(error, CheckpointError) else f"{path}: {error}"
            raise CheckpointError(
                f"{told}; delete {self.directory}: the tokens are made again from the text"
            ) from error

    def _path(self, i: int) -> Path:
        return self.directory / f"{i:05}{TOKENS}"


@contextmanager
def _locked(path: Path, flags: int) -> Iterator[None]:
    """Within it no other run has `path`; the system lets go when the process ends."""
    with _named(path):
        descriptor = os.open(path, flags, 0o666)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _files_of(name: str) -> dict[str, dict[str, Any]]:
    """Size in bytes and time of change of the files behind a name; a hub id has none to give."""
    if hub.is_hub_id(name):
        return {name: {"size": 0, "mtime_ns": 0}}
    try:
        stats = {str(path): path.stat() for path in list_files(name)}
    except OSError as error:  # gone since it was listed
        reason = f"cannot be read: {error.strerror or error}"
        raise DataError(reason, path=error.filename or name) from error
    return {path: {"size": s.st_size, "mtime_ns": s.st_mtime_ns} for path, s in stats.items()}


def _sizes(groups: Groups) -> dict[str, int]:
    return {name: sum(s["size"] for s in group.values()) for name, group in groups.items()}


def _hashes(groups: Groups) -> dict[str, str]:
    """sha256 by path."""
    named = (name for name, group in groups.items() if group)
    return {path: sha256 for name in named for path, sha256 in hash_files(name).items()}


def _change(before: Mapping[str, Any], groups: Groups) -> str | None:
    """The first difference in words, or None.

    Contents are compared where the sizes and times, which cost nothing to know, are not the same.
    """
    now = {path: stat for group in groups.values() for path, stat in group.items()}
    if list(now) == list(before) and all(now[p].items() <= before[p].items() for p in now):
        return None
    hashes = _hashes(groups)
    if list(hashes.values()) == [stat["sha256"] for stat in before.values()]:
        return None
    for path, sha256 in hashes.items():
        if path not in before:
            return f"{path} is new"
        if sha256 != before[path]["sha256"]:
            return f"{path} has changed ({before[path]['size']:,} bytes, now {now[path]['size']:,})"
    gone = [path for path in before if path not in now]
    return f"{gone[0]} is gone" if gone else "the order of the files has changed"


def _parts(names: Sequence[str], sizes: Mapping[str, int]) -> list[list[str]]:
    """Names in runs of PART_BYTES or a little more, of larger ones where there were too many."""
    parts: list[list[str]] = [[]]
    room = limit = max(PART_BYTES, -(-sum(map(sizes.__getitem__, names)) // (MAX_PARTS // 2)))
    for name in names:
        if parts[-1] and sizes[name] > room:
            parts.append([])
            room = limit
        parts[-1].append(name)
        room -= sizes[name]
    return parts


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with _named(path):
        write_json(path, value)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Within it an error of the system names a file: a full disk does not say which one was."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
