"""The four models of PPO: what is trained, what is frozen, and how each becomes a whole tree.

              frozen                                  trained
    rank 0    reference, reward model                 policy and value model, every parameter
    rank r    the same, the bases of what is trained  an adapter of each, and the value model's head

The reference is the policy with its adapter off. Where the reward model is itself an adapter and a
head, trained on the trunk that the policy starts from, that one trunk is all four models. Programs
take the parts, which share no array, and join them once, first of all (`Frozen.models`).
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from instruct_jax.errors import ConfigError
from instruct_jax.models.adapters import freeze, init_adapter, merge
from instruct_jax.models.matrices import join
from instruct_jax.models.transformer import Model
from instruct_jax.stages.ppo_config import PPOConfig
from instruct_jax.stages.stage import ADAPTER
from instruct_jax.stages.trained import Adapter, TrainedModel, trunk_fingerprint
from instruct_jax.training.optim import Schedule, schedule
from instruct_jax.training.state import TrainState, init_state

Optimizers = tuple[optax.GradientTransformation, optax.GradientTransformation]


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


class Models(NamedTuple):
    """The parameters of the four models, whole trees for the functions of `Recipe.policy` (the
    first two) and of `Recipe.scalar`.
    """

    policy: Any
    reference: Any
    reward: Any
    value: Any | None


class Readings(NamedTuple):
    """What the models say of B rows; 0 outside of the responses."""

    log_probs: jax.Array  # float32[B, R], of the policy that sampled
    entropy: jax.Array  # float32[B, R], its own, or an estimate without bias
    ref_log_probs: jax.Array  # float32[B, R], of the reference
    scores: jax.Array  # float32[B], the reward model's; 0 where it is not asked
    values: jax.Array | None  # float32[B, R]
    end_values: jax.Array | None = None  # float32[B], after the last token


class Frozen(NamedTuple):
    """The parameters that PPO reads and never writes.

    `reward` is a model with a trunk of its own, or an adapter and a head for the reference's;
    empty where nothing reads it.
    """

    reference: Any
    reward: Any

    def models(self, state: PPOState) -> Models:
        """All four as they are; no array is copied.

        Policy and value model are what is trained of them, joined to the models they started as.
        """
        # A trunk of its own has other leaves than the reference's: nothing of that may shine
        # through where it has none.
        reward = self.reward
        if reward and "embedder" not in reward:
            reward = join(self.reference, reward)
        value = None if state.value is None else join(reward, state.value.params)
        return Models(join(self.reference, state.policy.params), self.reference, reward, value)


class Recipe(NamedTuple):
    """What the programs of PPO are made of besides arrays: the same for a whole run."""

    config: PPOConfig
    policy: Model  # a language model, adapted where `config.lora` asks for it
    scalar: Model  # reward and value model
    policy_tx: optax.GradientTransformation
    value_tx: optax.GradientTransformation
    eos_id: int
    # How much the reward model's score counts; at 0 it is not asked.
    model_weight: float = 1.0


def learning_rates(config: PPOConfig) -> tuple[Schedule, Schedule]:
    """Of the policy and of the value model, by the updates made (PPO-3)."""
    policy, value = (
        schedule(
            rate,
            config.schedule,
            steps=config.iterations * config.updates,
            warmup=config.warmup_iterations * config.updates,
            start=0.1,
            final=config.final_fraction,
        )
        for rate in (config.learning_rate, config.value_learning_rate)
    )
    return policy, value


def optimizers(config: PPOConfig) -> Optimizers:
    """Of the policy and of the value model, of one kind (PPO-12: Adam)."""
    policy, value = map(config.make_optimizer, learning_rates(config))
    return policy, value


def frozen_models(config: PPOConfig, policy_params: Any, reward_params: Any) -> Frozen:
    """What PPO reads, quantised where `config.lora` says so; an adapter and a head stay as they
    are.
    """
    if "embedder" in reward_params:
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
        if "embedder" in reward_params:
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
