"""Dynamic sampling (Yu et al. 2025, DAPO, section 3.2): groups without signal are replaced.

A group whose responses all score the same has advantages of 0 and teaches nothing. An iteration
then adds whole rollouts, of prompts from a stream of their own, and puts their groups, in order,
in the places of those without signal, until none is left or `max_resamples` rollouts were added;
what is then left stays. Every rollout is a pure function of the state, the step and its number, so
a run that is taken up goes the same way, and so do several processes, which all count the same
replicated number. What responses are worth is compared without the KL penalty.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from instruct_jax.sampling.sampler import Rollout
from instruct_jax.stages.experience import response_rewards, without_signal
from instruct_jax.stages.ppo_models import Readings, Recipe
from instruct_jax.stages.rewards import Given


class Answered(NamedTuple):
    """A rollout, what the models say of it, and its rewards from elsewhere; B rows in all."""

    rollout: Rollout
    readings: Readings
    given: Given | None


def dull(recipe: Recipe, answered: Answered) -> jax.Array:
    """bool[N]: groups without signal."""
    return without_signal(response_rewards(recipe, *answered), recipe.config.samples_per_prompt)


def first_look(recipe: Recipe, answered: Answered) -> dict[str, jax.Array]:
    """The share of groups without signal, and the mean score as it came: float32[] each."""
    paid = response_rewards(recipe, *answered)
    empty = without_signal(paid, recipe.config.samples_per_prompt)
    return {"no_signal_first": empty.mean(dtype=jnp.float32), "score_first": paid.raw.mean()}


def refilled(recipe: Recipe, kept: Answered, fresh: Answered) -> Answered:
    """`kept` with its i-th group without signal replaced by the i-th of `fresh` that has some."""
    empty, lively = dull(recipe, kept), ~dull(recipe, fresh)
    count, samples = len(empty), recipe.config.samples_per_prompt
    rank = jnp.cumsum(empty, dtype=jnp.int32) - 1
    order = jnp.argsort(~lively, stable=True).astype(jnp.int32)
    taken = empty & (rank < lively.sum(dtype=jnp.int32))
    own = jnp.arange(count, dtype=jnp.int32)
    groups = jnp.where(taken, count + order[rank], own)
    rows = jnp.repeat(groups * samples, samples)
    rows += jnp.tile(jnp.arange(samples, dtype=jnp.int32), count)
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b])[rows], kept, fresh)


class Refill(NamedTuple):
    """Both as programs, over rollouts of B rows."""

    look: Callable[[Answered], dict[str, jax.Array]]
    refilled: Callable[[Answered, Answered], Answered]


def lively(
    answer: Callable[[dict[str, Any], jax.Array], Answered],
    refill: Refill,
    batch: dict[str, Any],
    key: jax.Array,
) -> tuple[Answered, dict[str, Any]]:
    """`answer(batch, key)`, its groups without signal replaced by those of the batches of
    `batch["more"]`, each asked for where it is needed; and logs of what was replaced.
    """
    answered = answer(batch, key)
    first = seen = refill.look(answered)
    tried = 0
    for more in batch["more"]:
        if not float(seen["no_signal_first"]):
            break
        tried += 1
        answered = refill.refilled(answered, answer(more, jax.random.fold_in(key, tried)))
        seen = refill.look(answered)
    return answered, first | {"extra_rollouts": np.float32(tried)}
