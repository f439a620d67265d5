"""From a rollout to what a policy learns from: log-probs, values, rewards, advantages (PPO-5 to 9).

Everything here is a constant of the update: nothing is differentiated.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from instruct_jax.losses import (
    TokenStatistics,
    clip_scores,
    critic_free_advantages,
    explained_variance,
    generalized_advantages,
    kl_estimate,
    kl_shaped_rewards,
    masked_mean,
    masked_whiten,
    missing_eos_scores,
)
from instruct_jax.models.matrices import join
from instruct_jax.models.transformer import Model, final_scores, response_values
from instruct_jax.sampling.sampler import Rollout
from instruct_jax.sampling.scores import token_scores
from instruct_jax.stages.lengths import read_by_length, shorter_forms
from instruct_jax.stages.ppo_config import PPOConfig
from instruct_jax.training.state import TrainState


@partial(
    jax.tree_util.register_dataclass, data_fields=["policy", "value", "kl_coef"], meta_fields=[]
)
@dataclass(frozen=True)
class PPOState:
    """All that changes over iterations; the reference and the reward model do not.

    `value` is None where the advantages need no value model.
    """

    policy: TrainState
    value: TrainState | None
    kl_coef: jax.Array


class Frozen(NamedTuple):
    """The models that PPO reads and never writes, each the base of what is trained on top of it.

    The trees are layers, joined leaf by leaf: reference, then reward, then what is trained. Where
    all parameters are trained or a reward model is whole, the upper layer hides the lower; an
    adapter and a head let it through, so one trunk serves up to four models.
    """

    reference: Any
    reward: Any

    def policy_params(self, state: PPOState) -> Any:
        """The policy as it is."""
        return join(self.reference, state.policy.params)

    def reward_params(self) -> Any:
        """The reward model."""
        return join(self.reference, self.reward)

    def value_params(self, value: TrainState) -> Any:
        """The value model as it is."""
        return join(self.reward_params(), value.params)


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


class Scored(NamedTuple):
    """What one iteration learns from, and its logs."""

    experience: Experience
    metrics: dict[str, jax.Array]  # float32[] each


class Lagging(NamedTuple):
    """The state of a run whose rollouts lag: `due` was sampled and scored an iteration ago."""

    models: PPOState
    due: Scored


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


class Readings(NamedTuple):
    """What the models say of B rows; 0 outside of the responses."""

    log_probs: jax.Array  # float32[B, R], of the policy that sampled
    entropy: jax.Array  # float32[B, R], its own, or an estimate without bias
    ref_log_probs: jax.Array  # float32[B, R], of the reference
    scores: jax.Array  # float32[B], the reward model's
    values: jax.Array | None  # float32[B, R]


def read_rollout(
    config: PPOConfig,
    policy: Model,
    scalar: Model,
    state: PPOState,
    frozen: Frozen,
    rollout: Rollout,
) -> Readings:
    """All forward passes over a rollout. From the sampler, -log p stands for the entropy."""
    tokens, mask, where, log_probs = rollout
    statistics = partial(
        response_scores,
        policy,
        tokens=tokens,
        mask=mask,
        where=where,
        temperature=config.temperature,
    )
    entropy = -log_probs
    if config.old_log_probs == "forward":
        own = statistics(frozen.policy_params(state), entropy=True)
        assert own.entropy is not None
        log_probs, entropy = own.log_probs, own.entropy
    values = None
    if state.value is not None:
        values = scalar.apply(frozen.value_params(state.value), tokens, mask=mask)
        values = response_values(values, prompt_length=tokens.shape[1] - where.shape[1])
        values = jnp.where(where, values, 0.0)
    return Readings(
        log_probs,
        entropy,
        statistics(frozen.reference).log_probs,
        final_scores(scalar.apply(frozen.reward_params(), tokens, mask=mask), mask),
        values,
    )


def score_rollout(
    config: PPOConfig,
    policy: Model,
    scalar: Model,
    state: PPOState,
    frozen: Frozen,
    rollout: Rollout,
    *,
    eos_id: int,
) -> Scored:
    """Rewards, values and advantages of a rollout, and the logs of PPO-16 that need no update."""
    tokens, mask, where, _ = rollout
    parts = config.updates // config.inner_epochs * config.micro_batches
    read = read_by_length(
        partial(read_rollout, config, policy, scalar, state, frozen),
        rollout,
        shorter_forms(lambda rows: rows.response_mask, where.shape[1], config.length_buckets),
        where=where,
        parts=parts,
    )
    has_eos = ((tokens[:, -where.shape[1] :] == eos_id) & where).any(axis=-1)
    scores = missing_eos_scores(
        clip_scores(read.scores, limit=config.reward_clip),
        has_eos,
        rule=config.missing_eos,
        penalty=config.missing_eos_penalty,
    )
    rewards = kl_shaped_rewards(
        scores, read.log_probs, read.ref_log_probs, where=where, kl_coef=state.kl_coef
    )
    if config.whiten_rewards:
        rewards = masked_whiten(rewards, where=where, shift_mean=False)
    returns = None
    if read.values is not None:
        advantages, returns = generalized_advantages(
            rewards,
            read.values,
            where=where,
            discount=config.discount,
            gae_lambda=config.gae_lambda,
        )
    else:
        advantages = critic_free_advantages(
            rewards,
            where=where,
            samples=config.samples_per_prompt,
            estimator=config.estimator,
            scale=config.group_scale,
            discount=config.discount,
        )
    if config.whiten_advantages == "rollout":
        advantages = masked_whiten(advantages, where=where)

    of_policy = read.log_probs, read.ref_log_probs
    experience = Experience(tokens, mask, where, *of_policy, advantages, read.values, returns)
    metrics = {
        "kl_coef": state.kl_coef,
        "entropy": masked_mean(read.entropy, where=where),
        "eos_rate": has_eos.mean(dtype=jnp.float32),
        **_reward_metrics(config, read.scores, rewards, where),
        **_policy_metrics(experience, state.kl_coef),
        **_value_metrics(experience),
    }
    if config.old_log_probs == "forward":
        metrics |= _sampler_metrics(experience, rollout.log_probs)
    return jax.tree.map(jax.lax.stop_gradient, Scored(experience, metrics))


def _reward_metrics(
    config: PPOConfig, raw_scores: jax.Array, rewards: jax.Array, where: jax.Array
) -> dict[str, jax.Array]:
    """Of the reward model's scores float32[B] and the shaped rewards float32[B, R]."""
    metrics = {
        "score": raw_scores.mean(),
        "score_sd": raw_scores.std(),
        "score_min": raw_scores.min(),
        "score_max": raw_scores.max(),
        "reward_total": jnp.where(where, rewards, 0.0).sum(-1).mean(),
    }
    if config.samples_per_prompt > 1:
        groups = raw_scores.reshape(-1, config.samples_per_prompt)
        metrics["score_sd_in_group"] = groups.std(axis=1).mean()
    return metrics


