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
Deviation: old log-probs come from one forward over the whole rollout batch, in fp32 equal to the
training forward's to 1e-5 (`ratio_error` of the first minibatch is logged); the sampler's own are a
diagnostic.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from instruct_jax.errors import ConfigError
from instruct_jax.losses import (
    adaptive_kl_update,
    clip_scores,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    generalized_advantages,
    kl_estimate,
    kl_shaped_rewards,
    loss_sum_and_count,
    masked_mean,
    masked_whiten,
    missing_eos_scores,
    policy_clipped,
    sum_and_count,
    token_entropy,
    token_log_probs,
    value_clipped,
)
from instruct_jax.models.transformer import (
    PARTITION_RULES,
    Model,
    final_scores,
    response_values,
)
from instruct_jax.sampling.sampler import Rollout, generate
from instruct_jax.stages.pretrain import language_loss, language_rows
from instruct_jax.stages.stage import AdamConfig, place_params
from instruct_jax.training.checkpoint import Checkpointer
from instruct_jax.training.loop import train as run_loop
from instruct_jax.training.mesh import batch_sharding, check_batch_size, replicated
from instruct_jax.training.metrics import MetricLogger
from instruct_jax.training.optim import adamw, warmup_constant_schedule
from instruct_jax.training.state import (
    LossFn,
    TrainState,
    accumulate_gradients,
    apply_gradients,
    global_norm,
    init_state,
    shard_state,
)

# On the progress line; everything else is in the metrics file.
SHOWN = ("score", "kl", "response_length", "eos_rate", "explained_variance")


