"""The programs of a stage, as the stage itself makes them, ready to be compiled without arrays.

Every array is a ShapeDtypeStruct with the sharding that the stage would give it; models, losses,
optimizers and steps are the stages' own. One `Program` is what runs `times` times in a run.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from instruct_jax.errors import ConfigError
from instruct_jax.models.adapters import adapt, split
from instruct_jax.models.transformer import TransformerConfig, language_model, scalar_model
from instruct_jax.planning import costs
from instruct_jax.planning.costs import Cost
from instruct_jax.sampling.sampler import Rollout, generate
from instruct_jax.stages import ppo
from instruct_jax.stages.experience import Experience, Frozen, PPOState
from instruct_jax.stages.ppo_config import PPOConfig
from instruct_jax.stages.preference import PreferenceConfig, preference_loss
from instruct_jax.stages.pretrain import PretrainConfig, language_loss
from instruct_jax.stages.reward_model import RewardModelConfig, reward_loss
from instruct_jax.stages.sft import SFTConfig
from instruct_jax.stages.stage import RULES, FitConfig, make_optimizer, make_step
from instruct_jax.stages.trunks import frozen_models, initial_state, optimizers
from instruct_jax.training.mesh import batch_sharding, check_batch_size, replicated, tree_shardings
from instruct_jax.training.state import init_state, state_shardings

Stage = Literal["pretrain", "sft", "reward_model", "preference", "ppo"]
StageConfig = PretrainConfig | SFTConfig | RewardModelConfig | PreferenceConfig | PPOConfig

Shapes = dict[str, tuple[tuple[int, ...], Any]]


@dataclass(frozen=True)
class Job:
    """One stage to plan. `scalar` is the reward and value model of PPO."""

    stage: Stage
    config: Any
    model: TransformerConfig
    scalar: TransformerConfig | None = None
    ptx_length: int = 0
    # Steps (iterations of PPO) in the run.
    steps: int = 1

    @property
    def rows(self) -> int:
        """Rows of a batch, or of a minibatch of PPO."""
        return self.config.minibatch if self.stage == "ppo" else self.config.batch_size

    def with_micro_batches(self, micro_batches: int) -> "Job":
        """The same, with the batch in so many parts."""
        config = dataclasses.replace(self.config, micro_batches=micro_batches)
        return dataclasses.replace(self, config=config)

    def with_remat(self, remat: bool) -> "Job":
        """The same, activations kept or computed again."""
        scalar = self.scalar and dataclasses.replace(self.scalar, remat=remat)
        model = dataclasses.replace(self.model, remat=remat)
        return dataclasses.replace(self, model=model, scalar=scalar)

    @property
    def length(self) -> int:
        """Tokens of a row."""
        config = self.config
        if self.stage == "pretrain":
            return config.length
        if self.stage == "sft":
            return config.pack_length or config.prompt_length + config.response_length
        if self.stage == "ppo":
            return config.prompt_length + config.response_length
        # One row holds the prompt and its completions.
        return config.prompt_length + config.completions * config.response_length


@dataclass(frozen=True)
class Program:
    """`lower()` is the stage's program at its shapes; `cost` is of one run of it, on all devices.

    `arguments` are what it reads, by role; `trips` how often a loop turns whose end is not known.
    """

    name: str
    lower: Callable[[], Any]
    arguments: dict[str, Any]
    cost: tuple[Cost, ...]
    trips: int = 1


def programs(job: Job, mesh: Mesh) -> list[Program]:
    """The programs of one step of `job` on `mesh`. ConfigError where the batch does not divide."""
    if job.stage == "ppo":
        return _ppo(job, mesh)
    return [_fit(job, mesh)]


def placed(tree: Any, shardings: Any) -> Any:
    """Shapes with their shardings."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def device_bytes(tree: Any) -> int:
    """Bytes of one device's part of shapes with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape)
        size = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        for n in shape:
            size *= n
        total += size
    return total


@functools.cache
def abstract_params(config: TransformerConfig, kind: costs.Kind) -> Any:
    """The shapes of a model's parameters."""
    model = (language_model if kind == "language" else scalar_model)(config)
    return jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)))


