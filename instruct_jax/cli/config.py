"""Configuration files and overrides as nested frozen dataclasses, strictly.

A file's `get_config(NAME)` returns an ml_collections ConfigDict of plain values;
`--config.a.b=value` overrides one. The dataclasses are the schema: names, types and defaults come
from them, and an override is read by the type of its field. So a field that a file leaves out can
be overridden, an optional field needs no placeholder, and nothing below this door sees a
ConfigDict.

A field is an int, float (an int will do), str, bool, tuple, Literal, a union such as `int | None`,
or another dataclass. What more there is to say of a field, such as its range, stands beside it
(instruct_jax/settings.py). Every error is a ConfigError of one line.
"""

import ast
import dataclasses
import functools
import importlib.util
import re
import sys
import traceback
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ml_collections import ConfigDict

from instruct_jax.cli.names import suggest, suggest_field
from instruct_jax.errors import ConfigError, RunError
from instruct_jax.settings import about, is_never, why_idle

REPOSITORY = Path(__file__).resolve().parents[2]

Config = TypeVar("Config")


class Loaded(NamedTuple):
    """A preset: "FILE:NAME", its values as nested dicts, and all presets that its file lists."""

    spec: str
    values: dict[str, Any]
    presets: tuple[str, ...]


def load_config(spec: str, *, default: str = "") -> dict[str, Any]:
    """The values of a preset as nested dicts; see `load`."""
    return load(spec, default=default).values


def load(spec: str, *, default: str = "") -> Loaded:
    """The preset "FILE:NAME", "FILE" (its usual one) or "NAME" (one of the file of `default`).

    A file of this package is named as it is there, configs/x.py, from wherever one stands: a file
    of that name in the current directory is never run unasked. Any other is named by its path
    (./configs/x.py where the two are alike).
    """
    path, _, name = spec.partition(":")
    named = spec != default
    if default and re.fullmatch(r"\w+", spec):
        path, name = default.partition(":")[0], spec
        spec, named = f"{path}:{name}", False
    ours = REPOSITORY / path if re.fullmatch(r"configs/\w+\.py", path) else None
    if ours is not None and ours.is_file() and _another(path, ours) and named:
        print(f"note: {path} is the package's; yours is ./{path}", file=sys.stderr)
    found = next((p for p in (ours, Path(path)) if p is not None and p.is_file()), None)
    if found is None:
        files = [str(p.relative_to(REPOSITORY)) for p in (REPOSITORY / "configs").glob("*.py")]
        likely = suggest(path, files)
        if name:
            likely = likely.replace("?", f":{name}?")
        raise ConfigError(f"no config file {path!r}{likely}")
    module_spec = importlib.util.spec_from_file_location(f"config_{found.stem}", found)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(f"config file {path!r} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        config = module.get_config(*[name] if name else [])
        values = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    except ValueError as error:  # raised by get_config, for the user to read
        raise ConfigError(f"{spec}: {error}") from error
    except Exception as error:  # a bug in the file
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(found)]
        where = f"{path}:{lines[-1]}" if lines else path
        raise ConfigError(f"{where}: {type(error).__name__}: {error}") from error
    return Loaded(spec, values, tuple(map(str, getattr(module, "PRESETS", ()))))


def _another(path: str, ours: Path) -> bool:
    """Whether the current directory has a file of that name which is not the package's."""
    here = Path(path)
    return here.is_file() and not here.samefile(ours)


def resolve(
    config_class: type[Config], values: dict[str, Any], overrides: Mapping[str, str]
) -> Config:
    """A `config_class` of `values`, with `overrides` as "a.b" -> text.

    An override of a field that cannot act beside the others is refused, but for one that turns the
    field off; a preset may hold one.
    """
    for name, text in overrides.items():
        value = _read(_hint_of(config_class, name), text, f"config.{name}")
        *groups, last = name.split(".")
        target = values
        for group in groups:
            if target.get(group) is None:
                target[group] = {}
            target = target[group]
        target[last] = value
    config = from_config(config_class, values)
    for name in overrides:
        reason = _why_idle(config, name)
        if reason is not None and not _is_off(config, name):
            raise ConfigError(f"config.{name} has no effect: {reason}; leave it out")
    return config


