"""The embedded world: an instruction world made by code, with a programmatic gold judge."""

from instruct_jax.data.toyworld.config import (
    CorpusMix,
    FamilyMix,
    FlawMix,
    JudgeWeights,
    KindMix,
    SplitMix,
    WorldConfig,
    Writer,
)
from instruct_jax.data.toyworld.describe import describe
from instruct_jax.data.toyworld.judge import Judge, Judgement
from instruct_jax.data.toyworld.spec import Spec
from instruct_jax.data.toyworld.tasks import FAMILIES, SKILLS
from instruct_jax.data.toyworld.world import PERSONAS, Split, ToyTask, ToyWorld
from instruct_jax.data.toyworld.writers import possible_flaws

__all__ = [
    "FAMILIES",
    "PERSONAS",
    "SKILLS",
    "CorpusMix",
    "FamilyMix",
    "FlawMix",
    "Judge",
    "JudgeWeights",
    "Judgement",
    "KindMix",
    "Spec",
    "Split",
    "SplitMix",
    "ToyTask",
    "ToyWorld",
    "WorldConfig",
    "Writer",
    "describe",
    "possible_flaws",
]
