"""Whether a run has ended and still stands: what it left is as it was, and what it was made of too.

Then there is nothing to do for the same command, and nothing in its directory is touched. Where
anything has changed the run is taken up, and says itself what stands against it (R20).
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from instruct_jax.cli.config import leaves
from instruct_jax.cli.record import ARTEFACTS
from instruct_jax.cli.replacing import artefacts
from instruct_jax.files import hash_of_file, read_object
from instruct_jax.paths import expanded, published

INPUTS = "inputs"
_MODEL_RECORDS = ("model.json", "adapter.json")


def finish(workdir: Path, config: Any, writes: Sequence[str]) -> dict[str, Any]:
    """What is recorded of a run that has ended: hashes of what it wrote, and of what it was made
    of.
    """
    found = {str(path): hash_of_file(workdir / path) for path in artefacts(workdir, writes)}
    made = {} if config is None else {INPUTS: _inputs(config, workdir)}
    return made | {ARTEFACTS: found}


def stands(workdir: Path, record: Mapping[str, Any], config: Any) -> bool:
    """Whether the run of `record` has ended and what `finish` recorded is so still."""
    if ARTEFACTS not in record or record.get(INPUTS) != _inputs(config, workdir):
        return False
    hashes = {workdir / name: digest for name, digest in record[ARTEFACTS].items()}
    for folder in {path.parent for path in hashes}:
        for arrays in folder.glob("params/manifest.json"):
            sums = read_object(arrays).items()
            hashes |= {arrays.parent / name: digest for name, (_, digest) in sums}
    there = all(path.is_file() and hash_of_file(path) == h for path, h in hashes.items())
    return there and _rows_are_as_recorded(record, workdir)


def _rows_are_as_recorded(record: Mapping[str, Any], workdir: Path) -> bool:
    """Of the files of rows that it has read."""
    data = record.get("data")
    for name, digest in (data if isinstance(data, dict) else {}).items():
        path = Path(expanded(name, workdir))
        if isinstance(digest, str) and path.is_file() and hash_of_file(path) != digest:
            return False
    return True


def _inputs(config: Any, workdir: Path) -> dict[str, str]:
    """Hashes by path, as it leads there from `workdir`, of the models and the code that a
    configuration names: of what says what a model is, its hashes with it, and of other folders of
    what is listed there.
    """
    values = (value for _, value in leaves(json.loads(json.dumps(dataclasses.asdict(config)))))
    pieces = {piece for value in values for piece in _pieces(value)}
    found = {}
    for path in sorted({Path(os.path.realpath(piece)) for piece in pieces}):
        try:
            if path.is_dir():
                told = json.dumps(_told(path)).encode()
                found[str(path)] = hashlib.sha256(told).hexdigest()
            elif path.is_file() and path.suffix == ".py":
                found[str(path)] = hash_of_file(path)
        except OSError:  # what may not be read now was no input, or is none that can be compared
            continue
    return published(found, workdir)


def _pieces(value: Any) -> Iterator[str]:
    """What may be a path in a value such as "models=a,b:mean" or "python=FILE:NAME"."""
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str) and "\0" not in item:
            yield from filter(None, {item, *re.split(r"[=,]|:(?=[^/]*$)", item)})


def _told(folder: Path) -> list[Any]:
    records = [path for depth in ("", "*/") for path in sorted(folder.glob(f"{depth}*.json"))]
    if own := [path for path in records if path.name in _MODEL_RECORDS]:
        return [hash_of_file(path) for path in own]
    stats = [(path.name, path.stat()) for path in sorted(folder.iterdir())]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
