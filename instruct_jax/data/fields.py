"""Checked access to the fields of a record: every mistake is a DataError with its place."""

import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from instruct_jax.data.records import Record, kind_of, lone_surrogate
from instruct_jax.data.rows import DataError, Turn
from instruct_jax.data.tokenizer import EOS

_ROLES = {
    "system": "system",
    "developer": "system",  # OpenAI's name for it since 2024
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
# Roles and keys of a message that a model must see, and no template here writes.
_TOOLS = ("tool", "function", "ipython", "observation", "function_call", "function_response")
_UNWRITTEN = (
    "tool_calls", "function_call", "tool_call_id", "refusal", "audio", "images",
    "reasoning_content", "reasoning", "thinking",
)  # fmt: skip
_TEXT_PARTS = ("text", "input_text", "output_text")
# Keys of a message that say whether it is learnt, each 0 or 1.
_LEARNT = ("weight", "train", "training", "loss")
# Columns of the system prompt, and those that change what a row means, in any case: in a format
# that does not read them, they are refused.
_SYSTEM = ("system", "system_prompt", "system_message")
_MEANT = {
    *_SYSTEM,
    "history", "input", "context", "passage", "choices", "options",
    "weight", "tools", "functions", "image", "images", "audio", "audios", "video", "videos",
}  # fmt: skip
_TRUE, _FALSE = ("true", "1", "1.0"), ("false", "0", "0.0")
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

    def ranks(self, name: str) -> tuple[int, ...]:
        """A list of ranks, of which the order counts; 1.0 is as good as 1, and tied ones may have
        the mean of their places (1, 2.5, 2.5, 4). They come doubled where any is no whole number.
        """
        values = self.listed(name)
        halves = [v for v in values if not _is_whole(v)]
        # The mean place of an even number that tie ends in .5; what else does is a score.
        if any(type(v) is not float or v % 1 != 0.5 or values.count(v) % 2 for v in halves):
            hint = 'the best has the least; where more is better, the column is "scores"'
            expected = "expected whole numbers, such as 0, 1, 1, 2 with a tie, or 1, 2.5, 2.5, 4"
            raise self.record.error(expected, field=name, hint=hint)
        return tuple(int(2 * v) if halves else int(v) for v in values)

    def choice(self, name: str, allowed: Sequence[int]) -> int:
        """A whole number out of `allowed`; its digits as text do as well (CSV)."""
        value = self.value(name)
        digits = str(int(value)) if _is_whole(value) else str(value).strip()
        if digits not in map(str, allowed):
            raise self.error(f"expected one of {', '.join(map(str, allowed))}", name)
        return int(digits)

    def is_text(self, name: str) -> bool:
        """Whether the field is a text, and not a chat that a table keeps as its JSON."""
        in_table = self.record.in_table
        return not self.is_chat(name) if in_table else isinstance(self.value(name), str)

    def is_chat(self, name: str) -> bool:
        """Whether the field is a chat, or the JSON of one."""
        value = self.value(name)
        if not isinstance(value, str):
            return True
        messages = _from_json(value) if value.lstrip().startswith("[{") else None
        return bool(messages) and all(isinstance(m, dict) and _role(m) for m in messages or ())

    def flag(self, name: str) -> bool:
        """True or false; 1 and 0, or the words, do as well (CSV)."""
        value = self.value(name)
        word = str(value).strip().lower()
        if word not in (*_TRUE, *_FALSE):
            raise self.error("expected true or false", name)
        return word in _TRUE

    def turns(self, name: str) -> tuple[Turn, ...]:
        """A chat: a list of {role, content}, or of {from, value}, or of {role, text}.

        A system turn without a text counts as none.
        """
        value = self.value(name)
        one = isinstance(value, dict) and _role(value)
        messages = [value] if one else self.listed(name)
        turns = []
        for i, item in enumerate(messages):
            item = item if isinstance(item, dict) else {}
            role = self._known_role(_role(item), i, name)
            content = item.get("content", item.get("value", item.get("text")))
            if isinstance(content, list):
                content = self._joined_parts(content, i, name)
            for key in _UNWRITTEN:
                if item.get(key):
                    remedy = "which no template here writes; take it out, or put it into content"
                    raise self.error(f'message {i} has "{key}", {remedy}', name)
            learnt = [item.get(key) for key in _LEARNT]
            for key, weight in zip(_LEARNT, learnt, strict=True):
                if weight not in (None, 0, 1):
                    raise self.error(f"message {i} has a {key} that is neither 0 nor 1", name)
            if role == "system" and (content is None or content == "" or str(content).isspace()):
                self.mended["empty system turns left out"] += 1
                continue
            text = self.checked(content, name, at=f"[{i}]")
            text = self.without_end(text, name) if role == "assistant" else text
            turns.append(Turn(role, text, 0 not in learnt or role != "assistant"))
        if not turns:
            raise self.error("no messages", name)
        return tuple(turns)

    def without_end(self, answer: str, name: str | None = None) -> str:
        """An answer whose end is not spelt out (T0 does): the loader puts the token there."""
        if not answer.rstrip().endswith(EOS):
            return answer
        self.mended[f"literal {EOS} taken off"] += 1
        return self.checked(answer.rstrip().removesuffix(EOS), name)

    def _known_role(self, role: str, i: int, name: str) -> str:
        if role.lower() in _TOOLS:
            reason = f"message {i} is of role {role[:30]!r}, which no template here writes"
            raise self.error(reason, name)
        if role.lower() not in _ROLES:
            expected = "expected role (or from) and content (or value)"
            raise self.error(f"message {i} has no known role: {expected}", name)
        return _ROLES[role.lower()]

    def _joined_parts(self, parts: list[Any], i: int, name: str) -> str:
        """The text of content in parts (OpenAI's), a line each, as servers join them."""
        texts = []
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else kind_of(part)
            if kind not in _TEXT_PARTS:
                raise self.error(
                    f"message {i} has a part of type {str(kind)[:30]!r}, no text", name
                )
            texts.append(self.checked(part.get("text"), name, at=f"[{i}]", blank=True))
        return "\n".join(texts)

    def system(self) -> str | None:
        """The system prompt in a column of its own: "" for an empty one, None without such a
        column.
        """
        names = [name for name in self.record.fields if _spelt(name) in _SYSTEM]
        texts = [self.text(name, blank=True) for name in names]
        for name, text in zip(names, texts, strict=True):
            if text != texts[0]:
                raise self.error(f"{names[0]} and {name} say different things", name)
        return texts[0] if texts else None

    def entry(self, name: str) -> "Fields":
        """An object, with checked access of its own."""
        return self._entry(self.value(name), name)

    def entries(self, name: str) -> list["Fields"]:
        """A list of objects, each with checked access of its own."""
        return [self._entry(value, name) for value in self.listed(name)]

    def listed(self, name: str) -> list[Any]:
        """A list of anything, or the JSON of one as text (CSV)."""
        value = self.value(name)
        if isinstance(value, str) and value.lstrip().startswith("["):
            found = _from_json(value)
            if found is None:
                hint = 'in a table, a list is the text of its JSON: [{"role": "user", ...}]'
                raise self.record.error("not JSON", field=name, hint=hint)
            value = found
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
        """Whether the field is there, not null and, as in a table, not empty."""
        return self.record.fields.get(name) not in (None, "")

    def rest(self) -> dict[str, Any]:
        """The fields no one asked for, with those of a "meta" object among them."""
        fields = self.record.fields
        rest = {k: v for k, v in fields.items() if k not in self._used and v is not None}
        meta = rest.pop("meta", {})
        return {**rest, **meta} if isinstance(meta, dict) else {**rest, "meta": meta}

    def refuse_unread(self, names: Collection[str] = _MEANT, *, judged: bool = False) -> None:
        """DataError for a column that no one asked for and that changes what the row means, and
        where an answer is `judged` good, for a label that says it is not.
        """
        for name, value in self.record.fields.items():
            if name in self._used or value in (None, "", [], {}):
                continue
            hint = f"rename it where it is no part of the row, say to {name}_"
            if _spelt(name) in names and value not in (1, "1"):
                reason = "this column is not read in this format"
                raise self.record.error(reason, field=name, hint=hint)
            if judged and _spelt(name) == "label" and str(value).strip().lower() in _FALSE:
                reason = "a label false is read of prompt+completion alone (kto)"
                raise self.record.error(reason, field=name, hint=hint)

    def error(self, reason: str, name: str | None = None) -> DataError:
        """A DataError at this record, or at its field `name`."""
        if self._inside:
            what = f'"{name}" of an entry: ' if name else "an entry: "
            return self.record.error(what + reason, field=self._inside)
        return self.record.error(reason, field=name)

    def checked(self, value: Any, name: str | None, *, at: str = "", blank: bool = False) -> str:
        """`value` of field `name` as a string that can be encoded; `at` says where in the field."""
        place = f"{at} " if at else ""
        if not isinstance(value, str):
            raise self.error(f"{place}expected a string, found {kind_of(value)}", name)
        if not blank and not value.strip():
            raise self.error(f"{place}empty text", name)
        if "\0" in value:
            raise self.error(f"{place}NUL character", name)
        half = lone_surrogate(value)
        if half is not None:
            raise self.error(f"{place}lone surrogate {half}", name)
        return value

    def _entry(self, value: Any, name: str) -> "Fields":
        if not isinstance(value, dict):
            raise self.error(f"expected an object, found {kind_of(value)}", name)
        # The outer field stays among an entry's own, for the excerpt of an error.
        fields = {**value, name: self.record.fields[name]}
        return Fields(replace(self.record, fields=fields), self.mended, inside=name)


def _spelt(name: str) -> str:
    return name.strip().lower().replace(" ", "_")


def _role(message: dict[str, Any]) -> str:
    return str(message.get("role") or message.get("from") or "").strip()


def _is_whole(value: Any) -> bool:
    return type(value) is int or (type(value) is float and value.is_integer())


def _from_json(text: str) -> list[Any] | None:
    try:
        value = json.loads(text)
    except (RecursionError, ValueError):
        return None
    return value if isinstance(value, list) else None
