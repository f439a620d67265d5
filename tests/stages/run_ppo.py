"""A PPO-ptx run to stop and to kill: python -m tests.stages.run_ppo WORKDIR ITERATIONS SECONDS."""

import dataclasses
import hashlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from instruct_jax.models.transformer import language_model, scalar_model
from instruct_jax.stages import ppo
from instruct_jax.stages.ppo_config import PPOConfig
from instruct_jax.stages.ppo_models import PPOState
from instruct_jax.training.mesh import make_mesh
from tests.stages import lab as labs

# Everything that a checkpoint must hold moves: two optimizers in warm-up, average, penalty, keys.
CONFIG = dataclasses.replace(
    labs.CONFIG,
    ptx_coef=0.5,
    kl_coef=0.1,
    kl_target=0.5,
    kl_horizon=200,
    learning_rate=3e-3,
    warmup_iterations=3,
    save_every=1,
)


class Killed(Exception):
    """What the batches of a run raise where it is to stop."""


def run(
    workdir: Path,
    iterations: int,
    *,
    mesh: str = "data:1",
    stop_at: int | None = None,
    pause: float = 0.0,
    config: PPOConfig = CONFIG,
    evaluate: Callable[[int, PPOState], dict[str, float]] | None = None,
) -> PPOState:
    """`iterations` of PPO-ptx on the lab's models; Killed when iteration `stop_at` begins."""

    def prompts(step: int) -> dict[str, np.ndarray]:
        if step == stop_at:
            raise Killed
        time.sleep(pause)
        return labs.prompt_rows(step, rows=config.prompts)

    return ppo.train(
        dataclasses.replace(
            config,
            episodes=iterations * config.rollout_batch,
            warmup_iterations=min(config.warmup_iterations, iterations),
        ),
        language_model(labs.SHAPE),
        scalar_model(labs.SHAPE),
        labs.policy_params(),
        labs.reward_params(),
        prompts,
        more_prompts=lambda i: labs.prompt_rows(100 + i, rows=config.prompts),
        ptx=labs.text_rows,
        eos_id=labs.EOS,
        mesh=make_mesh(mesh),
        workdir=workdir,
        evaluate=evaluate,
    )


def fingerprint(tree: Any) -> str:
    """The sha256 of every bit of `tree`."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(tree)):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    directory, count, seconds = sys.argv[1:]
    print(fingerprint(run(Path(directory), int(count), pause=float(seconds))))
