"""What PPO does to a policy: it earns, it pays in KL, and it forgets unless it keeps reading."""

import dataclasses
import json

import numpy as np
import pytest

from instruct_jax.evaluation.language import held_out_loss
from instruct_jax.models.transformer import language_model
from instruct_jax.stages import ppo
from instruct_jax.stages.ppo_config import PPOConfig
from instruct_jax.training.mesh import make_mesh
from tests.stages import world
from tests.stages.lab import EOS, PROMPT, RESPONSE, SHAPE

ROWS = 64
MODEL = language_model(SHAPE)
CONFIG = PPOConfig(
    episodes=24 * ROWS,
    rollout_batch=ROWS,
    minibatch=ROWS // 2,
    prompt_length=PROMPT,
    response_length=RESPONSE,
    kl_coef=0.05,
    learning_rate=2e-3,
    value_learning_rate=2e-2,
    warmup_iterations=2,
    ptx_ratio=2,
)
KL_BUDGET = 15.0  # nats a response


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    """M3: it has learnt to count upwards."""
    return world.speaker(tmp_path_factory.mktemp("speaker"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, speaker):
    """`trained(**changes)`: the log of a run and the held-out pretraining loss after it."""

    def train(**changes):
        config = dataclasses.replace(CONFIG, **changes)
        rows = config.updates * config.minibatch * config.ptx_ratio
        workdir = tmp_path_factory.mktemp("ppo")
        state = ppo.train(
            config,
            MODEL,
            world.counting_model(),
            speaker,
            world.counting_params(),
            lambda step: world.prompts(step, rows=ROWS),
            ptx=lambda step: {"tokens": world.text(rows, seed=1_000 + step)},
            eos_id=EOS,
            mesh=make_mesh("data:1"),
            workdir=workdir,
        )
        log = [json.loads(line) for line in (workdir / "ppo.jsonl").read_text().splitlines()]
        return log, held_out_loss(MODEL, state.policy.params, world.text(256, seed=999))

    return train


@pytest.fixture(scope="module")
def plain(trained):
    """PPO alone."""
    return trained()


def gain(log):
    """The rise of the score: its mean over the last iterations less the first."""
    return np.mean([row["score"] for row in log[-4:]]) - log[0]["score"]


def test_a_reward_that_can_be_counted_rises_within_the_kl_budget(plain):
    """T58: by at least one standard deviation of the start."""
    log, _ = plain
    assert gain(log) >= log[0]["score_sd"]
    assert max(row["kl"] for row in log) <= KL_BUDGET
    assert all(row["ratio_error"] <= 1e-5 and not row["skipped"] for row in log)


def test_a_hundred_times_the_penalty_keeps_the_policy_at_home(plain, trained):
    """T58: the gain shrinks, and so does the KL."""
    log, _ = trained(kl_coef=100 * CONFIG.kl_coef)
    assert gain(log) < 0.5 * gain(plain[0])
    assert log[-1]["kl"] < 0.2 * plain[0][-1]["kl"]


def test_a_policy_that_goes_on_reading_does_not_forget(plain, trained, speaker):
    """T39: with g > 0 the pretraining loss ends at least half a nat lower than with g = 0."""
    start = held_out_loss(MODEL, speaker, world.text(256, seed=999))
    log, mixed = trained(ptx_coef=1.0)
    _, alone = plain
    assert alone > start + 1.0, "PPO alone forgets"
    assert mixed < alone - 0.5
    assert mixed - start < 0.5 * (alone - start)
    assert gain(log) > 0, "and it still learns"


@pytest.mark.slow
def test_scores_of_the_124m_sentiment_run_stay_in_their_bands():
    """T60, section 10.1."""
    pytest.skip("needs GPT-2 124M and the 2019 sentiment labels, which are no longer published")
