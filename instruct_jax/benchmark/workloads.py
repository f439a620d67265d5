"""The phases of the pipeline at a named shape, through the stages' own programs.

pretrain, sft, reward_model     one update, as `stage.fit` compiles it
reward_model_separate           the same with the prompt read once for each completion
rollout                         one batch of responses in one program, as PPO samples
engine                          four times as many prompts through the slots of the engine
score, ppo_update, iteration    the programs of `ppo.make_programs`, and `ppo.make_iteration`
ptx                             the gradient of the pretraining mix of one update
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from instruct_jax.benchmark import reinforcement
from instruct_jax.benchmark.measure import Account, Workload, compiled, seconds_of
from instruct_jax.benchmark.rows import Rows, first_prompts
from instruct_jax.benchmark.shapes import Models, Shape
from instruct_jax.data.packing import pack
from instruct_jax.data.trees import TreeBatches, completion_sizes
from instruct_jax.errors import ConfigError
from instruct_jax.losses import ranking_loss
from instruct_jax.models import costs
from instruct_jax.models.transformer import language_model, scalar_model
from instruct_jax.sampling.choose import Sampling
from instruct_jax.sampling.engine import Engine
from instruct_jax.sampling.sampler import generate
from instruct_jax.stages.ppo import check_batches
from instruct_jax.stages.pretrain import PretrainConfig, language_loss, language_rows
from instruct_jax.stages.reward_model import RewardModelConfig, reward_loss, sequence_scores
from instruct_jax.stages.sft import SFTConfig
from instruct_jax.stages.stage import RULES, FitConfig, make_optimizer, make_step, place_params
from instruct_jax.training.mesh import BATCH_AXES, axes_size, batch_sharding, check_batch_size
from instruct_jax.training.state import LossFn, compile_step, init_state, shard_state

PHASES = (
    "pretrain", "sft", "reward_model", "rollout", "engine", "score", "ppo_update", "ptx",
    "iteration",
)  # fmt: skip


class Training:
    """One update after another of a stage's compiled step on batches given to it."""

    def __init__(
        self, config: FitConfig, loss: LossFn, params: Any, batch: Any, *, mesh: Mesh
    ) -> None:
        tx = make_optimizer(config, steps=1000)
        self._state = shard_state(init_state(params, tx), mesh, RULES)
        self._rows, self._key = batch_sharding(mesh), jax.random.key(config.seed)
        fixed = place_params({}, mesh)
        step = compile_step(make_step(config, loss, tx), mesh, self._state, fixed)
        self._batch = jax.device_put(batch, self._rows)
        self.compiled = compiled(step, self._state, self._batch, self._key, donate=(0,))

    def __call__(self, batch: Any = None) -> Any:
        """One update on `batch` (host arrays), else on the first one again."""
        rows = self._batch if batch is None else jax.device_put(batch, self._rows)
        self._state, metrics = self.compiled.call(self._state, rows, self._key)
        return metrics


def pretrain(shape: Shape, rows: Rows, models: Models, mesh: Mesh) -> Workload:
    """One update on `text_rows` rows of text."""
    config, batch = shape.policy_config(), language_rows(rows.text)
    loss = language_loss(language_model(config))
    stage = PretrainConfig(batch_size=len(rows.text), micro_batches=shape.micro_batches)
    step = Training(stage, loss, models.policy, batch, mesh=mesh)
    count, length = rows.text.shape
    account = Account(
        (costs.train(config, [length] * count),), count * length, count, count * length,
        count * length,
    )  # fmt: skip
    return _training("pretrain", step, account, config.dtype)


def sft(shape: Shape, rows: Rows, models: Models, mesh: Mesh) -> Workload:
    """One update on as many demonstrations as there are `rows`, packed where `pack_length` says."""
    config = shape.policy_config()
    batch = sft_batch(shape, rows.demonstrations, shape.rows, pad_id=config.pad_id)
    loss = language_loss(language_model(config))
    stage = SFTConfig(batch_size=len(batch["tokens"]), micro_batches=shape.micro_batches)
    step = Training(stage, loss, models.policy, batch, mesh=mesh)
    lengths = rows.demonstrations["mask"][: shape.rows].sum(1)
    tokens = int(lengths.sum())
    cost = costs.train(config, lengths)
    account = Account((cost,), tokens, shape.rows, tokens, batch["tokens"].size)
    return _training("sft", step, account, config.dtype)


