"""One dialogue has one row of ids: in every stage, in sampling, and in the exported template."""

import importlib
import json

import jax
import numpy as np
import pytest
import tokenizers

from instruct_jax.data.encoding import (
    encode_comparisons,
    encode_demonstrations,
    encode_dialogues,
    encode_prompts,
)
from instruct_jax.data.formats import (
    read_comparisons,
    read_demonstrations,
    read_dialogues,
    read_prompts,
)
from instruct_jax.data.templates import ALPACA, CHAT, HH
from instruct_jax.data.tokenizer import load_tokenizer, train_bpe
from instruct_jax.models.hf.text import chat_template_of
from instruct_jax.sampling.complete import Completion, complete
from instruct_jax.stages import reward_model

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "Name a <|endoftext|> colour."},
    {"role": "assistant", "content": "Red"},
    {"role": "user", "content": "Another\none?"},
    {"role": "assistant", "content": "Blue, of course."},
    {"role": "user", "content": "And?"},
]
ANSWER = {"role": "assistant", "content": "Green"}
LENGTHS = {"prompt_length": 400, "response_length": 40}


@pytest.fixture(scope="module")
def tokenizer():
    texts = [turn["content"] for turn in TURNS] + [CHAT.first, ALPACA.first, HH.first]
    return train_bpe(texts, vocab_size=300)


@pytest.fixture(params=[CHAT, HH, ALPACA], ids=lambda template: template.name)
def template(request):
    return request.param


@pytest.fixture(
    params=[[SYSTEM], [], [{**SYSTEM, "content": " "}]], ids=["system", "bare", "blank"]
)
def turns(request):
    return [*request.param, *TURNS]


def exported(template, tokenizer, turns, tmp_path):
    """The ids by jinja2 and the tokenizers library alone, of a folder as it is exported."""
    jinja2 = pytest.importorskip("jinja2", reason="chat templates are rendered by jinja2")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = pytest.fail
    text = environment.from_string(chat_template_of(template)).render(
        messages=turns, eos_token=tokenizer.eos
    )
    tokenizer.save(tmp_path)
    return tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids


def written(path, record):
    path.write_text(json.dumps(record) + "\n")
    return path


def test_every_stage_reads_one_dialogue_as_the_same_tokens(
    tokenizer, template, turns, tmp_path, monkeypatch
):
    """EOS ends every answer, also those in the middle."""
    chat = written(tmp_path / "chat.jsonl", {"messages": [*turns, ANSWER]})
    pair = written(
        tmp_path / "pair.jsonl",
        {"prompt": turns, "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "Dog"}]},
    )
    alone = written(tmp_path / "alone.jsonl", {"prompt": turns})
    answer = [*tokenizer.encode(template.response("Green")), tokenizer.eos_id]

    rows = encode_prompts(
        read_prompts(alone, template=template), tokenizer, prompt_length=LENGTHS["prompt_length"]
    )
    prompt = rows["tokens"][0][rows["mask"][0]].tolist()
    assert prompt.count(tokenizer.eos_id) == 2, "after each of the earlier answers"

    shown = read_demonstrations(chat, template=template)
    whole = [
        encode_demonstrations(shown, tokenizer, **LENGTHS),
        encode_dialogues(
            read_dialogues(chat, template=template), tokenizer, template=template, **LENGTHS
        ),
    ]
    for rows in whole:
        assert rows["tokens"][0][rows["mask"][0]].tolist() == prompt + answer
        assert rows["tokens"][0][rows["loss_mask"][0]].tolist() == answer
    ranked = encode_comparisons(
        read_comparisons(pair, template=template), tokenizer, completions=2, **LENGTHS
    )
    assert ranked["tokens"][0, 0][ranked["mask"][0, 0]].tolist() == prompt + answer

    sampled, scored = [], []
    completing = importlib.import_module("instruct_jax.sampling.complete")
    monkeypatch.setattr(completing, "respond", lambda m, p, ids, *a, **k: sampled.extend(ids) or [])
    (row,) = read_prompts(alone, template=template)
    complete(None, None, tokenizer, [row.text], key=jax.random.key(0), max_new_tokens=1)
    assert sampled == [prompt]

    def score(model, params, tokens, mask):
        scored.append(tokens[0][mask[0]].tolist())
        return np.zeros(1)

    monkeypatch.setattr(reward_model, "score_rows", score)
    trained = type("Trained", (), {"tokenizer": tokenizer, "model": None, "params": None})
    answered = Completion("Green", True, tuple(answer))
    reward_model.score_answers(trained, tokenizer, [row.text], [answered], **LENGTHS)
    assert scored == [prompt + answer]


def test_the_exported_template_makes_the_same_tokens(tokenizer, template, turns, tmp_path):
    """Of text without special tokens: those are characters here and tokens there."""
    plain = [{**turn, "content": turn["content"].replace("<|endoftext|> ", "")} for turn in turns]
    chat = written(tmp_path / "chat.jsonl", {"messages": [*plain, ANSWER]})
    rows = encode_demonstrations(read_demonstrations(chat, template=template), tokenizer, **LENGTHS)
    ours = rows["tokens"][0][rows["mask"][0]].tolist()
    assert exported(template, tokenizer, [*plain, ANSWER], tmp_path / "hf") == ours
    assert load_tokenizer(tmp_path / "hf").fingerprint == tokenizer.fingerprint
