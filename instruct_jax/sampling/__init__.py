"""Sampling: the compiled generation loop, and completions of texts."""

from instruct_jax.sampling.choose import draw, truncate
from instruct_jax.sampling.complete import Completion, complete, completions_of, pad_prompts
from instruct_jax.sampling.sampler import Rollout, generate

__all__ = [
    "Completion",
    "Rollout",
    "complete",
    "completions_of",
    "draw",
    "generate",
    "pad_prompts",
    "truncate",
]
