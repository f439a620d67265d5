"""What the stages share: the fields of every run, and one way to fit a model to one loss."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from instruct_jax.data.ragged import Rows
from instruct_jax.data.tokenizer import Tokenizer
from instruct_jax.errors import ConfigError
from instruct_jax.models.adapters import LoraConfig, adapt, adapter_rules, merge, split
from instruct_jax.models.config import ComputeConfig
from instruct_jax.models.families import preset
from instruct_jax.models.matrices import join
from instruct_jax.models.transformer import (
    PARTITION_RULES,
    Model,
    TransformerConfig,
)
from instruct_jax.settings import INT32_MAX, setting
from instruct_jax.stages.optimizers import OptimizerConfig
from instruct_jax.stages.trained import Adapter, save_adapter, trunk_fingerprint
from instruct_jax.training import hosts
from instruct_jax.training.checkpoint import Checkpointer
from instruct_jax.training.keeping import Best
from instruct_jax.training.loop import train as run_loop
from instruct_jax.training.mesh import (
    batch_sharding,
    check_batch_size,
    tree_shardings,
)
from instruct_jax.training.metrics import MetricLogger
from instruct_jax.training.optim import Shape, schedule
from instruct_jax.training.run import BestBy
from instruct_jax.training.state import (
    LossFn,
    TrainState,
    compile_step,
    fingerprint,
    init_state,
    make_train_step,
    shard_state,
)

RULES = adapter_rules(PARTITION_RULES)
# The best evaluation of a run, and the whole parameters of then
OnBest = Callable[[Best, Any], None]
# The role of the key that an adapter is drawn with. Steps count up from 0 and what is drawn once
# counts down from the top of `fold_in`'s numbers, so that no two meet (ppo_lag.py has the first).
ADAPTER = 2**32 - 2


@dataclass(frozen=True)
class ModelConfig(ComputeConfig):
    """A named size; the vocabulary is always the tokenizer's. None keeps the preset's value."""

    preset: str = setting("mini", "a named size of models/families.py")
    max_length: int | None = setting(None, "the longest text it can read", low=1, unit="tokens")

    def build(self, tokenizer: Tokenizer) -> TransformerConfig:
        """The preset with these changes; ConfigError for an unknown name or an unfit value."""
        try:
            base = preset(self.preset)
        except ValueError as error:
            raise ConfigError(f"config.model.preset: {error}") from error
        length = self.max_length or base.max_length
        return self.on(
            dataclasses.replace(base, vocab_size=tokenizer.vocab_size, max_length=length)
        )


@dataclass(frozen=True)
class RunConfig(OptimizerConfig):
    """What every stage has; a step is an update, of PPO an iteration.

    An update is skipped whose gradient is not finite, and with `skip_above` one that is that large.
    """

    lora: LoraConfig = LoraConfig()
    micro_batches: int = setting(1, "parts of a batch, one after the other, to save memory", low=1)
    skip_above: float | None = setting(
        None, "an update is skipped whose gradient, before clipping, has this norm", above=0.0
    )
    seed: int = setting(0, "seed of all that is drawn", low=0, high=2**32 - 1)
    log_every: int = setting(
        10, "steps between two lines of metrics", low=1, unit="steps", may_change=True
    )
    eval_every: int = setting(
        0,
        "steps between two evaluations; 0 makes none on the way",
        low=0,
        unit="steps",
        may_change=True,
    )
    save_every: int = setting(
        0,
        "steps between two checkpoints; 0 saves at the end alone",
        low=0,
        unit="steps",
        may_change=True,
    )
    best_metric: str | None = setting(
        None,
        "figure of an evaluation, such as valid_loss, whose best step is kept beside the last",
        needs="eval_every",
        may_change=True,
    )
    best_mode: Literal["min", "max"] = setting(
        "min", "which of its values is the best", needs="best_metric", may_change=True
    )

    @property
    def best_by(self) -> BestBy | None:
        """For the loop."""
        return None if self.best_metric is None else BestBy(self.best_metric, self.best_mode)


@dataclass(frozen=True)
class FitConfig(RunConfig):
    """What every stage that minimises one loss has; each stage sets the paper's values.

    The paper's schedule is a cosine from `learning_rate` to `final_fraction` of it, over the run,
    after `warmup` linear updates.
    """

    epochs: float = setting(1.0, "passes over the rows", above=0.0, high=1e6, may_change="more")
    batch_size: int = setting(64, "rows of an update", low=1, unit="rows")
    learning_rate: float = setting(1e-4, "learning rate at its peak", above=0.0)
    schedule: Shape = setting("cosine", "how the learning rate goes on from its peak")
    warmup: int = setting(
        0, "updates in which the learning rate rises to its peak", low=0, unit="updates"
    )
    final_fraction: float = setting(
        0.1,
        "the learning rate at the end, in parts of its peak",
        low=0.0,
        high=1.0,
        needs="schedule=cosine|linear|warmup_stable_decay",
    )
    decay_fraction: float = setting(
        0.2,
        "share of the run, at its end, in which the learning rate falls",
        above=0.0,
        high=1.0,
        needs="schedule=warmup_stable_decay",
    )
    residual_dropout: float = setting(
        0.0, "share dropped of what a layer adds to its input", low=0.0, below=1.0
    )

    def __post_init__(self) -> None:
        """ConfigError where a value is out of range, or the micro-batches do not divide a batch."""
        super().__post_init__()
        if self.batch_size % self.micro_batches:
            raise ConfigError(
                f"batch_size {self.batch_size} is not a multiple of "
                f"micro_batches {self.micro_batches}"
            )


def check_warmup(config: FitConfig, *, steps: int) -> None:
    """ConfigError where a run of `steps` updates never reaches its learning rate."""
    if config.warmup > steps:
        raise ConfigError(
            f"warmup {config.warmup} of {steps} updates: the learning rate is never reached; "
            "give fewer of them, or more epochs or rows"
        )


def trained_form(
    make: Callable[[TransformerConfig], Model], model: Model, config: FitConfig
) -> Model:
    """`model`, which `make` made, as it is trained: with the run's dropout and its adapter."""
    dropping = dataclasses.replace(model.config, residual_dropout=config.residual_dropout)
    return adapt(make(dropping), config.lora)


