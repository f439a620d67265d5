"""A PPO experiment small enough to take apart: two layers, 28 words and a stop token."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from instruct_jax.models.transformer import (
    Model,
    TransformerConfig,
    language_model,
    scalar_from_language,
    scalar_model,
)
from instruct_jax.sampling.sampler import Rollout, generate
from instruct_jax.stages.experience import Experience, Scored, make_experience, read_rollout
from instruct_jax.stages.ppo_config import PPOConfig
from instruct_jax.stages.ppo_models import Frozen, PPOState, Recipe
from instruct_jax.stages.ppo_update import minibatch_update
from instruct_jax.stages.pretrain import language_rows
from instruct_jax.stages.reward_model import sequence_scores
from instruct_jax.training.state import init_state

VOCAB, EOS, PAD = 29, 28, 29
PROMPT, RESPONSE = 6, 8
ROWS, MINIBATCH = 32, 16
KEY = jax.random.key(0)

# Weights this large make every token matter: a mistake in a mask or a position is seen.
SHAPE = TransformerConfig(
    vocab_size=VOCAB,
    num_layers=2,
    d_model=32,
    num_heads=2,
    max_length=96,
    vocab_multiple=32,
    init_std=0.2,
    scan_unroll=2,
)
# Plain descent at rate 1, with a counter: an update is minus the gradient.
DESCENT = optax.sgd(lambda count: 1.0)
CONFIG = PPOConfig(
    episodes=3 * ROWS,
    rollout_batch=ROWS,
    minibatch=MINIBATCH,
    prompt_length=PROMPT,
    response_length=RESPONSE,
    learning_rate=1e-3,
    value_learning_rate=1e-3,
    warmup_iterations=0,
    ptx_ratio=2,
)


class Lab(NamedTuple):
    """One state of PPO, with the programs that work on it."""

    config: PPOConfig
    policy: Model
    scalar: Model
    state: PPOState
    frozen: Frozen
    txs: tuple[optax.GradientTransformation, optax.GradientTransformation]

    def recipe(self, *, eos_id: int = EOS) -> Recipe:
        """What its programs are made of."""
        return Recipe(self.config, self.policy, self.scalar, *self.txs, eos_id)


def policy_params(seed: int = 0) -> Any:
    """Parameters of a language model of SHAPE."""
    return language_model(SHAPE).init(jax.random.key(seed))


def reward_params(seed: int = 0, *, bias: float = 0.7) -> Any:
    """Parameters of a scalar model with another trunk than the policy's and a bias."""
    params = scalar_from_language(policy_params(seed + 10), jax.random.key(seed), SHAPE)
    return {**params, "head": {**params["head"], "bias": jnp.full((1,), bias)}}


def make_lab(
    config: PPOConfig = CONFIG,
    *,
    shape: TransformerConfig = SHAPE,
    reference: int = 0,
    tx: optax.GradientTransformation = DESCENT,
) -> Lab:
    """The state before the first update; `reference` 0 is the policy itself."""
    state = PPOState(
        init_state(policy_params(), tx, ema=True),
        init_state(reward_params(), tx) if config.estimator == "gae" else None,
        jnp.float32(config.kl_coef),
    )
    return Lab(
        config,
        language_model(shape),
        scalar_model(shape),
        state,
        Frozen(policy_params(reference), reward_params()),
        (tx, tx),
    )


def prompt_rows(step: int = 0, *, rows: int = ROWS, same: bool = False) -> dict[str, np.ndarray]:
    """Left-padded prompts of 1 to PROMPT tokens; `same` repeats the first one."""
    rng = np.random.default_rng(step)
    lengths = rng.integers(1, PROMPT + 1, rows)
    tokens = rng.integers(0, VOCAB - 1, (rows, PROMPT)).astype(np.int32)
    mask = np.arange(PROMPT)[None] >= PROMPT - lengths[:, None]
    if same:
        tokens, mask = np.repeat(tokens[:1], rows, 0), np.repeat(mask[:1], rows, 0)
    return {"tokens": np.where(mask, tokens, PAD).astype(np.int32), "mask": mask}


