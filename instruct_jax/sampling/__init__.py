"""Sampling: the compiled decode loop, in one shot or with slots that refill, and completions."""

from instruct_jax.sampling.choose import Sampling, choose, draw, truncate
from instruct_jax.sampling.complete import Completion, complete, completions_of
from instruct_jax.sampling.engine import Engine, Response, respond
from instruct_jax.sampling.sampler import Rollout, generate

__all__ = [
    "Completion",
    "Engine",
    "Response",
    "Rollout",
    "Sampling",
    "choose",
    "complete",
    "completions_of",
    "draw",
    "generate",
    "respond",
    "truncate",
]
