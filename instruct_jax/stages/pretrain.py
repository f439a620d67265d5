"""Stage 0: language-model pretraining, the GPT that InstructGPT starts from (M0).

The loss is the mean next-token cross-entropy over all tokens of packed documents:

    L = - (1/N) sum_b sum_t log p(x_{b,t+1} | x_{b,<=t})

`language_loss` is the one language-model loss of the stages: pretraining, fine-tuning and the
pretraining term of PPO-ptx differ only in the rows they give it and in their `loss_mask`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from instruct_jax.data.loader import Batches
from instruct_jax.data.shares import Shares
from instruct_jax.data.tokens import JoinedRows, TokenRows
from instruct_jax.models.transformer import Model, language_model
from instruct_jax.sampling.scores import cross_entropy_sum
from instruct_jax.settings import setting
from instruct_jax.stages.optimizers import AdamConfig
from instruct_jax.stages.stage import FitConfig, OnBest, fit, steps_of, trained_form
from instruct_jax.training.state import LossFn, TrainState


@dataclass(frozen=True)
class PretrainConfig(FitConfig):
    """Rows of `length` tokens (MODEL-2 for the batch sizes and learning rates of GPT-3)."""

    length: int = setting(96, "tokens of a row of text", low=2, unit="tokens")
    warmup: int = 40
    learning_rate: float = 2e-3
    adam: AdamConfig = AdamConfig(weight_decay=0.1)


def language_loss(model: Model, *, dropout: bool = False, accuracy: bool = True) -> LossFn:
    """Next-token cross-entropy over the tokens that `loss_mask` marks.

    The batch holds `tokens` int32[B, T], `mask` bool[B, T] (real tokens) and `loss_mask` bool[B, T]
    (tokens that are targets; position 0 can never be one). Sums, not means: the caller divides once
    by the global count. Packed rows also have `segment_ids` int32[B, T]. Dropout is on only when
    asked for: the ptx term of PPO runs without it, and without the metric `accuracy`. Only targets
    are read out, and never as float[B, T, V].
    """

    def loss(
        params: Any, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        hidden = model.hidden(
            params,
            batch["tokens"],
            mask=batch["mask"],
            segment_ids=batch.get("segment_ids"),
            dropout_key=key if dropout else None,
        )
        # The state at t scores token t + 1; the last one scores nothing.
        following, targets = jnp.roll(batch["tokens"], -1, axis=1), next_is_target(batch)
        total, hits = cross_entropy_sum(
            model, params, hidden, following, where=targets, hits=accuracy
        )
        count = targets.sum(dtype=jnp.float32)
        return total, count, {} if hits is None else {"accuracy": (hits, count)}

    return loss


def next_is_target(batch: dict[str, jax.Array]) -> jax.Array:
    """bool[B, T]: whether the token after this one is a target."""
    return jnp.pad(batch["loss_mask"][:, 1:], ((0, 0), (0, 1)))


def language_rows(tokens: np.ndarray | TokenRows) -> dict[str, Any]:
    """Packed documents int32[N, T] as rows of `language_loss`: every token is real and is a
    target.
    """
    real = np.broadcast_to(np.True_, tokens.shape)  # which takes no memory
    return {"tokens": tokens, "mask": real, "loss_mask": real}


def train(
    config: PretrainConfig,
    model: Model,
    params: Any,
    tokens: np.ndarray | TokenRows | JoinedRows,
    *,
    shares: Shares | None = None,
    mesh: Mesh,
    workdir: Path,
    evaluate: Callable[[int, TrainState], dict[str, float]] | None = None,
    on_best: OnBest | None = None,
) -> Any:
    """Trains `params` on packed documents int32[N, T], of whose sources the batches have these
    `shares`; returns the trained parameters.

    Resumes from `workdir/checkpoints` when there is one.
    """
    batches = Batches(language_rows(tokens), config.batch_size, seed=config.seed, shares=shares)
    steps = steps_of(config.epochs, len(tokens), config.batch_size)
    return fit(
        config,
        language_loss(
            trained_form(language_model, model, config), dropout=config.residual_dropout > 0
        ),
        params,
        batches,
        steps=steps,
        mesh=mesh,
        workdir=workdir,
        name="pretrain",
        evaluate=evaluate,
        on_best=on_best,
    )
