"""A small run to kill: python -m tests.training.run_tiny WORKDIR STEPS SECONDS_PER_STEP [MESH]."""

import hashlib
import sys
import time
from pathlib import Path

import jax
import numpy as np

from instruct_jax.cli import processes
from instruct_jax.errors import RewardError
from instruct_jax.training import hosts
from instruct_jax.training.checkpoint import Checkpointer
from instruct_jax.training.loop import train
from instruct_jax.training.mesh import batch_sharding, make_mesh
from instruct_jax.training.metrics import MetricLogger
from instruct_jax.training.optim import adamw, schedule
from instruct_jax.training.state import compile_step, init_state, make_train_step, shard_state
from tests.training import tiny


def noisy_loss(params, batch, key):
    noise = 0.1 * jax.random.normal(key, batch["x"].shape)
    return tiny.loss_fn(params, batch | {"x": batch["x"] + noise}, key)


def fingerprint(tree):
    """The sha256 of every bit of `tree`."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(hosts.fetch(tree)):
        digest.update(leaf.tobytes())
    return digest.hexdigest()


def run(
    workdir,
    steps,
    *,
    pause=0.0,
    mesh="data:2,fsdp:2,tensor:2",
    batch_at=None,
    reward_until=None,
    **options,
):
    """Trains with everything that a checkpoint must hold: moments, average, keys, schedule.

    `reward_until`: process 0 asks for a reward before every step, and there is none from this one.
    """
    target = make_mesh(mesh)
    tx = adamw(schedule(1e-2, "cosine", steps=steps), weight_decay=0.1)
    state = shard_state(init_state(tiny.init(jax.random.key(1)), tx, ema=True), target, tiny.RULES)
    step = make_train_step(noisy_loss, tx, micro_batches=2, ema_decay=0.9)

    def slowly(i):
        time.sleep(pause)
        return (batch_at or tiny.batch)(i)

    def rewarded(state, batch, key):
        if reward_until is not None:
            done = hosts.fetch(state.step)
            hosts.of_first(lambda: reward(done, reward_until), np.int32(0))
        return compiled(state, batch, key)

    compiled = compile_step(step, target, state)
    options = {"save_every": 3} | options
    with (
        Checkpointer(Path(workdir) / "checkpoints") as checkpointer,
        MetricLogger(workdir, "tiny", total=steps) as logger,
    ):
        return train(
            rewarded,
            state,
            batch_at=hosts.global_batches(slowly, batch_sharding(target)),
            steps=steps,
            key=jax.random.key(7),
            logger=logger,
            checkpointer=checkpointer,
            **options,
        )


def reward(done, until):
    """1, and none from a step on."""
    if done == until:
        raise RewardError("it hangs")
    return np.int32(1)


def main(workdir, steps, pause, mesh="data:2,fsdp:2,tensor:2"):
    """One process of several, or the only one."""
    if processes.announced():
        processes.join()
    sha = fingerprint(run(Path(workdir), int(steps), pause=float(pause), mesh=mesh))
    if jax.process_index() == 0:
        print(sha)


if __name__ == "__main__":
    with processes.together():
        main(*sys.argv[1:])
