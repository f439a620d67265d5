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
Deviation: old log-probs come from one forward over the whole rollout batch, in fp32 equal to the
training forward's to 1e-5 (`ratio_error` of the first minibatch is logged), and the sampler's own
are a diagnostic; with `old_log_probs` "sampler" they take its place, to 1e-5 in the mean.

Off the paper's path is `rollout_lag` 1: iteration i samples and scores the batch of iteration i + 1
with the models as they are, before it updates them on the batch that iteration i - 1 left in the
state (`Lagging`). A batch is answered, its old log-probs and values read, and its penalty weighed,
by one and the same state, so the ratio is what PPO takes it for; only it is not 1 at first: the
policy has moved by the updates of one iteration, which `ratio_error` then measures. The first two
batches are of the same policy. No rollout waits for an update then, but on one set of devices the
programs still run in turn, and an iteration takes as long as before: it is a study of off-policy
data, and what a sampler with devices of its own would need.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from instruct_jax.errors import ConfigError
from instruct_jax.losses import adaptive_kl_update, masked_whiten
from instruct_jax.models.adapters import adapt
from instruct_jax.models.transformer import Model
from instruct_jax.sampling.sampler import generate
from instruct_jax.stages.experience import (
    Experience,
    Frozen,
    Lagging,
    PPOState,
    Scored,
    score_rollout,
)
from instruct_jax.stages.lengths import by_length, shorter_forms
from instruct_jax.stages.ppo_config import PPOConfig
from instruct_jax.stages.ppo_losses import policy_loss, ptx_loss, value_loss
from instruct_jax.stages.pretrain import language_rows
from instruct_jax.stages.stage import (
    RULES,
    Adapter,
    place_params,
    save_adapter,
    trunk_fingerprint,
    with_base,
)
from instruct_jax.stages.trunks import (
    Optimizers,
    frozen_models,
    initial_state,
    merged,
    optimizers,
)
from instruct_jax.training import hosts
from instruct_jax.training.checkpoint import Checkpointer
from instruct_jax.training.loop import train as run_loop
from instruct_jax.training.mesh import batch_sharding, check_batch_size, replicated
from instruct_jax.training.metrics import MetricLogger
from instruct_jax.training.state import (
    accumulate_gradients,
    apply_gradients,
    global_norm,
    shard_state,
)

# On the progress line; everything else is in the metrics file.
SHOWN = ("score", "kl", "response_length", "eos_rate", "explained_variance")

# Where rollouts lag, the first is drawn before iteration 0: in -1, as `fold_in` counts.
BEFORE = 2**32 - 1


def minibatch_update(
    config: PPOConfig,
    policy: Model,
    scalar: Model,
    policy_tx: optax.GradientTransformation,
    value_tx: optax.GradientTransformation,
    frozen: Frozen,
    state: PPOState,
    batch: Experience,
    ptx: dict[str, jax.Array] | None,
    key: jax.Array,
) -> tuple[PPOState, dict[str, jax.Array]]:
    """One update of the policy, and one of the value model where there is one.

    With pretraining rows the policy's gradient is dL_pg + ptx_coef * dL_ptx, given to Adam once.
    """
    if config.whiten_advantages == "minibatch":
        batch = batch._replace(advantages=masked_whiten(batch.advantages, where=batch.where))
    forms = shorter_forms(lambda b: b.where, config.response_length, config.length_buckets)
    accumulate = partial(
        accumulate_gradients, key=key, micro_batches=config.micro_batches, forms=forms
    )
    base = frozen.reference
    pg = accumulate(with_base(base, policy_loss(config, policy)), state.policy.params, batch)
    metrics = {
        "policy_loss": pg.loss,
        **pg.metrics,
        "grad_norm_pg": global_norm(pg.grads),
    }
    grads = pg.grads
    if ptx is not None:
        mix = accumulate_gradients(
            with_base(base, ptx_loss(config, policy)),
            state.policy.params,
            ptx,
            key,
            micro_batches=config.ptx_parts,
        )
        scaled = jax.tree.map(lambda g: config.ptx_coef * g, mix.grads)
        dot = jnp.asarray(optax.tree.vdot(pg.grads, scaled))
        norms = metrics["grad_norm_pg"] * global_norm(scaled)
        metrics |= {
            **mix.metrics,
            "grad_norm_ptx": global_norm(scaled),
            "grad_cosine": dot / jnp.maximum(norms, 1e-30),
        }
        grads = jax.tree.map(jnp.add, pg.grads, scaled)
    limit = math.inf if config.skip_above is None else config.skip_above
    new_policy, applied = apply_gradients(
        state.policy,
        grads,
        policy_tx,
        loss=pg.loss,
        ema_decay=config.ema_decay,
        skip_above=limit,
    )
    metrics["grad_norm"] = applied["grad_norm"]
    new_value = None
    if state.value is not None:
        loss = with_base(frozen.reward_params(), value_loss(config, scalar))
        vf = accumulate(loss, state.value.params, batch)
        new_value, applied = apply_gradients(
            state.value, vf.grads, value_tx, loss=vf.loss, skip_above=limit
        )
        metrics |= {
            "value_loss": vf.loss,
            **vf.metrics,
            "grad_norm_value": applied["grad_norm"],
        }
    return PPOState(new_policy, new_value, state.kl_coef), metrics