def _policy_metrics(experience: Experience, kl_coef: jax.Array) -> dict[str, jax.Array]:
    """How far the policy is from the reference."""
    where, log_probs, ref_log_probs = (
        experience.where,
        experience.log_probs,
        experience.ref_log_probs,
    )
    k1, k3 = (
        jnp.where(where, kl_estimate(log_probs, ref_log_probs, kind=kind), 0.0).sum(-1)
        for kind in ("k1", "k3")
    )
    return {
        "kl": k1.mean(),
        "kl_k3": k3.mean(),
        "reward_kl": -(kl_coef * k1).mean(),
        "response_length": where.sum(-1).mean(dtype=jnp.float32),
        "tokens": where.sum(dtype=jnp.float32),
    }


def _sampler_metrics(experience: Experience, sampler: jax.Array) -> dict[str, jax.Array]:
    """How far the sampler's log-probs float32[B, R] are from the forward's (NUM-4)."""
    gap = jnp.abs(sampler - experience.log_probs)
    return {
        "sampler_gap": masked_mean(gap, where=experience.where),
        "sampler_gap_max": jnp.where(experience.where, gap, 0.0).max(),
    }


def _value_metrics(experience: Experience) -> dict[str, jax.Array]:
    """Of the value model; none where there is none."""
    values, returns, where = experience.values, experience.returns, experience.where
    if values is None or returns is None:
        return {}
    return {
        "value": masked_mean(values, where=where),
        "return_mean": masked_mean(returns, where=where),
        "return_var": _masked_variance(returns, where),
        "explained_variance": explained_variance(values, returns, where=where),
    }


def _masked_variance(x: jax.Array, where: jax.Array) -> jax.Array:
    return masked_mean(jnp.square(x - masked_mean(x, where=where)), where=where)
