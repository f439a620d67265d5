"""From a rollout to what a policy learns from: log-probs, values, rewards, advantages (PPO-5 to 9).

Two programs: `read_rollout`, all forward passes, and `make_experience`, a few operations a token.
Between them a score may come from elsewhere. Everything here is a constant of the update: nothing
is differentiated.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from instruct_jax.losses import (
    TokenStatistics,
    clip_scores,
    critic_free_advantages,
    generalized_advantages,
    kl_shaped_rewards,
    masked_mean,
    masked_whiten,
    missing_eos_scores,
    sampler_mismatch_weights,
)
from instruct_jax.models.transformer import Model, final_scores, response_values
from instruct_jax.sampling.sampler import Rollout
from instruct_jax.sampling.scores import token_scores
from instruct_jax.stages.lengths import read_in_parts
from instruct_jax.stages.ppo_config import PPOConfig
from instruct_jax.stages.ppo_logs import rollout_logs
from instruct_jax.stages.ppo_models import Models, Readings, Recipe
from instruct_jax.stages.rewards import Given


class Experience(NamedTuple):
    """A scored rollout; B rows, prompt P, response R, T = P + R."""

    tokens: jax.Array  # int32[B, T]
    mask: jax.Array  # bool[B, T], real tokens
    where: jax.Array  # bool[B, R], response tokens through the stop token
    log_probs: jax.Array  # float32[B, R], of the policy that sampled
    ref_log_probs: jax.Array  # float32[B, R], of the reference
    advantages: jax.Array  # float32[B, R]
    values: jax.Array | None = None  # float32[B, R], V_t before y_t is emitted
    returns: jax.Array | None = None  # float32[B, R], from the unwhitened advantages
    weights: jax.Array | None = None  # float32[B, R], of the policy's loss; None: all 1


class Scored(NamedTuple):
    """What one iteration learns from, and its logs."""

    experience: Experience
    metrics: dict[str, jax.Array]  # float32[] each


def response_scores(
    model: Model,
    params: Any,
    tokens: jax.Array,
    mask: jax.Array,
    where: jax.Array,
    *,
    temperature: float,
    entropy: bool = False,
) -> TokenStatistics:
    """Log-probs of the response tokens, float32[B, R], and their entropy where it is asked for.

    Of int32[B, P+R] rows; 0 outside of `where` bool[B, R]. The temperature is the sampler's.
    """
    length = where.shape[1]
    hidden = model.hidden(params, tokens, mask=mask)
    return token_scores(
        model,
        params,
        hidden[:, -length - 1 : -1],
        tokens[:, -length:],
        where=where,
        temperature=temperature,
        moments=entropy,
    )


def read_rollout(recipe: Recipe, models: Models, rollout: Rollout) -> Readings:
    """All forward passes over a rollout, in parts of as many rows as a micro-batch of the update
    has: the same shapes, so the same rounding (NUM-5), and no more memory.
    """
    config = recipe.config
    return read_in_parts(
        partial(_read_rows, recipe, models),
        rollout,
        lambda rows: rows.response_mask,
        parts=config.rollout_batch // config.minibatch * config.micro_batches,
        buckets=config.length_buckets,
    )


def _read_rows(recipe: Recipe, models: Models, rollout: Rollout) -> Readings:
    """Of some rows. Where the sampler's log-probs are the old ones, -log p stands for the entropy
    of the policy."""
    config, scalar = recipe.config, recipe.scalar
    tokens, mask, where, log_probs = rollout
    statistics = partial(
        response_scores,
        recipe.policy,
        tokens=tokens,
        mask=mask,
        where=where,
        temperature=config.temperature,
    )
    entropy = -log_probs
    if config.old_log_probs == "forward":
        own = statistics(models.policy, entropy=True)
        assert own.entropy is not None
        log_probs, entropy = own.log_probs, own.entropy
    values = end_values = None
    if models.value is not None:
        of_all = scalar.apply(models.value, tokens, mask=mask)
        values = response_values(of_all, prompt_length=tokens.shape[1] - where.shape[1])
        values = jnp.where(where, values, 0.0)
        if config.bootstrap_truncated:
            end_values = final_scores(of_all, mask)
    scores = jnp.zeros(len(tokens), jnp.float32)
    if recipe.model_weight:
        scores = final_scores(scalar.apply(models.reward, tokens, mask=mask), mask)
    ref_log_probs = statistics(models.reference).log_probs
    return Readings(log_probs, entropy, ref_log_probs, scores, values, end_values)


class Paid(NamedTuple):
    """What B responses are worth, without the KL penalty; float32[B] each."""

    raw: jax.Array  # as it came
    last: jax.Array  # at the last token: clipped, and by the rule for a missing stop token
    total: jax.Array  # that, and what was given token by token
    ended: jax.Array  # bool[B], by the stop token


def response_rewards(
    recipe: Recipe, rollout: Rollout, readings: Readings, given: Given | None
) -> Paid:
    """The reward model's scores and what is given from elsewhere, added up."""
    config, where = recipe.config, rollout.response_mask
    responses = rollout.tokens[:, -where.shape[1] :]
    ended = ((responses == recipe.eos_id) & where).any(axis=-1)
    raw = recipe.model_weight * readings.scores
    if given is not None:
        raw += given.scores
    last = missing_eos_scores(
        clip_scores(raw, limit=config.reward_clip),
        ended,
        rule=config.missing_eos,
        penalty=config.missing_eos_penalty,
    )
    total = last
    if given is not None:
        of_tokens = jnp.where(where, given.tokens, 0.0).sum(-1)
        raw, total = raw + of_tokens, last + of_tokens
    return Paid(raw, last, total, ended)