def update(
    config: PPOConfig,
    minibatch_step: Callable[..., tuple[PPOState, dict[str, jax.Array]]],
    rows: NamedSharding,
    state: PPOState,
    experience: Experience,
    ptx: dict[str, jax.Array] | None,
    kl: jax.Array,
    key: jax.Array,
) -> tuple[PPOState, dict[str, jax.Array]]:
    """All updates of one iteration, in one `lax.scan` over the minibatches of fresh permutations.

    `ptx` holds [updates, rows, T] arrays. Every episode is in exactly one minibatch of an inner
    epoch.
    """
    epochs = jax.random.split(jax.random.fold_in(key, 0), config.inner_epochs)
    order = jax.vmap(lambda k: jax.random.permutation(k, config.rollout_batch))(epochs)
    order = order.reshape(config.updates, config.minibatch)

    def body(
        state: PPOState, inputs: tuple[jax.Array, dict[str, jax.Array] | None, jax.Array]
    ) -> tuple[PPOState, dict[str, jax.Array]]:
        index, ptx_rows, step_key = inputs
        if config.length_buckets > 1:
            index = index[by_length(experience.where[index], config.micro_batches)]
        batch = jax.tree.map(lambda x: x[index], experience)
        batch = jax.lax.with_sharding_constraint(batch, rows)
        return minibatch_step(state, batch, ptx_rows, step_key)

    step_keys = jax.random.split(jax.random.fold_in(key, 1), config.updates)
    state, history = jax.lax.scan(body, state, (order, ptx, step_keys))
    metrics = {name: values.mean() for name, values in history.items()}
    metrics["ratio_max"] = history["ratio_max"].max()
    metrics["ratio_min"] = -history["ratio_min_negated"].max()
    del metrics["ratio_min_negated"]
    metrics["ratio_var"] = metrics.pop("ratio_square") - jnp.square(metrics["ratio"])
    # Where the policy has not moved yet the ratio is 1; a drift here is a bug or a precision loss
    # (T1), or the updates that a lagging rollout has not seen.
    metrics["ratio_error"] = history["ratio_error"][0]
    trained = [model for model in (state.policy, state.value) if model is not None]
    skipped = jnp.stack([model.skipped for model in trained]).sum()
    in_a_row = jnp.stack([model.skipped_in_a_row for model in trained]).max()
    metrics["skipped"] = skipped.astype(jnp.float32)
    metrics["skipped_in_a_row"] = in_a_row.astype(jnp.float32)
    if config.kl_target is not None:
        kl_coef = adaptive_kl_update(
            state.kl_coef,
            kl,
            target=config.kl_target,
            horizon=config.kl_horizon,
            batch_size=config.rollout_batch,
        )
        state = PPOState(state.policy, state.value, kl_coef)
    return state, metrics


def programs(
    config: PPOConfig,
    policy: Model,
    scalar: Model,
    txs: Optimizers,
    state: PPOState,
    *,
    eos_id: int,
    mesh: Mesh,
) -> tuple[Any, Any]:
    """The scoring and the update program, jitted; `state` is read for its shardings alone.

    score(state, frozen, rollout) -> Scored, and
    update(state, frozen, experience, ptx, kl, key) -> (state, metrics), which donates the state.
    """
    rows = batch_sharding(mesh)

    def all_updates(state: PPOState, frozen: Frozen, *inputs: Any) -> Any:
        step = partial(minibatch_update, config, policy, scalar, *txs, frozen)
        return update(config, step, rows, state, *inputs)

    score = jax.jit(
        partial(score_rollout, config, policy, scalar, eos_id=eos_id),
        out_shardings=Scored(rows, replicated(mesh)),
    )
    kept = jax.tree.map(lambda x: x.sharding, state)
    return score, jax.jit(all_updates, donate_argnums=0, out_shardings=(kept, replicated(mesh)))


