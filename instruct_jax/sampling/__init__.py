"""Sampling: the compiled decode loop, in one shot or with refilled slots; completions, scores."""

from instruct_jax.sampling.choose import Sampling, choose, draw, truncate
from instruct_jax.sampling.complete import Completion, complete, completions_of
from instruct_jax.sampling.engine import Engine, Response, respond
from instruct_jax.sampling.sampler import Rollout, generate
from instruct_jax.sampling.scores import cross_entropy_sum, token_scores

__all__ = [
    "Completion",
    "Engine",
    "Response",
    "Rollout",
    "Sampling",
    "choose",
    "complete",
    "completions_of",
    "cross_entropy_sum",
    "draw",
    "generate",
    "respond",
    "token_scores",
    "truncate",
]