def sft_batch(
    shape: Shape, rows: dict[str, np.ndarray], count: int, *, pad_id: int
) -> dict[str, np.ndarray]:
    """The first `count` demonstrations, packed into rows of `pack_length` where that is given."""
    first = {name: x[:count] for name, x in rows.items()}
    if shape.pack_length is None:
        return first
    return pack(first, length=shape.pack_length, pad_id=pad_id)


def reward_model(shape: Shape, rows: Rows, models: Models, mesh: Mesh) -> Workload:
    """One update on `ranked` prompts with their completions."""
    config = shape.scalar_config()
    first = {name: x[: shape.ranked] for name, x in rows.comparisons.items()}
    batch = TreeBatches(
        first,
        len(first["where"]),
        pad_id=config.pad_id,
        micro_batches=shape.micro_batches,
        devices=axes_size(mesh, BATCH_AXES),
    )(0)
    stage = RewardModelConfig(batch_size=len(batch["ranks"]), micro_batches=shape.micro_batches)
    step = Training(stage, reward_loss(scalar_model(config)), models.reward, batch, mesh=mesh)
    lengths = np.where(first["where"], first["mask"].sum(-1), 0)
    cost = costs.train_branches(config, first["prompt_lengths"], completion_sizes(first))
    real, padded = int(batch["mask"].sum()), batch["tokens"].size
    account = Account((cost,), int(lengths.sum()), int(first["where"].sum()), real, padded)
    return _training("reward_model", step, account, config.dtype)


