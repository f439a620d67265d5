"""The record layouts that are known: which columns tell a format, and what they mean.

A layout turns one record into cases: a prompt and, beside it, one answer (a demonstration) or
several that are ranked or scored (a comparison). `formats` makes rows of them. To support another
format, write its function and add it to `FORMATS`, one of comparisons to `RANKINGS`.
"""

from dataclasses import replace

from instruct_jax.data.cases import (
    Case,
    Format,
    Instruction,
    answer_of,
    joined,
    prompt_of,
    task_of,
)
from instruct_jax.data.fields import Fields
from instruct_jax.data.rankings import RANKINGS
from instruct_jax.data.rows import Turn
from instruct_jax.data.templates import ALPACA, tldr_prompt


def read_cases(found: Format, f: Fields) -> list[Case]:
    """The cases of a record, under its system prompt where it has one in a column of its own.

    DataError for a record that does not fit, and for a column that nobody reads but should.
    """
    if found.kind == "documents":
        f.refuse_unread(("weight",))
        return found.layout(f)
    system = f.system()
    cases = [_without_ends(case, f) for case in found.layout(f)]
    f.refuse_unread(judged=found.kind != "prompts")
    return cases if system is None else [_under(system, case, f) for case in cases]


def _without_ends(case: Case, f: Fields) -> Case:
    answers = tuple(map(f.without_end, case.answers))
    if len(set(answers)) < len(set(case.answers)):
        raise f.error("completions that are the same text")
    return replace(case, answers=answers)


def _under(system: str, case: Case, f: Fields) -> Case:
    """An instruction that has no system prompt keeps its form; a whole prompt becomes a turn, so
    that all rows of a file are in one template.
    """
    style, prompt = case.style, case.prompt
    if isinstance(prompt, Instruction):
        if not system.strip():
            return case
        turns, style = (Turn("user", joined(prompt)),), ALPACA
    elif isinstance(prompt, str):
        turns = style.parse(prompt) if style else (Turn("user", prompt),)
    else:
        turns = tuple(turn for turn in prompt if isinstance(turn, Turn))
    if not turns:
        raise f.error("a system prompt beside a prompt that is in a template already", "system")
    if not system.strip():
        return replace(case, prompt=turns)
    if turns[0].role == "system" and turns[0].text != system:
        raise f.error("another system prompt than that of its messages", "system")
    given = turns[0].role == "system"
    return replace(case, prompt=turns if given else (Turn("system", system), *turns), style=style)


def _text(f: Fields) -> list[Case]:
    return [Case(f.text("text"), meta=f.rest())]


def _prompt(f: Fields) -> list[Case]:
    return [Case(prompt_of(f, "prompt"), meta=f.rest())]


def _instruction(f: Fields) -> list[Case]:
    return [Case(task_of(f, "instruction"), meta=f.rest())]


def _question_text(f: Fields) -> list[Case]:
    return [Case(Instruction(f.text("text")), meta=f.rest())]


def _question(f: Fields) -> list[Case]:
    return [Case(task_of(f, "question"), meta=f.rest())]


def _first_turn(f: Fields) -> list[Case]:
    first, *later = f.texts("turns") or (f.text("turns"),)
    return [Case(Instruction(first), meta={**f.rest(), "later_turns": later})]


def _alpaca(f: Fields) -> list[Case]:
    task = task_of(f, "instruction")
    answer = (f.text("output"),)
    history = f.listed("history") if f.has("history") else []  # LIMA: earlier [user, assistant]
    turns: list[Turn] = []
    for i, exchange in enumerate(history):
        if not isinstance(exchange, list | tuple) or len(exchange) != 2:
            raise f.error(f"exchange {i} is no pair of user and assistant", "history")
        question, reply = (f.checked(text, "history", at=f"[{i}]") for text in exchange)
        turns += [Turn("user", question), Turn("assistant", reply)]
    if not turns:
        return [Case(task, answer, meta=f.rest())]
    turns.append(Turn("user", joined(task)))
    return [Case(tuple(turns), answer, style=ALPACA, meta=f.rest())]