class Iteration(NamedTuple):
    """The step of this stage: `iteration(state, batch, key) -> (state, metrics)`.

    `batch` holds `prompts` int32[N, P] (left-padded), each read once and answered
    `samples_per_prompt` times in a row, `prompt_mask`, and with a pretraining mix
    `ptx`, rows of `language_loss` as [updates, rows, T].
    """

    sample: Callable[[PPOState, dict[str, Any], jax.Array], Scored]
    """(state, batch, key) -> a rollout of the prompts by the policy as it is, scored"""
    learn: Callable[..., tuple[PPOState, dict[str, jax.Array]]]
    """(state, scored, batch, key) -> (state, metrics), all updates on a rollout and the mix"""

    def __call__(
        self, state: PPOState, batch: dict[str, Any], key: jax.Array
    ) -> tuple[PPOState, dict[str, jax.Array]]:
        """Samples and learns from it."""
        rollout_key, update_key = jax.random.split(key)
        return self.learn(state, self.sample(state, batch, rollout_key), batch, update_key)

    def start(self, state: PPOState, batch: dict[str, Any], key: jax.Array) -> Lagging:
        """What a run whose rollouts lag begins with: a rollout, drawn before iteration 0, whose key
        is `key` and -1."""
        return Lagging(state, self.sample(state, batch, jax.random.fold_in(key, BEFORE)))

    def lagging(
        self, state: Lagging, batch: dict[str, Any], key: jax.Array
    ) -> tuple[Lagging, dict[str, jax.Array]]:
        """Samples, for the next iteration, and learns from what the one before sampled."""
        rollout_key, update_key = jax.random.split(key)
        # First, since learning donates the models.
        sampled = self.sample(state.models, batch, rollout_key)
        models, metrics = self.learn(state.models, state.due, batch, update_key)
        return Lagging(models, sampled), metrics


def make_iteration(
    config: PPOConfig,
    policy: Model,
    scalar: Model,
    policy_tx: optax.GradientTransformation,
    value_tx: optax.GradientTransformation,
    frozen: Frozen,
    state: PPOState,
    *,
    eos_id: int,
    mesh: Mesh,
) -> Iteration:
    """The iteration of three compiled programs: rollout, scoring, update; the state is donated to
    the last and stays sharded as the `state` given here.
    """
    rows = batch_sharding(mesh)
    txs = (policy_tx, value_tx)
    score, run_updates = programs(config, policy, scalar, txs, state, eos_id=eos_id, mesh=mesh)
    ptx_rows = NamedSharding(mesh, PartitionSpec(None, *rows.spec))

    def sample(state: PPOState, batch: dict[str, Any], key: jax.Array) -> Scored:
        rollout = generate(
            policy,
            frozen.policy_params(state),
            hosts.spread(batch["prompts"], rows),
            hosts.spread(batch["prompt_mask"], rows),
            hosts.spread(jax.random.split(key, config.rollout_batch), rows),
            max_new_tokens=config.response_length,
            eos_id=eos_id,
            temperature=config.temperature,
            halvings=config.halvings,
        )
        return score(state, frozen, rollout)

    def learn(
        state: PPOState, scored: Scored, batch: dict[str, Any], key: jax.Array
    ) -> tuple[PPOState, dict[str, jax.Array]]:
        experience, metrics = scored
        ptx = hosts.spread(batch["ptx"], ptx_rows) if "ptx" in batch else None
        state, updated = run_updates(state, frozen, experience, ptx, metrics["kl"], key)
        return state, metrics | updated

    return Iteration(sample, learn)


class Batches(NamedTuple):
    """Of iteration i: the prompts that it answers, those of i + `lag`, and for PPO-ptx its
    pretraining rows; a pure function of i.
    """

    prompts: Callable[[int], dict[str, np.ndarray]]
    ptx: Callable[[int], dict[str, np.ndarray]] | None
    updates: int
    lag: int = 0

    def answered(self, step: int) -> dict[str, Any]:
        """The prompts that iteration `step` answers."""
        rows = self.prompts(step + self.lag)
        return {"prompts": rows["tokens"], "prompt_mask": rows["mask"]}

    def __call__(self, step: int) -> dict[str, Any]:
        """The batch of iteration `step`."""
        batch = self.answered(step)
        if self.ptx is not None:
            tokens = self.ptx(step)["tokens"]
            shaped = tokens.reshape(self.updates, -1, tokens.shape[-1])
            batch["ptx"] = language_rows(shaped)
        return batch


