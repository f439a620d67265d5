"""How a model is asked, by whichever template; a dialogue carries the ids that were drawn."""

import pytest

from instruct_jax.data.rows import Turn
from instruct_jax.errors import ConfigError
from instruct_jax.models.transformer import TransformerConfig
from instruct_jax.stages.dialogue import Dialogue, way_of_asking
from instruct_jax.stages.trained import TrainedModel
from tests.data.test_chat_template import template


def trained(name: str, template_of_run: str | None = None) -> TrainedModel:
    """A model, without parameters, whose folder has the recorded chat template `name`."""
    chat = template(name, marked=False)
    chat.tokenizer.chat = chat.source
    shape = TransformerConfig(chat.tokenizer.vocab_size, 1, 8, 1)
    return TrainedModel("language", shape, {}, chat.tokenizer, "imported", template=template_of_run)


def test_the_template_of_the_run_comes_first_then_the_models_own_then_the_bare_text():
    assert way_of_asking(trained("chatml")).name == "model"
    assert way_of_asking(trained("chatml", "alpaca")).name == "alpaca"
    assert way_of_asking(trained("chatml", "alpaca"), "model").name == "model"
    bare = trained("llama3")
    bare.tokenizer.chat = None
    asking = way_of_asking(bare)
    assert asking.name == "plain"
    # What the tokenizer itself puts before a text, of this one nothing.
    assert asking.ids([Turn("user", "Hello")]) == bare.tokenizer.encode("Hello")
    with pytest.raises(ConfigError, match="no chat template"):
        way_of_asking(bare, "model")
    with pytest.raises(ConfigError, match="no template"):
        way_of_asking(bare, "alpacca")


def test_a_chat_template_that_fails_is_told_at_the_door():
    broken = trained("chatml")
    broken.tokenizer.chat = "{{ messages[0].missing.more }}"
    with pytest.raises(ConfigError, match="the model's chat template: it fails"):
        way_of_asking(broken)


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "phi3", "deepseek", "command_r"])
def test_what_was_drawn_is_carried_on_as_it_was_drawn(name):
    model = trained(name)
    asking = way_of_asking(model)
    tokenizer = model.tokenizer
    end = tokenizer.stop_ids[-1]
    dialogue = Dialogue(asking, tokenizer.stop_ids)
    first = dialogue.ask("What is the capital?")
    # Not the ids that the text would have: byte by byte.
    drawn = [i for c in "Paris" for i in tokenizer.encode(c)]
    dialogue.answered([*drawn, end], "Paris")
    second = dialogue.ask("Thanks")
    assert second[: len(first) + len(drawn) + 1] == [*first, *drawn, end]
    again = asking.ids([*dialogue.turns])
    assert second[len(first) + len(drawn) + 1 :] == again[again.index(end, len(first)) + 1 :]


def test_an_answer_without_its_end_is_written_anew():
    model = trained("chatml")
    dialogue = Dialogue(way_of_asking(model), model.tokenizer.stop_ids, system="Be kind.")
    dialogue.ask("Hello")
    dialogue.answered([5, 6], "ab")
    assert dialogue.ask("More") == way_of_asking(model).ids(dialogue.turns)
    assert [turn.role for turn in dialogue.turns] == ["system", "user", "assistant", "user"]


def test_an_own_template_carries_a_dialogue_too():
    chat = trained("llama3", "chat")
    dialogue = Dialogue(way_of_asking(chat), chat.tokenizer.stop_ids)
    first = dialogue.ask("a")
    dialogue.answered([7, chat.tokenizer.eos_id], "x")
    second = dialogue.ask("b")
    assert second[: len(first) + 2] == [*first, 7, chat.tokenizer.eos_id]
    assert second[len(first) + 2 :] == chat.tokenizer.encode("\n<|user|>\nb\n<|assistant|>\n")