@functools.cache
def _reinforcement(
    config: PPOConfig, model: TransformerConfig, scalar: TransformerConfig
) -> tuple[Frozen, PPOState]:
    """The shapes of what PPO freezes and of what it trains."""
    given = abstract_params(model, "language"), abstract_params(scalar, "scalar")
    frozen = jax.eval_shape(partial(frozen_models, config), *given)
    txs = optimizers(config)
    return frozen, jax.eval_shape(lambda p, r: initial_state(config, p, r, txs), *given)


def _on(mesh: Mesh, tree: Any) -> Any:
    return placed(tree, tree_shardings(mesh, RULES, tree))


def _key(mesh: Mesh) -> Any:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh))


def _rows(sharding: NamedSharding, shapes: Shapes) -> dict[str, Any]:
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, (shape, dtype) in shapes.items()
    }


# --- the stages that minimise one loss ----------------------------------------------------------


def fit_batch(job: Job, sharding: NamedSharding) -> dict[str, Any]:
    """The shapes of one batch, as the stage's loader makes it."""
    config, b, t = job.config, job.config.batch_size, job.length
    whole, flag = jnp.int32, jnp.bool_
    shapes: Shapes
    if isinstance(config, PretrainConfig | SFTConfig):
        shapes = {"tokens": ((b, t), whole), "mask": ((b, t), flag), "loss_mask": ((b, t), flag)}
        if isinstance(config, SFTConfig) and config.pack_length is not None:
            shapes["segment_ids"] = ((b, t), whole)
        return _rows(sharding, shapes)
    k = config.completions
    shapes = {name: ((b, t), whole) for name in ("tokens", "branches", "positions", "previous")}
    shapes |= {"mask": ((b, t), flag), "ends": ((b, k), whole)}
    shapes |= {"ranks": ((b, k), whole), "where": ((b, k), flag)}
    if isinstance(config, PreferenceConfig):
        if config.needs_reference:
            shapes["reference"] = ((b, k), jnp.float32)
        if config.loss == "kto":
            width = config.prompt_length + config.response_length
            shapes["mismatched_reference"] = ((b, k), jnp.float32)
            shapes["mismatched_tokens"] = ((b, k, width), whole)
            shapes |= {f"mismatched_{n}": ((b, k, width), flag) for n in ("mask", "loss_mask")}
    return _rows(sharding, shapes)


def _fit(job: Job, mesh: Mesh) -> Program:
    config: FitConfig = job.config
    check_batch_size(config.batch_size, mesh, micro_batches=config.micro_batches)
    model_config = job.model
    if config.residual_dropout:
        model_config = dataclasses.replace(model_config, residual_dropout=config.residual_dropout)
    dropout = config.residual_dropout > 0
    kind: costs.Kind = "scalar" if job.stage == "reward_model" else "language"
    make = scalar_model if kind == "scalar" else language_model
    model = adapt(make(model_config), config.lora)
    if isinstance(config, RewardModelConfig):
        loss = reward_loss(model, pair_norm=config.pair_norm, dropout=dropout)
    elif isinstance(config, PreferenceConfig):
        loss = preference_loss(config, model)
    else:
        loss = language_loss(model, dropout=dropout)
    tx = make_optimizer(config, steps=job.steps)
    whole = abstract_params(model_config, kind)
    base, trained = jax.eval_shape(
        lambda key, params: split(key, params, config.lora), _key(mesh), whole
    )
    state = jax.eval_shape(lambda params: init_state(params, tx), trained)
    state = placed(state, state_shardings(state, mesh, RULES, offload=config.offload))
    base, batch = _on(mesh, base), fit_batch(job, batch_sharding(mesh))
    step = make_step(config, loss, tx)
    kept = jax.tree.map(lambda x: x.sharding, state)

    def lower() -> Any:
        with jax.set_mesh(mesh):
            jitted = jax.jit(step, donate_argnums=0, out_shardings=(kept, replicated(mesh)))
            return jitted.lower(state, base, batch, _key(mesh))

    lengths = [job.length] * config.batch_size
    cost = costs.train(model_config, lengths, kind=kind)
    if job.stage in ("reward_model", "preference"):
        prompts = np.full(config.batch_size, job.config.prompt_length)
        shape = (config.batch_size, job.config.completions)
        completions = np.full(shape, job.config.response_length)
        cost = costs.train_branches(model_config, prompts, completions)
    arguments = {"parameters": state.params, "optimizer": state.opt_state, "frozen": base}
    return Program("train step", lower, arguments | {"batch": batch}, (cost,))


