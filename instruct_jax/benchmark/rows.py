"""The rows of a benchmark: random tokens at its shape, or real ones in their place."""

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from instruct_jax.benchmark.shapes import END, Shape
from instruct_jax.data.config import DataConfig
from instruct_jax.data.encoding import (
    Encoded,
    encode_comparisons,
    encode_demonstrations,
    encode_documents,
    encode_prompts,
)
from instruct_jax.data.sources import open_source
from instruct_jax.data.tokenizer import Tokenizer
from instruct_jax.errors import ConfigError
from instruct_jax.training.mesh import batch_sharding

# Prompts for each row of a batch: those of the engine.
QUEUE = 4


class Rows(NamedTuple):
    """What the phases read: the arrays that the loaders make, synthetic or of real rows."""

    text: np.ndarray  # int32[N, T]
    demonstrations: dict[str, np.ndarray]
    comparisons: dict[str, np.ndarray]
    prompts: dict[str, np.ndarray]  # left-padded
    eos_id: int = END


def synthetic_rows(shape: Shape) -> Rows:
    """Random tokens: full rows, or with `mean_response` geometric lengths of responses."""
    rng = np.random.default_rng(shape.seed)
    config = shape.policy_config()
    draw = partial(rng.integers, END + 1, config.vocab_size, dtype=np.int32)
    p, width, k = shape.prompt, shape.prompt + shape.response, shape.completions

    def padded(count: int) -> tuple[np.ndarray, np.ndarray]:
        lengths = np.full(count, shape.response)
        if shape.mean_response is not None:
            lengths = np.minimum(rng.geometric(1 / shape.mean_response, count), shape.response)
        mask = np.arange(width)[None] < p + lengths[:, None]
        return np.where(mask, draw((count, width)), config.pad_id).astype(np.int32), mask

    tokens, mask = padded(4 * shape.rows)
    demonstrations = {
        "tokens": tokens,
        "mask": mask,
        "loss_mask": mask & (np.arange(width) >= p)[None],
    }
    ranked, ranked_mask = (x.reshape(-1, k, width) for x in padded(shape.ranked * k))
    ranked[:, :, :p] = ranked[:, :1, :p]
    comparisons = {
        "tokens": ranked,
        "mask": ranked_mask,
        "ranks": np.tile(np.arange(k, dtype=np.int32), (shape.ranked, 1)),
        "where": np.ones((shape.ranked, k), bool),
        "prompt_lengths": np.full(shape.ranked, p, np.int32),
    }
    prompts = {
        "tokens": draw((QUEUE * shape.rows, p)),
        "mask": np.ones((QUEUE * shape.rows, p), bool),
    }
    return Rows(draw((shape.text_rows, shape.text_length)), demonstrations, comparisons, prompts)


def real_rows(shape: Shape, data: DataConfig, tokenizer: Tokenizer) -> Rows:
    """Rows of `data` at this shape, and random ones of the kinds that it has none of.

    ConfigError where the shape's vocabulary is not the tokenizer's.
    """
    if shape.policy_config().vocab_size != tokenizer.vocab_size:
        raise ConfigError(f"config.shape.vocab_size: the tokenizer has {tokenizer.vocab_size}")
    rows, source = synthetic_rows(shape), open_source(data)
    lengths = {"prompt_length": shape.prompt, "response_length": shape.response}
    if data.demonstrations:
        encoded = encode_demonstrations(source.demonstrations("train"), tokenizer, **lengths)
        prompts = encode_prompts(source.prompts("train"), tokenizer, prompt_length=shape.prompt)
        rows = rows._replace(demonstrations=_padded(encoded), prompts=_padded(prompts))
    if data.comparisons:
        encoded = encode_comparisons(
            source.comparisons("train"), tokenizer, completions=shape.completions, **lengths
        )
        rows = rows._replace(comparisons=_padded(encoded))
    if data.documents:
        text = encode_documents(list(source.text("train")), tokenizer, length=shape.text_length)
        rows = rows._replace(text=text["tokens"][: shape.text_rows])
    return rows._replace(eos_id=tokenizer.eos_id)


def _padded(encoded: Encoded) -> dict[str, np.ndarray]:
    """The whole arrays, as peers and workloads read them."""
    return {name: np.asarray(array) for name, array in encoded.items()}


def first_prompts(shape: Shape, rows: Rows, mesh: Mesh) -> tuple[Any, ...]:
    """Tokens, mask and keys of one batch of prompts, on the devices."""
    spread = batch_sharding(mesh)
    keys = jax.random.split(jax.random.key(shape.seed), shape.rows)
    first = (rows.prompts[name][: shape.rows] for name in ("tokens", "mask"))
    return tuple(jax.device_put(x, spread) for x in (*first, keys))
