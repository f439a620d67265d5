"""Cases into the words of a template: which template, and the prompt and answers in it.

A template that is asked for is used for every case. Else an instruction is put into ALPACA, a chat
into CHAT, a transcript keeps its own, and a whole prompt stays as it is. What a template refuses is
a ValueError, which the reader turns into an error of its line.
"""

from dataclasses import replace

from instruct_jax.data.cases import Case, Instruction, joined
from instruct_jax.data.rows import PromptText, Segment, Turn
from instruct_jax.data.templates import ALPACA, CHAT, PLAIN, TEMPLATES, Template

_BY_NAME = {template.name: template for template in TEMPLATES}


def known_template(case: Case) -> Case:
    """`case` with its template where its record names it, as the rows that we write do."""
    template = _BY_NAME.get(str(case.meta.get("template")))
    if template is None or not _is_whole(case):
        return case
    meta = {name: value for name, value in case.meta.items() if name != "template"}
    # A plain prompt is one that may yet be put into any template.
    rendered = template != PLAIN
    return replace(case, style=template if rendered else None, rendered=rendered, meta=meta)


def template_of(case: Case, wanted: Template | None) -> Template | None:
    """The template that a case is put into; None where its prompt is whole and stays so."""
    if wanted is not None or _is_whole(case):
        return wanted or case.style
    return case.style or (ALPACA if isinstance(case.prompt, Instruction) else CHAT)


def prompt_of(case: Case, template: Template | None) -> PromptText:
    """The prompt of a case in `template`, that of `template_of`; ValueError where it cannot be."""
    prompt = case.prompt
    if isinstance(prompt, str) and template is None:
        return prompt
    if template is None:
        raise ValueError("the prompt is in a template that it does not name")
    if isinstance(prompt, Instruction):
        return template.render(prompt.text, prompt.input)
    if isinstance(prompt, str) and case.style is None:
        return template.render(prompt)
    if case.rendered and template == case.style:
        return prompt
    return template.prompt(turns_of(case))


def answer_of(case: Case, answer: str, template: Template | None) -> str:
    """An answer of a case as it follows its prompt."""
    as_it_is = template is None or (case.rendered and template == case.style)
    return answer if as_it_is else template.response(answer)


def turns_of(case: Case) -> tuple[Turn, ...]:
    """The prompt of a case as turns; ValueError for one that is in a template already."""
    prompt = case.prompt
    if isinstance(prompt, Instruction):
        return (Turn("user", joined(prompt)),)
    if case.rendered or isinstance(prompt[0], Segment):
        name = f"template {case.style.name!r}" if case.style else "a template that it does not name"
        raise ValueError(f"the prompt is in {name} already")
    if isinstance(prompt, str):
        return case.style.parse(prompt) if case.style else (Turn("user", prompt),)
    return prompt


def _is_whole(case: Case) -> bool:
    """Whether the prompt is text as the model sees it, not an instruction or turns."""
    prompt = case.prompt
    return isinstance(prompt, str) or (isinstance(prompt, tuple) and isinstance(prompt[0], Segment))
