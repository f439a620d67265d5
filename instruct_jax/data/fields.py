"""Checked access to the fields of a record: every mistake is a DataError with its place."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from instruct_jax.data.files import Record, kind_of
from instruct_jax.data.rows import DataError, Turn

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}


_LARGEST = 1e300  # a whole number in JSON may be too large for a float


class Fields:
    """Checked access to a record; every mistake is a DataError with its place."""

    def __init__(self, record: Record, mended: Counter[str], *, inside: str = "") -> None:
        """`mended` counts what a layout put right by itself; `inside` is the field of an entry."""
        self.record = record
        self.mended = mended
        self._inside = inside
        self._used: set[str] = set()

    def text(self, name: str, *, blank: bool = False) -> str:
        """A string; not blank unless `blank`, where a missing one is ""."""
        value = self.value(name, "" if blank else None)
        return self.checked(value, name, blank=blank)

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings, none of them blank."""
        values = self.listed(name)
        return tuple(self.checked(v, name, at=f"[{i}]") for i, v in enumerate(values))

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of finite numbers."""
        return tuple(self.number(v, name) for v in self.listed(name))

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers."""
        values = self.listed(name)
        if any(type(value) is not int for value in values):
            raise self.error("expected whole numbers", name)
        return tuple(values)

    def choice(self, name: str, allowed: Sequence[int]) -> int:
        """A whole number out of `allowed`; its digits as text do as well (CSV)."""
        value = self.value(name)
        if str(value) not in map(str, allowed):
            raise self.error(f"expected one of {', '.join(map(str, allowed))}", name)
        return int(value)

    def turns(self, name: str) -> tuple[Turn, ...]:
        """A chat: a list of {role, content}, or of {from, value}, or of {role, text}."""
        turns = []
        for i, item in enumerate(self.listed(name)):
            item = item if isinstance(item, dict) else {}
            role = str(item.get("role", item.get("from")))
            content = item.get("content", item.get("value", item.get("text")))
            if role not in _ROLES:
                expected = "expected role (or from) and content (or value)"
                raise self.error(f"message {i} has no known role: {expected}", name)
            weight = item.get("weight")
            if weight not in (None, 0, 1):
                raise self.error(f"message {i} has a weight that is neither 0 nor 1", name)
            text = self.checked(content, name, at=f"[{i}]")
            turns.append(Turn(_ROLES[role], text, weight != 0 or _ROLES[role] != "assistant"))
        if not turns:
            raise self.error("no messages", name)
        return tuple(turns)

    def entry(self, name: str) -> "Fields":
        """An object, with checked access of its own."""
        return self._entry(self.value(name), name)

    def entries(self, name: str) -> list["Fields"]:
        """A list of objects, each with checked access of its own."""
        return [self._entry(value, name) for value in self.listed(name)]

    def listed(self, name: str) -> list[Any]:
        """A list of anything."""
        value = self.value(name)
        if not isinstance(value, list | tuple):
            raise self.error(f"expected a list, found {kind_of(value)}", name)
        return list(value)

    def number(self, value: Any, name: str) -> float:
        """`value` of field `name` as a finite number."""
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not abs(value) <= _LARGEST:
            raise self.error("expected a finite number", name)
        return float(value)

    def value(self, name: str, default: Any = None) -> Any:
        """The field as it is; DataError when it is missing and `default` is None."""
        self._used.add(name)
        value = self.record.fields.get(name)
        if value is None and default is None:
            raise self.error(f'"{name}" is missing')
        return default if value is None else value

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.record.fields.get(name) is not None

    def rest(self) -> dict[str, Any]:
        """The fields no one asked for, with those of a "meta" object among them."""
        fields = self.record.fields
        rest = {k: v for k, v in fields.items() if k not in self._used and v is not None}
        meta = rest.pop("meta", {})
        return {**rest, **meta} if isinstance(meta, dict) else {**rest, "meta": meta}

    def error(self, reason: str, name: str | None = None) -> DataError:
        """A DataError at this record, or at its field `name`."""
        if self._inside:
            what = f'"{name}" of an entry: ' if name else "an entry: "
            return self.record.error(what + reason, field=self._inside)
        return self.record.error(reason, field=name)

    def checked(self, value: Any, name: str, *, at: str = "", blank: bool = False) -> str:
        """`value` of field `name` as a string that can be encoded; `at` says where in the field."""
        place = f"{at} " if at else ""
        if not isinstance(value, str):
            raise self.error(f"{place}expected a string, found {kind_of(value)}", name)
        if not blank and not value.strip():
            raise self.error(f"{place}empty text", name)
        if "\0" in value:
            raise self.error(f"{place}NUL character", name)
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                code = f"U+{ord(value[error.start]):04X}"
                raise self.error(f"{place}lone surrogate {code}", name) from None
        return value

    def _entry(self, value: Any, name: str) -> "Fields":
        if not isinstance(value, dict):
            raise self.error(f"expected an object, found {kind_of(value)}", name)
        # The outer field stays among an entry's own, for the excerpt of an error.
        fields = {**value, name: self.record.fields[name]}
        return Fields(replace(self.record, fields=fields), self.mended, inside=name)
