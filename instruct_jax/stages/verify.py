"""Everything in the directory of a run read, and compared with what was written there (R22).

What a run hands on is known by its hashes: those in its record once it is finished, in model.json
and adapter.json, in the manifests of its arrays, beside rows, and in the journals of its tokens.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from instruct_jax.cli.record import ARTEFACTS, read_record
from instruct_jax.cli.record import RECORD as RUN
from instruct_jax.cli.replacing import is_run
from instruct_jax.data.files import check_hash
from instruct_jax.data.journal import PLAN, TOKENS, check_tokens
from instruct_jax.data.rows import HASH_SUFFIX
from instruct_jax.errors import CheckpointError, RunError
from instruct_jax.files import hash_of_file, read_object
from instruct_jax.stages.record import RECORD, check_files, hashes_in
from instruct_jax.stages.record import read_record as read_model
from instruct_jax.stages.trained import ADAPTER_RECORD, PARAMS
from instruct_jax.training.checkpoint import unreadable
from instruct_jax.training.keeping import damage_of, pinned_steps, step_numbers

_CHECKPOINTS, _DAMAGED = "checkpoints", "damaged"


def verify_run(workdir: Path) -> Iterator[tuple[str, str | None]]:
    """(what, why it cannot be trusted; None where it can) of everything in `workdir`: its record,
    its steps, models, adapters, tokens, rows and reports, and those of runs inside it.
    """
    if (workdir / RUN).exists():
        yield "record", _told(_check_record, workdir)
    directory = workdir / _CHECKPOINTS
    if directory.is_dir():
        yield "pins", _told(pinned_steps, directory)
        for number in step_numbers(directory):
            yield f"step {number}", arrays_damage(directory / str(number))
    for root, folders, files in os.walk(workdir):
        folder = Path(root)
        name = str(folder.relative_to(workdir))
        if folder != workdir and is_run(folder):
            yield from ((f"{name}: {what}", reason) for what, reason in verify_run(folder))
            folders.clear()
            continue
        if (
            folder != workdir and RUN in files
        ):  # of an exported model; of a run, were it not damaged
            yield f"{name}/{RUN}", _told(read_object, folder / RUN)
        folders[:] = sorted(set(folders) - {_CHECKPOINTS, _DAMAGED, PARAMS})
        found = [record for record in _CHECKS if record in files]
        yield from ((name, _told(_CHECKS[record], folder)) for record in found)
        if not found and (folder / PARAMS).is_dir():
            yield name, f"parameters without {RECORD} or {ADAPTER_RECORD}"
        if PLAN not in files and any(file.endswith(TOKENS) for file in files):
            yield name, f"tokens without {PLAN}"
        for file in sorted(file for file in files if file.endswith(HASH_SUFFIX)):
            rows = folder / file.removesuffix(HASH_SUFFIX)
            yield str(rows.relative_to(workdir)), _told(check_hash, rows)


def arrays_damage(path: Path) -> str | None:
    """Why the arrays in a folder, all of them, cannot be trusted, or None."""
    return damage_of(path) or unreadable(path)


def _told(check: Callable[[Path], object], path: Path) -> str | None:
    try:
        check(path)
    except RunError as error:
        return " ".join(str(error).split())
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{path}: {' '.join(str(error).split())}"
    return None


def _check_record(workdir: Path) -> None:
    for name, digest in (read_record(workdir) or {}).get(ARTEFACTS, {}).items():
        path = workdir / name
        if not path.is_file():
            raise CheckpointError(f"{path} is gone")
        if hash_of_file(path) != digest:
            raise CheckpointError(f"{path} is not as the run left it")


def _check_model(folder: Path) -> None:
    _check_folder(folder, RECORD, read_model(folder).files)


def _check_adapter(folder: Path) -> None:
    about: Mapping[str, Any] = read_object(folder / ADAPTER_RECORD, "lora", "base")
    _check_folder(folder, ADAPTER_RECORD, hashes_in(about))


def _check_folder(folder: Path, record: str, files: Mapping[str, str]) -> None:
    check_files(folder, record, files)
    if (reason := arrays_damage(folder / PARAMS)) is not None:
        raise CheckpointError(f"{folder / PARAMS}: {reason}")


_CHECKS: dict[str, Callable[[Path], None]] = {
    RECORD: _check_model,
    ADAPTER_RECORD: _check_adapter,
    PLAN: check_tokens,
}
