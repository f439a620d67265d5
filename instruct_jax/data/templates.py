"""How an instruction or a dialogue becomes the text of a prompt.

A template has a pattern for the first user turn, one with an input beside the instruction, and one
for later user turns. Each pattern ends where the response starts, so a rendered prompt and its
response are simply joined, and EOS ends the response:

    rendered prompt | response_prefix + response | EOS | later user turn | response | EOS ...

The ALPACA strings are PROMPT_DICT of train.py in tatsu-lab/stanford_alpaca (copyright 2023 Rohan
Taori, Ishaan Gulrajani, Tianyi Zhang, Yann Dubois, Xuechen Li; Apache-2.0); no space or newline
follows "### Response:" there (spec G4-3).
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from instruct_jax.data.rows import Turn
from instruct_jax.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Template:
    """Patterns with {text} and {input}; each ends where the assistant's answer starts.

    `later` is None for a template without dialogue. `response_prefix` stands between the pattern
    and the response. `tags` are the (role, opening) pairs of a template whose text can be read
    back; a turn that contains one is refused, because its text could speak for another role.
    """

    name: str
    first: str
    first_with_input: str
    later: str | None = None
    system: str = "{text}\n\n"
    response_prefix: str = ""
    tags: tuple[tuple[str, str], ...] = ()

    def render(self, instruction: str, input: str = "") -> str:
        """The prompt for one instruction; a blank `input` selects the form without input."""
        self._check(instruction, input)
        if not input.strip():
            return _fill(self.first, text=instruction)
        return _fill(self.first_with_input, text=instruction, input=input)

    def response(self, text: str) -> str:
        """The response as it follows the prompt."""
        return self.response_prefix + text

    def render_turns(self, turns: Sequence[Turn]) -> str:
        """The prompt for a dialogue whose last turn is the user's (or the whole, if it is not).

        ValueError for turns that do not alternate or a template without dialogue.
        """
        return "".join(text for text, _ in self.segments(turns))

    def segments(self, turns: Sequence[Turn]) -> list[tuple[str, bool]]:
        """The text in pieces, each with whether the assistant wrote it; EOS belongs after those."""
        system, rest = turns[: _leading_system(turns)], turns[_leading_system(turns) :]
        before = ""
        for turn in system:
            self._check(turn.text)
            before += _fill(self.system, text=turn.text)
        pieces: list[tuple[str, bool]] = []
        for i, turn in enumerate(rest):
            if turn.role != ("user", "assistant")[i % 2]:
                raise ValueError(f"turn {i} is of {turn.role!r}; user and assistant must alternate")
            self._check(turn.text)
            if turn.role == "assistant":
                pieces.append((self.response(turn.text), True))
            elif i == 0:
                pieces.append((before + _fill(self.first, text=turn.text), False))
            elif self.later is None:
                raise ValueError(f"template {self.name!r} has no form for several turns")
            else:
                pieces.append((_fill(self.later, text=turn.text), False))
        if not pieces:
            raise ValueError("a dialogue needs a user turn")
        return pieces

    def parse(self, text: str) -> tuple[Turn, ...]:
        """The turns of a text that `render_turns` made; ValueError when it is not such a text."""
        if not self.tags:
            raise ValueError(f"template {self.name!r} cannot be read back")
        roles = {opening: role for role, opening in self.tags}
        tag = "|".join(map(re.escape, roles))
        before, *parts = re.split(f"({tag})", text)
        if not parts or (before and "system" in roles.values()):
            raise ValueError(f"the text does not start with one of {sorted(roles)}")
        turns = [Turn("system", before)] if before else []
        for opening, body in zip(parts[::2], parts[1::2], strict=True):
            turns.append(Turn(roles[opening], body.removeprefix(self.response_prefix)))
        if turns[-1] == Turn("assistant", ""):
            turns.pop()  # the place of an answer that is still to come
        return tuple(turns)

    def _check(self, *texts: str) -> None:
        for _, opening in self.tags:
            if any(opening in f"\n\n{text}\n" for text in texts):
                raise ValueError(f"a turn contains {opening.strip()!r}, which marks a role")


ALPACA = Template(
    name="alpaca",
    first=(
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{text}\n\n### Response:"
    ),
    first_with_input=(
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{text}\n\n### Input:\n{input}\n\n### Response:"
    ),
    later="\n\n### Instruction:\n{text}\n\n### Response:",
)

# The text itself, as InstructGPT's API prompts were: whatever asks for an answer is in the prompt.
PLAIN = Template(name="plain", first="{text}", first_with_input="{text}\n\n{input}")

# Anthropic HH transcripts; the answer follows "Assistant:" with a space.
HH = Template(
    name="hh",
    first="\n\nHuman: {text}\n\nAssistant:",
    first_with_input="\n\nHuman: {text}\n\n{input}\n\nAssistant:",
    later="\n\nHuman: {text}\n\nAssistant:",
    system="{text}",
    response_prefix=" ",
    tags=(("user", "\n\nHuman:"), ("assistant", "\n\nAssistant:")),
)

# Role-tagged chat (spec EXT-1).
CHAT = Template(
    name="chat",
    first="\n<|user|>\n{text}\n<|assistant|>\n",
    first_with_input="\n<|user|>\n{text}\n\n{input}\n<|assistant|>\n",
    later="\n<|user|>\n{text}\n<|assistant|>\n",
    system="\n<|system|>\n{text}",
    tags=tuple((role, f"\n<|{role}|>\n") for role in ("system", "user", "assistant")),
)

TEMPLATES = (ALPACA, PLAIN, HH, CHAT)


def template_named(name: str) -> Template:
    """The template of this name; ValueError with close matches when there is none."""
    names = [template.name for template in TEMPLATES]
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f'; did you mean "{close[0]}"?' if close else ""
        raise ValueError(f'no template "{name}" among {", ".join(names)}{hint}')
    return TEMPLATES[names.index(name)]


def tldr_prompt(subreddit: str, title: str, post: str) -> str:
    """The TL;DR summarisation prompt (spec 10.2); the summary follows with a leading space."""
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"


def fit_turns(
    turns: Sequence[Turn], tokenizer: Tokenizer, *, template: Template, length: int
) -> tuple[Turn, ...] | None:
    """`turns` without the oldest exchanges, until what precedes the answer fits `length` tokens.

    `turns` end with the assistant's answer, which is kept whole, or with the user's question.
    System turns stay. EOS counts after every assistant turn. None when the last question alone is
    too long.
    """
    start = _leading_system(turns)
    system, rest = tuple(turns[:start]), tuple(turns[start:])
    while rest:
        pieces = template.segments([*system, *rest])
        before = pieces[:-1] if rest[-1].role == "assistant" else pieces
        used = sum(len(tokenizer.encode(text)) + is_response for text, is_response in before)
        if used <= length:
            return system + rest
        rest = rest[2:]
    return None


def _leading_system(turns: Sequence[Turn]) -> int:
    return next((i for i, turn in enumerate(turns) if turn.role != "system"), len(turns))


def _fill(pattern: str, **values: str) -> str:
    """Puts the values in; braces in a value stay as they are."""
    return re.sub(r"\{(text|input)\}", lambda match: values[match[1]], pattern)
