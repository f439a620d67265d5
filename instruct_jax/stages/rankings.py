"""What the stages that read rankings share: batches of trees (`data/trees.py`) on a mesh."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from instruct_jax.data.loader import Arrays
from instruct_jax.data.shares import Shares
from instruct_jax.data.trees import TreeBatches
from instruct_jax.errors import ConfigError
from instruct_jax.stages.stage import FitConfig
from instruct_jax.training import hosts
from instruct_jax.training.mesh import BATCH_AXES, axes_size, check_batch_size

# What a model is told about the tokens of `pack_trees`.
TREE = ("mask", "segment_ids", "branches", "positions")


def tree_batches(
    config: FitConfig,
    comparisons: Arrays,
    *,
    pad_id: int,
    mesh: Mesh,
    steps: int | None = None,
    shares: Shares | None = None,
) -> TreeBatches:
    """The batches of a run of `steps` updates, by default of one epoch. ConfigError where `mesh`
    does not divide them.
    """
    check_batch_size(config.batch_size, mesh, micro_batches=config.micro_batches)
    return TreeBatches(
        comparisons,
        config.batch_size,
        pad_id=pad_id,
        seed=config.seed,
        steps=steps,
        micro_batches=config.micro_batches,
        devices=axes_size(mesh, BATCH_AXES),
        shares=shares,
    )


def refuse_labels(comparisons: Arrays, reader: str) -> None:
    """ConfigError where single completions have labels: `reader` learns from pairs alone."""
    if "labels" in comparisons:
        raise ConfigError(
            f"{reader} learns from completions beside each other, and data.comparisons has single "
            "ones with a label: train on those with config.preference.loss=kto"
        )


def by_prompt(
    batches: TreeBatches, score: Callable[[dict[str, np.ndarray]], jax.Array]
) -> np.ndarray:
    """float32[N, K] of all N prompts, in their order: `score` of the batches of one epoch."""
    numbers = [batches.prompts(step) for step in range(batches.steps_per_epoch)]
    scores = [hosts.fetch(score(batches(step))) for step in range(batches.steps_per_epoch)]
    # The last batch may reach into the next epoch: of a prompt that is met twice the first counts.
    _, first = np.unique(np.concatenate(numbers), return_index=True)
    return np.concatenate(scores)[first]
