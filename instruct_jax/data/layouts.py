"""The record layouts that are known: which columns tell a format, and what they mean.

A layout turns one record into cases: a prompt and, beside it, one answer (a demonstration) or
several that are ranked or scored (a comparison). `formats` makes rows of them. To support another
format, write its function and add it to `FORMATS`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from instruct_jax.data.fields import Fields
from instruct_jax.data.rows import Meta, Segment, Turn
from instruct_jax.data.templates import ALPACA, HH, TEMPLATES, Template, tldr_prompt

Kind = Literal["documents", "demonstrations", "comparisons", "prompts"]


# What some sets of pairs keep of their judge.
_SCORES = (
    ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"), ("chosen-rating", "rejected-rating"),
)  # fmt: skip


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
    return [Case(_whole(f, "prompt"), meta=f.rest())]


def _instruction(f: Fields) -> list[Case]:
    return [Case(_task(f, "instruction"), meta=f.rest())]


def _question_text(f: Fields) -> list[Case]:
    return [Case(Instruction(f.text("text")), meta=f.rest())]


def _question(f: Fields) -> list[Case]:
    return [Case(_task(f, "question"), meta=f.rest())]


def _first_turn(f: Fields) -> list[Case]:
    first, *later = f.texts("turns") or (f.text("turns"),)
    return [Case(Instruction(first), meta={**f.rest(), "later_turns": later})]


def _alpaca(f: Fields) -> list[Case]:
    task = _task(f, "instruction")
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
    return [Case(_task(f, "instruction"), (f.text("response"),), meta=f.rest())]


def _question_answer(f: Fields) -> list[Case]:
    return [Case(_task(f, "question"), (f.text("answer"),), meta=f.rest())]


def _question_response(f: Fields) -> list[Case]:
    return [Case(_task(f, "question"), (f.text("response"),), meta=f.rest())]


def _query_response(f: Fields) -> list[Case]:
    return [Case(_task(f, "query"), (f.text("response"),), meta=f.rest())]


def _task(f: Fields, name: str) -> Instruction:
    """The instruction in column `name`, and what it is about in "input" or "context"."""
    inputs = [f.text(column, blank=True) for column in ("input", "context")]
    if all(text.strip() for text in inputs):
        raise f.error("both an input and a context", "context")
    return Instruction(f.text(name), inputs[0] or inputs[1])


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
    prompt, answer = _whole(f, "prompt"), _answer(f, name)
    answer = f.without_end(answer, name)
    if f.has("label") and not f.flag("label"):
        raise f.error("label false: no answer to learn from (data.comparisons of kto)", "label")
    return [Case(prompt, (answer,), meta=f.rest())]


def _unpaired(f: Fields) -> list[Case]:
    """An answer that was judged alone, as KTO's data sets have them."""
    prompt, answer = _whole(f, "prompt"), _answer(f, "completion")
    return [Case(prompt, (answer,), (0,), label=f.flag("label"), meta=f.rest())]


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


def _preference(f: Fields) -> list[Case]:
    if not f.is_chat("chosen"):
        if f.text("chosen").startswith(HH.tags[0][1]):
            return _hh(f)
        prompt = _whole(f, "prompt")
        return [_ranked(f, prompt, (f.text("chosen"), f.text("rejected")), (0, 1))]
    chosen, rejected = f.turns("chosen"), f.turns("rejected")
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if turns[-1].role != "assistant":
            raise f.error("the last turn is not the assistant's", name)
    shared = chosen[:-1]
    if shared != rejected[:-1]:
        raise f.error("chosen and rejected answer different prompts", "rejected")
    if not shared or f.has("prompt"):
        whole = f.is_text("prompt")
        given = (Turn("user", f.text("prompt")),) if whole else f.turns("prompt")
        shared = shared or given
        _check_prompt(f, given, shared)
    return [_ranked(f, shared, (chosen[-1].text, rejected[-1].text), (0, 1))]


def _check_prompt(f: Fields, given: tuple[Turn, ...], shared: tuple[Turn, ...]) -> None:
    """DataError for a prompt that is neither all that precedes both answers nor a question there:
    sets name the first one, or the last.
    """
    words = [[(turn.role, turn.text.strip()) for turn in turns] for turns in (given, shared)]
    asked, there = ([turn for turn in turns if turn[0] != "system"] for turns in words)
    if words[0] != words[1] and asked != there and not (len(asked) == 1 and asked[0] in there):
        raise f.error("not the prompt that chosen and rejected answer", "prompt")


def _task_preference(f: Fields) -> list[Case]:
    name = "instruction" if f.has("instruction") else "question"
    return [_ranked(f, _task(f, name), (f.text("chosen"), f.text("rejected")), (0, 1))]


