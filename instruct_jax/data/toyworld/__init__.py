"""The embedded world: an instruction world made by code, with a programmatic gold judge."""

from instruct_jax.data.toyworld.judge import Judge, Judgement, JudgeWeights
from instruct_jax.data.toyworld.tasks import FAMILIES, SKILLS, Spec
from instruct_jax.data.toyworld.world import PERSONAS, ToyTask, ToyWorld, WorldConfig
from instruct_jax.data.toyworld.writers import FLAWS, Writer

__all__ = [
    "FAMILIES",
    "FLAWS",
    "PERSONAS",
    "SKILLS",
    "Judge",
    "JudgeWeights",
    "Judgement",
    "Spec",
    "ToyTask",
    "ToyWorld",
    "WorldConfig",
    "Writer",
]