def from_config(config_class: type[Config], values: Mapping[str, Any] | ConfigDict) -> Config:
    """A `config_class` of nested `values`; absent fields take their default."""
    plain = values.to_dict() if isinstance(values, ConfigDict) else values
    return _build(config_class, plain, "config")


def conditions(owner: Any, name: str) -> Iterator[str]:
    """The conditions under which the script of `owner` reads the field or group "a.b" of it."""
    for field, condition in getattr(owner, "acts_if", {}).items():
        if name == field or name.startswith(f"{field}."):
            yield str(condition)


def _why_idle(config: Any, name: str) -> str | None:
    """Why the field "a.b" cannot act in `config`; None where it does."""
    owner, parts = config, name.split(".")
    for depth, part in enumerate(parts):
        rest, inside = ".".join(parts[depth:]), "".join(f"{p}." for p in parts[:depth])
        for condition in (*conditions(owner, rest), about(type(owner), part).needs):
            if (reason := why_idle(owner, condition, prefix=inside)) is not None:
                return reason
        owner = getattr(owner, part)
        if owner is None:
            return None
    return None


def _is_off(config: Any, name: str) -> bool:
    """Whether the field "a.b" is None, False or 0, as it is by default: that turns nothing on."""
    *groups, last = name.split(".")
    for group in groups:
        config = getattr(config, group)
    value = getattr(config, last)
    return not value and value == getattr(default_of(type(config)), last, value)