# --- PPO ----------------------------------------------------------------------------------------


def _ppo(job: Job, mesh: Mesh) -> list[Program]:
    config: PPOConfig = job.config
    if job.scalar is None:
        raise ConfigError("ppo needs the size of the reward model: --reward=NAME")
    check_batch_size(config.prompts, mesh)
    check_batch_size(config.minibatch, mesh, micro_batches=config.micro_batches)
    policy = adapt(language_model(job.model), config.lora)
    scalar = adapt(scalar_model(job.scalar), config.lora)
    # What a search varies changes no shape.
    plain = job.with_micro_batches(1).with_remat(False)
    assert plain.scalar is not None
    frozen, state = _reinforcement(plain.config, plain.model, plain.scalar)
    frozen = Frozen(*(_on(mesh, tree) for tree in frozen))

    def sharded(part: Any) -> Any:
        return part and placed(part, state_shardings(part, mesh, RULES))

    kl: Any = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    state = PPOState(sharded(state.policy), sharded(state.value), kl)
    eos = job.model.vocab_size - 1
    n, p, b, r = config.prompts, config.prompt_length, config.rollout_batch, config.response_length
    rows, key = batch_sharding(mesh), _key(mesh)

    def array(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

    prompts, prompt_mask = array(jnp.int32, n, p), array(jnp.bool_, n, p)
    keys = array(key.dtype, b)
    tokens, mask = array(jnp.int32, b, p + r), array(jnp.bool_, b, p + r)
    where, numbers = array(jnp.bool_, b, r), array(jnp.float32, b, r)
    rollout = Rollout(tokens, mask, where, numbers)
    critic = (numbers, numbers) if state.value is not None else (None, None)
    experience = Experience(tokens, mask, where, numbers, numbers, numbers, *critic)
    sample = partial(generate, policy, max_new_tokens=r, eos_id=eos, temperature=config.temperature)
    weights = frozen.policy_params(state)

    def lower(name: str) -> Any:
        with jax.set_mesh(mesh):
            if name == "rollout":
                return jax.jit(sample).lower(weights, prompts, prompt_mask, keys)
            txs = optimizers(config)
            score, update = ppo.programs(config, policy, scalar, txs, state, eos_id=eos, mesh=mesh)
            if name == "score":
                return score.lower(state, frozen, rollout)
            return update.lower(state, frozen, experience, ptx, kl, key)

    ptx = None
    if config.ptx_coef > 0:
        shape = (config.updates, config.minibatch * config.ptx_ratio, job.ptx_length)
        spread = NamedSharding(mesh, PartitionSpec(None, *rows.spec))
        kinds = {"tokens": jnp.int32, "mask": jnp.bool_, "loss_mask": jnp.bool_}
        ptx = _rows(spread, {name: (shape, dtype) for name, dtype in kinds.items()})
    held = {
        "policy": state.policy.params,
        "average": state.policy.ema,
        "optimizer": (state.policy.opt_state, state.value and state.value.opt_state),
        "value model": state.value and state.value.params,
        "frozen": frozen,
    }
    lengths = [job.length] * b
    prompt_lengths, responses = [p] * n, [r] * b
    times = {"updates": config.updates, "epochs": config.inner_epochs}
    work: tuple[Cost, ...] = (costs.train(job.model, lengths, **times),)
    if state.value is not None:
        work += (costs.train(job.scalar, lengths, kind="scalar", **times),)
    if ptx is not None:
        rows_of = [job.ptx_length] * (config.minibatch * config.ptx_ratio)
        work += (costs.ptx(job.model, rows_of) * config.updates,)
    own = Cost(costs.forward_flops(job.model, lengths), costs.weight_bytes(job.model))
    scored = costs.score(job.model, job.scalar, lengths, scalars=1 + (state.value is not None))
    samples = config.samples_per_prompt
    return [
        Program(
            "rollout",
            partial(lower, "rollout"),
            held | {"batch": (prompts, prompt_mask, keys)},
            tuple(costs.generate(job.model, prompt_lengths, responses, samples=samples)),
            trips=r,
        ),
        Program(
            "score",
            partial(lower, "score"),
            held | {"batch": rollout},
            (scored, own),
        ),
        Program(
            "update",
            partial(lower, "update"),
            held | {"batch": (experience, ptx)},
            work,
        ),
    ]
