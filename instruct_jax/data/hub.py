"""Rows that the `datasets` library reads: hub ids and folders it saved.

The libraries are imported only when such a source is opened. Without a network `datasets` retries
for half a minute; here one short request decides first, and then either the copy in the local cache
is used or a DataError comes within about two seconds.

A mistyped path may look like OWNER/NAME. So what is about to be asked is said first on stderr; no
request is made where a local file has nearly that name, or where HF_HUB_OFFLINE is set; and the
user's token goes along only where the hub says that a data set is gated, or where the id is written
as hf:OWNER/NAME and no public data set has it.
"""

import difflib
import itertools
import json
import os
import re
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from instruct_jax.data.rows import DataError

_PREFIX = "hf:"
_ID = re.compile(
    r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))??(:(?P<split>[\w.\[\]%+-]+))?"
)
_MOST_NAMES = 2000
_PROBE_SECONDS = 1.0
_MOST_BYTES = 2**24  # of the hub's answer, which lists the files
_FILE = re.compile(
    r"\.(jsonl|ndjson|json|csv|tsv|txt|text|md|parquet)$|\.(gz|bz2|xz|zst)$", re.IGNORECASE
)
# libraries' own names for "ask nothing"
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


def is_hub_id(source: str) -> bool:
    """Whether `source` is a hub id and no path.

    A hub id is "hf:NAME" or, when no such path exists, OWNER/NAME; ":SPLIT" or ":CONFIG:SPLIT" may
    follow. A name that ends like a data file is a path.
    """
    if source.startswith(_PREFIX):
        return True
    if source.count("/") != 1 or os.path.exists(source) or _FILE.search(source):
        return False
    owner = source.split("/")[0]
    return bool(_ID.fullmatch(source)) and owner not in (".", "..") and not os.path.exists(owner)


def repository_of(source: str) -> str:
    """OWNER/NAME of a hub id; DataError where it is none."""
    return _parse(source)["name"]


def local_card(source: str) -> Path | None:
    """The README.md of a hub data set in the local cache, when there is one."""
    folder = "datasets--" + repository_of(source).replace("/", "--")
    cards = sorted(_hub_cache().glob(f"{folder}/snapshots/*/README.md"))
    return cards[-1] if cards else None


def load_hub(source: str) -> Iterable[dict[str, Any]]:
    """Rows of a hub data set (split "train" when none is named); DataError when not to be had."""
    match = _parse(source)
    name, config, split = match["name"], match["config"], match["split"] or "train"
    if not source.startswith(_PREFIX):
        near = nearest_path(name)
        if near is not None:
            hint = f'did you mean "{near}"? The hub\'s is {_PREFIX}{source}'
            raise DataError("no such path", path=source, hint=hint)
    access = None if _offline() else _ask(name, source)
    if access is None and not _in_cache(name):
        hint = "check the connection, or give a path to a local copy"
        if _offline():
            hint = "HF_HUB_OFFLINE is set, so the hub was not asked"
        raise DataError("no such path, and the hub cannot be reached", path=source, hint=hint)
    import datasets
    from huggingface_hub import constants

    # Both libraries read the environment once, on import; with no answer they must not ask again.
    settings = (datasets.config, constants)
    before = [module.HF_HUB_OFFLINE for module in settings]
    try:
        for module, was_offline in zip(settings, before, strict=True):
            module.HF_HUB_OFFLINE = was_offline or access is None
        token = None if access == "token" else False  # None: the one that the user logged in with
        return datasets.load_dataset(name, config, split=split, token=token)
    except Exception as error:  # the library raises many kinds; all mean "not to be had"
        raise DataError(_first_line(error), path=source) from error
    finally:
        for module, was_offline in zip(settings, before, strict=True):
            module.HF_HUB_OFFLINE = was_offline


