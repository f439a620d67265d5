import json
import re
from datetime import datetime
from functools import cache
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from instruct_jax.data.chat_template import ChatTemplate
from instruct_jax.data.jinja import Program, Refused, TemplateError, check_template
from instruct_jax.data.tokenizer import Tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures" / "chat"
RECORDED = json.loads((FIXTURES / "chats.json").read_text())
NOW = datetime(2026, 12, 1)
MARKS = re.compile(r"\{% (end)?generation %\}")


@cache
def template(name: str, marked: bool = True) -> ChatTemplate:
    """The recorded template `name`, with or without its generation marks."""
    recorded = RECORDED[name]
    named = recorded["named"]
    backend = tokenizers.Tokenizer.from_file(str(FIXTURES / recorded["tokenizer"]))
    generation = {"eos_token_id": recorded["ends"]}
    tokenizer = Tokenizer(backend, eos=named["eos_token"], named=named, generation=generation)
    source = (FIXTURES / "templates" / f"{name}.jinja").read_text()
    return ChatTemplate(source if marked else MARKS.sub("{##}", source), tokenizer)


def chats(name: str, refused: bool = False) -> list[dict]:
    return [chat for chat in RECORDED[name]["chats"] if ("refused" in chat) == refused]


def bits(ours: list[bool]) -> str:
    return "".join("01"[one] for one in ours)


@pytest.mark.parametrize("name", RECORDED)
def test_ids_and_answers_are_those_of_transformers(name):
    for chat in chats(name):
        found = template(name).encode(chat["messages"], now=NOW)
        assert found.ids == chat["ids"], chat["messages"]
        assert bits(found.ours) == chat["ours"], chat["messages"]


@pytest.mark.parametrize("name", RECORDED)
def test_a_template_without_generation_marks_gives_the_same_answers_or_says_why_not(name):
    told_apart = 0
    for chat in chats(name):
        try:
            found = template(name, marked=False).encode(chat["messages"], now=NOW)
        except Refused as refusal:
            first = chat["messages"][0]["role"]
            # Mistral's puts the system's text into the last question, wherever that is.
            assert (first, name) == ("system", "mistral") or first == "assistant", refusal
            continue
        assert found.ids == chat["ids"]
        if name == "smollm3":
            # Its marks enclose the empty thought that its generation prompt has too, and the end of
            # the line; an answer is what follows the prompt, up to its end.
            start = bits(found.ours).rindex("01") + 1
            stop = bits(found.ours).rindex("1")
            assert found.ids[:start] == chat["prompt"]
            assert found.ids[stop] == template(name).tokenizer.eos_id
        else:
            assert bits(found.ours) == chat["ours"], chat["messages"]
        told_apart += 1
    assert told_apart >= 7


@pytest.mark.parametrize("name", RECORDED)
def test_a_prompt_is_that_of_transformers_and_the_start_of_the_whole(name):
    for chat in chats(name):
        found = template(name).encode(chat["messages"][:-1], add_generation_prompt=True, now=NOW)
        assert found.ids == chat["prompt"]
        assert not any(found.ours)


@pytest.mark.parametrize("name", RECORDED)
def test_what_the_template_refuses_is_refused_in_its_words(name):
    for chat in chats(name, refused=True):
        with pytest.raises(Refused, match=re.escape(chat["refused"])):
            template(name).encode(chat["messages"], now=NOW)


@pytest.mark.parametrize("name", ["qwen3", "gemma", "zephyr", "llama3", "deepseek"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_text_of_anybody_becomes_a_control_token(name, data):
    """Over all special tokens, whole and in parts, in every role and beside white space."""
    chat = template(name)
    # What the model has no piece for is <unk>, whoever writes it.
    tokens = [t for t in chat.tokenizer.special if t != "<unk>"]
    tokens += (t for t in chat.tokenizer.added if t in chat.source)
    parts = st.sampled_from(tokens).flatmap(
        lambda token: st.sampled_from([token, token[:-1], token[1:], token[: len(token) // 2]])
    )
    text = st.lists(parts | st.sampled_from(["a", " ", "\n", "<", "|", ">", "é"]), max_size=6)
    said = [f"x{''.join(data.draw(text))}{end}" for end in ("y", "", " ", "y")]
    roles = ("user", "assistant", "user", "assistant")
    # The assistant may write what its template inspects, such as <think>; not what is special.
    inspected = [t for t in chat.tokenizer.added if t not in chat.tokenizer.special]
    for token in inspected:
        said = [text.replace(token, "") if i % 2 else text for i, text in enumerate(said)]
    plain = [{"role": r, "content": "x"} for r in roles]
    made = [{"role": r, "content": c} for r, c in zip(roles, said, strict=True)]
    controls = {chat.tokenizer.id_of(token) for token in tokens}

    def control_ids(messages):
        return [i for i in chat.encode(messages, now=NOW).ids if i in controls]

    assert control_ids(made) == control_ids(plain)


@pytest.mark.parametrize("name", ["qwen3", "llama2", "zephyr"])
def test_what_was_hidden_is_read_as_its_characters(name):
    chat = template(name)
    token = chat.tokenizer.eos
    found = chat.render([{"role": "user", "content": f"a {token} b"}])
    assert f"a {token} b" in found.text
    ids = chat.encode([{"role": "user", "content": f"a {token} b"}]).ids
    typed = f"a {token} b" if name != "zephyr" else "b"  # a Unigram of 200 pieces lacks < and >
    assert typed in chat.tokenizer.decode(i for i in ids if i != chat.tokenizer.eos_id)


def test_the_assistant_may_write_what_its_template_inspects_and_a_user_may_not():
    chat = template("qwen3")
    think = chat.tokenizer.id_of("<think>")
    asked = chat.encode([{"role": "user", "content": "<think>"}], now=NOW)
    assert think not in asked.ids
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>b</think>c"}]
    assert chat.encode(said, now=NOW).ids.count(think) == 1


def test_a_code_point_that_stands_for_a_control_token_is_refused():
    with pytest.raises(Refused, match=r"U\+100001"):
        template("chatml").encode([{"role": "user", "content": "a\U00100001b"}])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% if %}", "no Jinja template"),
        ("x" * 1_000_001, "no template is so long"),
        ("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", "loops"),
        ("{% set n = namespace(x='ab') %}{% for a in range(50) %}{% set n.x = n.x ~ n.x %}"
         "{% endfor %}", "more than 1,000,000"),
        ("{{ [1] * 10**9 }}", "more than 1,000,000"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it fails"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely"),
        ("{{ 'a'.ljust(10**10) }}", "Memory"),
        ("{% include 'x' %}", "fails"),
    ],
)  # fmt: skip
def test_a_template_that_would_not_end_or_reaches_out_is_one_line(source, reason):
    with pytest.raises(TemplateError, match=reason) as told:
        check_template(source, {})
    assert "\n" not in str(told.value)


def test_the_recorded_templates_are_within_the_limits():
    for name in RECORDED:
        check_template(template(name).source, template(name).tokenizer.named)


def test_a_date_is_the_one_given():
    program = Program("{{ strftime_now('%Y-%m-%d') }}")
    assert program.render([], add_generation_prompt=False, now=NOW) == "2026-12-01"
