"""The log-probs of completions that stand in trees (`data/trees.py`), by the policy or by a frozen
one; the loss falls on every token of a branch, the stop token included.

For KTO a completion of another prompt is one more branch of every tree.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from instruct_jax.data.loader import Arrays
from instruct_jax.data.ragged import Ragged
from instruct_jax.data.trees import completion_sizes
from instruct_jax.errors import ConfigError
from instruct_jax.models.transformer import Model
from instruct_jax.sampling.scores import token_scores
from instruct_jax.stages.rankings import TREE
from instruct_jax.stages.stage import place_params
from instruct_jax.training.mesh import shard_batch
from instruct_jax.training.state import join_rows, split_rows


def branch_log_probs(
    model: Model, params: Any, batch: dict[str, jax.Array], *, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Summed log-probs of the completions of `pack_trees`, and their tokens; float32[B, K] twice.

    Both are 0 where a completion is not there. `key` turns dropout on.
    """
    options = {name: batch[name] for name in TREE}
    hidden = model.hidden(params, batch["tokens"], **options, dropout_key=key)
    # The first token of a branch is predicted at the prompt's last.
    before = jnp.take_along_axis(hidden, batch["previous"][..., None], axis=1)
    own = batch["branches"] > 0
    log_probs = token_scores(model, params, before, batch["tokens"], where=own).log_probs
    shape = batch["where"].shape
    completion = (batch["segment_ids"] - 1) * shape[1] + batch["branches"] - 1
    completion = jnp.where(own, completion, batch["where"].size)  # beyond the last: counts nowhere

    def sums(values: jax.Array) -> jax.Array:
        flat = values.reshape(-1), completion.reshape(-1)
        return jax.ops.segment_sum(*flat, num_segments=batch["where"].size).reshape(shape)

    return sums(log_probs), sums(own.astype(jnp.float32))


def with_mismatched(comparisons: Arrays, *, seed: int) -> dict[str, Any]:
    """The comparisons with one completion more, the last: that of another prompt, without a rank.

    Prompt n gets a completion of the next prompt of a random cycle through all of them.
    ConfigError where there is but one prompt.
    """
    tokens, starts = _ragged(comparisons), comparisons["prompt_lengths"]
    where = np.asarray(comparisons["where"])
    count, _, width = tokens.shape
    if count < 2:
        raise ConfigError("kto needs the comparisons of at least two prompts")
    rng = np.random.default_rng(seed)
    order = rng.permutation(count)
    other = np.empty(count, np.int64)
    other[order] = np.roll(order, -1)
    values, added = [], np.zeros((count, 1), np.int64)
    for n, m in enumerate(other):
        k = rng.choice(np.flatnonzero(where[m]))
        response = tokens.values[tokens.starts[m, k] :][: min(tokens.own[m, k], width - starts[n])]
        own = tokens.values[tokens.starts[n, 0] :][: tokens.own[n].sum()]
        values += [own, response]
        added[n] = len(response)
    joined = Ragged(
        np.concatenate(values),
        np.concatenate([tokens.own, added], axis=1),
        width=width,
        fill=tokens.fill,
        heads=tokens.heads,
    )
    one_more = ((0, 0), (0, 1))
    extended = {
        name: np.pad(np.asarray(comparisons[name]), one_more)
        for name in ("ranks", "labels")
        if name in comparisons
    }
    extended["where"] = np.pad(where, one_more, constant_values=True)
    return dict(comparisons) | {"tokens": joined, "mask": joined.marks()} | extended


def _ragged(comparisons: Arrays) -> Ragged:
    """The tokens of comparisons: prompts as heads, completions behind them."""
    tokens = comparisons["tokens"]
    if isinstance(tokens, Ragged):
        return tokens
    tokens, starts = np.asarray(tokens), comparisons["prompt_lengths"]
    sizes = completion_sizes(comparisons)
    count, _, width = tokens.shape
    column = np.arange(width)
    inside = (column >= starts[:, None, None]) & (column < (starts[:, None] + sizes)[..., None])
    first = tokens[np.arange(count), comparisons["where"].argmax(1)]
    pad = int(max(tokens[~comparisons["mask"]].max(initial=0), 0))
    heads = Ragged(first[column < starts[:, None]], starts, width=width, fill=pad)
    return Ragged(tokens[inside], sizes, width=width, fill=pad, heads=heads)


class ResponseScorer:
    """Log-probs of completions under frozen parameters, of which it holds a copy on `mesh`."""

    def __init__(self, model: Model, params: Any, mesh: Mesh, *, micro_batches: int = 1) -> None:
        """Batches come in `micro_batches` parts, which are scored one after another."""
        self._mesh = mesh
        self._params = place_params(params, mesh)
        self._score = partial(_scored, model, micro_batches)

    def __call__(self, batch: dict[str, np.ndarray]) -> jax.Array:
        """float32[B, K] of a batch of `pack_trees`. ConfigError where `mesh` does not divide it."""
        with jax.set_mesh(self._mesh):
            return self._score(self._params, shard_batch(batch, self._mesh))


@partial(jax.jit, static_argnums=(0, 1))
def _scored(
    model: Model, micro_batches: int, params: Any, batch: dict[str, jax.Array]
) -> jax.Array:
    """One program for every scorer of a model: the policy, the reference, at any evaluation."""
    parts = split_rows(batch, micro_batches)
    return join_rows(jax.lax.map(lambda part: branch_log_probs(model, params, part)[0], parts))