def nearest_path(name: str) -> str | None:
    """A path of this machine that `name`, which is none, was perhaps meant to be."""
    wanted = Path(name)
    folders = [wanted.parent]
    beside = [f for f in _children(wanted.parent.parent) if os.path.isdir(f)]
    names = difflib.get_close_matches(wanted.parent.name, [f.name for f in beside], cutoff=0.7)
    folders += [f for f in beside if f.name in names and f != wanted.parent]
    for folder in folders:
        found = {key: f for f in _children(folder) for key in (f.name, f.name.split(".")[0])}
        close = difflib.get_close_matches(wanted.name, found, n=1)
        if close:
            return str(found[close[0]])
    return None


def _children(folder: Path) -> list[Path]:
    """Of a very large folder some only: they are compared one by one."""
    try:
        return sorted(itertools.islice(folder.iterdir(), _MOST_NAMES))
    except OSError:
        return []


def is_saved(folder: Path) -> bool:
    """Whether `datasets` saved this folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def load_saved(folder: Path) -> Iterable[dict[str, Any]]:
    """Rows of a folder that `datasets` saved; of its split "train" when it has several."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise DataError(_first_line(error), path=folder) from error
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if "train" not in loaded:
        splits = ", ".join(f"{folder.name}/{name}" for name in loaded)
        raise DataError('there is no split "train"', path=folder, hint=f"name one: {splits}")
    return loaded["train"]


def _offline() -> bool:
    return any(os.environ.get(name, "").upper() in ("1", "TRUE", "YES", "ON") for name in _OFFLINE)


def _ask(name: str, source: str) -> Literal["public", "token"] | None:
    """Whether the hub's data set can be had, and whether only with the user's token; None where no
    hub answers. DataError when it says that there is none.
    """
    from huggingface_hub import constants, get_token

    url = f"{constants.ENDPOINT}/api/datasets/{name}"
    _say(f'asking {constants.ENDPOINT} for the data set "{name}", which is no path here')
    status, gated = _get(url, None)
    if status in (401, 403, 404):
        token = get_token() if source.startswith(_PREFIX) else None
        if token:
            _say(f'no public data set "{name}": asking again with your token')
            status, gated = _get(url, token)[0], True
        if status in (401, 403, 404):
            hint = f"a local file needs its whole path; a private data set is {_PREFIX}{name}"
            if source.startswith(_PREFIX):
                hint = "a private data set needs a login that may read it: hf auth login"
            raise DataError("neither a path nor a public hub data set", path=source, hint=hint)
    if status is None or status >= 500:
        return None
    return "token" if gated else "public"


def _say(line: str) -> None:
    """Once a run: a source is opened for every split."""
    if line not in _said:
        _said.add(line)
        print(line, file=sys.stderr, flush=True)


_said: set[str] = set()


def _get(url: str, token: str | None) -> tuple[int | None, bool]:
    """The status of an answer (None: no answer) and whether it says "gated".

    The request runs in a thread, because looking up a host can take longer than any time-out.
    """
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    answers: list[tuple[int, bool]] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(url, headers=headers)
            with urllib.request.urlopen(request, timeout=_PROBE_SECONDS) as response:
                said = json.loads(response.read(_MOST_BYTES) or b"{}")
                answers.append((response.status, bool(said.get("gated"))))
        except urllib.error.HTTPError as error:
            answers.append((error.code, False))
        except (OSError, ValueError, AttributeError):
            pass  # no network, or something else than the hub in its place: no answer

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS + 0.2)
    return answers[0] if answers else (None, False)


def _in_cache(name: str) -> bool:
    """Whether either library has a copy; they change the case of a name and its underscores."""
    folders = (Path(os.environ.get("HF_DATASETS_CACHE", _home() / "datasets")), _hub_cache())
    wanted = {_letters(name), _letters(f"datasets{name}")}
    return any(
        _letters(child.name) in wanted for f in folders if f.is_dir() for child in f.iterdir()
    )


def _parse(source: str) -> re.Match[str]:
    match = _ID.fullmatch(source.removeprefix(_PREFIX))
    if match is None:
        raise DataError("not a hub id", path=source, hint="hf:OWNER/NAME[:CONFIG][:SPLIT]")
    return match


def _home() -> Path:
    return Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))


def _hub_cache() -> Path:
    return Path(os.environ.get("HF_HUB_CACHE", _home() / "hub"))


def _letters(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
