"""A manifest of sha256 sums, by which damage to a saved tree of files is seen (R4).

Neither the file system nor Orbax notices a flipped bit. `write_manifest` is the last thing a save
does, so a directory without a manifest was never finished.
"""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from instruct_jax.files import PARTIAL, hash_of_file, json_text, write_text

MANIFEST = "manifest.json"
UNFINISHED = "the save was not finished (no manifest)"
# sha256 lets go of the interpreter lock; more readers than this only wait for the disk.
_READERS = 4


def write_manifest(directory: Path) -> None:
    """Writes the size and the sha256 of every file below `directory` into its manifest."""
    with ThreadPoolExecutor(_READERS) as pool:
        paths = list(_files(directory))
        measured = pool.map(lambda path: _measure(directory / path), paths)
        sums = dict(zip(map(str, paths), measured, strict=True))
    write_text(directory / MANIFEST, json_text(sums).rstrip())


def find_damage(directory: Path) -> str | None:
    """Why what is below `directory` is not what was saved; None where it is, to the bit.

    Every file is read. A file that the manifest does not name is damage too.
    """
    try:
        sums = json.loads((directory / MANIFEST).read_text())
        wanted = {str(name): (int(size), str(sha)) for name, (size, sha) in sums.items()}
    except FileNotFoundError:
        return UNFINISHED
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    present = set(map(str, _files(directory)))
    if missing := wanted.keys() - present:
        return f"{_some(missing)} missing"
    if added := present - wanted.keys():
        return f"{_some(added)} not in the manifest"

    def differs(name: str) -> str | None:
        size, sha = wanted[name]
        try:
            if (found := (directory / name).stat().st_size) != size:
                return f"{name} has {found} bytes, saved were {size}"
            return None if _measure(directory / name)[1] == sha else f"{name} was changed"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"

    with ThreadPoolExecutor(_READERS) as pool:
        return next(filter(None, pool.map(differs, sorted(wanted))), None)


def strangers(directory: Path) -> list[Path]:
    """The files below `directory`, relative to it, that its save did not write; none where no
    manifest says what it wrote.
    """
    try:
        wanted = json.loads((directory / MANIFEST).read_text())
    except (OSError, ValueError):
        return []
    return [path for path in _files(directory) if str(path) not in wanted]


def _files(directory: Path) -> Iterable[Path]:
    """Every file below `directory`, relative to it, but for the manifest itself."""
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.parent / MANIFEST != path and path.suffix != PARTIAL:
            yield path.relative_to(directory)


def _measure(path: Path) -> tuple[int, str]:
    return path.stat().st_size, hash_of_file(path)


def _some(names: Iterable[str]) -> str:
    first, *rest = sorted(names)
    return f"{first} and {len(rest)} more are" if rest else f"{first} is"
