"""The layouts of comparisons: completions of one prompt that are ranked, scored or labelled."""

from collections.abc import Sequence

from instruct_jax.data.cases import Asked, Case, Format, Instruction, answer_of, prompt_of, task_of
from instruct_jax.data.fields import Fields
from instruct_jax.data.rows import Turn
from instruct_jax.data.templates import HH, Template, tldr_prompt

# What some sets of pairs keep of their judge.
_SCORES = (
    ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"), ("chosen-rating", "rejected-rating"),
)  # fmt: skip


def _preference(f: Fields) -> list[Case]:
    if not f.is_chat("chosen"):
        if f.text("chosen").startswith(HH.tags[0][1]):
            return _hh(f)
        prompt = prompt_of(f, "prompt")
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
    return [_ranked(f, task_of(f, name), (f.text("chosen"), f.text("rejected")), (0, 1))]


def _chat_preference(f: Fields) -> list[Case]:
    answers = (answer_of(f, "chosen"), answer_of(f, "rejected"))
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


def _unpaired(f: Fields) -> list[Case]:
    """An answer that was judged alone, as KTO's data sets have them."""
    prompt, answer = prompt_of(f, "prompt"), answer_of(f, "completion")
    return [Case(prompt, (answer,), (0,), label=f.flag("label"), meta=f.rest())]


def _kwise(f: Fields) -> list[Case]:
    prompt, answers, ranks = prompt_of(f, "prompt"), f.texts("completions"), f.ranks("ranks")
    labeler = f.text("labeler") if f.has("labeler") else None
    sources = f.texts("sources") if f.has("sources") else ()
    return [_ranked(f, prompt, answers, ranks, labeler=labeler, sources=sources)]


def _scored(f: Fields) -> list[Case]:
    prompt, answers, scores = prompt_of(f, "prompt"), f.texts("completions"), f.numbers("scores")
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


RANKINGS = (
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
)
