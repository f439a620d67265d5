"""A variant beside the original: agreement, paired changes, and the table."""

import jax
import numpy as np
import pytest

from instruct_jax.data.rows import Prompt
from instruct_jax.evaluation.compression import (
    ORIGINAL,
    Exam,
    agreement,
    compression_table,
    measure,
    summary,
)
from instruct_jax.evaluation.intervals import bootstrap_mean
from instruct_jax.evaluation.language import held_out_loss
from instruct_jax.models.compression import Variant, as_it_is, compress
from instruct_jax.models.transformer import TransformerConfig, language_model
from instruct_jax.sampling.complete import Completion

VOCAB = 37
DOCUMENTS = np.random.default_rng(0).integers(VOCAB, size=(40, 12)).astype(np.int32)
PROMPTS = [Prompt(f"prompt {i}") for i in range(8)]


@pytest.fixture(scope="module")
def original():
    shape = TransformerConfig(
        vocab_size=VOCAB, num_layers=2, d_model=16, num_heads=2, max_length=32, init_std=0.3
    )
    model = language_model(shape)
    return as_it_is(model, model.init(jax.random.key(0)))


@pytest.fixture
def asked():
    return []


@pytest.fixture
def exam(asked, original):
    def answer(model, params, prompts):
        asked.append((params, len(prompts)))
        return [Completion("x", i % 2 == 0, (1, 2, 3)) for i in range(len(prompts))]

    def grade(answers):
        """Higher by 1 when it is not the original that answered."""
        changed = asked[-1][0] is not original.params
        return np.arange(len(answers)) + float(changed)

    return Exam(PROMPTS, DOCUMENTS, answer, {"reward": grade}, warm_up=3)


def test_agreement_is_that_of_the_logits_in_float64(original):
    other = compress(original.model, original.params, "int4")
    cosines, agree = agreement(original, other, DOCUMENTS)
    a, b = (
        np.asarray(v.model.apply(v.params, DOCUMENTS), np.float64)[..., :VOCAB]
        for v in (original, other)
    )
    wanted = (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    np.testing.assert_allclose(cosines, wanted, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(agree, a.argmax(-1) == b.argmax(-1))
    assert 0 < agree.mean() < 1


def test_changes_are_paired_and_the_original_has_none(exam, original, asked):
    before = measure(original, original, exam)
    assert [count for _, count in asked] == [3, len(PROMPTS)], "a batch first, that compiles"
    assert before.eos_rate == 0.5 and before.tokens_per_second > 0
    assert before.perplexity == pytest.approx(
        np.exp(held_out_loss(original.model, original.params, DOCUMENTS))
    )
    same = summary(before, before)
    assert same["size_ratio"] == 1.0 and same["perplexity_change"] == 0.0
    assert same["reward_change"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    small = compress(original.model, original.params, "int8")
    after = summary(measure(small, original, exam), before)
    # Every grade is higher by 1, so the interval of the change is a point; that of the mean is not.
    assert after["reward_change"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert after["reward"] == bootstrap_mean(np.arange(8) + 1.0)._asdict()
    assert after["reward"]["low"] < 4.5 < after["reward"]["high"]


def test_what_decodes_fastest_is_what_answers(exam, original, asked):
    small = compress(original.model, original.params, "int8")
    measure(small, original, exam)
    assert all(params is small.decoding for params, _ in asked)


def test_the_table_has_a_line_a_variant_and_a_column_for_what_was_graded(exam, original):
    before = measure(original, original, exam)
    noted = Variant(original.model, original.params, 500, {"layers": 1})
    results = {
        ORIGINAL: summary(before, before),
        "half": summary(measure(noted, original, exam), before),
    }
    assert results["half"]["layers"] == 1
    head, _, *lines = compression_table(results).splitlines()
    assert "RM score" in head and "gold" not in head
    assert [line.split("|")[1].strip() for line in lines] == [ORIGINAL, "half"]
    assert lines[1].split("|")[2].strip() == "0", "500 bytes in kB"
    assert "3.500 (+0.000 [+0.000, +0.000])" in lines[0]