def _chat_preference(f: Fields) -> list[Case]:
    answers = (_answer(f, "chosen"), _answer(f, "rejected"))
    return [_ranked(f, f.turns("conversations"), answers, (0, 1))]


def _hh(f: Fields) -> list[Case]:
    if f.is_chat("chosen"):
        return _preference(f)
    prompts, answers = [], []
    for name in ("chosen", "rejected"):
        text = f.text(name)
        prompt, opening, answer = text.rpartition("\n\nAssistant:")
        if not opening or "\n\nHuman:" in answer:
            raise f.error('expected a transcript that ends with "\\n\\nAssistant: ..."', name)
        if not answer.strip():
            raise f.error("empty text in the last turn", name)
        prompts.append(prompt + opening)
        answers.append(answer.removeprefix(HH.response_prefix))
    if prompts[0] != prompts[1]:
        raise f.error("chosen and rejected answer different prompts", "rejected")
    if f.has("prompt"):
        # Either the transcript up to the answer or a question of it.
        given = f.text("prompt") if f.is_text("prompt") else f.turns("prompt")
        turns = HH.parse(prompts[0])
        if isinstance(given, str):
            given = f"\n\n{given.strip()}"
            given = HH.parse(given if given.startswith(HH.tags[0][1]) else HH.render(given.strip()))
        _check_prompt(f, given, turns)
    return [_ranked(f, prompts[0], tuple(answers), (0, 1), style=HH)]


def _kwise(f: Fields) -> list[Case]:
    prompt, answers, ranks = _whole(f, "prompt"), f.texts("completions"), f.integers("ranks")
    labeler = f.text("labeler") if f.has("labeler") else None
    sources = f.texts("sources") if f.has("sources") else ()
    return [_ranked(f, prompt, answers, ranks, labeler=labeler, sources=sources)]


def _scored(f: Fields) -> list[Case]:
    prompt, answers, scores = _whole(f, "prompt"), f.texts("completions"), f.numbers("scores")
    sources = f.texts("sources") if f.has("sources") else ()
    return [_ranked(f, prompt, answers, scores=scores, sources=sources)]


def _webgpt(f: Fields) -> list[Case]:
    prompt = Instruction(f.text("question"))
    return [_ranked(f, prompt, f.texts("answers"), scores=f.numbers("scores"))]


def _oasst(f: Fields) -> list[Case]:
    prompt, responses = f.turns("messages"), f.entries("responses")
    answers = tuple(entry.text("text") for entry in responses)
    ranks = tuple(entry.choice("rank", range(len(responses))) for entry in responses)
    f.value("K", 0)
    return [_ranked(f, prompt, answers, ranks)]


def _alpaca_eval(f: Fields) -> list[Case]:
    """An answer that several models gave is kept once, at the mean of its scores."""
    prompt = Instruction(f.text("instruction"), f.text("input", blank=True))
    found: dict[str, tuple[list[str], list[float]]] = {}
    for entry in f.entries("responses"):
        text, model = entry.text("text", blank=True), entry.text("model")
        if not text.strip():
            f.mended["empty answers left out"] += 1
            continue
        f.mended["equal answers merged"] += text in found
        models, logits = found.setdefault(text, ([], []))
        models.append(model)
        logits.append(entry.number(entry.value("logit"), "logit"))
    f.value("K", 0)
    scores = tuple(sum(logits) / len(logits) for _, logits in found.values())
    sources = tuple("+".join(models) for models, _ in found.values())
    return [_ranked(f, prompt, tuple(found), scores=scores, sources=sources)]


def _pandalm(f: Fields) -> list[Case]:
    """Three annotators: three comparisons of one pair."""
    prompt = Instruction(f.text("instruction"), f.text("input", blank=True))
    answers = f.text("response1"), f.text("response2")
    votes = {name: f.choice(name, (0, 1, 2)) for name in ("annotator1", "annotator2", "annotator3")}
    models = tuple(f.text("cmp_key", blank=True).split("_"))
    sources = models if len(models) == 2 else ()
    ranks = {0: (0, 0), 1: (0, 1), 2: (1, 0)}
    return [
        _ranked(f, prompt, answers, ranks[vote], labeler=name, sources=sources)
        for name, vote in votes.items()
    ]


def _llmbar(f: Fields) -> list[Case]:
    answers = f.text("output_1"), f.text("output_2")
    ranks = ((0, 1), (1, 0))[f.choice("label", (1, 2)) - 1]
    return [_ranked(f, Instruction(f.text("input")), answers, ranks)]


def _gpt4llm(f: Fields) -> list[Case]:
    answers = f.text("completion_a"), f.text("completion_b")  # a is the better one
    return [_ranked(f, Instruction(f.text("user_input")), answers, (0, 1))]


