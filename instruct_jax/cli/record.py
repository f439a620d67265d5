"""The record of a run, config.json: what was run, and what it may be taken up with.

It bears the mark of this package (`schema`), by which a run is known: the config.json of an
exported model or of anything else is no record. A run is taken up with the configuration that it
has, where

- a field that was recorded with another value may change (`may_change` in settings.py): how often
  something is logged, evaluated or saved, and more epochs, over all of which the schedule then
  runs;
- a field that the record lacks, since it is younger than the run, has its default now;
- a field that the record has and this version lacks is a difference: what it did is not known;
- two texts that name the same file are the same, however they are written (paths.py).
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from instruct_jax.cli.config import leaves
from instruct_jax.errors import ConfigError
from instruct_jax.files import unseal
from instruct_jax.paths import expanded, published
from instruct_jax.settings import about

RECORD = "config.json"
# The field with the sha256 of what a finished run has written, by path.
ARTEFACTS = "artefacts"
SCHEMA = "instruct_jax.run/1"
_MISSING = object()


def read_record(workdir: Path) -> dict[str, Any] | None:
    """The record in `workdir`, None where there is no config.json.

    ConfigError where there is one that cannot be read, or that is not ours; CheckpointError where
    it was changed since it was written.
    """
    path = workdir / RECORD
    if not os.path.lexists(path):
        return None
    try:
        data = path.read_bytes()
        record = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise _foreign(path, f"cannot be read ({_short(error)})") from error
    if not is_record(record):
        raise _foreign(path, "is not the record of a run")
    unseal(path, data, record)
    if record.get("schema", SCHEMA) != SCHEMA:
        raise _foreign(path, f"is of schema {record['schema']!r}, this version reads {SCHEMA!r}")
    return record


def is_record(value: Any) -> bool:
    """Whether a JSON value bears our mark; that of earlier versions was the version itself."""
    if not isinstance(value, dict) or not isinstance(value.get("config"), dict):
        return False
    versions = value.get("versions")
    early = isinstance(versions, dict) and "instruct_jax" in versions
    return str(value.get("schema", "")).startswith("instruct_jax.run/") or early


def _foreign(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"{path} {reason}; nothing there is touched: choose another --workdir")


def unchanged(record: Mapping[str, Any], config: Any, workdir: Path) -> bool:
    """Whether the run of `record`, in `workdir`, has this very configuration."""
    before, after = dict(leaves(record["config"])), dict(leaves(_plain(dataclasses.asdict(config))))
    same = before.keys() == after.keys()
    return same and all(_alike(before[name], after[name], workdir) for name in after)


def _alike(recorded: Any, now: Any, workdir: Path) -> bool:
    """Whether a recorded value is the one that is given now."""
    return _same(recorded, published(now, workdir)) or _same(_expanded(recorded, workdir), now)


def _expanded(value: Any, workdir: Path) -> Any:
    if isinstance(value, list):
        return [_expanded(item, workdir) for item in value]
    return expanded(value, workdir) if isinstance(value, str) else value


def changes(record: Mapping[str, Any], config: Any, workdir: Path = Path()) -> list[str]:
    """What stands against taking up the run of `record`, in `workdir`, with `config`, in words."""
    before = dict(leaves(record["config"]))
    after = dict(leaves(_plain(dataclasses.asdict(config))))
    found = []
    for name, now in after.items():
        if name not in before and any(old.startswith(f"{name}.") for old in before):
            continue  # a group that was there; its fields are told below
        was = before[name] if name in before else _absent(name, before, config)
        if not (
            was is not _MISSING
            and (_alike(was, now, workdir) or _may_change(config, name, was, now))
        ):
            told = "absent" if was is _MISSING else repr(_expanded(was, workdir))
            grows = _about(config, name).may_change == "more" and isinstance(was, int | float)
            less = " (more would do)" if grows else ""
            found.append(f"{name} was {told}, is {now!r}{less}")
    for name in before.keys() - after.keys():
        if _under(name, after):
            found.append(f"{name} was {before[name]!r}, its group is None")
        elif not any(new.startswith(f"{name}.") for new in after):
            found.append(f"{name} was {before[name]!r}, and this version has no such field")
    return sorted(found)


def _absent(name: str, before: Mapping[str, Any], config: Any) -> Any:
    """What a field that is not in a record had: None with its group, else its default."""
    if (group := _under(name, before)) is not None:
        return before[group]
    value, default = config, _MISSING
    for part in name.split("."):
        if default is _MISSING:
            field = next(f for f in dataclasses.fields(value) if f.name == part)
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            if default is dataclasses.MISSING:
                default = _MISSING
        else:  # what the owner of a group sets in it comes before the group's own
            default = getattr(default, part, _MISSING)
        value = getattr(value, part)
    return default if default is _MISSING else _plain(default)


def _under(name: str, tree: Mapping[str, Any]) -> str | None:
    """The leaf of `tree` that stands where `name` has a group."""
    parts = name.split(".")
    return next((g for i in range(1, len(parts)) if (g := ".".join(parts[:i])) in tree), None)


def _about(config: Any, name: str) -> Any:
    *groups, last = name.split(".")
    for group in groups:
        config = getattr(config, group)
    return about(type(config), last)


def _may_change(config: Any, name: str, was: Any, now: Any) -> bool:
    allowed = _about(config, name).may_change
    if allowed == "more":
        numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (was, now))
        return numbers and now > was
    return bool(allowed)


def _same(was: Any, now: Any) -> bool:
    if isinstance(was, list) and isinstance(now, list):
        return len(was) == len(now) and all(map(_same, was, now))
    if isinstance(was, str) and isinstance(now, str):
        return was == now or (bool(was and now) and _named(was) == _named(now))
    return bool(was == now) and isinstance(was, bool) == isinstance(now, bool)


def _named(text: str) -> tuple[str, str]:
    """The file that a text may name, in its one true form; "NAME=FILE" names one too."""
    name, equals, path = (
        text.rpartition("=") if os.sep in text.partition("=")[2] else ("", "", text)
    )
    try:
        return name + equals, os.path.realpath(path)
    except (OSError, ValueError):
        return "", text


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    return json.loads(json.dumps(value))


def _short(error: BaseException) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
