"""The programs of an iteration of PPO, as `stages/ppo.py` makes them: rollout, score, update."""

import functools
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from instruct_jax.errors import ConfigError
from instruct_jax.models import costs
from instruct_jax.models.adapters import adapt
from instruct_jax.models.costs import Cost
from instruct_jax.models.transformer import TransformerConfig, language_model, scalar_model
from instruct_jax.planning.abstract import (
    Program,
    abstract_key,
    abstract_params,
    abstract_rows,
    on_mesh,
    placed,
)
from instruct_jax.planning.jobs import Job
from instruct_jax.sampling.sampler import Rollout, generate
from instruct_jax.stages import ppo
from instruct_jax.stages.experience import Experience
from instruct_jax.stages.ppo_config import PPOConfig
from instruct_jax.stages.ppo_models import (
    Frozen,
    PPOState,
    Recipe,
    frozen_models,
    initial_state,
    optimizers,
)
from instruct_jax.stages.stage import RULES
from instruct_jax.training.mesh import batch_sharding, replicated
from instruct_jax.training.state import state_shardings


class Rows(NamedTuple):
    """What the programs are given beside the models."""

    prompts: tuple[Any, Any, Any]  # tokens, mask and a key for each response
    rollout: Rollout
    experience: Experience
    ptx: dict[str, Any] | None
    kl: Any


def iteration_programs(job: Job, mesh: Mesh) -> list[Program]:
    """Rollout, score and update of `job`. ConfigError where a batch does not divide over `mesh`."""
    config: PPOConfig = job.config
    if job.scalar is None:
        raise ConfigError("ppo needs the size of the reward model: --reward=NAME")
    ppo.check_batches(config, mesh)
    frozen, state = _models(job, mesh)
    rows = _rows(job, mesh, critic=state.value is not None)
    held = {
        "policy": state.policy.params,
        "average": state.policy.ema,
        "optimizer": (state.policy.opt_state, state.value and state.value.opt_state),
        "value model": state.value and state.value.params,
        "frozen": frozen,
        "pending": rows.experience if config.rollout_lag else None,
    }
    rollout, score, update = _costs(job, critic=state.value is not None)
    lower = partial(_lower, job, mesh, frozen, state, rows)

    def program(name: str, data: Any, cost: Sequence[Cost], trips: int = 1) -> Program:
        return Program(name, partial(lower, name), held | {"batch": data}, tuple(cost), trips)

    return [
        program("rollout", rows.prompts, rollout, trips=config.response_length),
        program("score", rows.rollout, score),
        program("update", (rows.experience, rows.ptx), update),
    ]


def _lower(job: Job, mesh: Mesh, frozen: Frozen, state: PPOState, rows: Rows, name: str) -> Any:
    """The program called `name`, lowered."""
    assert job.scalar is not None
    config: PPOConfig = job.config
    policy = adapt(language_model(job.model), config.lora)
    scalar = adapt(scalar_model(job.scalar), config.lora)
    eos_id = job.model.vocab_size - 1
    with jax.set_mesh(mesh):
        if name == "rollout":
            settings = {
                "max_new_tokens": config.response_length,
                "eos_id": eos_id,
                "temperature": config.temperature,
                "halvings": config.halvings,
            }
            sample = partial(generate, policy, **settings)
            return jax.jit(sample).lower(frozen.models(state).policy, *rows.prompts)
        recipe = Recipe(config, policy, scalar, *optimizers(config), eos_id)
        programs: Any = ppo.make_programs(recipe, state, mesh)
        if name == "score":  # what follows is a few operations a token
            return programs.read.lower(state, frozen, rows.rollout)
        key = abstract_key(mesh)
        return programs.update.lower(state, frozen, rows.experience, rows.ptx, rows.kl, key)


def _models(job: Job, mesh: Mesh) -> tuple[Frozen, PPOState]:
    """What PPO freezes and what it trains, placed."""
    # What a search varies changes no shape.
    plain = job.with_micro_batches(1).with_remat("none")
    assert plain.scalar is not None
    frozen, state = _reinforcement(plain.config, plain.model, plain.scalar)

    def sharded(part: Any) -> Any:
        return part and placed(part, state_shardings(part, mesh, RULES))

    kl: Any = _scalar(mesh)
    frozen = Frozen(*(on_mesh(mesh, tree) for tree in frozen))
    return frozen, PPOState(sharded(state.policy), sharded(state.value), kl)


@functools.cache
def _reinforcement(
    config: PPOConfig, model: TransformerConfig, scalar: TransformerConfig
) -> tuple[Frozen, PPOState]:
    """The shapes of what PPO freezes and of what it trains."""
    given = abstract_params(model, "language"), abstract_params(scalar, "scalar")
    frozen = jax.eval_shape(partial(frozen_models, config), *given)
    txs = optimizers(config)
    return frozen, jax.eval_shape(lambda p, r: initial_state(config, p, r, txs), *given)


def _scalar(mesh: Mesh) -> Any:
    return jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))


def _rows(job: Job, mesh: Mesh, *, critic: bool) -> Rows:
    """The batches of an iteration, as the stage's loader and its programs make them."""
    config: PPOConfig = job.config
    spread = batch_sharding(mesh)

    def array(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=spread)

    n, p, b, r = config.prompts, config.prompt_length, config.rollout_batch, config.response_length
    keys = array(abstract_key(mesh).dtype, b)
    tokens, mask = array(jnp.int32, b, p + r), array(jnp.bool_, b, p + r)
    where, numbers = array(jnp.bool_, b, r), array(jnp.float32, b, r)
    values = (numbers, numbers) if critic else (None, None)
    ptx = None
    if config.ptx_coef > 0:
        shape = (config.updates, config.minibatch * config.ptx_ratio, job.ptx_length)
        steps = NamedSharding(mesh, PartitionSpec(None, *spread.spec))
        kinds = {"tokens": jnp.int32, "mask": jnp.bool_, "loss_mask": jnp.bool_}
        ptx = abstract_rows(steps, {name: (shape, dtype) for name, dtype in kinds.items()})
    return Rows(
        prompts=(array(jnp.int32, n, p), array(jnp.bool_, n, p), keys),
        rollout=Rollout(tokens, mask, where, numbers),
        experience=Experience(tokens, mask, where, numbers, numbers, numbers, *values),
        ptx=ptx,
        kl=_scalar(mesh),
    )


def _costs(job: Job, *, critic: bool) -> tuple[list[Cost], list[Cost], list[Cost]]:
    """The work of rollout, score and update, on all devices."""
    config: PPOConfig = job.config
    assert job.scalar is not None
    lengths = [job.length] * config.rollout_batch
    prompts = [config.prompt_length] * config.prompts
    responses = [config.response_length] * config.rollout_batch
    rollout = costs.generate(job.model, prompts, responses, samples=config.samples_per_prompt)
    # The old log-probs are the policy's own, from a pass of their own.
    own = Cost(costs.forward_flops(job.model, lengths), costs.weight_bytes(job.model))
    score = [costs.score(job.model, job.scalar, lengths, scalars=1 + critic), own]
    train = partial(
        costs.train,
        updates=config.updates,
        epochs=config.inner_epochs,
        optimizer=config.optimizer,
    )
    update = [train(job.model, lengths)]
    if critic:
        update.append(train(job.scalar, lengths, kind="scalar"))
    if config.ptx_coef > 0:
        rows = [job.ptx_length] * (config.minibatch * config.ptx_ratio)
        update.append(costs.ptx(job.model, rows) * config.updates)
    return rollout, score, update
