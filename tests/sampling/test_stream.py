"""Streaming: the same tokens as all at once, stop texts across tokens, rows that are given up."""

import jax
import jax.numpy as jnp
import pytest

from instruct_jax.data.tokenizer import train_bpe
from instruct_jax.models.transformer import TransformerConfig, language_model
from instruct_jax.sampling import Engine, Sampling, respond
from instruct_jax.sampling.stream import first_stop, settled, stream

BUDGET = 24


@pytest.fixture(scope="module")
def tokenizer():
    words = "one two three four five six seven eight nine ten éàü 日本語 "
    return train_bpe([words * 4], vocab_size=320)


@pytest.fixture(scope="module")
def lm(tokenizer):
    shape = TransformerConfig(
        vocab_size=tokenizer.vocab_size, num_layers=2, d_model=16, num_heads=2, max_length=64,
        init_std=0.5, positions="rope",
    )  # fmt: skip
    model = language_model(shape)
    return model, model.init(jax.random.key(1))


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [tokenizer.encode(text) for text in ("one", "two three", "four five six", "日本", "é")]


def keys(count):
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(3), jnp.arange(count))


def streamed(lm, tokenizer, prompts, *, slots, stops=(), turns=4):
    engine = Engine(*lm, Sampling(stop_ids=(tokenizer.eos_id,)), slots=slots)
    engine.submit(prompts, keys(len(prompts)), max_new_tokens=BUDGET)
    pieces = list(stream(engine, tokenizer, stops=stops, turns=turns))
    texts: dict[int, str] = {}
    for piece in pieces:
        texts[piece.number] = texts.get(piece.number, "") + piece.text
    return texts, {p.number: p for p in pieces if p.end is not None}, pieces


@pytest.fixture(scope="module")
def whole(lm, tokenizer, prompts):
    """The answers of the engine all at once."""
    sampling = Sampling(stop_ids=(tokenizer.eos_id,))
    return respond(*lm, prompts, keys(len(prompts)), sampling, max_new_tokens=BUDGET)


@pytest.mark.parametrize(("slots", "turns"), [(1, 1), (2, 4), (8, 100)])
def test_streamed_tokens_are_those_of_one_call(lm, tokenizer, prompts, whole, slots, turns):
    texts, ends, _ = streamed(lm, tokenizer, prompts, slots=slots, turns=turns)
    for n, response in enumerate(whole):
        assert ends[n].tokens == response.tokens
        assert ends[n].end == ("stop" if response.ended else "length")
        kept = response.tokens[: len(response.tokens) - response.ending]
        assert texts[n] == tokenizer.decode(kept)
        assert len(ends[n].log_probs) == len(response.tokens)


def test_text_comes_on_the_way_and_never_half_a_character(lm, tokenizer, prompts):
    _, _, pieces = streamed(lm, tokenizer, prompts, slots=2, turns=1)
    assert sum(piece.end is None for piece in pieces) > len(prompts)
    assert not any(piece.text.endswith("\ufffd") for piece in pieces if piece.end is None)


def test_a_stop_text_ends_an_answer_before_it_also_across_tokens(lm, tokenizer, prompts, whole):
    for n, response in enumerate(whole):
        text = tokenizer.decode(response.tokens[: len(response.tokens) - response.ending])
        stop = text[len(text) // 2 :][:3]
        texts, ends, _ = streamed(lm, tokenizer, prompts, slots=4, turns=3, stops=(stop,))
        assert texts[n] == text[: text.find(stop)]
        assert ends[n].end == "stop"


def test_a_row_that_is_given_up_frees_its_slot_and_changes_no_other(lm, tokenizer, prompts, whole):
    engine = Engine(*lm, Sampling(stop_ids=(tokenizer.eos_id,)), slots=2)
    engine.submit(prompts, keys(len(prompts)), max_new_tokens=BUDGET)
    engine.step(2)
    gone = min(engine.drawn_by())
    last = len(prompts) - 1
    engine.cancel([gone, last])  # one that lives, one that waits
    assert gone not in engine.drawn_by()
    responses = dict(engine.run())
    assert sorted(responses) == [n for n in range(last) if n != gone]
    assert all(responses[n].tokens == whole[n].tokens for n in responses)


def test_what_may_become_a_stop_text_waits():
    assert settled("abc", ()) == 3
    assert settled("ab\ufffd", ()) == 2
    assert settled("text <|us", ("<|user|>",)) == 5
    assert settled("text <|user", ("<|user|>", "|")) == 5
    assert first_stop("a\n\nb", ("\n\n", "b")) == 1
    assert first_stop("abc", ("x",)) is None
