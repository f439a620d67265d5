"""The policy losses beside the clip, in the stage: against float64 by the papers' equations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax.errors import ConfigError
from instruct_jax.models.transformer import final_scores
from instruct_jax.stages.algorithms import CISPOConfig, GSPOTokenConfig, SAPOConfig
from instruct_jax.stages.ppo_config import PPOConfig
from instruct_jax.stages.ppo_losses import policy_loss
from tests.stages import lab as labs
from tests.stages import run_ppo
from tests.stages.lab import CONFIG, EOS, RESPONSE
from tests.stages.test_critic_free import log_probs_of, loss_and_gradient

SIZES = {
    name: getattr(CONFIG, name)
    for name in (
        "episodes", "rollout_batch", "minibatch", "prompt_length", "response_length",
        "learning_rate", "warmup_iterations",
    )
}  # fmt: skip
SIZES |= {"samples_per_prompt": 4, "max_resamples": 0}
CISPO = CISPOConfig(**SIZES, cispo_low=0.95, cispo_high=1.05)
SAPO = SAPOConfig(**SIZES)
GSPO_TOKEN = GSPOTokenConfig(**SIZES)


def moved(config):
    """A lab, and a minibatch as if of a policy that has moved since, with advantages by token."""
    lab = labs.make_lab(config)
    batch = labs.first(labs.score(lab, labs.sample(lab))[0])
    rng = np.random.default_rng(1)
    old = batch.log_probs + 0.1 * rng.normal(size=batch.log_probs.shape).astype(np.float32)
    own = batch.advantages + 0.5 * rng.normal(size=old.shape).astype(np.float32)
    return lab, batch._replace(log_probs=old, advantages=jnp.where(batch.where, own, 0.0))


def by_hand(config, log_probs, batch):
    """float64[B, R] losses of tokens, with d loss / d log-prob beside them."""
    new, old, advantages = (
        np.asarray(x, np.float64) for x in (log_probs, batch.log_probs, batch.advantages)
    )
    where = np.asarray(batch.where)
    ratio = np.exp(np.where(where, new - old, 0.0))
    if config.policy_loss == "cispo":
        weight = np.clip(ratio, config.cispo_low, config.cispo_high)
        return -weight * advantages * new, -weight * advantages
    if config.policy_loss == "sapo":
        tau = np.where(advantages > 0, config.sapo_sharpness, config.sapo_sharpness_negative)
        gate = 1 / (1 + np.exp(-tau * (ratio - 1)))
        return -4 / tau * gate * advantages, -4 * gate * (1 - gate) * ratio * advantages
    mean = np.where(where, new - old, 0.0).sum(1, keepdims=True) / where.sum(1, keepdims=True)
    ratio = np.exp(mean)
    clipped = np.clip(ratio, 1 - config.clip, 1 + config.clip_high)
    losses = np.maximum(-ratio * advantages, -clipped * advantages)
    return losses, np.where(-ratio * advantages >= losses, -ratio * advantages, 0.0)


@pytest.mark.parametrize("config", [CISPO, SAPO, GSPO_TOKEN], ids=["cispo", "sapo", "gspo_token"])
def test_a_loss_and_its_gradient_are_the_papers_after_the_policy_has_moved(config):
    lab, batch = moved(config)
    value, grads = loss_and_gradient(config, lab, batch)
    log_probs = log_probs_of(lab, lab.state.policy.params, batch)
    losses, slopes = by_hand(config, log_probs, batch)
    where = np.asarray(batch.where)
    share = where / where.sum()
    if config.loss_reduction == "seq_mean":
        share = where / where.sum(1, keepdims=True) / len(where)
    np.testing.assert_allclose(value, (losses * share).sum(), rtol=2e-5)
    weights = jnp.asarray(slopes * share, jnp.float32)

    def linear(params):
        return (weights * log_probs_of(lab, params, batch)).sum()

    wanted = labs.flat(jax.jit(jax.grad(linear))(lab.state.policy.params))
    assert np.abs(wanted).max() > 1e-3
    np.testing.assert_allclose(labs.flat(grads), wanted, atol=2e-5)


def test_cispo_counts_the_weights_that_are_bounded():
    lab, batch = moved(CISPO)
    _, _, metrics = policy_loss(CISPO, lab.policy)(lab.state.policy.params, batch, labs.KEY)
    log_probs = log_probs_of(lab, lab.state.policy.params, batch)
    ratio = np.exp(np.asarray(log_probs - batch.log_probs))[np.asarray(batch.where)]
    total, count = metrics["clip_fraction"]
    wanted = ((ratio < CISPO.cispo_low) | (ratio > CISPO.cispo_high)).mean()
    assert 0.1 < wanted < 1.0
    np.testing.assert_allclose(total / count, wanted, rtol=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("outside", ["truncate", "mask"])
def test_a_loss_is_weighed_by_trainer_over_sampler(level, outside):
    bounds = {"mismatch_low": 0.8, "mismatch_high": 1.2}
    config = dataclasses.replace(CONFIG, mismatch=level, mismatch_outside=outside, **bounds)
    lab = labs.make_lab(config)
    rollout = labs.sample(lab)
    noise = 0.2 * np.random.default_rng(0).normal(size=rollout.log_probs.shape)
    where = np.asarray(rollout.response_mask)
    sampler = np.where(where, np.asarray(rollout.log_probs) + noise, 0.0).astype(np.float32)
    experience, metrics = labs.score(lab, rollout._replace(log_probs=jnp.asarray(sampler)))
    gap = np.where(where, np.asarray(experience.log_probs, np.float64) - sampler, 0.0)
    if level == "sequence":
        gap = np.broadcast_to(gap.sum(1, keepdims=True), gap.shape)
    ratio = np.exp(gap)
    wanted = np.clip(ratio, 0.8, 1.2)
    if outside == "mask":
        wanted = np.where((ratio >= 0.8) & (ratio <= 1.2), ratio, 0.0)
    np.testing.assert_allclose(np.asarray(experience.weights)[where], wanted[where], rtol=1e-4)
    np.testing.assert_allclose(metrics["mismatch_weight"], wanted[where].mean(), rtol=1e-4)
    # The policy has not moved: each token's loss is minus its advantage.
    batch = labs.first(experience)
    value, _ = loss_and_gradient(config, lab, batch)
    there = np.asarray(batch.where)
    losses = -np.asarray(batch.advantages, np.float64) * wanted[: len(there)]
    np.testing.assert_allclose(value, losses[there].mean(), rtol=1e-4, atol=1e-6)


def test_a_response_that_its_budget_cut_off_is_worth_the_value_of_its_end():
    """GAE in float64, of rows that ended and rows that were cut off; 0 follows an end."""
    config = dataclasses.replace(CONFIG, bootstrap_truncated=True, whiten_advantages="none")
    lab = labs.make_lab(config)
    rollout = labs.written([1, EOS], [1, 2, 3, 4, 5, 6, 7, 8], prompt=[3, 4])
    experience, _ = labs.score(lab, rollout)
    after = lab.scalar.apply(lab.state.value.params, rollout.tokens, mask=rollout.mask)
    after = np.asarray(final_scores(after, rollout.mask), np.float64)
    scores = labs.scores_of(lab, rollout)
    log_ratio = np.asarray(experience.log_probs - experience.ref_log_probs, np.float64)
    values = np.asarray(experience.values, np.float64)
    for row, length, end in ((0, 2, 0.0), (1, RESPONSE, after[1])):
        rewards = -config.kl_coef * log_ratio[row, :length]
        rewards[-1] += scores[row]
        ahead, advantage, wanted = end, 0.0, np.zeros(length)
        for t in reversed(range(length)):
            delta = rewards[t] + ahead - values[row, t]
            advantage = delta + config.gae_lambda * advantage
            wanted[t], ahead = advantage, values[row, t]
        np.testing.assert_allclose(experience.advantages[row, :length], wanted, atol=1e-5)
    assert abs(after[1]) > 1e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy_loss": "cispo", "ratio": "sequence"}, "is of the ratio of a token"),
        ({"policy_loss": "sapo", "ratio": "sequence_mean_token"}, "is of the ratio of a token"),
        ({"mismatch": "token", "ratio": "sequence"}, "use 'sequence'"),
        ({"cispo_low": 6.0}, "cispo_low 6 is above cispo_high 5"),
        ({"mismatch_low": 3.0}, "mismatch_low 3 is above mismatch_high 2"),
        ({"mismatch_high": 0.0}, "mismatch_high=0.0: expected above 0"),
        ({"sapo_sharpness": 0.0}, "sapo_sharpness=0.0: expected above 0"),
        ({"max_resamples": -1}, "max_resamples=-1: expected 0 or more"),
    ],
)
def test_what_no_loss_can_use_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        PPOConfig(estimator="rloo", samples_per_prompt=4, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("config", [CISPO, SAPO, GSPO_TOKEN], ids=["cispo", "sapo", "gspo_token"])
def test_a_run_taken_up_at_a_checkpoint_ends_with_the_same_bits(config, tmp_path):
    config = dataclasses.replace(config, save_every=1, mismatch="sequence")
    whole = run_ppo.run(tmp_path / "whole", 3, config=config)
    with pytest.raises(run_ppo.Killed):
        run_ppo.run(tmp_path / "stopped", 3, config=config, stop_at=2)
    resumed = run_ppo.run(tmp_path / "stopped", 3, config=config)
    assert run_ppo.fingerprint(resumed) == run_ppo.fingerprint(whole)