def _dolly(f: Fields) -> list[Case]:
    return [Case(task_of(f, "instruction"), (f.text("response"),), meta=f.rest())]


def _question_answer(f: Fields) -> list[Case]:
    return [Case(task_of(f, "question"), (f.text("answer"),), meta=f.rest())]


def _question_response(f: Fields) -> list[Case]:
    return [Case(task_of(f, "question"), (f.text("response"),), meta=f.rest())]


def _query_response(f: Fields) -> list[Case]:
    return [Case(task_of(f, "query"), (f.text("response"),), meta=f.rest())]


def _instances(f: Fields) -> list[Case]:
    instruction = f.text("instruction")
    pairs = [(e.text("input", blank=True), e.text("output")) for e in f.entries("instances")]
    meta = f.rest()
    return [Case(Instruction(instruction, i), (o,), meta=meta) for i, o in pairs]


def _completion(f: Fields) -> list[Case]:
    return _prompt_and(f, "completion")


def _response(f: Fields) -> list[Case]:
    return _prompt_and(f, "response")


def _prompt_and(f: Fields, name: str) -> list[Case]:
    prompt, answer = prompt_of(f, "prompt"), answer_of(f, name)
    answer = f.without_end(answer, name)
    if f.has("label") and not f.flag("label"):
        raise f.error("label false: no answer to learn from (data.comparisons of kto)", "label")
    return [Case(prompt, (answer,), meta=f.rest())]


def _messages(f: Fields) -> list[Case]:
    return [_chat(f, "messages")]


def _sharegpt(f: Fields) -> list[Case]:
    return [_chat(f, "conversations")]


def _chat(f: Fields, name: str) -> Case:
    turns = f.turns(name)
    if len(turns) == 1 and turns[0].role == "assistant":
        raise f.error("an answer without a question", name)
    if turns[-1].role != "assistant":
        return Case(turns, meta=f.rest())
    return Case(turns[:-1], (turns[-1].text,), target=turns[-1].target, meta=f.rest())


def _tldr(f: Fields) -> list[Case]:
    prompt = tldr_prompt(f.text("subreddit"), f.text("title", blank=True), f.text("post"))
    return [Case(prompt, (f" {f.text('summary').strip()}",), meta=f.rest())]


# A record is read by the first format of the wanted kind whose required columns it has.
FORMATS = (
    *RANKINGS,
    Format("self-instruct", "demonstrations", ("instruction", "instances"), _instances),
    Format("alpaca", "demonstrations", ("instruction", "output"), _alpaca, ("input", "history")),
    Format("dolly", "demonstrations", ("instruction", "response"), _dolly, ("context",)),
    Format("messages", "demonstrations", ("messages",), _messages),
    Format("sharegpt", "demonstrations", ("conversations",), _sharegpt),
    Format("tldr", "demonstrations", ("subreddit", "title", "post", "summary"), _tldr),
    Format("prompt+completion", "demonstrations", ("prompt", "completion"), _completion),
    Format("prompt+response", "demonstrations", ("prompt", "response"), _response),
    Format(
        "question+response",
        "demonstrations",
        ("question", "response"),
        _question_response,
        ("context",),
    ),
    Format(
        "question+answer", "demonstrations", ("question", "answer"), _question_answer, ("context",)
    ),
    Format(
        "query+response", "demonstrations", ("query", "response"), _query_response, ("context",)
    ),
    Format("questions", "prompts", ("question_id", "turns"), _first_turn),
    Format("questions", "prompts", ("question_id", "text"), _question_text),
    Format("questions", "prompts", ("question",), _question, ("context",)),
    Format("instructions", "prompts", ("instruction",), _instruction, ("input",)),
    Format("prompts", "prompts", ("prompt",), _prompt),
    Format("text", "documents", ("text",), _text),
)
