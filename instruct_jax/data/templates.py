"""How an instruction or a dialogue becomes the text of a prompt.

A template has a pattern for the first user turn, one with an input beside the instruction, and one
for later user turns. Each pattern ends where the response starts, so a rendered prompt and its
response are simply joined, and EOS ends the response:

    rendered prompt | response_prefix + response | EOS | later user turn | response | EOS ...

Turns become `Segment`s while a file is read, so that what a template refuses is an error of a line;
`encode_segments` alone makes ids of them, for training, scoring and sampling: a prompt of several
turns is never one string, because the EOS inside it cannot be written in text.

The ALPACA strings are PROMPT_DICT of train.py in tatsu-lab/stanford_alpaca (copyright 2023 Rohan
Taori, Ishaan Gulrajani, Tianyi Zhang, Yann Dubois, Xuechen Li; Apache-2.0); no space or newline
follows "### Response:" there (spec G4-3).
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from instruct_jax.data.rows import PromptText, Segment, Turn
from instruct_jax.data.tokenizer import Tokenizer

TemplateName = Literal["alpaca", "plain", "hh", "chat"]


@dataclass(frozen=True)
class Template:
    """Patterns with {text} and {input}; each ends where the assistant's answer starts.

    `later` is None for a template without dialogue. `response_prefix` stands between the pattern
    and the response. `tags` are the (role, opening) pairs of a template whose text can be read
    back; a turn that contains one is refused, because its text could speak for another role, and so
    is one that contains one of `marks`.
    """

    name: str
    first: str
    first_with_input: str
    later: str | None = None
    system: str = "{text}\n\n"
    response_prefix: str = ""
    tags: tuple[tuple[str, str], ...] = ()
    marks: tuple[str, ...] = ()

    def render(self, instruction: str, input: str = "") -> str:
        """The prompt for one instruction; a blank `input` selects the form without input."""
        self._check(f"{instruction}\n\n{input}")
        if not input.strip():
            return _fill(self.first, text=instruction)
        return _fill(self.first_with_input, text=instruction, input=input)

    def response(self, text: str) -> str:
        """The response as it follows the prompt."""
        return self.response_prefix + text

    def prompt(self, turns: Sequence[Turn]) -> PromptText:
        """The prompt for a dialogue that ends with the user's turn.

        ValueError as in `segments`, and where the last turn is another's.
        """
        segments = self.segments(turns)
        if segments[-1].ours:
            raise ValueError("the prompt does not end with the user's turn")
        return segments[0].text if len(segments) == 1 else segments

    def segments(self, turns: Sequence[Turn]) -> tuple[Segment, ...]:
        """A dialogue in pieces: each user turn, with the system's before the first, and each
        answer. An empty system turn counts as absent.

        ValueError for turns that do not alternate, for one that marks a role, and for a second
        question where the template has no dialogue.
        """
        system, rest = turns[: _leading_system(turns)], turns[_leading_system(turns) :]
        before = "".join(self._system(turn.text) for turn in system if turn.text.strip())
        segments: list[Segment] = []
        for i, turn in enumerate(rest):
            if turn.role != ("user", "assistant")[i % 2]:
                remedy = "join it with the one before" if i else "let the user begin"
                told = f"turn {i} is of {turn.role!r}; user and assistant must alternate: {remedy}"
                raise ValueError(told)
            self._check(turn.text)
            if turn.role == "assistant":
                segments.append(Segment(self.response(turn.text), True, turn.target))
            elif i == 0:
                segments.append(Segment(before + _fill(self.first, text=turn.text)))
            elif self.later is None:
                raise ValueError(f"template {self.name!r} has no form for several turns")
            else:
                segments.append(Segment(_fill(self.later, text=turn.text)))
        if not segments:
            raise ValueError("a dialogue needs a user turn")
        return tuple(segments)

    def parse(self, text: str) -> tuple[Turn, ...]:
        """The turns of a transcript in this template; ValueError when it is none."""
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

    def _system(self, text: str) -> str:
        self._check(text)
        return _fill(self.system, text=text)

    def _check(self, text: str) -> None:
        for opening in (*(opening for _, opening in self.tags), *self.marks):
            if opening in f"\n\n{text}\n":
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
    marks=("\n### Instruction:", "\n### Response:"),
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
assert get_args(TemplateName) == tuple(template.name for template in TEMPLATES)


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


def encode_segments(
    rows: Sequence[Sequence[Segment]], tokenizer: Tokenizer
) -> list[list[list[int]]]:
    """The ids of every segment of every row; EOS ends each answer. Every stage has its ids from
    here.
    """
    encoded = iter(tokenizer.encode_batch([segment.text for row in rows for segment in row]))
    end = [tokenizer.eos_id]
    return [[next(encoded) + end * segment.ours for segment in row] for row in rows]


def encode_texts(texts: Sequence[PromptText], tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of every prompt, as they are trained on and sampled from."""
    rows = [(Segment(text),) if isinstance(text, str) else text for text in texts]
    return [[i for ids in pieces for i in ids] for pieces in encode_segments(rows, tokenizer)]


def fit_turns(
    turns: Sequence[Turn],
    segments: Sequence[Segment],
    ids: Sequence[list[int]],
    tokenizer: Tokenizer,
    *,
    template: Template,
    length: int,
) -> tuple[Sequence[Segment], Sequence[list[int]]] | None:
    """`segments` and `ids` of a dialogue without its oldest exchanges, so that what precedes the
    last answer fits `length` tokens; system turns stay. None when the last question is too long.

    Only questions that come first by it are encoded again, since they have another form there.
    """
    start = _leading_system(turns)
    system, rest = turns[:start], turns[start:]
    after = sum(map(len, ids[:-1]))
    for first in range(0, len(rest), 2):
        after -= len(ids[first])
        if after <= length:
            opening, opened = segments[:1], ids[:1]
            if first:
                opening = template.segments([*system, rest[first]])
                opened = encode_segments([opening], tokenizer)[0]
            if len(opened[0]) + after <= length:
                return [*opening, *segments[first + 1 :]], [*opened, *ids[first + 1 :]]
        after -= len(ids[first + 1])
    return None


def _leading_system(turns: Sequence[Turn]) -> int:
    return next((i for i, turn in enumerate(turns) if turn.role != "system"), len(turns))


def _fill(pattern: str, **values: str) -> str:
    """Puts the values in; braces in a value stay as they are."""
    return re.sub(r"\{(text|input)\}", lambda match: values[match[1]], pattern)
