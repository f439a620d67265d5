"""All updates of one iteration of PPO (PPO-10 to 15): permute, then gradient, mix, apply."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from instruct_jax.losses import adaptive_kl_update, masked_whiten
from instruct_jax.stages.experience import Experience
from instruct_jax.stages.lengths import by_length, shorter_forms
from instruct_jax.stages.ppo_config import PPOConfig
from instruct_jax.stages.ppo_losses import policy_loss, ptx_loss, ratio_logs, value_loss
from instruct_jax.stages.ppo_models import Frozen, PPOState, Recipe, learning_rates
from instruct_jax.stages.stage import with_base
from instruct_jax.training.state import (
    Gradients,
    accumulate_gradients,
    apply_gradients,
    global_norm,
)

Metrics = dict[str, jax.Array]
Text = dict[str, jax.Array]
MinibatchUpdate = Callable[[PPOState, Experience, Text | None, jax.Array], tuple[PPOState, Metrics]]


def update_on_rollout(
    config: PPOConfig,
    minibatch_update: MinibatchUpdate,
    row_sharding: NamedSharding,
    state: PPOState,
    experience: Experience,
    text: Text | None,
    kl: jax.Array,
    key: jax.Array,
) -> tuple[PPOState, Metrics]:
    """All updates of one iteration, in one `lax.scan` over the minibatches of fresh permutations.

    `text` holds [updates, rows, T] arrays. Every episode is in exactly one minibatch of an inner
    epoch. `kl` float32[] of the rollout steers the coefficient of the next one.
    """
    order = _permutations(config, jax.random.fold_in(key, 0))
    step_keys = jax.random.split(jax.random.fold_in(key, 1), config.updates)

    def one(
        state: PPOState, inputs: tuple[jax.Array, Text | None, jax.Array]
    ) -> tuple[PPOState, Metrics]:
        index, text_rows, step_key = inputs
        where = experience.where[index]
        index = index[by_length(where, config.micro_batches, buckets=config.length_buckets)]
        minibatch = jax.tree.map(lambda x: x[index], experience)
        minibatch = jax.lax.with_sharding_constraint(minibatch, row_sharding)
        return minibatch_update(state, minibatch, text_rows, step_key)

    state, history = jax.lax.scan(one, state, (order, text, step_keys))
    metrics = {name: x.mean() for name, x in history.items() if not name.startswith("ratio_")}
    metrics |= ratio_logs(history) | _skipped(state)
    if config.kl_target is None:
        return state, metrics
    kl_coef = adaptive_kl_update(
        state.kl_coef,
        kl,
        target=config.kl_target,
        horizon=config.kl_horizon,
        batch_size=config.rollout_batch,
    )
    return PPOState(state.policy, state.value, kl_coef), metrics


def _permutations(config: PPOConfig, key: jax.Array) -> jax.Array:
    """int32[updates, minibatch]: the rollout's rows, in another order for each inner epoch."""
    epochs = jax.random.split(key, config.inner_epochs)
    order = jax.vmap(lambda k: jax.random.permutation(k, config.rollout_batch))(epochs)
    return order.reshape(config.updates, config.minibatch)


def _skipped(state: PPOState) -> Metrics:
    """Updates without effect, of both models over the run, and the longer row of them."""
    trained = [model for model in (state.policy, state.value) if model is not None]
    total = jnp.stack([model.skipped for model in trained]).sum()
    in_a_row = jnp.stack([model.skipped_in_a_row for model in trained]).max()
    return {
        "skipped": total.astype(jnp.float32),
        "skipped_in_a_row": in_a_row.astype(jnp.float32),
    }


def minibatch_update(
    recipe: Recipe,
    frozen: Frozen,
    state: PPOState,
    minibatch: Experience,
    text: Text | None,
    key: jax.Array,
) -> tuple[PPOState, Metrics]:
    """One update of the policy, and one of the value model where there is one.

    With pretraining rows the policy's gradient is dL_pg + ptx_coef * dL_ptx, given to Adam once.
    """
    config, models = recipe.config, frozen.models(state)
    if config.whiten_advantages == "minibatch":
        advantages = masked_whiten(minibatch.advantages, where=minibatch.where)
        minibatch = minibatch._replace(advantages=advantages)
    gradient = partial(
        accumulate_gradients,
        key=key,
        micro_batches=config.micro_batches,
        forms=shorter_forms(lambda b: b.where, config.response_length, config.length_buckets),
    )
    apply = partial(
        apply_gradients, skip_above=math.inf if config.skip_above is None else config.skip_above
    )
    rates = learning_rates(config)

    loss = with_base(models.reference, policy_loss(config, recipe.policy))
    pg = gradient(loss, state.policy.params, minibatch)
    grads, metrics = pg.grads, {"policy_loss": pg.loss, **pg.metrics}
    metrics["grad_norm_pg"] = global_norm(pg.grads)
    metrics["learning_rate"] = rates[0](state.policy.updates)
    if text is not None:
        loss = with_base(models.reference, ptx_loss(config, recipe.policy))
        parts = config.ptx_parts
        mix = accumulate_gradients(loss, state.policy.params, text, key, micro_batches=parts)
        grads, mixed_metrics = mixed(pg, mix, config.ptx_coef)
        metrics |= mixed_metrics
    policy, applied = apply(
        state.policy, grads, recipe.policy_tx, loss=pg.loss, ema_decay=config.ema_decay
    )
    metrics["grad_norm"] = applied["grad_norm"]
    if state.value is None:
        return PPOState(policy, None, state.kl_coef), metrics

    loss = with_base(models.reward, value_loss(config, recipe.scalar))
    vf = gradient(loss, state.value.params, minibatch)
    metrics |= {"value_loss": vf.loss, **vf.metrics}
    metrics["value_learning_rate"] = rates[1](state.value.updates)
    value, applied = apply(state.value, vf.grads, recipe.value_tx, loss=vf.loss)
    metrics["grad_norm_value"] = applied["grad_norm"]
    return PPOState(policy, value, state.kl_coef), metrics


def mixed(pg: Gradients, text: Gradients, coef: float) -> tuple[Any, Metrics]:
    """dL_pg + coef * dL_ptx (PPO-13), and what must be known of the two to judge `coef`: their
    norms and the cosine between them.
    """
    scaled = jax.tree.map(lambda g: coef * g, text.grads)
    dot = jnp.asarray(optax.tree.vdot(pg.grads, scaled))
    norms = global_norm(pg.grads) * global_norm(scaled)
    metrics = {
        **text.metrics,
        "grad_norm_ptx": global_norm(scaled),
        "grad_cosine": dot / jnp.maximum(norms, 1e-30),
    }
    return jax.tree.map(jnp.add, pg.grads, scaled), metrics
