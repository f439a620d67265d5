"""What an iteration of PPO logs of its rollout, before any update (PPO-16)."""

import jax
import jax.numpy as jnp

from instruct_jax.losses import explained_variance, kl_estimate, masked_mean
from instruct_jax.sampling.sampler import Rollout
from instruct_jax.stages.ppo_config import PPOConfig
from instruct_jax.stages.ppo_models import Readings

Metrics = dict[str, jax.Array]

# NUM-4: the bands of exp(trainer - sampler) whose shares are logged, by the name of their log.
BANDS = {
    "sampler_within_0.001": (0.999, 1.002),
    "sampler_within_0.01": (0.99, 1.01),
    "sampler_within_0.05": (0.95, 1.05),
}


def rollout_logs(
    config: PPOConfig,
    kl_coef: jax.Array,
    rollout: Rollout,
    readings: Readings,
    scores: jax.Array,
    rewards: jax.Array,
    ended: jax.Array,
    returns: jax.Array | None,
) -> Metrics:
    """float32[] each, of the scores float32[B] as they came, the shaped rewards float32[B, R],
    whether responses ended bool[B], and the returns float32[B, R] of the value model, if any.
    """
    where = rollout.response_mask
    metrics = {
        "kl_coef": kl_coef,
        "entropy": masked_mean(readings.entropy, where=where),
        "eos_rate": ended.mean(dtype=jnp.float32),
        "response_length": where.sum(-1).mean(dtype=jnp.float32),
        "tokens": where.sum(dtype=jnp.float32),
        "reward_total": jnp.where(where, rewards, 0.0).sum(-1).mean(),
        **_score_logs(scores, config.samples_per_prompt),
        **_divergence_logs(readings, kl_coef, where),
    }
    if config.old_log_probs == "forward":
        metrics |= sampler_logs(readings.log_probs, rollout.log_probs, where)
    if returns is not None:
        assert readings.values is not None
        metrics |= _value_logs(readings.values, returns, where)
    return metrics


def sampler_logs(log_probs: jax.Array, sampler: jax.Array, where: jax.Array) -> Metrics:
    """How far the sampler's log-probs float32[B, R] are from the forward's, in nats (NUM-4): the
    mean, root mean square and largest difference, and the shares of `BANDS`.
    """
    gap = jnp.where(where, log_probs - sampler, 0.0)
    ratio = jnp.exp(gap)
    return {
        "sampler_gap": masked_mean(jnp.abs(gap), where=where),
        "sampler_gap_rms": jnp.sqrt(masked_mean(jnp.square(gap), where=where)),
        "sampler_gap_max": jnp.abs(gap).max(),
    } | {
        name: masked_mean(((low <= ratio) & (ratio <= high)).astype(jnp.float32), where=where)
        for name, (low, high) in BANDS.items()
    }


def _score_logs(scores: jax.Array, samples: int) -> Metrics:
    """Of the scores float32[B] as they came, `samples` rows a prompt."""
    metrics = {
        "score": scores.mean(),
        "score_sd": scores.std(),
        "score_min": scores.min(),
        "score_max": scores.max(),
    }
    if samples > 1:
        metrics["score_sd_in_group"] = scores.reshape(-1, samples).std(axis=1).mean()
    return metrics


def _divergence_logs(readings: Readings, kl_coef: jax.Array, where: jax.Array) -> Metrics:
    """How far the policy is from the reference, summed over a response (PPO-18)."""
    k1, k3 = (
        jnp.where(
            where, kl_estimate(readings.log_probs, readings.ref_log_probs, kind=kind), 0.0
        ).sum(-1)
        for kind in ("k1", "k3")
    )
    return {"kl": k1.mean(), "kl_k3": k3.mean(), "reward_kl": -(kl_coef * k1).mean()}


def _value_logs(values: jax.Array, returns: jax.Array, where: jax.Array) -> Metrics:
    mean = masked_mean(returns, where=where)
    return {
        "value": masked_mean(values, where=where),
        "return_mean": mean,
        "return_var": masked_mean(jnp.square(returns - mean), where=where),
        "explained_variance": explained_variance(values, returns, where=where),
    }
