"""The rows of direct preference training, and the log-probs that a frozen policy gives them.

Encoded comparisons hold K completions a prompt: `tokens` int32[N, K, T], `mask`, `ranks`, `where`,
`prompt_lengths` int32[N]. The loss falls on a completion and its stop token: `loss_mask`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from instruct_jax.errors import ConfigError
from instruct_jax.losses import sequence_log_probs, token_log_probs
from instruct_jax.models.transformer import Model
from instruct_jax.stages.stage import in_batches, place_params
from instruct_jax.training.mesh import shard_batch

ROW_FIELDS = ("tokens", "mask", "loss_mask")


def response_log_probs(
    model: Model, params: Any, tokens: jax.Array, mask: jax.Array, loss_mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Summed log-probs of the tokens under `loss_mask`, and their number.

    int32[..., T] and two bool[..., T] -> twice float32[...].
    """
    flat, real, where = (x.reshape(-1, x.shape[-1]) for x in (tokens, mask, loss_mask))
    logits = model.apply(params, flat, mask=real)
    log_probs = token_log_probs(logits[:, :-1], flat[:, 1:])
    where = where[:, 1:]
    shape = tokens.shape[:-1]
    counts = where.sum(-1, dtype=jnp.float32)
    return sequence_log_probs(log_probs, where).reshape(shape), counts.reshape(shape)


def preference_rows(comparisons: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Encoded comparisons with their `loss_mask` bool[N, K, T]."""
    rows = {name: comparisons[name] for name in ("tokens", "mask", "ranks", "where")}
    position = np.arange(rows["tokens"].shape[-1])
    starts = comparisons["prompt_lengths"][:, None, None]
    return rows | {"loss_mask": rows["mask"] & (position >= starts)}


def mismatched_rows(
    rows: dict[str, np.ndarray], prompt_lengths: np.ndarray, *, seed: int
) -> dict[str, np.ndarray]:
    """For KTO each prompt with a completion of another: `mismatched_tokens` int32[N, T], `_mask`,
    `_loss_mask`.

    Row n has the prompt of n, then a completion of the next row of a random cycle through all rows,
    cut to fit. ConfigError where there is but one prompt.
    """
    count, _, width = rows["tokens"].shape
    if count < 2:
        raise ConfigError("kto needs the comparisons of at least two prompts")
    rng = np.random.default_rng(seed)
    order = rng.permutation(count)
    other = np.empty(count, np.int64)
    other[order] = np.roll(order, -1)
    tokens = rows["tokens"][:, 0].copy()
    mask, loss_mask = np.zeros((2, count, width), bool)
    for n, (start, m) in enumerate(zip(prompt_lengths, other, strict=True)):
        k = rng.choice(np.flatnonzero(rows["where"][m]))
        response = rows["tokens"][m, k][rows["loss_mask"][m, k]][: width - start]
        end = start + len(response)
        tokens[n, start:end] = response
        mask[n, :end] = True
        loss_mask[n, start:end] = True
    return {"mismatched_tokens": tokens, "mismatched_mask": mask, "mismatched_loss_mask": loss_mask}


class ResponseScorer:
    """Log-probs of responses under frozen parameters, of which it holds a copy on `mesh`."""

    def __init__(self, model: Model, params: Any, mesh: Mesh) -> None:
        self._mesh = mesh
        self._params = place_params(params, mesh)
        self._score = jax.jit(lambda params, *rows: response_log_probs(model, params, *rows)[0])

    def __call__(
        self, rows: dict[str, np.ndarray], *, prefix: str = "", batch_size: int | None = None
    ) -> np.ndarray:
        """float32[N, K] of the fields `prefix` + ROW_FIELDS (float32[N] where they have no K).

        All at once when `mesh` divides N; any N in batches of `batch_size`.
        """
        fields = [rows[prefix + name] for name in ROW_FIELDS]
        if batch_size is not None:
            return in_batches(self._run, batch_size, *fields)
        return self._run(*fields)

    def _run(self, *fields: np.ndarray) -> np.ndarray:
        with jax.set_mesh(self._mesh):
            return np.asarray(self._score(self._params, *shard_batch(fields, self._mesh)))
