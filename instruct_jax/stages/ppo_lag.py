"""PPO whose rollouts lag by one iteration (`rollout_lag` 1), off the paper's path.

Iteration i samples and scores the batch of iteration i + 1 with the models as they are, before it
updates them on the batch that iteration i - 1 left in the state (`Lagging`). A batch is answered,
its old log-probs and values read, and its penalty weighed, by one and the same state, so the ratio
is what PPO takes it for; only it is not 1 at first: the policy has moved by the updates of one
iteration, which `ratio_error` then measures. The first two batches are of the same policy. No
rollout waits for an update then, but on one set of devices the programs still run in turn, and an
iteration takes as long as before: it is a study of off-policy data, and what a sampler with devices
of its own would need.
"""

from typing import Any, NamedTuple, Protocol

import jax

from instruct_jax.stages.experience import Scored
from instruct_jax.stages.ppo_models import PPOState

# The first rollout is drawn before iteration 0: in -1, as `fold_in` counts.
BEFORE = 2**32 - 1


class Lagging(NamedTuple):
    """The state of a run whose rollouts lag: `due` was sampled and scored an iteration ago."""

    models: PPOState
    due: Scored


class Halves(Protocol):
    """An `Iteration`, in its two halves."""

    def gather(self, state: PPOState, batch: dict[str, Any], key: jax.Array) -> Scored: ...

    def learn(
        self, state: PPOState, scored: Scored, batch: dict[str, Any], key: jax.Array
    ) -> tuple[PPOState, dict[str, jax.Array]]: ...


def first_rollout(
    iteration: Halves, state: PPOState, batch: dict[str, Any], key: jax.Array
) -> Lagging:
    """What a run whose rollouts lag begins with: a rollout, drawn before iteration 0."""
    return Lagging(state, iteration.gather(state, batch, jax.random.fold_in(key, BEFORE)))


def behind(
    iteration: Halves, state: Lagging, batch: dict[str, Any], key: jax.Array
) -> tuple[Lagging, dict[str, jax.Array]]:
    """Samples, for the next iteration, and learns from what the one before sampled."""
    rollout_key, update_key = jax.random.split(key)
    # First, since learning donates the models.
    gathered = iteration.gather(state.models, batch, rollout_key)
    models, metrics = iteration.learn(state.models, state.due, batch, update_key)
    return Lagging(models, gathered), metrics


def models_of(state: PPOState | Lagging) -> PPOState:
    """What is trained, without what waits to be learnt from."""
    return state.models if isinstance(state, Lagging) else state
