"""The programs of a stage, as the stage itself makes them, ready to be compiled without arrays.

Every array is a ShapeDtypeStruct with the sharding that the stage would give it; models, losses,
optimizers and steps are the stages' own. One `Program` is what runs `times` times in a run.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from instruct_jax.models import costs
from instruct_jax.models.adapters import split
from instruct_jax.models.transformer import language_model, scalar_model
from instruct_jax.planning.abstract import (
    Program,
    Shapes,
    abstract_key,
    abstract_params,
    abstract_rows,
    on_mesh,
    placed,
)
from instruct_jax.planning.iteration import iteration_programs
from instruct_jax.planning.jobs import Job
from instruct_jax.stages.preference import PreferenceConfig, preference_loss
from instruct_jax.stages.pretrain import PretrainConfig, language_loss
from instruct_jax.stages.reward_model import RewardModelConfig, reward_loss
from instruct_jax.stages.sft import SFTConfig
from instruct_jax.stages.stage import RULES, FitConfig, make_optimizer, make_step, trained_form
from instruct_jax.training.mesh import batch_sharding, check_batch_size, replicated
from instruct_jax.training.state import init_state, state_shardings


def programs(job: Job, mesh: Mesh) -> list[Program]:
    """The programs of one step of `job` on `mesh`. ConfigError where the batch does not divide."""
    if job.stage == "ppo":
        return iteration_programs(job, mesh)
    return [_fit(job, mesh)]


def fit_batch(job: Job, sharding: NamedSharding) -> dict[str, Any]:
    """The shapes of one batch, as the stage's loader makes it."""
    config, b, t = job.config, job.config.batch_size, job.length
    whole, flag = jnp.int32, jnp.bool_
    shapes: Shapes
    if isinstance(config, PretrainConfig | SFTConfig):
        shapes = {"tokens": ((b, t), whole), "mask": ((b, t), flag), "loss_mask": ((b, t), flag)}
        if isinstance(config, SFTConfig) and config.pack_length is not None:
            shapes["segment_ids"] = ((b, t), whole)
        return abstract_rows(sharding, shapes)
    # Where every tree is as long as it may be, each has a row of its own.
    k = job.branches
    names = ("tokens", "segment_ids", "branches", "positions", "previous")
    shapes = {name: ((b, t), whole) for name in names}
    shapes |= {"mask": ((b, t), flag), "ends": ((b, k), whole)}
    shapes |= {"ranks": ((b, k), whole), "where": ((b, k), flag)}
    if isinstance(config, PreferenceConfig) and config.needs_reference:
        shapes["reference"] = ((b, k), jnp.float32)
    return abstract_rows(sharding, shapes)


def _fit(job: Job, mesh: Mesh) -> Program:
    config: FitConfig = job.config
    check_batch_size(config.batch_size, mesh, micro_batches=config.micro_batches)
    dropout = config.residual_dropout > 0
    kind: costs.Kind = "scalar" if job.stage == "reward_model" else "language"
    make = scalar_model if kind == "scalar" else language_model
    model = trained_form(make, make(job.model), config)
    model_config = model.config
    if isinstance(config, RewardModelConfig):
        loss = reward_loss(model, pair_norm=config.pair_norm, dropout=dropout)
    elif isinstance(config, PreferenceConfig):
        loss = preference_loss(config, model)
    else:
        loss = language_loss(model, dropout=dropout)
    tx = make_optimizer(config, steps=job.steps)
    whole = abstract_params(model_config, kind)
    base, trained = jax.eval_shape(
        lambda key, params: split(key, params, config.lora), abstract_key(mesh), whole
    )
    state = jax.eval_shape(lambda params: init_state(params, tx), trained)
    state = placed(state, state_shardings(state, mesh, RULES))
    base, batch = on_mesh(mesh, base), fit_batch(job, batch_sharding(mesh))
    step = make_step(config, loss, tx)
    kept = jax.tree.map(lambda x: x.sharding, state)

    def lower() -> Any:
        with jax.set_mesh(mesh):
            jitted = jax.jit(step, donate_argnums=0, out_shardings=(kept, replicated(mesh)))
            return jitted.lower(state, base, batch, abstract_key(mesh))

    lengths = [job.length] * config.batch_size
    cost = costs.train(model_config, lengths, kind=kind, optimizer=config.optimizer)
    if job.stage in ("reward_model", "preference"):
        prompts = np.full(config.batch_size, job.config.prompt_length)
        shape = (config.batch_size, job.branches)
        completions = np.full(shape, job.config.response_length)
        cost = costs.train_branches(model_config, prompts, completions, optimizer=config.optimizer)
    arguments = {"parameters": state.params, "optimizer": state.opt_state, "frozen": base}
    return Program("train step", lower, arguments | {"batch": batch}, (cost,))
