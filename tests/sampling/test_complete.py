"""Completions of texts, in batches whose size does not matter."""

import jax
import numpy as np
import pytest

from instruct_jax.sampling import complete
from instruct_jax.training.mesh import make_mesh

LETTERS = "abcdefghij"


class Letters:
    """One token a letter; 10 is the end token, 11 PAD."""

    eos_id, pad_id, vocab_size = 10, 11, 11

    def encode_batch(self, texts):
        return [[LETTERS.index(letter) for letter in text] for text in texts]

    def decode(self, ids):
        return "".join(LETTERS[i] for i in ids)


@pytest.fixture
def alphabet(table_model):
    """Each letter is followed by the next one or the one after, j by the end."""
    fake = table_model(11)
    rows = np.full((11, 11), -30.0, np.float32)
    for i in range(11):
        rows[i, min(i + 1, 10)] = rows[i, min(i + 2, 10)] = 0.0
    return fake.model, fake.params(rows)


PROMPTS = ["a", "bc", "ah", "abcde", "j", "ga", "d"]


def test_a_completion_does_not_depend_on_the_batch_size(alphabet):
    settings = dict(key=jax.random.key(0), max_new_tokens=12)
    whole = complete(*alphabet, Letters(), PROMPTS, **settings, batch_size=64)
    assert len(whole) == len(PROMPTS)
    for batch_size in (1, 3):
        assert complete(*alphabet, Letters(), PROMPTS, **settings, batch_size=batch_size) == whole
    wider = complete(*alphabet, Letters(), PROMPTS, **settings, prompt_length=8)
    assert wider == whole


def test_text_and_end_are_told_apart_from_the_budget(alphabet):
    completions = complete(
        *alphabet, Letters(), ["j", "a"], key=jax.random.key(0), max_new_tokens=3
    )
    assert completions[0] == ("", True, (10,))
    assert not completions[1].ended and len(completions[1].text) == 3
    stopped = complete(
        *alphabet, Letters(), ["a"], key=jax.random.key(0), max_new_tokens=9, stop_ids=(1, 2)
    )[0]
    assert stopped.ended and stopped.text == "" and stopped.tokens[0] in (1, 2)


def test_rows_are_spread_over_a_mesh(alphabet):
    settings = dict(key=jax.random.key(0), max_new_tokens=12)
    spread = complete(*alphabet, Letters(), PROMPTS, **settings, mesh=make_mesh("data:4"))
    assert spread == complete(*alphabet, Letters(), PROMPTS, **settings)


def test_a_prompt_that_is_empty_or_too_long_is_refused(alphabet):
    settings = dict(key=jax.random.key(0), max_new_tokens=3)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        complete(*alphabet, Letters(), ["a", ""], **settings)
    with pytest.raises(ValueError, match="prompt 2 has 5 tokens"):
        complete(*alphabet, Letters(), ["a", "b", "abcde"], **settings, prompt_length=4)
    assert complete(*alphabet, Letters(), [], **settings) == []