def text_rows(step: int = 0, *, rows: int | None = None, length: int = 12) -> dict[str, np.ndarray]:
    """Pretraining rows of one iteration."""
    rows = CONFIG.updates * MINIBATCH * CONFIG.ptx_ratio if rows is None else rows
    rng = np.random.default_rng(1000 + step)
    return {"tokens": rng.integers(0, VOCAB, (rows, length)).astype(np.int32)}


def ptx_rows(*, rows: int) -> dict[str, np.ndarray]:
    """The pretraining rows of one update."""
    return language_rows(text_rows(rows=rows)["tokens"])


def sample(lab: Lab, *, seed: int = 0, step: int = 0, same: bool = False) -> Rollout:
    """A rollout of the lab's policy."""
    prompts = prompt_rows(step, same=same)
    return generate(
        lab.policy,
        lab.state.policy.params,
        jnp.asarray(prompts["tokens"]),
        jnp.asarray(prompts["mask"]),
        jax.random.split(jax.random.key(seed), ROWS),
        max_new_tokens=RESPONSE,
        eos_id=EOS,
        temperature=lab.config.temperature,
    )


def written(*responses: list[int], prompt: list[int]) -> Rollout:
    """The rollout in which rows of one prompt were answered as given, over and over."""
    tokens = np.full((len(responses), PROMPT + RESPONSE), PAD, np.int32)
    tokens[:, PROMPT - len(prompt) : PROMPT] = prompt
    where = np.zeros((len(responses), RESPONSE), bool)
    for row, answered, response in zip(tokens, where, responses, strict=True):
        row[PROMPT : PROMPT + len(response)] = response
        answered[: len(response)] = True
    mask = np.concatenate([tokens[:, :PROMPT] != PAD, where], axis=1)
    # Filled up to ROWS, so that one compiled program serves all rollouts.
    rows = np.arange(ROWS) % len(responses)
    arrays = (jnp.asarray(x[rows]) for x in (tokens, mask, where))
    return Rollout(*arrays, jnp.zeros((ROWS, RESPONSE)))


@functools.cache
def _score_of(scalar: Model) -> Any:
    return jax.jit(partial(sequence_scores, scalar))


def scores_of(lab: Lab, rollout: Rollout) -> np.ndarray:
    """The reward model's scores, by the reward model's own function."""
    return np.asarray(_score_of(lab.scalar)(lab.frozen.reward, rollout.tokens, rollout.mask))


def scoring(recipe: Recipe, state: PPOState, frozen: Frozen, rollout: Rollout) -> Scored:
    """Both programs between a rollout and its updates."""
    readings = read_rollout(recipe, frozen.models(state), rollout)
    return make_experience(recipe, state.kl_coef, rollout, readings)


@functools.cache
def _scoring(recipe: Recipe) -> Any:
    return jax.jit(partial(scoring, recipe))


def score(
    lab: Lab, rollout: Rollout, *, eos_id: int = EOS
) -> tuple[Experience, dict[str, jax.Array]]:
    """`scoring`, compiled once for a configuration."""
    return _scoring(lab.recipe(eos_id=eos_id))(lab.state, lab.frozen, rollout)


@functools.cache
def _stepping(recipe: Recipe) -> Any:
    return jax.jit(partial(minibatch_update, recipe))


def step(
    lab: Lab, batch: Experience, ptx: Any = None, *, key: jax.Array = KEY
) -> tuple[PPOState, dict[str, jax.Array]]:
    """`minibatch_update`, compiled once for a configuration; the state of the lab stays."""
    return _stepping(lab.recipe())(lab.frozen, lab.state, batch, ptx, key)


def first(batch: Any, rows: int = MINIBATCH) -> Any:
    """The first rows of a tree of arrays."""
    return jax.tree.map(lambda x: x[:rows], batch)


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Within it, a list to which every compilation of a program is added."""
    seen: list[str] = []

    def listen(event: str, seconds: float, **details: Any) -> None:
        if event.endswith("backend_compile_duration"):
            seen.append(str(details.get("fun_name", event)))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def same_bits(a: Any, b: Any) -> bool:
    """Whether two trees hold the same arrays, bit for bit (NaN equals NaN)."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def distance(a: Any, b: Any) -> float:
    """The largest difference of two trees."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in pairs)


def flat(tree: Any) -> np.ndarray:
    """All leaves as one float64 vector."""
    leaves = [np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)]
    return np.concatenate(leaves)
