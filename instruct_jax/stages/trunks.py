"""What PPO freezes and what it trains: whole models, or adapters on trunks that they share.

              frozen                                  trained
    rank 0    reference, reward model                 policy and value model, every parameter
    rank r    the same, the bases of what is trained  an adapter of each, and the value model's head

The reference is the policy with its adapter off. Where the reward model is itself an adapter and a
head, trained on the trunk that the policy starts from, that one trunk is all four models.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from instruct_jax.errors import ConfigError
from instruct_jax.models.adapters import freeze, init_adapter, merge
from instruct_jax.stages.experience import Frozen, PPOState
from instruct_jax.stages.ppo_config import PPOConfig
from instruct_jax.stages.stage import ADAPTER, Adapter, TrainedModel, trunk_fingerprint
from instruct_jax.training.optim import adamw, warmup_constant_schedule
from instruct_jax.training.state import init_state

Optimizers = tuple[optax.GradientTransformation, optax.GradientTransformation]


def optimizers(config: PPOConfig) -> Optimizers:
    """Adam for the policy and for the value model (PPO-3)."""
    warmup = config.warmup_iterations * config.updates
    adam = dict(vars(config.adam))
    policy, value = (
        adamw(warmup_constant_schedule(rate, warmup=warmup), **adam)
        for rate in (config.learning_rate, config.value_learning_rate)
    )
    return policy, value


def frozen_models(config: PPOConfig, policy_params: Any, reward_params: Any) -> Frozen:
    """What PPO reads, quantised where `config.lora` says so. A reward model without a trunk stays
    as it is, an adapter and a head for the reference's.
    """
    if _has_trunk(reward_params):
        reward_params = freeze(reward_params, config.lora)
    return Frozen(freeze(policy_params, config.lora), reward_params)


def initial_state(
    config: PPOConfig, policy_params: Any, reward_params: Any, txs: Optimizers
) -> PPOState:
    """All that PPO changes, before the first update; the value model starts as the reward model."""
    policy, value = policy_params, reward_params
    if config.lora.rank:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), ADAPTER))
        policy = init_adapter(keys[0], policy_params, config.lora)
        if _has_trunk(reward_params):
            value = init_adapter(keys[1], reward_params, config.lora)
    return PPOState(
        init_state(policy, txs[0], ema=True),
        init_state(value, txs[1]) if config.estimator == "gae" else None,
        jnp.float32(config.kl_coef),
    )


def merged(config: PPOConfig, frozen: Frozen, state: PPOState) -> PPOState:
    """`state` with the average of the policy as whole parameters. A and B are averaged apart, so it
    is their averages that are multiplied.
    """
    ema = merge(frozen.reference, state.policy.ema, config.lora)
    return dataclasses.replace(state, policy=dataclasses.replace(state.policy, ema=ema))


def on_the_policys_trunk(
    config: PPOConfig, start: TrainedModel, reward: TrainedModel, adapter: Adapter, name: str
) -> Any:
    """The reward model as `adapter` and the head of `reward`, for the trunk of `start`.

    Raises ConfigError, naming the folder `name`, where the adapter does not belong there.
    """
    lora = config.lora
    if lora.rank == 0:
        raise ConfigError(
            f"{name}: an adapter shares the policy's trunk, but config.ppo.lora.rank 0 trains all "
            "of that; give a rank, or the reward model alone"
        )
    if adapter.base != trunk_fingerprint(start.params):
        raise ConfigError(
            f"{name}: trained on another trunk than config.init; start both from one model folder"
        )
    if (adapter.lora.scale, adapter.lora.base) != (lora.scale, lora.base):
        raise ConfigError(
            f"{name}: trained with alpha / rank {adapter.lora.scale:g} and base "
            f"{adapter.lora.base}; config.ppo.lora has {lora.scale:g} and {lora.base}"
        )
    return {"layers": adapter.params["layers"], "head": reward.params["head"]}


def _has_trunk(params: Any) -> bool:
    return "embedder" in params
