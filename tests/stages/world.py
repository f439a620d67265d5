"""A language of one rule, and a reward that can be counted: what a policy can unlearn, and learn.

Text counts upwards: after word i comes word i + 1 (mod 28), now and then any word, now and then
the stop token. The reward is the number of LOW words, which counting upwards visits a quarter of
the time.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instruct_jax.models.transformer import Model, TransformerConfig, language_model
from instruct_jax.stages import pretrain
from instruct_jax.stages.pretrain import PretrainConfig
from instruct_jax.training.mesh import make_mesh
from tests.stages.lab import EOS, PAD, PROMPT, SHAPE

LOW = 7
LENGTH = 16


def text(rows: int, *, seed: int) -> np.ndarray:
    """int32[rows, LENGTH] of the language."""
    rng = np.random.default_rng(seed)
    tokens = np.empty((rows, LENGTH), np.int32)
    tokens[:, 0] = rng.integers(0, EOS, rows)
    for t in range(1, LENGTH):
        follows = (tokens[:, t - 1] + 1) % EOS
        anything = rng.integers(0, EOS, rows)
        luck = rng.random(rows)
        tokens[:, t] = np.where(luck < 0.75, follows, np.where(luck < 0.9, anything, EOS))
    return tokens


def prompts(step: int, *, rows: int) -> dict[str, np.ndarray]:
    """Beginnings of texts, left-padded, without a stop token."""
    rng = np.random.default_rng([7, step])
    lengths = rng.integers(1, PROMPT + 1, rows)[:, None]
    start = rng.integers(0, EOS, (rows, 1))
    tokens = (start + np.arange(PROMPT)[None]) % EOS
    mask = np.arange(PROMPT)[None] >= PROMPT - lengths
    return {"tokens": np.where(mask, tokens, PAD).astype(np.int32), "mask": mask}


def speaker(workdir: Path, *, shape: TransformerConfig = SHAPE) -> Any:
    """Parameters of a language model that has learnt the language."""
    config = PretrainConfig(
        batch_size=32, length=LENGTH, learning_rate=1e-2, warmup=10, log_every=100
    )
    model = language_model(shape)
    rows = text(6_400, seed=0)
    return pretrain.train(
        config,
        model,
        model.init(jax.random.key(0)),
        rows,
        mesh=make_mesh("data:1"),
        workdir=workdir,
    )


def counting_model(shape: TransformerConfig = SHAPE) -> Model:
    """score = gain * (LOW words so far) + bias: a reward model without a network.

    As a value model it can learn both numbers.
    """

    def apply(params: Any, tokens: jax.Array, *, mask: jax.Array, **_: Any) -> jax.Array:
        low = jnp.cumsum(((tokens < LOW) & mask).astype(jnp.float32), axis=1)
        return low * params["head"]["kernel"][0, 0] + params["head"]["bias"][0]

    def nothing(*_: Any, **__: Any) -> Any:
        raise AssertionError("a reward model is only applied")

    return Model(shape, nothing, apply, nothing, nothing, nothing, nothing)


def counting_params() -> Any:
    """One point a LOW word."""
    return {"head": {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros((1,))}}
