"""model.json, what a model folder says of itself: read strictly, before anything else of it is.

kind       "language" or "scalar"
stage      the stage that made it
history    the stages before that one, the first first
base       where its weights came from, for imported ones and all that is trained from them
template   the one that its prompts were put into, once it was fine-tuned
config     the `TransformerConfig`
notes      metrics, hashes of data: whatever the stage put down
files      sha256 of the other files of the folder, by name

Its second line is the hash of the others (`files.py`). Older ones have neither that nor `files`.
"""

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from instruct_jax.data.templates import template_named
from instruct_jax.errors import CheckpointError, ConfigError
from instruct_jax.files import SEAL, hash_of_file, read_sealed
from instruct_jax.models.transformer import TransformerConfig

RECORD = "model.json"
_REQUIRED = {
    field.name
    for field in dataclasses.fields(TransformerConfig)
    if field.default is dataclasses.MISSING
}
_HINTS = typing.get_type_hints(TransformerConfig)


class Base(NamedTuple):
    """The model that others are trained from; None where its folder did not say."""

    name: str
    """A hub id, or the bare name of a folder."""
    licence: str | None = None
    model_type: str | None = None


class Record(NamedTuple):
    """What model.json holds."""

    kind: str
    stage: str
    config: TransformerConfig
    history: tuple[str, ...] = ()
    base: Base | None = None
    template: str | None = None
    notes: dict[str, Any] = {}  # noqa: RUF012  never changed
    files: Mapping[str, str] = MappingProxyType({})
    sealed: bool = False
    """Whether it was read with its hash, which is right then."""

    def as_json(self) -> dict[str, Any]:
        """What `read_record` reads."""
        values = self._asdict() | {
            "config": dataclasses.asdict(self.config),
            "base": None if self.base is None else self.base._asdict(),
            "files": dict(self.files),
        }
        return {name: value for name, value in values.items() if name != "sealed"}


def read_record(directory: Path) -> Record:
    """The model.json of a model folder.

    Raises CheckpointError where it is damaged, and a value that no version writes is damage too;
    ConfigError where its configuration has fields of another version.
    """
    path = directory / RECORD
    about, sealed = read_sealed(path, "kind", "stage", "config")
    try:
        return Record(
            kind=_one_of(about, "kind", ("language", "scalar")),
            stage=_text(about, "stage"),
            history=tuple(_typed(about.get("history", []), "history", list)),
            base=_base(about.get("base")),
            template=_template(about.get("template")),
            notes=_typed(about.get("notes", {}), "notes", dict),
            config=_config(path, about.get("config")),
            files=hashes_in(about),
            sealed=sealed,
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged: {error}; copy the folder again") from error


def hashes_in(about: Mapping[str, Any]) -> dict[str, str]:
    """The `files` of a record; ValueError where they are no texts by name."""
    files = _typed(about.get("files", {}), "files", dict)
    for name, digest in files.items():
        _typed(digest, f"files.{name}", str)
    return files


def hashes_of(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """The `files` of a record that is about to be written into `directory`."""
    return {name: hash_of_file(directory / name) for name in names}


def check_files(directory: Path, record: str, files: Mapping[str, str]) -> None:
    """CheckpointError where a file of `directory` is not the one that its `record` names."""
    for name, digest in files.items():
        try:
            found = hash_of_file(directory / name)
        except OSError as error:
            raise CheckpointError(
                f"{directory / name} cannot be read ({error.strerror}); copy the folder again"
            ) from error
        if found != digest:
            raise CheckpointError(
                f"{directory / name} is not the file that {record} was saved with: copy the folder"
                f" again or, if you changed it yourself, take it out of the files in {record} and"
                f' delete "{SEAL}" there'
            )


def one_template(named: Mapping[str, str | None]) -> str | None:
    """The template of models that read the same prompts, by their folders; None where they name
    none. ConfigError where they were trained with different ones.
    """
    known = {folder: template for folder, template in named.items() if template is not None}
    first = next(iter(known), "")
    for folder, template in known.items():
        if template != known[first]:
            raise ConfigError(
                f"{folder} was trained with template {template!r}, {first} with {known[first]!r}: "
                "models that read the same prompts need the same one"
            )
    return known.get(first)


def _template(value: Any) -> str | None:
    return None if value is None else template_named(_typed(value, "template", str)).name


def _config(path: Path, values: Any) -> TransformerConfig:
    values = _typed(values, "config", dict)
    unknown = sorted(set(values) - set(_HINTS))
    if unknown:
        raise ConfigError(
            f"{path}: config: unknown {', '.join(unknown)}; it was written by another version of "
            "instruct_jax: load it with that one"
        )
    missing = sorted(_REQUIRED - set(values))
    if missing:
        raise ValueError(f"config: {', '.join(missing)} missing")
    for name, value in values.items():
        if not _fits(value, _HINTS[name]):
            raise ValueError(f"config: {name}={str(value)[:40]!r} is not {_said(name)}")
    try:
        return TransformerConfig(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config: {error}") from error


def _said(name: str) -> str:
    kinds = _kinds(_HINTS[name])
    return "of type " + " or ".join(
        "null" if kind is type(None) else kind.__name__ for kind in kinds
    )


def _kinds(hint: Any) -> tuple[type, ...]:
    if typing.get_origin(hint) is typing.Literal:
        return (str,)  # its choices are the configuration's to check
    return typing.get_args(hint) or (hint,)


def _fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of the type of a field."""
    kinds = _kinds(hint)
    return type(value) in kinds or (type(value) is int and float in kinds)


def _base(value: Any) -> Base | None:
    if value is None:
        return None
    value = _typed(value, "base", dict)
    licence, model_type = (value.get(name) for name in ("licence", "model_type"))
    for name, text in (("licence", licence), ("model_type", model_type)):
        if text is not None:
            _typed(text, f"base.{name}", str)
    return Base(_typed(value.get("name"), "base.name", str), licence, model_type)


def _one_of(about: dict[str, Any], name: str, known: tuple[str, ...]) -> str:
    value = _text(about, name)
    if value not in known:
        raise ValueError(f"{name}={value[:40]!r} is not one of {', '.join(known)}")
    return value


def _text(about: dict[str, Any], name: str) -> str:
    return _typed(about[name], name, str)


def _typed(value: Any, name: str, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{name}: expected {kind.__name__}, found {type(value).__name__}")
    if kind is list and not all(isinstance(item, str) for item in value):
        raise ValueError(f"{name}: expected a list of texts")
    return value