def without_signal(paid: Paid, samples: int) -> jax.Array:
    """bool[N]: groups of `samples` responses that are all worth the same, and so teach nothing."""
    groups = paid.total.reshape(-1, samples)
    return groups.max(axis=1) == groups.min(axis=1)


def make_experience(
    recipe: Recipe,
    kl_coef: jax.Array,
    rollout: Rollout,
    readings: Readings,
    given: Given | None = None,
) -> Scored:
    """Rewards and advantages of a rollout, and the logs of PPO-16 that need no update.

    `given` are rewards from elsewhere, added to the reward model's.
    """
    config, where = recipe.config, rollout.response_mask
    paid = response_rewards(recipe, rollout, readings, given)
    of_policy = readings.log_probs, readings.ref_log_probs
    rewards = kl_shaped_rewards(paid.last, *of_policy, where=where, kl_coef=kl_coef)
    if given is not None:
        rewards += jnp.where(where, given.tokens, 0.0)
    if config.whiten_rewards:
        rewards = masked_whiten(rewards, where=where, shift_mean=False)
    advantages, returns = _advantages(config, rewards, where, readings, paid.ended)
    spread = jnp.std(advantages, where=where)  # as they came: of whitened ones it says nothing
    if config.whiten_advantages == "rollout":
        advantages = masked_whiten(advantages, where=where)
    weights = _mismatch_weights(config, rollout, readings)
    experience = Experience(
        rollout.tokens,
        rollout.mask,
        where,
        *of_policy,
        advantages,
        readings.values,
        returns,
        weights,
    )
    worth = paid.raw, rewards, paid.ended, returns
    metrics = rollout_logs(config, kl_coef, rollout, readings, *worth)
    metrics["advantage_sd"] = spread
    if config.samples_per_prompt > 1:
        dull = without_signal(paid, config.samples_per_prompt)
        metrics["no_signal"] = dull.mean(dtype=jnp.float32)
    if weights is not None:
        metrics["mismatch_weight"] = masked_mean(weights, where=where)
    return jax.tree.map(jax.lax.stop_gradient, Scored(experience, metrics))


def _advantages(
    config: PPOConfig, rewards: jax.Array, where: jax.Array, readings: Readings, ended: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """float32[B, R], before any whitening, and with a value model the returns."""
    if readings.values is not None:
        # Of a response that ended, the state after it is worth nothing.
        cut_off = readings.end_values
        bootstrap = None if cut_off is None else jnp.where(ended, 0.0, cut_off)
        return generalized_advantages(
            rewards,
            readings.values,
            where=where,
            bootstrap=bootstrap,
            discount=config.discount,
            gae_lambda=config.gae_lambda,
        )
    assert config.estimator != "gae"
    advantages = critic_free_advantages(
        rewards,
        where=where,
        samples=config.samples_per_prompt,
        estimator=config.estimator,
        scale=config.group_scale,
        discount=config.discount,
    )
    return advantages, None


def _mismatch_weights(config: PPOConfig, rollout: Rollout, readings: Readings) -> jax.Array | None:
    """Trainer over sampler, float32[B, R], where the loss is weighed by that."""
    if config.mismatch == "none":
        return None
    return sampler_mismatch_weights(
        readings.log_probs,
        rollout.log_probs,
        where=rollout.response_mask,
        level=config.mismatch,
        outside=config.mismatch_outside,
        low=config.mismatch_low,
        high=config.mismatch_high,
    )