def with_base(base: Any, loss_fn: LossFn) -> LossFn:
    """`loss_fn` of `params` joined to `base`; what `base` alone holds has no gradient."""
    return lambda params, batch, key: loss_fn(join(base, params), batch, key)


class BatchSource(Protocol):
    """The batch of a step, a pure function of it: `Batches`, `Mixture` and what wraps them."""

    @property
    def batch_size(self) -> int:
        """Rows of a batch."""
        ...

    def __call__(self, step: int) -> Any:
        """The batch of `step`."""
        ...


def steps_of(epochs: float, rows: int, batch_size: int) -> int:
    """Updates in which every row is met `epochs` times; the last batch may reach into the next
    epoch, and none is left without its update. ConfigError where int32 cannot count them.

    >>> steps_of(1.0, 20, 16), steps_of(2.0, 24, 16), steps_of(0.5, 20, 16)
    (2, 3, 1)
    """
    if epochs * rows / batch_size > INT32_MAX:
        raise ConfigError(f"epochs {epochs:g} of {rows:,} rows are over {INT32_MAX:,} updates")
    # Less than a thousandth of a batch over a whole number is rounding of `epochs`.
    return max(1, math.ceil(epochs * rows / batch_size - 1e-3))


def make_optimizer(config: FitConfig, *, steps: int) -> optax.GradientTransformation:
    """The optimizer of `config`, its schedule over `steps` updates."""
    rate = schedule(
        config.learning_rate,
        config.schedule,
        steps=steps,
        warmup=config.warmup,
        final=config.final_fraction,
        decay=config.decay_fraction,
    )
    return config.make_optimizer(rate)