@dataclass(frozen=True)
class PPOConfig:
    """PPO-3: the paper's values; `ptx_coef` 0 is PPO, 27.8 the paper's PPO-ptx."""

    episodes: int = 256_000
    rollout_batch: int = 512
    minibatch: int = 64
    inner_epochs: int = 1
    prompt_length: int = 1024
    response_length: int = 1024
    temperature: float = 1.0
    # Reward: the KL penalty, and what is done to the reward model's score before it.
    kl_coef: float = 0.02
    kl_target: float | None = None
    kl_horizon: int = 10_000
    missing_eos: Literal["none", "replace", "subtract"] = "none"
    missing_eos_penalty: float = 1.0
    reward_clip: float | None = None
    whiten_rewards: bool = False
    # Advantages and the clipped losses.
    discount: float = 1.0
    gae_lambda: float = 0.95
    whiten_advantages: Literal["rollout", "minibatch", "none"] = "rollout"
    clip: float = 0.2
    value_clip: float = 0.2
    loss_reduction: Literal["token_mean", "seq_mean", "seq_sum_const"] = "token_mean"
    # The pretraining mix.
    ptx_coef: float = 0.0
    ptx_ratio: int = 8
    ptx_reduction: Literal["token_mean", "seq_sum_mean"] = "token_mean"
    # Optimizers: one each for the policy and the value model.
    learning_rate: float = 9.65e-6
    value_learning_rate: float = 9e-6
    warmup_iterations: int = 10
    adam: AdamConfig = AdamConfig(eps=1e-5)
    ema_decay: float = 0.992
    micro_batches: int = 1
    seed: int = 0
    log_every: int = 1
    eval_every: int = 0
    save_every: int = 0

    def __post_init__(self) -> None:
        """ConfigError where a batch does not divide."""
        if self.rollout_batch % self.minibatch:
            raise ConfigError(
                f"rollout_batch {self.rollout_batch} is not a multiple of "
                f"minibatch {self.minibatch}"
            )
        if self.minibatch % self.micro_batches:
            raise ConfigError(
                f"minibatch {self.minibatch} is not a multiple of "
                f"micro_batches {self.micro_batches}"
            )

    @property
    def iterations(self) -> int:
        """Rollout batches in the run."""
        return max(1, self.episodes // self.rollout_batch)

    @property
    def updates(self) -> int:
        """Optimizer updates in one iteration."""
        return self.inner_epochs * (self.rollout_batch // self.minibatch)


@partial(
    jax.tree_util.register_dataclass, data_fields=["policy", "value", "kl_coef"], meta_fields=[]
)
@dataclass(frozen=True)
class PPOState:
    """All that changes over iterations; the reference and the reward model do not."""

    policy: TrainState
    value: TrainState
    kl_coef: jax.Array


class Frozen(NamedTuple):
    """The models that PPO reads and never writes."""

    reference: Any
    reward: Any


class Experience(NamedTuple):
    """A scored rollout; B rows, prompt P, response R, T = P + R."""

    tokens: jax.Array  # int32[B, T]
    mask: jax.Array  # bool[B, T], real tokens
    where: jax.Array  # bool[B, R], response tokens through the stop token
    log_probs: jax.Array  # float32[B, R], of the policy that sampled
    values: jax.Array  # float32[B, R], V_t before y_t is emitted
    advantages: jax.Array  # float32[B, R]
    returns: jax.Array  # float32[B, R], from the unwhitened advantages


def response_logits(
    model: Model, params: Any, tokens: jax.Array, mask: jax.Array, *, response_length: int
) -> jax.Array:
    """float32[B, R, V] logits that predict the response: those of positions P-1 .. P+R-2."""
    hidden = model.hidden(params, tokens, mask=mask)
    return model.readout(params, hidden[:, -response_length - 1 : -1])


def score_rollout(
    config: PPOConfig,
    policy: Model,
    scalar: Model,
    state: PPOState,
    frozen: Frozen,
    rollout: Rollout,
    *,
    eos_id: int,
) -> tuple[Experience, dict[str, jax.Array]]:
    """Rewards, values and advantages of a rollout, and the logs of PPO-16 that need no update.

    Everything here is a constant of the update: nothing is differentiated.
    """
    tokens, mask, where = rollout.tokens, rollout.mask, rollout.response_mask
    length = where.shape[1]
    responses = tokens[:, -length:]
    logits = response_logits(policy, state.policy.params, tokens, mask, response_length=length)
    ref_logits = response_logits(policy, frozen.reference, tokens, mask, response_length=length)
    log_probs = token_log_probs(logits, responses, temperature=config.temperature)
    ref_log_probs = token_log_probs(ref_logits, responses, temperature=config.temperature)
    log_probs = jnp.where(where, log_probs, 0.0)
    ref_log_probs = jnp.where(where, ref_log_probs, 0.0)

    has_eos = ((responses == eos_id) & where).any(axis=-1)
    raw_scores = final_scores(scalar.apply(frozen.reward, tokens, mask=mask), mask)
    scores = missing_eos_scores(
        clip_scores(raw_scores, limit=config.reward_clip),
        has_eos,
        rule=config.missing_eos,
        penalty=config.missing_eos_penalty,
    )
    prompt_length = tokens.shape[1] - length
    values = scalar.apply(state.value.params, tokens, mask=mask)
    values = response_values(values, prompt_length=prompt_length)
    values = jnp.where(where, values, 0.0)

    rewards = kl_shaped_rewards(
        scores, log_probs, ref_log_probs, where=where, kl_coef=state.kl_coef
    )
    if config.whiten_rewards:
        rewards = masked_whiten(rewards, where, shift_mean=False)
    advantages, returns = generalized_advantages(
        rewards, values, where=where, discount=config.discount, gae_lambda=config.gae_lambda
    )
    if config.whiten_advantages == "rollout":
        advantages = masked_whiten(advantages, where)

    k1 = kl_estimate(log_probs, ref_log_probs, kind="k1")
    kl = jnp.where(where, k1, 0.0).sum(-1)
    k3 = jnp.where(where, kl_estimate(log_probs, ref_log_probs, kind="k3"), 0.0).sum(-1)
    gap = rollout.log_probs - log_probs
    entropy = token_entropy(logits, temperature=config.temperature)
    metrics = {
        "kl": kl.mean(),
        "kl_k3": k3.mean(),
        "kl_coef": state.kl_coef,
        "entropy": masked_mean(entropy, where),
        "score": raw_scores.mean(),
        "score_sd": raw_scores.std(),
        "score_min": raw_scores.min(),
        "score_max": raw_scores.max(),
        "reward_kl": -(state.kl_coef * kl).mean(),
        "reward_total": jnp.where(where, rewards, 0.0).sum(-1).mean(),
        "response_length": where.sum(-1).mean(dtype=jnp.float32),
        "eos_rate": has_eos.mean(dtype=jnp.float32),
        "value": masked_mean(values, where),
        "return_mean": masked_mean(returns, where),
        "return_var": _masked_variance(returns, where),
        "explained_variance": explained_variance(values, returns, where=where),
        "sampler_gap": masked_mean(jnp.abs(gap), where),
        "sampler_gap_max": jnp.where(where, jnp.abs(gap), 0.0).max(),
        "tokens": where.sum(dtype=jnp.float32),
    }
    experience = Experience(tokens, mask, where, log_probs, values, advantages, returns)
    return jax.tree.map(jax.lax.stop_gradient, (experience, metrics))


def _masked_variance(x: jax.Array, where: jax.Array) -> jax.Array:
    return masked_mean(jnp.square(x - masked_mean(x, where)), where)


def policy_loss(config: PPOConfig, policy: Model) -> LossFn:
    """The clipped policy loss (PPO-10) of one minibatch of `Experience`, as a sum and its count.

    The log-probs are those of the tempered distribution that sampled, so that the ratio starts at
    1. Reductions: "token_mean" weighs tokens alike (long answers weigh more), "seq_mean" answers
    alike (tokens of long answers weigh less), "seq_sum_const" sums tokens and divides by the
    response budget (tokens alike, and no answer's length changes another's weight).
    """

    def loss(
        params: Any, batch: Experience, key: jax.Array
    ) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        del key  # No dropout: the ratio must be 1 where the policy has not moved.
        where, length = batch.where, batch.where.shape[1]
        logits = response_logits(policy, params, batch.tokens, batch.mask, response_length=length)
        log_probs = token_log_probs(
            logits, batch.tokens[:, -length:], temperature=config.temperature
        )
        log_probs = jnp.where(where, log_probs, 0.0)
        losses = clipped_policy_loss(log_probs, batch.log_probs, batch.advantages, clip=config.clip)
        total, count = loss_sum_and_count(losses, where, reduction=config.loss_reduction)
        diff = log_probs - batch.log_probs
        ratio = jnp.exp(diff)
        clipped = policy_clipped(log_probs, batch.log_probs, batch.advantages, clip=config.clip)
        metrics = {
            "ratio": sum_and_count(ratio, where),
            "ratio_square": sum_and_count(jnp.square(ratio), where),
            "ratio_error": sum_and_count(jnp.abs(ratio - 1.0), where),
            "ratio_max": jnp.where(where, ratio, -jnp.inf).max(),
            "ratio_min_negated": jnp.where(where, -ratio, -jnp.inf).max(),
            "approx_kl": sum_and_count(0.5 * jnp.square(diff), where),
            "clip_fraction": sum_and_count(clipped, where),
        }
        return total, count, metrics

    return loss


def value_loss(config: PPOConfig, scalar: Model) -> LossFn:
    """The clipped value loss (PPO-11) of one minibatch of `Experience`, as a sum and its token
    count.
    """

    def loss(
        params: Any, batch: Experience, key: jax.Array
    ) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        del key
        where, length = batch.where, batch.where.shape[1]
        values = scalar.apply(params, batch.tokens, mask=batch.mask)
        values = response_values(values, prompt_length=batch.tokens.shape[1] - length)
        values = jnp.where(where, values, 0.0)
        bound = {"clip": config.value_clip}
        losses = clipped_value_loss(values, batch.values, batch.returns, **bound)
        clipped = value_clipped(values, batch.values, batch.returns, **bound)
        total, count = sum_and_count(losses, where)
        return total, count, {"value_clip_fraction": sum_and_count(clipped, where)}

    return loss


def ptx_loss(config: PPOConfig, policy: Model) -> LossFn:
    """Pretraining loss of PPO-13: a mean over tokens, or the mean over rows of their summed
    loss.
    """
    token_loss = language_loss(policy)

    def loss(
        params: Any, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        total, count, _ = token_loss(params, batch, key)
        metrics = {"pretrain_nll": (total, count)}
        if config.ptx_reduction == "seq_sum_mean":
            count = jnp.float32(batch["tokens"].shape[0])
        return total, count, metrics

    return loss


def minibatch_update(
    config: PPOConfig,
    policy: Model,
    scalar: Model,
    policy_tx: optax.GradientTransformation,
    value_tx: optax.GradientTransformation,
    state: PPOState,
    batch: Experience,
    ptx: dict[str, jax.Array] | None,
    key: jax.Array,
) -> tuple[PPOState, dict[str, jax.Array]]:
    """One update of the policy and one of the value model.

    With pretraining rows the policy's gradient is dL_pg + ptx_coef * dL_ptx, given to Adam once.
    """
    if config.whiten_advantages == "minibatch":
        batch = batch._replace(advantages=masked_whiten(batch.advantages, batch.where))
    accumulate = partial(accumulate_gradients, key=key, micro_batches=config.micro_batches)
    pg = accumulate(policy_loss(config, policy), state.policy.params, batch)
    metrics = {
        "policy_loss": pg.loss,
        **pg.metrics,
        "grad_norm_pg": global_norm(pg.grads),
    }
    grads = pg.grads
    if ptx is not None:
        mix = accumulate(ptx_loss(config, policy), state.policy.params, ptx)
        scaled = jax.tree.map(lambda g: config.ptx_coef * g, mix.grads)
        dot = jnp.asarray(optax.tree.vdot(pg.grads, scaled))
        norms = metrics["grad_norm_pg"] * global_norm(scaled)
        metrics |= {
            **mix.metrics,
            "grad_norm_ptx": global_norm(scaled),
            "grad_cosine": dot / jnp.maximum(norms, 1e-30),
        }
        grads = jax.tree.map(jnp.add, pg.grads, scaled)
    new_policy, applied = apply_gradients(
        state.policy, grads, policy_tx, loss=pg.loss, ema_decay=config.ema_decay
    )
    vf = accumulate(value_loss(config, scalar), state.value.params, batch)
    new_value, value_applied = apply_gradients(state.value, vf.grads, value_tx, loss=vf.loss)
    metrics |= {
        "grad_norm": applied["grad_norm"],
        "value_loss": vf.loss,
        **vf.metrics,
        "grad_norm_value": value_applied["grad_norm"],
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
    # (T1).
    metrics["ratio_error"] = history["ratio_error"][0]
    metrics["skipped"] = (state.policy.skipped + state.value.skipped).astype(jnp.float32)
    in_a_row = jnp.maximum(state.policy.skipped_in_a_row, state.value.skipped_in_a_row)
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
) -> Callable[[PPOState, dict[str, Any], jax.Array], tuple[PPOState, dict[str, jax.Array]]]:
    """The step of this stage: `iteration(state, batch, key) -> (state, metrics)`.

    `batch` holds `prompts` int32[B, P] (left-padded), `prompt_mask`, and with a pretraining mix
    `ptx`, rows of `language_loss` as [updates, rows, T]. Three compiled programs: rollout, scoring,
    update; the state is donated to the last and stays sharded as the `state` given here.
    """
    rows = batch_sharding(mesh)
    step = partial(minibatch_update, config, policy, scalar, policy_tx, value_tx)
    score = jax.jit(
        partial(score_rollout, config, policy, scalar, eos_id=eos_id),
        out_shardings=(rows, replicated(mesh)),
    )
    run_updates = jax.jit(
        partial(update, config, step, rows),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda x: x.sharding, state), replicated(mesh)),
    )
    ptx_rows = NamedSharding(mesh, PartitionSpec(None, *rows.spec))

    def iteration(
        state: PPOState, batch: dict[str, Any], key: jax.Array
    ) -> tuple[PPOState, dict[str, jax.Array]]:
        rollout_key, update_key = jax.random.split(key)
        rollout = generate(
            policy,
            state.policy.params,
            jax.device_put(batch["prompts"], rows),
            jax.device_put(batch["prompt_mask"], rows),
            jax.device_put(jax.random.split(rollout_key, config.rollout_batch), rows),
            max_new_tokens=config.response_length,
            eos_id=eos_id,
            temperature=config.temperature,
        )
        experience, scored = score(state, frozen, rollout)
        ptx = jax.device_put(batch["ptx"], ptx_rows) if "ptx" in batch else None
        state, updated = run_updates(state, experience, ptx, scored["kl"], update_key)
        return state, scored | updated

    return iteration


class Batches(NamedTuple):
    """Prompts of iteration i and, for PPO-ptx, its pretraining rows; a pure function of i."""

    prompts: Callable[[int], dict[str, np.ndarray]]
    ptx: Callable[[int], dict[str, np.ndarray]] | None
    updates: int

    def __call__(self, step: int) -> dict[str, Any]:
        """The batch of iteration `step`."""
        rows = self.prompts(step)
        batch: dict[str, Any] = {"prompts": rows["tokens"], "prompt_mask": rows["mask"]}
        if self.ptx is not None:
            tokens = self.ptx(step)["tokens"]
            shaped = tokens.reshape(self.updates, -1, tokens.shape[-1])
            batch["ptx"] = language_rows(shaped)
        return batch


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

    `prompts(step)` gives tokens int32[rollout_batch, P] left-padded and mask; `ptx(step)` tokens
    int32[updates * minibatch * ptx_ratio, T] of packed pretraining text. `policy_params` becomes
    the policy and the frozen reference; `reward_params` the reward model and the value model, bias
    included. The policy to evaluate and to keep is `state.policy.ema`. Resumes from
    `workdir/checkpoints` when there is one.
    """
    if config.ptx_coef > 0 and ptx is None:
        raise ConfigError(f"ptx_coef {config.ptx_coef} needs pretraining text; none was given")
    check_batch_size(config.rollout_batch, mesh)
    check_batch_size(config.minibatch, mesh, micro_batches=config.micro_batches)
    warmup = config.warmup_iterations * config.updates
    adam = dict(vars(config.adam))
    policy_tx = adamw(warmup_constant_schedule(config.learning_rate, warmup=warmup), **adam)
    value_tx = adamw(warmup_constant_schedule(config.value_learning_rate, warmup=warmup), **adam)
    # The update donates its state, so the frozen models hold buffers of their own (JAX-8).
    frozen = Frozen(*(place_params(p, mesh) for p in (policy_params, reward_params)))
    policy_state, value_state = (
        init_state(policy_params, policy_tx, ema=True),
        init_state(reward_params, value_tx),
    )
    state = PPOState(
        shard_state(policy_state, mesh, PARTITION_RULES),
        shard_state(value_state, mesh, PARTITION_RULES),
        jax.device_put(jnp.float32(config.kl_coef), replicated(mesh)),
    )
    iteration = make_iteration(
        config,
        policy,
        scalar,
        policy_tx,
        value_tx,
        frozen,
        state,
        eos_id=eos_id,
        mesh=mesh,
    )
    batch_at = Batches(prompts, ptx if config.ptx_coef > 0 else None, config.updates)
    with (
        Checkpointer(workdir / "checkpoints") as checkpointer,
        MetricLogger(workdir, "ppo", total=config.iterations, show=SHOWN) as logger,
    ):
        return run_loop(
            iteration,
            state,
            batch_at=batch_at,
            steps=config.iterations,
            key=jax.random.key(config.seed),
            logger=logger,
            checkpointer=checkpointer,
            save_every=config.save_every,
            evaluate=evaluate,
            eval_every=config.eval_every,
            log_every=config.log_every,
        )
