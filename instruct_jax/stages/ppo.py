"""Stage 3: PPO against the reward model, with a per-token KL penalty, and PPO-ptx (M5, M6).

The objective to maximise (Ouyang et al. 2022, eq. 2), pi_ref the frozen policy of iteration 0 (M3):

    E_{x, y ~ pi} [ r(x, y) - beta sum_t (log pi(y_t) - log pi_ref(y_t)) ] + gamma E_z [ log pi(z) ]

One iteration (PPO-15): sample a response to every prompt with the policy as it is; score it;
log-probs of the policy and the reference, values; rewards, advantages, whitening; then
`inner_epochs` passes over a random partition into minibatches, each one update of the policy and
one of the value model. With `ptx_coef` > 0 the gradient of the pretraining loss joins the policy's
before its single update (PPO-13): Adam is blind to the scale of what it is given, so a separate
update would make the coefficient meaningless.

Choices where the paper is silent, all of them fields: lambda and the value clip 0.95 and 0.2 (the
2019 code and its descendants), Adam's eps 1e-5, gradient clip 1 on the summed gradient, advantages
whitened over the rollout batch, no reward whitening or clipping, token means in every loss (the
meaning of gamma depends on it: the gradient norms of both terms and their cosine are logged), EMA
after every update.
Critic-free algorithms (RLOO, GRPO and kin) are the same iteration without the value model; the
table in ppo_config.py says which fields make which.
Old log-probs come from a forward over the rollout in parts of as many rows as a micro-batch of the
update has, so in the same shapes (NUM-5; `ratio_error` of the first minibatch is logged), and the
sampler's own are a diagnostic; with `old_log_probs` "sampler" they take its place, to 1e-5 in the
mean. Off the paper's path is `rollout_lag` (ppo_lag.py).

The step is read here, then in experience.py, ppo_update.py, ppo_losses.py, losses/ppo.py and
training/state.py; what the four models are stands in ppo_models.py.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from instruct_jax.models.adapters import adapt
from instruct_jax.models.transformer import Model
from instruct_jax.sampling.sampler import Rollout, generate
from instruct_jax.stages.experience import Experience, Scored, make_experience, read_rollout
from instruct_jax.stages.ppo_batches import IterationBatches, iteration_batches
from instruct_jax.stages.ppo_config import PPOConfig
from instruct_jax.stages.ppo_lag import Lagging, behind, first_rollout, models_of
from instruct_jax.stages.ppo_models import (
    Frozen,
    PPOState,
    Readings,
    Recipe,
    frozen_models,
    initial_state,
    merged,
    optimizers,
)
from instruct_jax.stages.ppo_update import minibatch_update, update_on_rollout
from instruct_jax.stages.resampling import Answered, Refill, first_look, lively, refilled
from instruct_jax.stages.rewards import Given, HostRewards
from instruct_jax.stages.stage import RULES, OnBest, place_params
from instruct_jax.stages.trained import Adapter, save_adapter, trunk_fingerprint
from instruct_jax.training import hosts
from instruct_jax.training.checkpoint import Checkpointer
from instruct_jax.training.keeping import Best
from instruct_jax.training.loop import train as run_loop
from instruct_jax.training.mesh import batch_sharding, check_batch_size, replicated
from instruct_jax.training.metrics import MetricLogger
from instruct_jax.training.state import fingerprint, shard_state

Metrics = dict[str, jax.Array]

# On the progress line; everything else is in the metrics file.
SHOWN = ("score", "kl", "response_length", "eos_rate", "explained_variance")
# What `evaluate` may add rows to, by `append_rows`: a run that is taken up rewinds it.
SAMPLES = "samples.jsonl"


class Programs(NamedTuple):
    """What an iteration compiles, besides the sampler."""

    read: Callable[[PPOState, Frozen, Rollout], Readings]
    """all forward passes over a rollout"""
    score: Callable[[jax.Array, Rollout, Readings, Given | None], Scored]
    """(kl_coef, rollout, readings, rewards from elsewhere) -> rewards, advantages and logs"""
    refill: Refill
    """what replaces groups without signal"""
    update: Callable[..., tuple[PPOState, Metrics]]
    """(state, frozen, experience, text, kl, key) -> (state, metrics); the state is donated"""


def make_programs(recipe: Recipe, state: PPOState, mesh: Mesh) -> Programs:
    """The programs of `recipe` on `mesh`; `state` is read for its shardings alone."""
    rows, whole = batch_sharding(mesh), replicated(mesh)

    def read(state: PPOState, frozen: Frozen, rollout: Rollout) -> Readings:
        return read_rollout(recipe, frozen.models(state), rollout)

    def update(
        state: PPOState,
        frozen: Frozen,
        experience: Experience,
        text: dict[str, jax.Array] | None,
        kl: jax.Array,
        key: jax.Array,
    ) -> tuple[PPOState, Metrics]:
        one = partial(minibatch_update, recipe, frozen)
        return update_on_rollout(recipe.config, one, rows, state, experience, text, kl, key)

    kept = jax.tree.map(lambda x: x.sharding, state)
    return Programs(
        jax.jit(read, out_shardings=rows),
        jax.jit(partial(make_experience, recipe), out_shardings=Scored(rows, whole)),
        Refill(
            jax.jit(partial(first_look, recipe), out_shardings=whole),
            jax.jit(partial(refilled, recipe), out_shardings=rows),
        ),
        jax.jit(update, donate_argnums=0, out_shardings=(kept, whole)),
    )


class Iteration(NamedTuple):
    """The step of this stage: `iteration(state, batch, key) -> (state, metrics)`.

    `batch` holds `prompts` int32[N, P] (left-padded), each read once and answered
    `samples_per_prompt` times in a row, `prompt_mask`, with rewards from elsewhere `index` int[N],
    with `max_resamples` a list `more` of so many such batches, and with a pretraining mix `text`,
    rows of `language_loss` as [updates, rows, T].
    """

    recipe: Recipe
    programs: Programs
    frozen: Frozen
    mesh: Mesh
    rewards: HostRewards | None = None

    def __call__(
        self, state: PPOState, batch: dict[str, Any], key: jax.Array
    ) -> tuple[PPOState, Metrics]:
        """Samples, scores and learns (PPO-15)."""
        rollout_key, update_key = jax.random.split(key)
        return self.learn(state, self.gather(state, batch, rollout_key), batch, update_key)

    def gather(self, state: PPOState, batch: dict[str, Any], key: jax.Array) -> Scored:
        """Experience of the models as they are: a response to every prompt, read and scored."""
        logs: dict[str, Any] = {}

        def answer(batch: dict[str, Any], key: jax.Array) -> Answered:
            answered, of_rewards = self.answer(state, batch, key)
            logs.update(of_rewards | logs)  # of the first rollout
            return answered

        if self.recipe.config.max_resamples:
            answered, counts = lively(answer, self.programs.refill, batch, key)
            logs |= counts
        else:
            answered = answer(batch, key)
        scored = self.programs.score(state.kl_coef, *answered)
        return scored._replace(metrics=scored.metrics | logs)

    def answer(
        self, state: PPOState, batch: dict[str, Any], key: jax.Array
    ) -> tuple[Answered, dict[str, Any]]:
        """A response to every prompt, read, with its rewards from elsewhere and their logs."""
        rollout = self.sample(state, batch, key)
        readings = self.programs.read(state, self.frozen, rollout)
        if self.rewards is None:
            return Answered(rollout, readings, None), {}
        # The device is at the readings meanwhile.
        given, logs = self.rewards(rollout, batch["index"])
        given = hosts.spread(given, batch_sharding(self.mesh))
        return Answered(rollout, readings, given), hosts.spread(logs, replicated(self.mesh))

    def sample(self, state: PPOState, batch: dict[str, Any], key: jax.Array) -> Rollout:
        """Responses of the policy to the prompts of `batch`."""
        config, rows = self.recipe.config, batch_sharding(self.mesh)
        return generate(
            self.recipe.policy,
            self.frozen.models(state).policy,
            hosts.spread(batch["prompts"], rows),
            hosts.spread(batch["prompt_mask"], rows),
            hosts.spread(jax.random.split(key, config.rollout_batch), rows),
            max_new_tokens=config.response_length,
            eos_id=self.recipe.eos_id,
            temperature=config.temperature,
            halvings=config.halvings,
        )

    def learn(
        self, state: PPOState, scored: Scored, batch: dict[str, Any], key: jax.Array
    ) -> tuple[PPOState, Metrics]:
        """All updates on what was gathered, and on the text of `batch`."""
        text = None
        if "text" in batch:
            by_row = PartitionSpec(None, *batch_sharding(self.mesh).spec)
            text = hosts.spread(batch["text"], NamedSharding(self.mesh, by_row))
        experience, logs = scored
        state, metrics = self.programs.update(state, self.frozen, experience, text, logs["kl"], key)
        return state, logs | metrics


def make_iteration(
    recipe: Recipe,
    frozen: Frozen,
    state: PPOState,
    mesh: Mesh,
    rewards: HostRewards | None = None,
) -> Iteration:
    """The iteration of four compiled programs; the state is donated to the last and stays sharded
    as the `state` given here.
    """
    return Iteration(recipe, make_programs(recipe, state, mesh), frozen, mesh, rewards)


def check_batches(config: PPOConfig, mesh: Mesh) -> None:
    """ConfigError where prompts, minibatches or their text do not divide over `mesh`."""
    check_batch_size(config.prompts, mesh)
    check_batch_size(config.minibatch, mesh, micro_batches=config.micro_batches)
    if config.ptx_coef > 0:
        text = config.minibatch * config.ptx_ratio
        check_batch_size(text, mesh, micro_batches=config.ptx_parts)


def train(
    config: PPOConfig,
    policy: Model,
    scalar: Model,
    policy_params: Any,
    reward_params: Any,
    prompts: Callable[[int], dict[str, np.ndarray]],
    *,
    more_prompts: Callable[[int], dict[str, np.ndarray]] | None = None,
    ptx: Callable[[int], dict[str, np.ndarray]] | None = None,
    eos_id: int,
    mesh: Mesh,
    workdir: Path,
    evaluate: Callable[[int, PPOState], dict[str, float]] | None = None,
    on_best: OnBest | None = None,
    rewards: HostRewards | None = None,
    model_weight: float = 1.0,
) -> PPOState:
    """Runs PPO (or PPO-ptx when `config.ptx_coef` > 0) from M3; returns the final state.

    `prompts(step)` gives tokens int32[config.prompts, P] left-padded and mask, and so does
    `more_prompts`, of the rollouts that `max_resamples` adds; `ptx(step)` tokens
    int32[updates * minibatch * ptx_ratio, T] of packed pretraining text. `policy_params` becomes
    the policy and the frozen reference; `reward_params` the reward model and, with estimator "gae",
    the value model, bias included. The policy to evaluate and to keep is `state.policy.ema`, whole
    parameters also where an adapter is trained. Resumes from `workdir/checkpoints` when there is
    one; ConfigError where that was trained with other models. `on_best` is called at the end with
    the average of the best evaluation's policy, where `config.best_metric` names one.

    `rewards` are added to `model_weight` times the reward model's score, and read the `index` of
    `prompts`. With weight 0 the reward model is what the value model starts as and no more.

    With a rank in `config.lora`, `reward_params` may be an adapter and a head alone, trained on the
    trunk of `policy_params`: that trunk then serves all four models (`ppo_models.py`). The average
    of the policy's adapter is also left in `workdir/adapter`.
    """
    batch_at = iteration_batches(config, prompts, ptx, more_prompts)
    check_batches(config, mesh)
    recipe = Recipe(
        config,
        adapt(policy, config.lora),
        adapt(scalar, config.lora),
        *optimizers(config),
        eos_id,
        model_weight,
    )
    frozen, state = placed_models(recipe, policy_params, reward_params, mesh)
    iteration = make_iteration(recipe, frozen, state, mesh, rewards)

    def shown(step: int, state: PPOState | Lagging) -> dict[str, float]:
        assert evaluate is not None
        return evaluate(step, merged(config, frozen, models_of(state)))

    def kept(best: Best, state: PPOState | Lagging) -> None:
        assert on_best is not None
        on_best(best, merged(config, frozen, models_of(state)).policy.ema)

    looks = None if evaluate is None else shown, None if on_best is None else kept
    state = _run(iteration, state, batch_at, workdir, *looks)
    if config.lora.rank == 0:
        return state
    base = trunk_fingerprint(policy_params)
    save_adapter(workdir / "adapter", Adapter(state.policy.ema, config.lora, base))
    return merged(config, frozen, state)


def _run(
    iteration: Iteration,
    state: PPOState,
    batch_at: IterationBatches,
    workdir: Path,
    evaluate: Callable[[int, PPOState | Lagging], dict[str, float]] | None,
    on_best: Callable[[Best, PPOState | Lagging], None] | None,
) -> PPOState:
    """All iterations, from the newest checkpoint of `workdir` if there is one; the last state."""
    config, frozen = iteration.recipe.config, iteration.frozen
    key = jax.random.key(config.seed)
    inputs = {"init": fingerprint(frozen.reference), "reward_model": fingerprint(frozen.reward)}
    with (
        jax.set_mesh(iteration.mesh),
        Checkpointer(workdir / "checkpoints") as checkpointer,
        MetricLogger(
            workdir, "ppo", total=config.iterations, show=SHOWN, beside=(SAMPLES,)
        ) as logger,
    ):
        start: PPOState | Lagging = state
        step: Callable[..., Any] = iteration
        if config.rollout_lag:
            # Also in a run that is taken up: it reads the shapes of its own rollout off this one.
            start = first_rollout(iteration, state, batch_at.answered(-1), key)
            step = partial(behind, iteration)
        end = run_loop(
            step,
            start,
            batch_at=batch_at,
            steps=config.iterations,
            key=key,
            logger=logger,
            checkpointer=checkpointer,
            save_every=config.save_every,
            evaluate=evaluate,
            eval_every=config.eval_every,
            log_every=config.log_every,
            inputs=inputs,
            stop_when=None if config.kl_stop is None else config.why_stop,
            best=config.best_by,
            on_best=on_best,
        )
    return models_of(end)


def placed_models(
    recipe: Recipe, policy_params: Any, reward_params: Any, mesh: Mesh
) -> tuple[Frozen, PPOState]:
    """The frozen models and the first state, on `mesh` and in buffers of their own: the update
    donates its state (JAX-8).
    """
    config = recipe.config
    frozen = frozen_models(config, policy_params, reward_params)
    txs = recipe.policy_tx, recipe.value_tx
    state = initial_state(config, policy_params, reward_params, txs)
    if not recipe.model_weight and config.lora.rank == 0:
        frozen = frozen._replace(reward={})  # the value model has all of its own
    value = None if state.value is None else shard_state(state.value, mesh, RULES)
    return Frozen(*(place_params(params, mesh) for params in frozen)), PPOState(
        shard_state(state.policy, mesh, RULES),
        value,
        hosts.place(state.kl_coef, replicated(mesh)),
    )