def make_step(
    config: FitConfig, loss_fn: LossFn, tx: optax.GradientTransformation
) -> Callable[[TrainState, Any, Any, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """The step of `fit`: (state, fixed, batch, key) -> (state, metrics), `fixed` not trained."""

    def step(state: TrainState, fixed: Any, batch: Any, key: jax.Array) -> Any:
        make = make_train_step(
            with_base(fixed, loss_fn),
            tx,
            micro_batches=config.micro_batches,
            skip_above=math.inf if config.skip_above is None else config.skip_above,
        )
        return make(state, batch, key)

    return step


def fit(
    config: FitConfig,
    loss_fn: LossFn,
    params: Any,
    batch_at: BatchSource,
    *,
    steps: int,
    mesh: Mesh,
    workdir: Path,
    name: str,
    frozen: Any = None,
    evaluate: Callable[[int, TrainState], dict[str, float]] | None = None,
    on_best: OnBest | None = None,
    epoch: int = 0,
) -> Any:
    """Minimises one loss for `steps` updates and returns the parameters.

    `loss_fn` is of the functions of `adapt(model, config.lora)`. With a rank above 0 an adapter is
    all that is trained and checkpointed; `evaluate` and the caller see the parameters merged, and
    the adapter alone is left in `workdir/adapter`. `frozen` holds what else the loss finds beside
    its parameters and does not change (a teacher). Resumes from `workdir/checkpoints`. `evaluate`
    is also called after every `epoch` updates, and `on_best` at the end with the best evaluation
    and its parameters, where `config` names a metric. Raises ConfigError, before anything is
    compiled, where `mesh` does not divide the batch or the run ends within its warm-up, and where
    what is there to be taken up was trained from other parameters.
    """
    check_warmup(config, steps=steps)
    check_batch_size(batch_at.batch_size, mesh, micro_batches=config.micro_batches)
    tx = make_optimizer(config, steps=steps)
    key, lora = jax.random.key(config.seed), config.lora
    base, trained = split(jax.random.fold_in(key, ADAPTER), params, lora)
    state = shard_state(init_state(trained, tx), mesh, RULES)
    base, beside = place_params(base, mesh), place_params(frozen or {}, mesh)
    inputs = {"init": fingerprint((base, state.params)), "frozen model": fingerprint(beside)}

    def plain(step: int, state: TrainState) -> dict[str, float]:
        assert evaluate is not None
        merged = merge(base, state.params, lora)
        return evaluate(step, dataclasses.replace(state, params=merged))

    with (
        jax.set_mesh(mesh),
        Checkpointer(workdir / "checkpoints") as checkpointer,
        MetricLogger(workdir, name, total=steps) as logger,
    ):
        state = run_loop(
            compile_step(make_step(config, loss_fn, tx), mesh, state, join(base, beside)),
            state,
            batch_at=hosts.global_batches(batch_at, batch_sharding(mesh)),
            steps=steps,
            key=key,
            logger=logger,
            checkpointer=checkpointer,
            save_every=config.save_every,
            evaluate=None if evaluate is None else plain,
            eval_every=(config.eval_every, epoch),
            log_every=config.log_every,
            inputs=inputs,
            best=config.best_by,
            on_best=None
            if on_best is None
            else lambda best, state: on_best(best, merge(base, state.params, lora)),
        )
    if lora.rank:
        save_adapter(workdir / "adapter", Adapter(state.params, lora, trunk_fingerprint(params)))
    return merge(base, state.params, lora)


def place_params(params: Any, mesh: Mesh) -> Any:
    """`params` on `mesh`, sharded by the models' partition rules, in buffers of their own."""
    return hosts.place(params, tree_shardings(mesh, RULES, params))


def in_batches(fn: Callable[..., Any], batch_size: int, *arrays: Rows) -> np.ndarray:
    """`fn` over rows of `arrays`, `batch_size` at a time, as one array; the last batch is filled up
    with copies of row 0, so that one compiled program serves all.
    """
    rows = len(arrays[0])
    out = []
    for start in range(0, rows, batch_size):
        index = np.arange(start, start + batch_size)
        index = np.where(index < rows, index, 0)
        out.append(hosts.fetch(fn(*(array[index] for array in arrays))))
    return np.concatenate(out)[:rows]
