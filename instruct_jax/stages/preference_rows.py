"""The rows of direct preference training, and the log-probs that a frozen policy gives them.

The K completions of a prompt are branches of one row (`data/branches.py`); the loss falls on every
token of a branch, the stop token included.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from instruct_jax.errors import ConfigError
from instruct_jax.losses import sequence_log_probs
from instruct_jax.models.transformer import Model
from instruct_jax.sampling.scores import token_scores
from instruct_jax.stages.stage import in_batches, place_params
from instruct_jax.training.mesh import shard_batch

BRANCHED = ("tokens", "mask", "branches", "positions", "previous", "where")
MISMATCHED = ("mismatched_tokens", "mismatched_mask", "mismatched_loss_mask")


def branch_log_probs(
    model: Model, params: Any, rows: dict[str, jax.Array], *, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Summed log-probs of the completions of `branch_rows`, and their tokens; float32[B, K] twice.

    Both are 0 where a completion is not there. `key` turns dropout on.
    """
    options = {name: rows[name] for name in ("mask", "branches", "positions")}
    hidden = model.hidden(params, rows["tokens"], **options, dropout_key=key)
    # The first token of a branch is predicted at the prompt's last.
    before = jnp.take_along_axis(hidden, rows["previous"][..., None], axis=1)
    own = rows["branches"] > 0
    log_probs = token_scores(model, params, before, rows["tokens"], where=own).log_probs
    numbers = jnp.arange(1, rows["where"].shape[1] + 1)
    of = rows["branches"][:, :, None] == numbers[None, None]
    sums = jnp.where(of, log_probs[..., None], 0.0).sum(1)
    return sums, of.sum(1, dtype=jnp.float32)


def mismatched_log_probs(model: Model, params: Any, rows: dict[str, jax.Array]) -> jax.Array:
    """Summed log-probs float32[B] of the responses of `mismatched_rows`."""
    tokens, mask, loss_mask = (rows[name] for name in MISMATCHED)
    hidden = model.hidden(params, tokens, mask=mask)[:, :-1]
    targets = loss_mask[:, 1:]
    scores = token_scores(model, params, hidden, tokens[:, 1:], where=targets)
    return sequence_log_probs(scores.log_probs, targets)


def mismatched_rows(comparisons: dict[str, np.ndarray], *, seed: int) -> dict[str, np.ndarray]:
    """For KTO each prompt with a completion of another: `mismatched_tokens` int32[N, T], `_mask`,
    `_loss_mask`.

    Row n has the prompt of n, then a completion of the next row of a random cycle through all rows,
    cut to fit. ConfigError where there is but one prompt.
    """
    starts, source = comparisons["prompt_lengths"], comparisons["tokens"]
    count, _, width = source.shape
    if count < 2:
        raise ConfigError("kto needs the comparisons of at least two prompts")
    rng = np.random.default_rng(seed)
    order = rng.permutation(count)
    other = np.empty(count, np.int64)
    other[order] = np.roll(order, -1)
    tokens = source[:, 0].copy()
    mask, loss_mask = np.zeros((2, count, width), bool)
    for n, (start, m) in enumerate(zip(starts, other, strict=True)):
        k = rng.choice(np.flatnonzero(comparisons["where"][m]))
        response = source[m, k][comparisons["mask"][m, k]][starts[m] :][: width - start]
        end = start + len(response)
        tokens[n, start:end] = response
        mask[n, :end] = True
        loss_mask[n, start:end] = True
    return dict(zip(MISMATCHED, (tokens, mask, loss_mask), strict=True))


class ResponseScorer:
    """Log-probs of responses under frozen parameters, of which it holds a copy on `mesh`."""

    def __init__(self, model: Model, params: Any, mesh: Mesh) -> None:
        def score(params: Any, rows: dict[str, jax.Array]) -> jax.Array:
            if "tokens" in rows:
                return branch_log_probs(model, params, rows)[0]
            return mismatched_log_probs(model, params, rows)

        self._mesh = mesh
        self._params = place_params(params, mesh)
        self._score = jax.jit(score)

    def __call__(
        self, rows: dict[str, np.ndarray], *, batch_size: int | None = None
    ) -> dict[str, np.ndarray]:
        """As the loss calls its reference: `reference` float32[N, K], and where there are
        mismatched rows `mismatched_reference` float32[N].

        All at once when `mesh` divides N; any N in batches of `batch_size`.
        """
        scores = {"reference": self._of(BRANCHED, rows, batch_size)}
        if MISMATCHED[0] in rows:
            scores["mismatched_reference"] = self._of(MISMATCHED, rows, batch_size)
        return scores

    def _of(
        self, names: tuple[str, ...], rows: dict[str, np.ndarray], batch_size: int | None
    ) -> np.ndarray:
        def run(*fields: np.ndarray) -> np.ndarray:
            batch = shard_batch(dict(zip(names, fields, strict=True)), self._mesh)
            with jax.set_mesh(self._mesh):
                return np.asarray(self._score(self._params, batch))

        fields = [rows[name] for name in names]
        return run(*fields) if batch_size is None else in_batches(run, batch_size, *fields)
