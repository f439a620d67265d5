"""What a stage's rows must be, and the lengths that are measured on them."""

import dataclasses
import importlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instruct_jax.data.config import DataConfig, RowFiles
from instruct_jax.data.encoding import encode_comparisons, encode_demonstrations
from instruct_jax.data.rows import Comparison, Demonstration, Prompt
from instruct_jax.errors import ConfigError
from instruct_jax.files import write_json
from instruct_jax.settings import is_never
from instruct_jax.stages.inputs import (
    UNLIMITED,
    check_batch,
    check_held_out,
    check_pairs,
    data_acts,
    fit_lengths,
    lengths_of,
    measured,
    paired,
    prompt_tokens,
)
from instruct_jax.stages.sft import SFTConfig
from tests.experiments import scripts

counts = st.lists(st.integers(1, 400), min_size=1, max_size=30).map(np.array)


@settings(deadline=None)
@given(counts, counts, st.integers(8, 300), st.integers(8, 300), st.integers(16, 600))
def test_measured_lengths_hold_all_rows_or_as_many_as_they_can(
    prompts, responses, prompt, response, limit
):
    fit = fit_lengths(prompts, responses, prompt=prompt, response=response, limit=limit)
    assert 1 <= fit.prompt <= prompt and 1 <= fit.response <= response
    assert fit.prompt + fit.response <= limit
    assert fit.long_prompts == (prompts > fit.prompt).sum()
    assert fit.long_responses == (responses > fit.response).sum()
    wanted = min(prompts.max(), prompt) + min(responses.max(), response)
    if wanted + 16 <= limit:  # both rounded up to a multiple of 8
        assert fit.long_prompts == (prompts > prompt).sum()
        assert fit.long_responses == (responses > response).sum()
    best = min(
        (prompts > p).sum() + (responses > min(response, limit - p)).sum()
        for p in range(8, min(prompt, limit - 1) + 1, 8)
    )
    assert fit.long_prompts + fit.long_responses <= best


def test_what_was_chosen_is_told_with_what_is_lost():
    prompts, responses = np.array([5, 17, 90]), np.array([3, 4, 30])
    form = {"limit": 64, "group": "config.sft"}
    stage, words = measured(SFTConfig(), prompts, responses, **form)
    assert (stage.prompt_length, stage.response_length) == (24, 32)
    assert words == (
        "measured on 3 rows: prompt_length 24, response_length 32, of 64 positions; "
        "prompts that are longer: 1 (raise config.sft.prompt_length, the most that is taken)"
    )
    # What is configured is the most that is taken.
    small = SFTConfig(prompt_length=8, response_length=16)
    stage, words = measured(small, prompts, responses, **form)
    assert (stage.prompt_length, stage.response_length) == (8, 16)
    assert words.endswith(
        "; prompts that are longer: 2 (raise config.sft.prompt_length, the most that is taken); "
        "responses that are longer: 1 (raise config.sft.response_length, the most that is taken)"
    )
    # Where the positions are what there is too little of, no field is named.
    _, words = measured(SFTConfig(), prompts, responses, **form | {"limit": 32})
    assert words.endswith("; prompts that are longer: 1; responses that are longer: 1")


def test_lengths_are_those_of_the_encoded_rows_with_the_end_of_every_answer():
    reads = scripts.tokenizer()
    count = lambda text: len(reads.encode(text))  # noqa: E731
    rows = [Comparison("the cat", ("sat", "on a mat"), (0, 1)), Comparison("a", ("run",), (0,))]
    encoded = encode_comparisons(rows, reads, completions=3, **UNLIMITED)
    prompts, answers = lengths_of(encoded)
    assert prompts.tolist() == [count("the cat"), count("a")]
    assert answers.tolist() == [count(text) + 1 for text in ("sat", "on a mat", "run")]
    told = [Demonstration("the cat", "sat"), Demonstration("a", "small red dog")]
    prompts, answers = lengths_of(encode_demonstrations(told, reads, **UNLIMITED))
    assert prompts.tolist() == [count("the cat"), count("a")]
    assert answers.tolist() == [count("sat") + 1, count("small red dog") + 1]
    asked = [Prompt("the cat sat"), Prompt("a")]
    assert prompt_tokens(asked, reads).tolist() == [count("the cat sat"), count("a")]
    assert prompt_tokens([], reads).shape == (0,)


def test_rows_that_are_less_than_a_batch_are_refused_with_what_to_do():
    with pytest.raises(ConfigError) as error:
        check_batch(3, 4, kind="prompts", field="ppo.rollout_batch")
    assert str(error.value) == (
        "config.ppo.rollout_batch=4: there are 3 prompts to train on, less than one batch; "
        "take 3 or less, or give more of them"
    )
    check_batch(4, 4, kind="prompts", field="ppo.rollout_batch")


def test_comparisons_without_a_pair_are_refused_and_labels_count_for_kto():
    tied = {"ranks": np.zeros((2, 2), np.int32), "where": np.ones((2, 2), bool)}
    with pytest.raises(ConfigError, match=r"each is a tie or a single completion$"):
        check_pairs(tied)
    labelled = tied | {"labels": np.array([[1, 0], [0, 0]], np.int32)}
    with pytest.raises(ConfigError, match="labels are for the loss kto"):
        check_pairs(labelled)
    check_pairs(labelled, labels=True)
    assert paired(labelled, labels=True) == 1 and paired(labelled) == 0


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), max_size=6))
def test_prompts_with_a_pair_are_counted(rankings):
    ranks, where = np.zeros((len(rankings), 3), np.int32), np.zeros((len(rankings), 3), bool)
    for n, ranking in enumerate(rankings):
        ranks[n, : len(ranking)], where[n, : len(ranking)] = ranking, True
    assert paired({"ranks": ranks, "where": where}) == sum(len(set(r)) > 1 for r in rankings)


@pytest.mark.parametrize(
    "script",
    ["pretrain", "sft", "reward_model", "preference", "ppo", "evaluate", "collect", "select_sft",
     "corpus"],
)  # fmt: skip
def test_what_a_script_does_not_read_are_fields_that_there_are(script):
    config = importlib.import_module(f"experiments.{script}").Config
    own = {field.name for field in dataclasses.fields(config)}
    data = {field.name for field in dataclasses.fields(DataConfig)}
    assert "data" in own
    for name, condition in config.acts_if.items():
        group, _, field = name.partition(".")
        assert group in own
        if group == "data" and field.partition(".")[0] not in ("valid", "test"):
            assert field in data, name
        if not is_never(condition):
            assert condition.partition(".")[0].partition("=")[0] in own, condition
    assert is_never(data_acts("documents")["data.comparisons"])


def test_prompts_that_a_model_was_trained_on_are_not_held_out_for_it(tmp_path):
    model = tmp_path / "sft" / "model"

    def check(hashes=("a", "b"), **changed):
        config = DataConfig(source="files", **({"valid_fraction": 0.1} | changed))
        check_held_out(config, dict(enumerate(hashes)), model)

    check()  # nothing is known of it
    data = {"seed": 0, "valid_fraction": 0.1, "test_fraction": None}
    write_json(tmp_path / "sft/config.json", {"config": {"data": data}, "data": {"rows": "a"}})
    check()
    check(test_fraction=0.05)  # fewer of the same
    check(hashes=["c"], valid_fraction=0.3)  # other rows
    check(test=RowFiles(prompts=("own.jsonl",)), valid_fraction=0.3)
    for changed in (
        {"test_fraction": 0.3}, {"valid_fraction": 0.2}, {"valid_fraction": 0.05}, {"seed": 1},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="would be asked what it was trained on"):
            check(**changed)