def default_of(config_class: type) -> Any:
    """A configuration in which nothing is set; MISSING where a field has no default."""
    try:
        return config_class()
    except (TypeError, ValueError):
        return dataclasses.MISSING


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """("a.b", value) of every leaf of nested dicts."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


# --- the schema --------------------------------------------------------------------------------


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union; a type alone."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def group_of(hint: Any) -> Any:
    """The dataclass that `hint` is, or that it may be beside None."""
    return next((option for option in _options(hint) if dataclasses.is_dataclass(option)), None)


def fields(config_class: type) -> dict[str, Any]:
    """The fields of a dataclass, with their types."""
    hints = typing.get_type_hints(config_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


def _field_names(config_class: type) -> Iterable[str]:
    for name, hint in fields(config_class).items():
        group = group_of(hint)
        if group is None:
            yield name
        else:
            yield from (f"{name}.{inner}" for inner in _field_names(group))


def known(config_class: type) -> list[str]:
    """The fields "a.b" that the script of `config_class` reads."""
    names = _field_names(config_class)
    return [name for name in names if not any(map(is_never, conditions(config_class, name)))]


def _hint_of(config_class: type, name: str) -> Any:
    """The type of the field "a.b"."""
    hint: Any = config_class
    for part in name.split("."):
        group = group_of(hint)
        if group is None or part not in fields(group):
            raise ConfigError(
                f"unknown key config.{name}{suggest_field(name, known(config_class))}"
            )
        hint = fields(group)[part]
    return hint


def name_of(hint: Any) -> str:
    """A type as it is read: "int | None", "one of a, b", "tuple of str"."""
    if len(options := _options(hint)) > 1:
        return " | ".join("None" if o is types.NoneType else name_of(o) for o in options)
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        items = [name_of(a) for a in typing.get_args(hint) if a is not Ellipsis]
        several = Ellipsis in typing.get_args(hint)
        return f"tuple of {items[0]}" if several else f"tuple of ({', '.join(items)})"
    return str(getattr(hint, "__name__", hint))


def _pairs(hint: Any, items: Sequence[Any], path: str) -> list[tuple[Any, Any, str]]:
    """(type, item, path) of each item of a tuple of type `hint`."""
    arguments = typing.get_args(hint)
    if arguments[-1:] == (Ellipsis,):
        arguments = arguments[:1] * len(items)
    if len(arguments) != len(items):
        raise ConfigError(f"{path}: expected {len(arguments)} values, got {len(items)}")
    return [(a, b, f"{path}[{i}]") for i, (a, b) in enumerate(zip(arguments, items, strict=True))]


# --- values ------------------------------------------------------------------------------------


def _build(config_class: Any, values: Mapping[str, Any], path: str, default: Any = None) -> Any:
    """`config_class` of `values`; what they leave out is `default`'s, else the class's own."""
    hints = fields(config_class)
    for name in values:
        if name not in hints:
            raise ConfigError(f"unknown key {path}.{name}{suggest(name, hints)}")
    for field in dataclasses.fields(config_class):
        defaults = (field.default, field.default_factory)
        missing = defaults == (dataclasses.MISSING, dataclasses.MISSING)
        if default is None and field.name not in values and missing:
            raise ConfigError(f"{path}.{field.name} has no value: --config.{field.name}=VALUE")
    # A group that is named in part keeps the rest of what its owner set, as Adam's eps in PPO.
    owner = config_class if default is None else default
    arguments = {
        name: _convert(hints[name], value, f"{path}.{name}", getattr(owner, name, None))
        for name, value in values.items()
    }
    try:
        if default is None:
            return config_class(**arguments)
        return dataclasses.replace(default, **arguments)
    except ConfigError as error:  # of a field, which its message starts with
        raise ConfigError(f"{path}.{error}") from None
    except RunError:
        raise
    except ValueError as error:  # a value that __post_init__ refuses
        raise ConfigError(f"{path}: {error}") from error


def _convert(hint: Any, value: Any, path: str, default: Any = None) -> Any:
    """`value` if it is of type `hint`; a list as a tuple, an int as a float, a dict as a group."""
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return _build(hint, value, path, default)
    if len(_options(hint)) > 1:
        reader = functools.partial(_convert, default=default)
        return _first_that_fits(reader, hint, value, path, value is None)
    if origin is tuple and isinstance(value, tuple | list):
        return tuple(_convert(*pair) for pair in _pairs(hint, value, path))
    if origin is typing.Literal and value in typing.get_args(hint):
        return value
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is hint:
        return value
    raise ConfigError(f"{path}={value!r}: expected {name_of(hint)}")


def _read(hint: Any, text: str, path: str) -> Any:
    """The value that `text` on the command line means for a field of type `hint`."""
    if dataclasses.is_dataclass(hint):
        first = next(iter(_field_names(hint)))
        raise ConfigError(f"{path} is a group of fields; set one of them, such as {path}.{first}")
    if len(_options(hint)) > 1:
        return _first_that_fits(_read, hint, text, path, text.lower() == "none")
    try:
        if typing.get_origin(hint) is tuple:
            if text.startswith(("(", "[")):
                return _convert(hint, ast.literal_eval(text), path)
            items = [item.strip() for item in text.split(",")] if text else []
            return tuple(_read(*pair) for pair in _pairs(hint, items, path))
        if typing.get_origin(hint) is typing.Literal:
            return {str(value): value for value in typing.get_args(hint)}[text]
        if hint is bool:
            return {"true": True, "false": False}[text.lower()]
        return hint(text)
    except (KeyError, ValueError, SyntaxError):
        raise ConfigError(f"{path}={text}: expected {name_of(hint)}") from None


def _first_that_fits(reader: Any, hint: Any, value: Any, path: str, is_none: bool) -> Any:
    """`value` as the first member of the union `hint` that takes it."""
    options = [option for option in _options(hint) if option is not types.NoneType]
    if is_none and len(options) < len(_options(hint)):
        return None
    if len(options) == 1 and group_of(hint) is not None:
        return reader(options[0], value, path)  # whose errors are more exact
    for option in options:
        try:
            return reader(option, value, path)
        except ConfigError:
            continue
    raise ConfigError(f"{path}={value}: expected {name_of(hint)}")
