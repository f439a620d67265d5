import dataclasses

import jax
import numpy as np
import pytest

from instruct_jax.benchmark.measure import Account, Machine, Workload, measure, published_peaks
from instruct_jax.benchmark.rows import synthetic_rows
from instruct_jax.benchmark.shapes import Shape, random_models, with_mean_length
from instruct_jax.benchmark.workloads import sft_batch
from instruct_jax.errors import ConfigError
from instruct_jax.models import costs
from instruct_jax.models.transformer import language_model
from instruct_jax.sampling.sampler import generate

TINY = Shape(
    model="tiny", num_layers=1, rows=4, minibatch=4, prompt=4, response=12, text_rows=2,
    text_length=16, pack_length=32, ranked=2, completions=3,
)  # fmt: skip


def test_the_end_token_comes_after_the_mean_length_that_was_asked_for():
    shape = dataclasses.replace(TINY, mean_response=5, response=200, max_length=256)
    config, params = shape.policy_config(), random_models(shape).policy
    rows = 128
    prompts = jax.random.randint(jax.random.key(1), (rows, 4), 1, config.vocab_size)
    keys = jax.random.split(jax.random.key(2), rows)
    drawn = generate(
        language_model(config),
        params,
        prompts,
        np.ones((rows, 4), bool),
        keys,
        max_new_tokens=200,
        eos_id=0,
    )
    lengths = np.asarray(drawn.response_mask.sum(1))
    # A geometric length of mean 5 has a standard error of 0.4 over 128 rows.
    assert 3.5 < lengths.mean() < 6.8
    assert lengths.max() < 60


def test_a_model_without_a_final_bias_cannot_be_given_a_length():
    changes = {"model": "llama3.2-1b", "num_heads": 8, "d_model": 32, "vocab_size": 64}
    shape = dataclasses.replace(TINY, mean_response=5, max_length=32, **changes)
    with pytest.raises(ConfigError, match="mean_response"):
        with_mean_length(
            {"final_norm": {}}, shape.policy_config(), 5, eos_id=0, key=jax.random.key(0)
        )


def test_packing_keeps_every_real_token():
    rows = synthetic_rows(dataclasses.replace(TINY, mean_response=4))
    batch = sft_batch(TINY, rows.demonstrations, 4, pad_id=256)
    assert batch["mask"].sum() == rows.demonstrations["mask"][:4].sum()
    assert len(batch["tokens"]) < 4


def test_the_completions_of_a_prompt_begin_with_it():
    ranked = synthetic_rows(TINY).comparisons["tokens"]
    assert (ranked[:, :, :4] == ranked[:, :1, :4]).all()
    assert not (ranked[:, 0] == ranked[:, 1]).all()


def test_what_grows_with_a_field_grows():
    longer = TINY.grown("text_length", 64)
    assert (longer.prompt, longer.response, longer.max_length) == (32, 32, 64)
    assert TINY.grown("rows", 8).minibatch == 8
    assert TINY.grown("d_model", 96).policy_config().num_heads == 3


def test_shares_are_of_the_peaks_and_the_roofline_of_what_was_measured():
    """T = 2 s limit over the time of the median run."""
    times = iter([9.0, 4.0, 1.0, 4.0, 100.0])

    def run():
        import time

        time.sleep(next(times) / 1000)
        return np.zeros(1)

    account = Account((costs.Cost(200.0, 10.0),), tokens=8, sequences=2, real=6, padded=8)
    published = dataclasses.replace(costs.PEAKS["h200"], float32=400.0, bandwidth=20.0)
    machine = Machine({"float32": 100_000.0}, 20.0, published)
    result = measure(
        Workload("x", run, lambda _: account, 0.0, None, "float32"), machine, repeats=4
    )
    assert len(result.runs) == 4
    assert result.limit_seconds == 0.5
    assert result.roofline == pytest.approx(0.5 / result.seconds)
    assert result.mfu == pytest.approx(200 / result.seconds / 400)
    assert result.mbu == pytest.approx(10 / result.seconds / 20)
    assert result.seconds < 0.05  # the median: neither the warm-up nor the slowest run
    assert result.tokens_per_second == pytest.approx(8 / result.seconds)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e"),
     ("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100")],
)  # fmt: skip
def test_a_device_is_known_by_its_kind(kind, name):
    assert published_peaks(kind) == costs.PEAKS[name]
    assert published_peaks("cpu") is None
