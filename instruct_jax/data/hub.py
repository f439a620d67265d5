"""Rows that the `datasets` library reads, hub ids and folders it saved; and Parquet files.

The libraries are imported only when such a source is opened. Without a network `datasets` retries
for half a minute; here one short request decides first, and then either the copy in the local cache
is used or a DataError comes within about two seconds.
"""

import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from instruct_jax.data.rows import DataError

_PREFIX = "hf:"
_ID = re.compile(
    r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))??(:(?P<split>[\w.\[\]%+-]+))?"
)
_PROBE_SECONDS = 1.0
_FILE = re.compile(
    r"\.(jsonl|ndjson|json|csv|tsv|txt|text|md|parquet)(\.gz)?$|\.gz$", re.IGNORECASE
)


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
    online = _reachable(name)
    if not online and not _in_cache(name):
        hint = "check the connection, or give a path to a local copy"
        raise DataError("no such path, and the hub cannot be reached", path=source, hint=hint)
    import datasets
    from huggingface_hub import constants

    # Both libraries read the environment once, on import; with no answer they must not ask again.
    settings = (datasets.config, constants)
    before = [module.HF_HUB_OFFLINE for module in settings]
    try:
        for module, was_offline in zip(settings, before, strict=True):
            module.HF_HUB_OFFLINE = was_offline or not online
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library raises many kinds; all mean "not to be had"
        raise DataError(_first_line(error), path=source) from error
    finally:
        for module, was_offline in zip(settings, before, strict=True):
            module.HF_HUB_OFFLINE = was_offline


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


def load_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file, some thousands of them in memory at a time."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for rows in file.iter_batches(batch_size=4096):
                yield from rows.to_pylist()
    except Exception as error:
        raise DataError(f"not Parquet: {_first_line(error)}", path=path) from error


def _reachable(name: str) -> bool:
    """Whether the hub answers a request for this data set; DataError when it says there is none.

    The request runs in a thread, because looking up a host can take longer than any time-out.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    from huggingface_hub import constants, get_token

    url = f"{constants.ENDPOINT}/api/datasets/{name}"
    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    answers: list[int] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD", headers=headers)
            with urllib.request.urlopen(request, timeout=_PROBE_SECONDS) as response:
                answers.append(response.status)
        except urllib.error.HTTPError as error:
            answers.append(error.code)
        except (OSError, ValueError):
            pass  # no network: no answer

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS + 0.2)
    if answers and answers[0] in (401, 403, 404):
        hint = "a private or gated data set needs a login; a local file needs its whole path"
        raise DataError("neither a path nor a public hub data set", path=name, hint=hint)
    return bool(answers) and answers[0] < 500


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
