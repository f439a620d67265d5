"""Tiny models that the tests of this folder share.

Most of the time here is compilation: parameters are drawn by NumPy, functions are jitted once a
session, and tests keep to tokens of one shape where they can.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from instruct_jax.models import Model, TransformerConfig, language_model, scalar_model

GPT = TransformerConfig(
    vocab_size=61, num_layers=2, d_model=32, num_heads=4, max_length=96, vocab_multiple=16
)
LLAMA = dataclasses.replace(
    GPT, norm="rmsnorm", activation="swiglu", positions="rope", num_kv_heads=2, use_bias=False,
    tie_embeddings=False, d_ff=48,
)  # fmt: skip
FAMILIES = {"gpt": GPT, "llama": LLAMA}
SHAPE = (2, 12)


@functools.cache
def language(config: TransformerConfig) -> tuple[Model, Any]:
    """A language model and random parameters."""
    return _with_params(language_model(config))


@functools.cache
def scalar(config: TransformerConfig) -> tuple[Model, Any]:
    """A scalar model and random parameters."""
    return _with_params(scalar_model(config))


@functools.cache
def jitted(function: Any) -> Any:
    """One compiled function for all tests."""
    return jax.jit(function)


def outputs(case: tuple[Model, Any], tokens: np.ndarray, mask: Any = None, **extra: Any) -> Any:
    """`apply`, compiled; the mask is always an array, so that its absence is no second program."""
    model, params = case
    mask = np.ones(tokens.shape, bool) if mask is None else mask
    return np.asarray(jitted(model.apply)(params, tokens, mask=mask, **extra))


def random_tokens(*shape: int, seed: int = 1) -> np.ndarray:
    """int32[shape] of real ids."""
    return np.random.default_rng(seed).integers(0, GPT.vocab_size, shape).astype(np.int32)


def _with_params(model: Model) -> tuple[Model, Any]:
    # Biases away from 0 and scales away from 1: a model that forgot them would not pass unnoticed.
    rng = np.random.default_rng(0)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return rng.normal(centre, 0.2, leaf.shape).astype(leaf.dtype)

    abstract = jax.eval_shape(model.init, jax.random.key(0))
    return model, jax.tree_util.tree_map_with_path(draw, abstract)
