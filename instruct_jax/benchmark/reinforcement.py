"""The programs of PPO at a shape, set up as `ppo.train` does: scoring, updates, an iteration."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from instruct_jax.benchmark.measure import Account, Workload, compiled, seconds_of
from instruct_jax.benchmark.rows import Rows, first_prompts
from instruct_jax.benchmark.shapes import Models, Shape
from instruct_jax.models import costs
from instruct_jax.models.transformer import language_model, scalar_model
from instruct_jax.sampling.sampler import generate
from instruct_jax.stages import ppo
from instruct_jax.stages.ppo_lag import behind, first_rollout, models_of
from instruct_jax.stages.ppo_losses import ptx_loss
from instruct_jax.stages.ppo_models import Recipe, optimizers
from instruct_jax.stages.pretrain import language_rows
from instruct_jax.stages.stage import with_base
from instruct_jax.training.mesh import batch_sharding
from instruct_jax.training.state import accumulate_gradients


class Reinforcement:
    """The models, the state and the programs of PPO at a shape, set up as `ppo.train` does."""

    def __init__(self, shape: Shape, rows: Rows, models: Models, mesh: Mesh) -> None:
        self.shape, self.rows, self.mesh = shape, rows, mesh
        self.config = shape.ppo_config()
        self.policy = language_model(shape.policy_config())
        self.scalar = scalar_model(shape.scalar_config())
        self.recipe = Recipe(
            self.config, self.policy, self.scalar, *optimizers(self.config), rows.eos_id
        )
        self.frozen, self.state = ppo.placed_models(self.recipe, models.policy, models.reward, mesh)
        self.key = jax.random.key(shape.seed)

    def programs(self) -> ppo.Programs:
        """Those between and after rollouts."""
        return ppo.make_programs(self.recipe, self.state, self.mesh)

    def sample(self) -> Any:
        """A rollout of the policy."""
        inputs = first_prompts(self.shape, self.rows, self.mesh)
        return generate(
            self.policy,
            self.frozen.models(self.state).policy,
            *inputs,
            max_new_tokens=self.shape.response,
            eos_id=self.rows.eos_id,
            halvings=self.config.halvings,
        )

    def ptx(self) -> dict[str, np.ndarray] | None:
        """Rows of text for every update, [updates, rows, T]."""
        if not self.shape.ptx_ratio:
            return None
        count = self.config.updates * self.config.minibatch * self.shape.ptx_ratio
        text = np.resize(self.rows.text, (count, self.rows.text.shape[1]))
        return language_rows(text.reshape(self.config.updates, -1, text.shape[1]))

    def text_tokens(self) -> int:
        """Tokens of text in an iteration."""
        mix = self.ptx()
        return 0 if mix is None else mix["tokens"].size

    def update_pieces(self, lengths: np.ndarray) -> tuple[costs.Cost, ...]:
        """What all updates of an iteration cost, the mix included."""
        times = {"updates": self.config.updates, "epochs": self.config.inner_epochs}
        pieces = (
            costs.train(self.policy.config, lengths, **times),
            costs.train(self.scalar.config, lengths, kind="scalar", **times),
        )
        mix = self.ptx()
        if mix is None:
            return pieces
        updates, count, length = mix["tokens"].shape
        return *pieces, costs.ptx(self.policy.config, [length] * count) * updates

    def account(
        self, mask: Any, response_mask: Any, phases: Callable[..., tuple[costs.Cost, ...]]
    ) -> Account:
        """Of `phases(prompt lengths, response lengths)`, in tokens of prompt and response."""
        lengths = np.asarray(response_mask.sum(1))
        prompts = np.asarray(mask.sum(1)) - lengths
        pieces = phases(prompts, lengths)
        real = int(mask.sum())
        return Account(pieces, real, self.shape.rows, real, mask.size)


def score(shape: Shape, rows: Rows, models: Models, mesh: Mesh) -> Workload:
    """Log-probs, rewards, values and advantages of a rollout."""
    work = Reinforcement(shape, rows, models, mesh)
    sampled = work.sample()
    programs = work.programs()
    program = compiled(programs.read, work.state, work.frozen, sampled)
    account = work.account(
        sampled.mask,
        sampled.response_mask,
        lambda p, r: (costs.score(work.policy.config, work.scalar.config, p + r),),
    )

    def run() -> Any:
        readings = program.call(work.state, work.frozen, sampled)
        return programs.score(work.state.kl_coef, sampled, readings)

    return Workload("score", run, lambda _: account, program.seconds, program.memory, shape.dtype)


def ppo_update(shape: Shape, rows: Rows, models: Models, mesh: Mesh) -> Workload:
    """All updates of an iteration, with the mix where `ptx_ratio` is given."""
    work = Reinforcement(shape, rows, models, mesh)
    programs, rollout = work.programs(), work.sample()
    readings = programs.read(work.state, work.frozen, rollout)
    experience, metrics = programs.score(work.state.kl_coef, rollout, readings)
    inputs = (work.frozen, experience, work.ptx(), metrics["kl"], work.key)
    program = compiled(programs.update, work.state, *inputs, donate=(0,))

    def run() -> Any:
        work.state, updated = program.call(work.state, *inputs)
        return updated

    account = work.account(
        experience.mask, experience.where, lambda p, r: work.update_pieces(p + r)
    )
    tokens = account.tokens * shape.inner_epochs + work.text_tokens()
    account = account._replace(tokens=tokens)
    return Workload(
        "ppo_update", run, lambda _: account, program.seconds, program.memory, shape.dtype
    )


def ptx(shape: Shape, rows: Rows, models: Models, mesh: Mesh) -> Workload:
    """The gradient of the pretraining loss on the text of one update."""
    work = Reinforcement(shape, rows, models, mesh)
    config = work.policy.config
    mix = work.ptx()
    text = rows.text if mix is None else mix["tokens"][0]
    batch = jax.device_put(language_rows(text), batch_sharding(mesh))
    loss = with_base(work.frozen.reference, ptx_loss(work.config, work.policy))

    def gradient(params: Any, batch: Any) -> Any:
        return accumulate_gradients(
            loss, params, batch, work.key, micro_batches=work.config.ptx_parts
        ).grads

    program = compiled(gradient, work.state.policy.params, batch)
    count, length = text.shape
    tokens = count * length
    account = Account((costs.ptx(config, [length] * count),), tokens, count, tokens, tokens)
    run = lambda: program.call(work.state.policy.params, batch)  # noqa: E731
    return Workload("ptx", run, lambda _: account, program.seconds, program.memory, shape.dtype)


def iteration(shape: Shape, rows: Rows, models: Models, mesh: Mesh) -> Workload:
    """Rollout, scoring and all updates, as the training loop calls them."""
    work = Reinforcement(shape, rows, models, mesh)
    step = ppo.make_iteration(work.recipe, work.frozen, work.state, mesh)
    first = {name: x[: shape.rows] for name, x in rows.prompts.items()}
    batch: dict[str, Any] = {"prompts": first["tokens"], "prompt_mask": first["mask"]}
    if (mix := work.ptx()) is not None:
        batch["text"] = mix
    steps, state, run_step = 0, work.state, step
    if shape.rollout_lag:
        state, run_step = first_rollout(step, state, batch, work.key), partial(behind, step)

    def run() -> Any:
        nonlocal steps, state
        key = jax.random.fold_in(work.key, steps)
        state, metrics = run_step(state, batch, key)
        work.state = models_of(state)
        steps += 1
        return metrics

    def account(metrics: Any) -> Account:
        # The metrics give the sum of the response lengths; the rows of a rollout of the same
        # distribution stand for how it was spread.
        sampled = work.sample()
        mask, responses = sampled.mask, sampled.response_mask
        pieces = work.account(
            mask,
            responses,
            lambda p, r: (
                *costs.generate(work.policy.config, p, r),
                costs.score(work.policy.config, work.scalar.config, p + r),
                *work.update_pieces(p + r),
            ),
        )
        drawn = int(metrics["tokens"])
        return pieces._replace(tokens=drawn, real=int(first["mask"].sum()) + drawn)

    seconds, _ = seconds_of(run)
    return Workload("iteration", run, account, seconds, None, shape.dtype)
