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
import difflib
import functools
import importlib.util
import re
import traceback
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ml_collections import ConfigDict

from instruct_jax.errors import ConfigError, RunError
from instruct_jax.settings import NEVER, About, about, why_idle

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
    if default and re.fullmatch(r"\w+", spec):
        path, name = default.partition(":")[0], spec
        spec = f"{path}:{name}"
    ours = REPOSITORY / path if re.fullmatch(r"configs/\w+\.py", path) else None
    found = next((p for p in (ours, Path(path)) if p is not None and p.is_file()), None)
    if found is None:
        files = [str(p.relative_to(REPOSITORY)) for p in (REPOSITORY / "configs").glob("*.py")]
        raise ConfigError(f"no config file {path!r}{suggest(path, files)}")
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


def resolve(
    config_class: type[Config], values: dict[str, Any], overrides: Mapping[str, str]
) -> Config:
    """A `config_class` of `values`, with `overrides` as "a.b" -> text.

    An override of a field that cannot act beside the others is refused; a preset may hold one.
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
        if (reason := _why_idle(config, name)) is not None:
            raise ConfigError(f"config.{name} has no effect: {reason}; leave it out")
    return config


def from_config(config_class: type[Config], values: Mapping[str, Any] | ConfigDict) -> Config:
    """A `config_class` of nested `values`; absent fields take their default."""
    plain = values.to_dict() if isinstance(values, ConfigDict) else values
    return _build(config_class, plain, "config")


def field_help(config: Any, spec: str, presets: Sequence[str] = ()) -> str:
    """The presets, and every field that this script reads: its value as it is written on the
    command line, its type and range, and what it does.
    """
    lines = [f"\npresets: {', '.join(presets)}"] if presets else []
    lines += [
        f"\nfields, with their values in {spec}",
        "(a tuple is written a,b or ('a', 'b'), and no value none):",
    ]
    for name, hint, said, value in _described(config, config, ""):
        kind = ", ".join(filter(None, [_name_of(hint), said.range, said.unit]))
        acts = f"Acts with {said.needs}." if said.needs else ""
        words = " ".join(filter(None, [f"{kind}.", said.text and f"{said.text}.", acts]))
        lines += [f"  --config.{name}={value!r}", f"        {words}"]
    return "\n".join(lines)


def _described(root: Any, config: Any, prefix: str) -> Iterator[tuple[str, Any, About, Any]]:
    """(name, type, what is said of it, value) of every field that acts in some configuration."""
    for name, hint in _fields(type(config)).items():
        value, path = getattr(config, name), prefix + name
        if _condition(root, path) == NEVER:
            continue
        if dataclasses.is_dataclass(value):
            yield from _described(root, value, f"{path}.")
        else:
            yield path, hint, about(type(config), name), value


def _condition(owner: Any, name: str) -> str:
    """The condition under which the script of `owner` reads the field or group "a.b" of it."""
    for field, condition in getattr(owner, "acts_if", {}).items():
        if name == field or name.startswith(f"{field}."):
            return str(condition)
    return ""


def _why_idle(config: Any, name: str) -> str | None:
    """Why the field "a.b" cannot act in `config`; None where it does."""
    owner, parts = config, name.split(".")
    for depth, part in enumerate(parts):
        rest, inside = ".".join(parts[depth:]), "".join(f"{p}." for p in parts[:depth])
        for condition in (_condition(owner, rest), about(type(owner), part).needs):
            if (reason := why_idle(owner, condition)) is not None:
                return reason if condition == NEVER else inside + reason
        owner = getattr(owner, part)
        if owner is None:
            return None
    return None


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """("a.b", value) of every leaf of nested dicts."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def suggest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?", or all that is known."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; there are {', '.join(sorted(known))}"


def _suggest_field(name: str, known: Sequence[str]) -> str:
    """The field that was meant, by its last word, its initials (lr) or one of its words; else
    those of its group.
    """
    group, _, word = name.rpartition(".")

    def likeness(candidate: str) -> float:
        owner, _, field = candidate.rpartition(".")
        words = field.split("_")
        alike = difflib.SequenceMatcher(None, word, field).ratio()
        if word == "".join(w[0] for w in words if w):
            alike = 0.9
        elif set(word.split("_")) & set(words):
            alike = max(alike, 0.7)
        return alike + 0.05 * (owner == group)  # the right field in the wrong group also counts

    best = max(known, key=likeness)
    if likeness(best) >= 0.7:
        return f"; did you mean config.{best}?"
    siblings = [field for field in known if field.rpartition(".")[0] == group] or known
    return f"; there are {', '.join(siblings)}"


# --- the schema --------------------------------------------------------------------------------


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union; a type alone."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _group(hint: Any) -> Any:
    """The dataclass that `hint` is, or that it may be beside None."""
    return next((option for option in _options(hint) if dataclasses.is_dataclass(option)), None)


def _fields(config_class: type) -> dict[str, Any]:
    hints = typing.get_type_hints(config_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


def _field_names(config_class: type) -> Iterable[str]:
    for name, hint in _fields(config_class).items():
        group = _group(hint)
        if group is None:
            yield name
        else:
            yield from (f"{name}.{inner}" for inner in _field_names(group))


def _hint_of(config_class: type, name: str) -> Any:
    """The type of the field "a.b"."""
    hint: Any = config_class
    for part in name.split("."):
        group = _group(hint)
        if group is None or part not in _fields(group):
            names = list(_field_names(config_class))
            raise ConfigError(f"unknown key config.{name}{_suggest_field(name, names)}")
        hint = _fields(group)[part]
    return hint


def _name_of(hint: Any) -> str:
    if len(options := _options(hint)) > 1:
        return " | ".join("None" if o is types.NoneType else _name_of(o) for o in options)
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


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
    fields = _fields(config_class)
    for name in values:
        if name not in fields:
            raise ConfigError(f"unknown key {path}.{name}{suggest(name, fields)}")
    for field in dataclasses.fields(config_class):
        defaults = (field.default, field.default_factory)
        missing = defaults == (dataclasses.MISSING, dataclasses.MISSING)
        if default is None and field.name not in values and missing:
            raise ConfigError(f"{path}.{field.name} has no value: --config.{field.name}=VALUE")
    # A group that is named in part keeps the rest of what its owner set, as Adam's eps in PPO.
    owner = config_class if default is None else default
    arguments = {
        name: _convert(fields[name], value, f"{path}.{name}", getattr(owner, name, None))
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
    raise ConfigError(f"{path}={value!r}: expected {_name_of(hint)}")


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
        raise ConfigError(f"{path}={text}: expected {_name_of(hint)}") from None


def _first_that_fits(reader: Any, hint: Any, value: Any, path: str, is_none: bool) -> Any:
    """`value` as the first member of the union `hint` that takes it."""
    options = [option for option in _options(hint) if option is not types.NoneType]
    if is_none and len(options) < len(_options(hint)):
        return None
    if len(options) == 1 and _group(hint) is not None:
        return reader(options[0], value, path)  # whose errors are more exact
    for option in options:
        try:
            return reader(option, value, path)
        except ConfigError:
            continue
    raise ConfigError(f"{path}={value}: expected {_name_of(hint)}")
