"""What --help says of a configuration: its presets, and every field with what may be written."""

import dataclasses
import re
import shlex
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from instruct_jax.cli.config import conditions, default_of, fields, group_of, name_of
from instruct_jax.settings import About, about, is_never, short


def field_help(config: Any, spec: str, presets: Sequence[str] = ()) -> str:
    """The presets, and every field that this script reads: its value as it is written on the
    command line, what it does, its type and range, and its default where `spec` has another.
    """
    lines = ["", *_wrapped(f"presets: {', '.join(presets)}", "  ")] if presets else []
    lines += [
        "",
        f"fields, with their values in {spec}",
        "(a tuple is written a,b or \"('a', 'b')\", and no value none):",
    ]
    for field in _described(config, config, default=default_of(type(config))):
        lines += [f"  --config.{field.name}={_as_typed(field.value)}"]
        lines += _wrapped(f"      {field}", "      ")
    return "\n".join(lines)


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


class _Described(NamedTuple):
    """A field for --help."""

    name: str
    hint: Any
    said: About
    value: Any
    default: Any
    condition: str

    def __str__(self) -> str:
        """What it does, and in brackets what may be written."""
        said = self.said
        kind = ", ".join(filter(None, [name_of(self.hint), said.range, said.unit]))
        more = [f"acts with {_as_words(self.condition)}"] if self.condition else []
        if said.may_change:
            more.append(
                "a run may be resumed with another"
                if said.may_change is True
                else "a run may be resumed with a larger one"
            )
        if self.default is not dataclasses.MISSING and self.default != self.value:
            more.append(f"default {_as_typed(self.default)}")
        brackets = f"[{'; '.join([kind, *more])}]"
        return f"{said.text[:1].upper()}{said.text[1:]} {brackets}" if said.text else brackets


def _described(
    root: Any, config: Any, prefix: str = "", *, default: Any, condition: str = ""
) -> Iterator[_Described]:
    """Every field that acts in some configuration: those of a class before those of its base, and
    before its groups.
    """
    kind = type(config)
    groups = []
    for name in sorted(fields(kind), key=lambda name: _depth(kind, name)):
        value, said, path = getattr(config, name), about(kind, name), prefix + name
        needs = said.needs and _prefixed(said.needs, prefix)
        met = [condition, needs, *conditions(root, path)]
        if any(map(is_never, met)):
            continue
        own = " and ".join(dict.fromkeys(filter(None, met)))
        inner = getattr(default, name, dataclasses.MISSING)
        group = group_of(fields(kind)[name])
        if group is not None and value is None:
            value = default_of(group)  # there is none until a field of it is set
        if dataclasses.is_dataclass(value):
            groups.append(_described(root, value, f"{path}.", default=inner, condition=own))
        else:
            yield _Described(path, fields(kind)[name], said, value, inner, own)
    for group in groups:
        yield from group


def _depth(kind: type, name: str) -> int:
    """How far down in the bases of `kind` the field was introduced."""
    bases = kind.__mro__
    return max(i for i, base in enumerate(bases) if name in getattr(base, "__annotations__", {}))


def _prefixed(condition: str, prefix: str) -> str:
    """`condition` of fields in a group, as it is named from outside."""
    return re.sub(r"(^| and | or )", rf"\1{prefix}", condition)


def _as_words(condition: str) -> str:
    """A condition of `setting`, to be read."""
    return condition.replace("|", " or ").replace("=", " ").replace(">", " above ")


def _as_typed(value: Any) -> str:
    """`value` as it is written on a command line."""
    if value is None:
        return "none"
    if type(value) is float:
        return short(value)
    if type(value) is int and abs(value) >= 10_000:
        return f"{value:_}"
    if isinstance(value, tuple):
        items = [_as_typed(item) for item in value]
        plain = all(
            not isinstance(item, tuple) and re.fullmatch(r"[^,()\[\]\s'\"]+", text)
            for item, text in zip(value, items, strict=True)
        )
        return ",".join(items) if plain else f'"{value!r}"'
    return shlex.quote(value) if isinstance(value, str) and value else str(value)