def check_batches(config: PPOConfig, mesh: Mesh) -> None:
    """ConfigError where prompts, minibatches or their text do not divide over `mesh`."""
    check_batch_size(config.prompts, mesh)
    check_batch_size(config.minibatch, mesh, micro_batches=config.micro_batches)
    if config.ptx_coef > 0:
        text = config.minibatch * config.ptx_ratio
        check_batch_size(text, mesh, micro_batches=config.ptx_parts)


def models_of(state: PPOState | Lagging) -> PPOState:
    """What is trained, without what waits to be learnt from."""
    return state.models if isinstance(state, Lagging) else state


def train(
    config: PPOConfig,
    policy: Model,
    scalar: Model,
    policy_params: Any,
    reward_params: Any,
    prompts: Callable[[int], dict[str, np.ndarray]],
    *,
    ptx: Callable[[int], dict[str, np.ndarray]] | None = None,
    eos_id: int,
    mesh: Mesh,
    workdir: Path,
    evaluate: Callable[[int, PPOState], dict[str, float]] | None = None,
) -> PPOState:
    """Runs PPO (or PPO-ptx when `config.ptx_coef` > 0) from M3; returns the final state.

    `prompts(step)` gives tokens int32[config.prompts, P] left-padded and mask; `ptx(step)` tokens
    int32[updates * minibatch * ptx_ratio, T] of packed pretraining text. `policy_params` becomes
    the policy and the frozen reference; `reward_params` the reward model and, with estimator "gae",
    the value model, bias included. The policy to evaluate and to keep is `state.policy.ema`, whole
    parameters also where an adapter is trained. Resumes from `workdir/checkpoints` when there is
    one.

    With a rank in `config.lora`, `reward_params` may be an adapter and a head alone, trained on the
    trunk of `policy_params`: that trunk then serves all four models (`trunks.py`). The average of
    the policy's adapter is also left in `workdir/adapter`.
    """
    if config.ptx_coef > 0 and ptx is None:
        raise ConfigError(f"ptx_coef {config.ptx_coef} needs pretraining text; none was given")
    check_batches(config, mesh)
    txs = optimizers(config)
    # The update donates its state, so the frozen models hold buffers of their own (JAX-8).
    frozen = Frozen(
        *(place_params(p, mesh) for p in frozen_models(config, policy_params, reward_params))
    )
    state = initial_state(config, policy_params, reward_params, txs)
    state = PPOState(
        shard_state(state.policy, mesh, RULES),
        None if state.value is None else shard_state(state.value, mesh, RULES),
        hosts.place(state.kl_coef, replicated(mesh)),
    )
    iteration = make_iteration(
        config,
        adapt(policy, config.lora),
        adapt(scalar, config.lora),
        *txs,
        frozen,
        state,
        eos_id=eos_id,
        mesh=mesh,
    )

    def shown(step: int, state: PPOState | Lagging) -> dict[str, float]:
        assert evaluate is not None
        return evaluate(step, merged(config, frozen, models_of(state)))

    mix = ptx if config.ptx_coef > 0 else None
    batch_at = Batches(prompts, mix, config.updates, config.rollout_lag)
    key = jax.random.key(config.seed)
    with (
        jax.set_mesh(mesh),
        Checkpointer(workdir / "checkpoints") as checkpointer,
        MetricLogger(workdir, "ppo", total=config.iterations, show=SHOWN) as logger,
    ):
        start: PPOState | Lagging = state
        if config.rollout_lag:
            # Also in a run that is taken up: it reads the shapes of its own rollout off this one.
            start = iteration.start(state, batch_at.answered(-1), key)
        end = run_loop(
            iteration.lagging if config.rollout_lag else iteration,
            start,
            batch_at=batch_at,
            steps=config.iterations,
            key=key,
            logger=logger,
            checkpointer=checkpointer,
            save_every=config.save_every,
            evaluate=None if evaluate is None else shown,
            eval_every=config.eval_every,
            log_every=config.log_every,
        )
    state = models_of(end)
    if config.lora.rank == 0:
        return state
    base = trunk_fingerprint(policy_params)
    save_adapter(workdir / "adapter", Adapter(state.policy.ema, config.lora, base))
    return merged(config, frozen, state)
