"""Held-out loss and few-shot tasks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax.evaluation.language import (
    Question,
    choose,
    continuation_log_probs,
    few_shot,
    greedy_answers,
    held_out_loss,
    ptx_recovery,
    task_accuracy,
)
from instruct_jax.models.transformer import PARTITION_RULES, TransformerConfig, language_model
from instruct_jax.training.mesh import make_mesh, tree_shardings

LETTERS = "abcdefgh:\n"
EOS, VOCAB = 10, 11


class Letters:
    """One token a letter; 10 is the end token, 11 PAD."""

    eos_id, pad_id, vocab_size = EOS, VOCAB, VOCAB

    def encode(self, text):
        return [LETTERS.index(letter) for letter in text]

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        return "".join(LETTERS[i] for i in ids)


@pytest.fixture(scope="module")
def model():
    return language_model(
        TransformerConfig(
            vocab_size=VOCAB, num_layers=1, d_model=16, num_heads=2, max_length=48, init_std=0.4
        )
    )


@pytest.fixture(scope="module")
def params(model):
    return model.init(jax.random.key(0))


@pytest.fixture(scope="module")
def log_softmax(model, params):
    """tokens of one unpadded row -> float64[T, V] log-probs, each row of its own."""

    def full(tokens):
        padded = np.full((1, 48), VOCAB, np.int32)
        padded[0, : len(tokens)] = tokens
        logits = np.asarray(apply(jnp.asarray(padded)), np.float64)[0, : len(tokens), :VOCAB]
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    apply = jax.jit(lambda tokens: model.apply(params, tokens))
    return full


def ragged(rng, count=13, width=12):
    tokens = rng.integers(0, VOCAB, (count, width)).astype(np.int32)
    mask = np.arange(width)[None, :] < rng.integers(1, width + 1, count)[:, None]
    return np.where(mask, tokens, VOCAB).astype(np.int32), mask


def test_held_out_loss_divides_once_by_the_global_count(model, params, log_softmax, rng):
    """JAX-4: a ragged set in batches of any size gives the mean over its tokens."""
    tokens, mask = ragged(rng)
    losses = []
    for row, real in zip(tokens, mask.sum(axis=1), strict=True):
        table = log_softmax(row[:real])
        losses += [-table[t, row[t + 1]] for t in range(real - 1)]
    for batch_size in (4, 32):
        loss = held_out_loss(model, params, tokens, mask, batch_size=batch_size)
        assert loss == pytest.approx(np.mean(losses), abs=1e-5)
    sharded = jax.device_put(params, tree_shardings(make_mesh("data:4"), PARTITION_RULES, params))
    spread = held_out_loss(model, sharded, tokens, mask, batch_size=6, mesh=make_mesh("data:4"))
    assert spread == pytest.approx(np.mean(losses), abs=1e-5)


def test_only_targets_count(model, params, log_softmax, rng):
    tokens, mask = ragged(rng, count=4)
    targets = mask & (np.arange(12)[None, :] == 2)
    expected = [
        -log_softmax(row)[1, row[2]] for row, t in zip(tokens, targets, strict=True) if t[2]
    ]
    loss = held_out_loss(model, params, tokens, mask, targets, batch_size=4)
    assert loss == pytest.approx(np.mean(expected), abs=1e-5)
    with pytest.raises(ValueError, match="no target"):
        held_out_loss(model, params, tokens, mask, mask & False, batch_size=4)


def test_a_continuation_is_scored_after_its_prompt(model, params, log_softmax):
    texts = [("ab:", "cd"), ("h", "abcdefg"), ("abcabc", "\n")]
    sums, counts = continuation_log_probs(model, params, Letters(), texts)
    assert counts.tolist() == [2, 7, 1]
    for total, (prompt, continuation) in zip(sums, texts, strict=True):
        ids = Letters().encode(prompt + continuation)
        table = log_softmax(ids)
        start = len(prompt)
        expected = sum(table[t - 1, ids[t]] for t in range(start, len(ids)))
        assert total == pytest.approx(expected, abs=1e-4)


def test_the_choice_is_the_best_average_not_the_best_sum(model, params):
    """EVAL-8: a longer answer is not worse for being longer."""
    questions = [
        Question("ab:", "c", ("c", "cdefgh", "hg")),
        Question("h:", "a", ("a", "bb")),
    ]
    picks = choose(model, params, Letters(), questions)
    for question, pick in zip(questions, picks, strict=True):
        sums, counts = continuation_log_probs(
            model, params, Letters(), [(question.prompt, c) for c in question.choices]
        )
        assert pick == int(np.argmax(sums / counts))
    right = [q._replace(answer=q.choices[p]) for q, p in zip(questions, picks, strict=True)]
    assert task_accuracy(model, params, Letters(), right).mean == 1.0


def test_greedy_answers_stop_at_the_newline(model, params, log_softmax):
    prompts = ["ab:", "hgf", "c"]
    answers = greedy_answers(model, params, Letters(), prompts, max_new_tokens=8)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = Letters().encode(prompt)
        while len(ids) < len(prompt) + 8 and (len(ids) == len(prompt) or ids[-1] not in (9, EOS)):
            ids.append(int(log_softmax(ids)[-1].argmax()))
        expected = Letters().decode([i for i in ids[len(prompt) :] if i < 9])
        assert answer == expected
    questions = [Question(p, f" {a} ") for p, a in zip(prompts, answers, strict=True)]
    assert task_accuracy(model, params, Letters(), questions, max_new_tokens=8).mean == 1.0


def test_few_shot_examples_use_the_format_of_the_question_and_never_show_it():
    pool = [Question(f"{letter}:", letter.upper()) for letter in "abcdef"]
    shown = few_shot(pool, pool, shots=3, seed=1)
    for question, original in zip(shown, pool, strict=True):
        *solved, asked = question.prompt.split("\n\n")
        assert asked == original.prompt and question.answer == original.answer
        assert len(set(solved)) == 3
        assert all(s[0].upper() == s[2] and s[:2] != original.prompt for s in solved)
    assert few_shot(pool, pool, shots=3, seed=1) == shown
    assert few_shot(pool, pool, shots=3, seed=2) != shown
    assert few_shot(pool, pool, shots=0) == pool
    with pytest.raises(ValueError, match="6 shots from 5"):
        few_shot(pool, pool, shots=6)


def test_texts_that_cannot_be_scored_are_refused(model, params):
    with pytest.raises(ValueError, match="empty"):
        continuation_log_probs(model, params, Letters(), [("a", "")])
    with pytest.raises(ValueError, match="text 1 has 49 tokens"):
        continuation_log_probs(model, params, Letters(), [("a", "b"), ("a" * 40, "b" * 9)])


def test_recovery_is_the_share_of_the_regression_undone():
    """EVAL-10."""
    assert ptx_recovery(gpt=2.0, ppo=2.4, ppo_ptx=2.1) == pytest.approx(0.75)
    assert np.isnan(ptx_recovery(gpt=2.0, ppo=2.0, ppo_ptx=2.1))