def _tldr_comparison(f: Fields) -> list[Case]:
    """summarize-from-feedback: two summaries of a Reddit post and a worker's choice."""
    post = f.entry("info")
    prompt = tldr_prompt(
        post.text("subreddit", blank=True), post.text("title", blank=True), post.text("post")
    )
    summaries = f.entries("summaries")
    answers = tuple(f" {entry.text('text').strip()}" for entry in summaries)
    sources = tuple(entry.text("policy", blank=True) for entry in summaries)
    best = f.choice("choice", range(len(summaries)))
    ranks = tuple(int(i != best) for i in range(len(summaries)))
    labeler = f.text("worker") if f.has("worker") else None
    return [_ranked(f, prompt, answers, ranks, labeler=labeler, sources=sources)]


def _ranked(
    f: Fields,
    prompt: Asked,
    answers: tuple[str, ...],
    ranks: tuple[int, ...] | None = None,
    *,
    scores: tuple[float, ...] | None = None,
    labeler: str | None = None,
    sources: tuple[str, ...] = (),
    style: Template | None = None,
) -> Case:
    """A comparison; DataError when its answers do not match their ranks, scores or sources."""
    if ranks is not None:
        _check_scores(f)
    order: Sequence[float] = ranks if ranks is not None else scores or ()
    if len(answers) < 2:
        raise f.error(f"{len(answers)} completions; a comparison needs at least 2")
    if len(order) != len(answers):
        what = "scores" if ranks is None else "ranks"
        raise f.error(f"{len(answers)} completions with {len(order)} {what}")
    if sources and len(sources) != len(answers):
        raise f.error(f"{len(answers)} completions with {len(sources)} sources")
    best = dict(zip(answers, order, strict=True))
    if any(best[answer] != rank for answer, rank in zip(answers, order, strict=True)):
        pair = "chosen and rejected are the same text"
        raise f.error(pair if len(answers) == 2 else "equal completions with different ranks")
    return Case(prompt, answers, ranks, scores, labeler, sources, style, meta=f.rest())


def _check_scores(f: Fields) -> None:
    """DataError for a rejected answer that was given more than the chosen one."""
    for names in _SCORES:
        if all(map(f.has, names)):
            try:
                chosen, rejected = (float(f.record.fields[name]) for name in names)
            except (TypeError, ValueError):
                continue
            if chosen < rejected:
                raise f.error("the rejected answer has the higher score", names[0])


def _whole(f: Fields, name: str) -> str | tuple[Turn, ...] | tuple[Segment, ...]:
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


def _answer(f: Fields, name: str) -> str:
    """A string, or a list of one assistant message."""
    if f.is_text(name):
        return f.text(name)
    turns = f.turns(name)
    if len(turns) != 1 or turns[0].role != "assistant":
        raise f.error("expected one assistant message", name)
    return turns[0].text


def joined(task: Instruction) -> str:
    """An instruction and its input as one message."""
    return f"{task.text}\n\n{task.input}" if task.input.strip() else task.text


# A record is read by the first format of the wanted kind whose required columns it has.
FORMATS = (
    Format("oasst rankings", "comparisons", ("messages", "responses"), _oasst),
    Format("alpaca_eval rankings", "comparisons", ("instruction", "responses"), _alpaca_eval),
    Format(
        "pandalm",
        "comparisons",
        ("instruction", "response1", "response2", "annotator1", "annotator2", "annotator3"),
        _pandalm,
        ("input",),
    ),
    Format("llmbar", "comparisons", ("input", "output_1", "output_2", "label"), _llmbar),
    Format("webgpt", "comparisons", ("question", "answers", "scores"), _webgpt),
    Format("unpaired", "comparisons", ("prompt", "completion", "label"), _unpaired),
    Format("K-wise ranks", "comparisons", ("prompt", "completions", "ranks"), _kwise),
    Format("K-wise scores", "comparisons", ("prompt", "completions", "scores"), _scored),
    Format("tldr comparisons", "comparisons", ("info", "summaries", "choice"), _tldr_comparison),
    Format("gpt4llm", "comparisons", ("user_input", "completion_a", "completion_b"), _gpt4llm),
    Format("preference", "comparisons", ("prompt", "chosen", "rejected"), _preference),
    Format(
        "instruction preference",
        "comparisons",
        ("instruction", "chosen", "rejected"),
        _task_preference,
        ("input",),
    ),
    Format(
        "question preference", "comparisons", ("question", "chosen", "rejected"), _task_preference
    ),
    Format(
        "sharegpt preference",
        "comparisons",
        ("conversations", "chosen", "rejected"),
        _chat_preference,
    ),
    Format("hh transcripts", "comparisons", ("chosen", "rejected"), _hh, ("prompt",)),
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