def reward_model_separate(shape: Shape, rows: Rows, models: Models, mesh: Mesh) -> Workload:
    """The same update with every completion in a row of its own, its prompt before it."""
    config = shape.scalar_config()
    model = scalar_model(config)
    batch = {n: rows.comparisons[n][: shape.ranked] for n in ("tokens", "mask", "ranks", "where")}
    width = -(-int(batch["mask"].sum(-1).max()) // 8) * 8
    batch |= {name: batch[name][..., :width] for name in ("tokens", "mask")}

    def loss(
        params: Any, batch: Any, key: jax.Array
    ) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        del key
        scores = sequence_scores(model, params, batch["tokens"], batch["mask"])
        losses = ranking_loss(scores, batch["ranks"], where=batch["where"])
        return losses.sum(), jnp.float32(len(losses)), {}

    step = Training(RewardModelConfig(), loss, models.reward, batch, mesh=mesh)
    lengths = batch["mask"].sum(-1)[batch["where"]]
    cost = costs.train(config, lengths, kind="scalar")
    real = int(lengths.sum())
    account = Account((cost,), real, len(lengths), real, batch["tokens"].size)
    return _training("reward_model_separate", step, account, config.dtype)


def check_phases(
    phases: Sequence[str],
    shape: Shape,
    rows: Rows,
    mesh: Mesh,
    *,
    packed: int | None = None,
) -> None:
    """ConfigError, before anything is compiled, where there are fewer rows than a phase reads at
    once, or `mesh` and the micro-batches do not divide them. `packed` demonstrations make a batch,
    by default those of the shape.
    """
    demonstrations, comparisons, prompts = (
        len(kind["tokens"]) for kind in (rows.demonstrations, rows.comparisons, rows.prompts)
    )
    for phase in phases:
        parts = shape.micro_batches
        if phase == "pretrain":
            _check(phase, "text_rows", shape.text_rows, len(rows.text), mesh, parts)
        elif phase == "sft":
            _check(phase, "rows", shape.rows, demonstrations)
            pad_id = shape.policy_config().pad_id
            batch = sft_batch(shape, rows.demonstrations, shape.rows, pad_id=pad_id)["tokens"]
            count = len(batch) if packed is None else packed
            _check(phase, "rows or config.shape.pack_length", count, count, mesh, parts)
        elif phase.startswith("reward_model"):
            parts = parts if phase == "reward_model" else 1
            _check(phase, "ranked", shape.ranked, comparisons, mesh, parts)
        else:
            _check(phase, "rows", shape.rows, prompts, mesh)
        if phase in ("score", "ppo_update", "ptx", "iteration"):
            check_batches(shape.ppo_config(), mesh)


def _check(
    phase: str, field: str, wanted: int, there: int, mesh: Mesh | None = None, parts: int = 1
) -> None:
    if there < wanted:
        raise ConfigError(f"{phase}: config.shape.{field}={wanted}, but there are {there} rows")
    if mesh is not None:
        try:
            check_batch_size(wanted, mesh, micro_batches=parts)
        except ConfigError as error:
            raise ConfigError(f"{phase}: {error} (by config.shape.{field})") from None


def _training(phase: str, step: Training, account: Account, dtype: str) -> Workload:
    made = step.compiled
    return Workload(phase, step, lambda _: account, made.seconds, made.memory, dtype)


# --- sampling ----------------------------------------------------------------------------------


def rollout(shape: Shape, rows: Rows, models: Models, mesh: Mesh) -> Workload:
    """One batch of `rows` responses, as PPO samples them."""
    config = shape.policy_config()
    model, params = language_model(config), place_params(models.policy, mesh)
    inputs = first_prompts(shape, rows, mesh)
    settings = {
        "max_new_tokens": shape.response,
        "eos_id": rows.eos_id,
        "halvings": shape.ppo_config().halvings,
    }
    program = compiled(lambda *args: generate(model, *args, **settings), params, *inputs)

    def account(result: Any) -> Account:
        lengths = np.asarray(result.response_mask.sum(1))
        prompts = rows.prompts["mask"][: shape.rows].sum(1)
        drawn, turns = int(lengths.sum()), int(lengths.max())
        return Account(
            tuple(costs.generate(config, prompts, lengths)),
            drawn,
            shape.rows,
            drawn + int(prompts.sum()),
            result.mask.size,
            drawn / (turns * shape.rows),
        )

    run = lambda: program.call(params, *inputs)  # noqa: E731
    return Workload("rollout", run, account, program.seconds, program.memory, config.dtype)


def engine(shape: Shape, rows: Rows, models: Models, mesh: Mesh) -> Workload:
    """`QUEUE` times `rows` prompts through `rows` slots."""
    config = shape.policy_config()
    model, params = language_model(config), place_params(models.policy, mesh)
    masks = rows.prompts["mask"]
    prompts = [t[m].tolist() for t, m in zip(rows.prompts["tokens"], masks, strict=True)]
    keys = jax.random.split(jax.random.key(shape.seed), len(prompts))
    sampling = Sampling(stop_ids=(rows.eos_id,))
    occupancy = 0.0

    def run() -> Any:
        nonlocal occupancy
        one = Engine(model, params, sampling, slots=shape.rows)
        one.submit(prompts, keys, max_new_tokens=shape.response)
        responses = dict(one.run())
        occupancy = one.occupancy
        return [np.int32(len(responses[i].tokens)) for i in range(len(prompts))]

    def account(lengths: Any) -> Account:
        drawn, given = int(sum(lengths)), masks.sum(1)
        steps = costs.generate(config, given, np.asarray(lengths))
        # Refilled slots share a reading of the weights: at best every turn decodes `rows` rows.
        full = drawn / shape.rows
        live = float(np.average(given + np.asarray(lengths) / 2, weights=lengths))
        limit = (steps[0], costs.decode_step(config, shape.rows, live) * full)
        real = drawn + int(given.sum())
        return Account(limit, drawn, len(prompts), real, real, occupancy)

    seconds, _ = seconds_of(run)
    return Workload("engine", run, account, seconds, None, config.dtype)


BUILDERS: dict[str, Callable[[Shape, Rows, Models, Mesh], Workload]] = {
    "pretrain": pretrain,
    "sft": sft,
    "reward_model": reward_model,
    "reward_model_separate": reward_model_separate,
    "rollout": rollout,
    "engine": engine,
    "score": reinforcement.score,
    "ppo_update": reinforcement.ppo_update,
    "ptx": reinforcement.ptx,
    "iteration": reinforcement.iteration,
}
