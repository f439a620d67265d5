"""A model's own chat template, rendered as transformers renders it, but within limits.

A template is a program from elsewhere. It runs in jinja2's immutable sandbox, with the globals,
options and extensions of transformers, and two things more: every turn of a loop and every call of
a macro is counted, and what it writes has a bound, so that one that would not end is an error.
What `{% generation %}` encloses stands between `OPEN` and `CLOSE` in the text.

Before a template is trusted with rows it is tried on a few dialogues in a process of its own, with
little time and memory (`check_template`); as with a tokenizer's patterns, a trial proves nothing of
other texts.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

# Code points that no text has, and no tokenizer: the last of the private ones.
OPEN, CLOSE = "\U0010fff0", "\U0010fff1"

LONGEST = 1_000_000
_MOST_TURNS = 200_000
_CPU_SECONDS, _SECONDS, _BYTES = 2, 30, 500_000_000

Message = Mapping[str, Any]


class Refused(ValueError):
    """What a template says of a dialogue that it does not take (its `raise_exception`)."""


class TemplateError(ValueError):
    """A template that is no Jinja, that fails, or that goes past its limits."""


class Program:
    """A compiled template; `render` is a pure function but for the date that it may ask for."""

    def __init__(self, source: str) -> None:
        """TemplateError where `source` is no template."""
        if len(source) > LONGEST:
            raise TemplateError(f"more than {LONGEST:,} characters; no template is so long")
        self.source = source
        self._sandbox = _Sandbox()
        try:
            self._template = self._sandbox.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise TemplateError(f"no Jinja template: {_line(error)}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        now: datetime | None = None,
        **variables: Any,
    ) -> str:
        """The text of a dialogue. Raises Refused and TemplateError."""
        self._sandbox.begin(now)
        written, size = [], 0
        try:
            for piece in self._template.generate(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **variables
            ):
                written.append(piece)
                size += len(piece)
                if size > LONGEST:
                    raise TemplateError(f"it writes more than {LONGEST:,} characters")
        except (Refused, TemplateError):
            raise
        except Exception as error:  # whatever the program of a stranger raises
            raise TemplateError(f"it fails: {_line(error)}") from error
        return "".join(written)


def check_template(source: str, variables: Mapping[str, Any]) -> None:
    """TemplateError where a template is no Jinja, or where it takes more than seconds or half a
    gigabyte for a dialogue of two words; `variables` are what it is given beside them.
    """
    Program(source)
    try:
        done = subprocess.run(
            [sys.executable, "-I", __file__, json.dumps(sys.path)],
            input=json.dumps({"source": source, "variables": dict(variables)}),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise TemplateError(f"it takes more than {_SECONDS} seconds") from None
    if done.returncode:
        said = done.stderr.strip().rsplit("\n", 1)[-1]
        reason = said if done.returncode == 1 and said else f"it goes past {_CPU_SECONDS} seconds"
        raise TemplateError(f"{reason[:200]} (tried on a dialogue of two words)")


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        self.filters["tojson"] = _tojson
        self.globals.pop("lipsum")
        self.globals |= {"raise_exception": _refuse, "strftime_now": self._strftime}
        self.begin(None)

    def begin(self, now: datetime | None) -> None:
        """A new rendering: its date, and the turns of loops that it has."""
        self._now, self._left = now, _MOST_TURNS

    def tick(self) -> str:
        """One turn of a loop, or one call of a macro; writes nothing."""
        self._left -= 1
        if self._left < 0:
            raise TemplateError(f"its loops make more than {_MOST_TURNS:,} turns")
        return ""

    def concat_checked(self, *parts: Any) -> str:
        """What `~` makes of its operands."""
        return _bounded("".join(map(str, parts)))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator whose result may grow, within bounds."""
        for many, sized in ((left, right), (right, left)):
            if operator == "*" and isinstance(many, int) and hasattr(sized, "__len__"):
                _bounded(range(many * len(sized)))
        if operator == "**" and isinstance(right, int) and abs(right) > 64:
            raise TemplateError(f"it raises a number to the power {right}")
        if operator == "%" and isinstance(left, str):
            raise TemplateError("it formats with %")
        return _bounded(super().call_binop(context, operator, left, right))

    def _parse(self, source: str, name: Any, filename: Any) -> nodes.Template:
        return _Counted().visit(super()._parse(source, name, filename))

    def _strftime(self, form: str) -> str:
        return (self._now or datetime.now()).strftime(form)


class _Counted(NodeTransformer):
    """Puts `tick` before the body of every loop and macro, and bounds what `~` joins."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._counting(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._counting(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._counting(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        node = self.generic_visit(node)
        called = nodes.EnvironmentAttribute("concat_checked", lineno=node.lineno)
        return nodes.Call(called, node.nodes, [], None, None, lineno=node.lineno)

    def _counting(self, node: Any) -> nodes.Node:
        node = self.generic_visit(node)
        called = nodes.EnvironmentAttribute("tick", lineno=node.lineno)
        tick = nodes.Call(called, [], [], None, None, lineno=node.lineno)
        node.body.insert(0, nodes.Output([tick], lineno=node.lineno))
        return node


class _Generation(Extension):
    """`{% generation %}`: marks what it encloses as the assistant's."""

    tags = {"generation"}  # noqa: RUF012  jinja2's own way

    def parse(self, parser: Any) -> list[nodes.Node]:
        """The body between its marks."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        mark = partial(nodes.TemplateData, lineno=line)
        return [
            nodes.Output([mark(OPEN)], lineno=line),
            *body,
            nodes.Output([mark(CLOSE)], lineno=line),
        ]


def _bounded(value: Any) -> Any:
    if isinstance(value, str | list | tuple | range) and len(value) > LONGEST:
        raise TemplateError(f"it makes a text or a list of more than {LONGEST:,}")
    return value


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: what HTML gives a meaning to is not escaped."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(reason: Any) -> None:
    raise Refused(str(reason))


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def _try(source: str, variables: Mapping[str, Any]) -> None:
    """Renders dialogues of two words, with little time and memory; for a process of its own."""
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS,) * 2)
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES,) * 2)
    program = Program(source)
    user, answer = ({"role": r, "content": "word"} for r in ("user", "assistant"))
    system = {"role": "system", "content": "word"}
    for start in ([], [system]):
        for messages in ([user], [user, answer], [user, answer, user]):
            for asked in (True, False):
                try:
                    program.render([*start, *messages], add_generation_prompt=asked, **variables)
                except Refused:
                    continue  # the template's right


if __name__ == "__main__":
    # Python has put the folder of this file first, whose names are not those of modules.
    sys.path[:] = json.loads(sys.argv[1])
    try:
        _try(**json.load(sys.stdin))
    except (TemplateError, MemoryError) as trouble:
        sys.exit(str(trouble) or "it takes more than half a gigabyte")
