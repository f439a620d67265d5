"""What every record layout is made of: the cases of a record, and the columns that all ask for."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from instruct_jax.data.fields import Fields
from instruct_jax.data.rows import Meta, Segment, Turn
from instruct_jax.data.templates import TEMPLATES, Template

Kind = Literal["documents", "demonstrations", "comparisons", "prompts"]


@dataclass(frozen=True)
class Instruction:
    """A task to put into a template."""

    text: str
    input: str = ""


Asked = str | Instruction | tuple[Turn, ...] | tuple[Segment, ...]


@dataclass(frozen=True)
class Case:
    """One prompt of a record and its answers, without any template.

    A string prompt is whole, and so are segments: `style` is the template it is written in, when
    that is known, and `rendered` says that it is by us, the answers too. Turns end with the
    user's. Comparisons have `ranks` (0 is best) or `scores` (higher is better). A
    demonstration whose answer is no `target` is there for the turns before it. A single answer that
    was judged alone has a `label`.
    """

    prompt: Asked
    answers: tuple[str, ...] = ()
    ranks: tuple[int, ...] | None = None
    scores: tuple[float, ...] | None = None
    labeler: str | None = None
    sources: tuple[str, ...] = ()
    style: Template | None = None
    target: bool = True
    label: bool | None = None
    rendered: bool = False
    meta: Meta = field(default_factory=dict)


Layout = Callable[[Fields], list[Case]]


@dataclass(frozen=True)
class Format:
    """A layout, the columns that tell it, and those that may be missing."""

    name: str
    kind: Kind
    required: tuple[str, ...]
    layout: Layout
    optional: tuple[str, ...] = ()


def joined(task: Instruction) -> str:
    """An instruction and its input as one message."""
    return f"{task.text}\n\n{task.input}" if task.input.strip() else task.text


def task_of(f: Fields, name: str) -> Instruction:
    """The instruction in column `name`, and what it is about in "input" or "context"."""
    inputs = [f.text(column, blank=True) for column in ("input", "context")]
    if all(text.strip() for text in inputs):
        raise f.error("both an input and a context", "context")
    return Instruction(f.text(name), inputs[0] or inputs[1])


def prompt_of(f: Fields, name: str) -> str | tuple[Turn, ...] | tuple[Segment, ...]:
    """A whole prompt: a text, messages, or texts in turn as `write_rows` has them."""
    if f.is_text(name):
        return f.text(name)
    value = f.value(name)
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        # As we write it: question, answer, question, each in the words of its template.
        known = [t.name for t in TEMPLATES if t.later is not None]
        if f.rest().get("template") not in known or len(value) % 2 == 0:
            expected = f'question, answer, ..., question beside a "template" of {", ".join(known)}'
            raise f.error(f"a list of texts is {expected}; else messages are expected", name)
        return tuple(Segment(text, i % 2 == 1) for i, text in enumerate(f.texts(name)))
    return f.turns(name)


def answer_of(f: Fields, name: str) -> str:
    """A string, or a list of one assistant message."""
    if f.is_text(name):
        return f.text(name)
    turns = f.turns(name)
    if len(turns) != 1 or turns[0].role != "assistant":
        raise f.error("expected one assistant message", name)
    return turns[0].text
