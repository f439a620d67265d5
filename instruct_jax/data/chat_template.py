"""From turns to token ids with a model's own chat template.

Ids are those of transformers' `apply_chat_template(tokenize=True)`, with one difference on purpose:
**control tokens come from the template alone**. "<|im_end|>" that a user typed, or that stands in a
row of data, would end the user's turn and let the rest speak for another role; peers encode it so.
Here it stays characters:

1. before rendering, what is a control token in a message's text is hidden behind a code point that
   no text has (and so is a beginning of one at the end of a text, which the template's own words
   could complete);
2. what is a control token in the rendered text is then the template's. It becomes one code point,
   a mark of its own (marks.py);
3. what was hidden is put back, and the text encoded by a tokenizer that knows marks and no other
   control token.

Control tokens are the tokenizer's special ones, and those of its other added tokens that the
template names (`<think>`). The latter may stand in what a model wrote itself, the turns of the
assistant; in those of users, systems and tools never.

Which tokens the assistant wrote is what the template says by `{% generation %}`, or else: from
where the rendering with a generation prompt ends, to the first token after it that ends an answer.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from itertools import count
from typing import Any, NamedTuple

from instruct_jax.data.jinja import CLOSE, OPEN, Message, Program, Refused
from instruct_jax.data.marks import HIDDEN, RESERVED, Marked
from instruct_jax.data.tokenizer import Tokenizer


class Rendered(NamedTuple):
    """A dialogue as text, its control tokens as marks, and [start, end) of what the assistant wrote
    in it.
    """

    text: str
    ours: tuple[tuple[int, int], ...]


class Tokenised(NamedTuple):
    """Ids of a dialogue, and of each whether the assistant wrote it."""

    ids: list[int]
    ours: list[bool]


class ChatTemplate:
    """A Jinja template and the tokenizer that its control tokens are of."""

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        """TemplateError where `source` is no template."""
        self.source, self.tokenizer = source, tokenizer
        self._program = Program(source)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        now: datetime | None = None,
    ) -> Rendered:
        """The text of a dialogue, and with no generation prompt what the assistant wrote in it.

        Raises Refused, in the template's words, for a dialogue that it does not take, or whose
        answers cannot be told apart in its text; TemplateError where the template fails.
        """
        text, spans = self._text(messages, add_generation_prompt, now)
        if add_generation_prompt:
            return Rendered(text, ())
        if not self.marks_answers:
            spans = self._answers(text, messages, now)
        return Rendered(text, tuple(spans))

    def encode(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        now: datetime | None = None,
    ) -> Tokenised:
        """The ids of a dialogue: with a generation prompt those of a prompt, else with the tokens
        of its answers marked, each with the token that ends it. Raises as `render` does.
        """
        rendered = self.render(messages, add_generation_prompt=add_generation_prompt, now=now)
        ids, offsets = self.marked.encode(rendered.text)
        ours = [False] * len(ids)
        for start, end in rendered.ours:
            for i, (first, last) in enumerate(offsets):
                ours[i] |= first < end and last > start
        return Tokenised(ids, ours)

    def encode_after(
        self, messages: Sequence[Message], *, now: datetime | None = None
    ) -> list[int] | None:
        """The ids of the last message with a generation prompt, as they follow the answer before it
        and its end token; None where the template writes what precedes that answer in another way
        now, or nothing ends it. Raises as `render` does.
        """
        text, _ = self._text(messages, True, now)
        before, _ = self._text(messages[:-2], True, now)
        stop = self._end.search(text, len(before)) if text.startswith(before) else None
        if stop is None:
            return None
        return self.marked.encode(text[stop.start() :])[0][1:]

    @cached_property
    def marks_answers(self) -> bool:
        """Whether the template itself says what the assistant wrote."""
        return re.search(r"\{%-?\s*generation\s*[-+]?%\}", self.source) is not None

    @cached_property
    def marked(self) -> Marked:
        """The tokenizer of rendered texts."""
        return Marked(self.tokenizer, self._controls)

    @cached_property
    def _controls(self) -> dict[str, bool]:
        """The control tokens, and of each whether an assistant's text may have it."""
        special = dict.fromkeys(self.tokenizer.special, False)
        named = (token for token in self.tokenizer.added if token in self.source)
        return special | {token: True for token in named if token not in special}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._controls, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def _text(
        self, messages: Sequence[Message], asked: bool, now: datetime | None
    ) -> tuple[str, list[tuple[int, int]]]:
        hidden: dict[str, str] = {}
        fresh = map(chr, count(HIDDEN))
        safe = [self._hide(message, hidden, fresh) for message in messages]
        raw = self._program.render(
            safe, add_generation_prompt=asked, now=now, **self.tokenizer.named
        )
        marked = self._pattern.sub(lambda found: self.marked.mark_of(found[0]), raw)
        if hidden:
            back = re.compile("|".join(hidden.values()))
            by_point = {point: text for text, point in hidden.items()}
            marked = back.sub(lambda found: by_point[found[0]], marked)
        return _without_spans(marked)

    def _hide(
        self, message: Message, hidden: dict[str, str], fresh: Iterator[str]
    ) -> dict[str, Any]:
        """`message` with the control tokens in its texts behind code points."""
        allowed = message.get("role") == "assistant"

        def behind(text: str) -> str:
            if text not in hidden:
                hidden[text] = next(fresh)
            return hidden[text]

        def replaced(found: re.Match[str]) -> str:
            return found[0] if allowed and self._controls[found[0]] else behind(found[0])

        def safe(value: Any) -> Any:
            if isinstance(value, str):
                if stray := RESERVED.search(value):
                    raise Refused(
                        f"a text holds the private code point U+{ord(stray[0]):X}, which stands "
                        "for a control token here"
                    )
                text = self._pattern.sub(replaced, value)
                return self._without_ends(text, behind)
            if isinstance(value, Mapping):
                return {name: safe(item) for name, item in value.items()}
            return [safe(item) for item in value] if isinstance(value, list | tuple) else value

        role = self._pattern.sub(replaced, str(message.get("role")))  # no text of anybody's
        return {name: safe(value) for name, value in message.items()} | {"role": role}

    def _without_ends(self, text: str, behind: Callable[[str], str]) -> str:
        """`text` without the part of a control token at its ends: what the template writes beside
        it, or what is left once white space is stripped, could make it whole.
        """
        bare = text.strip()
        start = text.find(bare)
        before, after = text[:start], text[start + len(bare) :]
        if bare and (tail := self._tails.search(bare)):
            bare = bare[: tail.start()] + behind(tail[0])
        if bare and (head := self._heads.match(bare)):
            bare = behind(head[0]) + bare[head.end() :]
        return before + bare + after

    @cached_property
    def _tails(self) -> re.Pattern[str]:
        """A beginning of a control token, at the end of a text."""
        parts = {token[:n] for token in self._controls for n in range(1, len(token))}
        return _any_of(parts, r"(?:%s)\Z")

    @cached_property
    def _heads(self) -> re.Pattern[str]:
        """An end of a control token, at the start of a text."""
        parts = {token[n:] for token in self._controls for n in range(1, len(token))}
        return _any_of(parts, r"(?:%s)")

    @cached_property
    def _end(self) -> re.Pattern[str]:
        """The mark of a token that ends an answer."""
        marks = {self.marked.mark_of_id(i) for i in self.tokenizer.stop_ids}
        return re.compile("|".join(map(re.escape, filter(None, marks))) or r"(?!)")

    def _answers(
        self, text: str, messages: Sequence[Message], now: datetime | None
    ) -> list[tuple[int, int]]:
        """[start, end) of every answer in `text`, with the mark that ends it."""
        spans = []
        for i, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            if i == 0:
                raise Refused("the assistant begins: where its answer starts cannot be told")
            before, _ = self._text(messages[:i], True, now)
            if not text.startswith(before):
                raise Refused(
                    f"turn {i}: the template writes what precedes an answer in another way once "
                    "the answer is there, so that its tokens cannot be told apart"
                )
            stop = self._end.search(text, len(before))
            if stop is None:
                raise Refused(f"turn {i}: no token that ends an answer follows it")
            spans.append((len(before), stop.end()))
        return spans


def _any_of(parts: set[str], form: str) -> re.Pattern[str]:
    longest_first = sorted(parts, key=len, reverse=True)
    return re.compile(form % ("|".join(map(re.escape, longest_first)) or "(?!)"))


def _without_spans(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """`marked` without OPEN and CLOSE, and [start, end) of what stood between them."""
    pieces, spans, size, opened = [], [], 0, 0
    for piece in re.split(f"([{OPEN}{CLOSE}])", marked):
        if piece == OPEN:
            opened = size
        elif piece == CLOSE:
            spans.append((opened, size))
        else:
            pieces.append(piece)
            size += len(piece)
    return "".join(pieces), spans
