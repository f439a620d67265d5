"""A small run of any stage, to kill and to run as several processes.

    python -m tests.stages.run_stage STAGE WORKDIR STEPS [MESH]

Prints the sha256 of all that its last checkpoint holds: parameters, both optimizers, averages,
penalty, counters and the key. As a program it meets the other processes if there are any, so
nothing that it imports may touch a device.
"""

import dataclasses
import hashlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from instruct_jax.cli import processes
from instruct_jax.data.loader import Batches
from instruct_jax.evaluation.language import held_out_loss
from instruct_jax.models.adapters import LoraConfig
from instruct_jax.models.transformer import (
    TransformerConfig,
    language_model,
    scalar_from_language,
    scalar_model,
)
from instruct_jax.stages import ppo, pretrain, reward_model, sft
from instruct_jax.stages.optimizers import AdamConfig
from instruct_jax.stages.ppo_config import PPOConfig
from instruct_jax.stages.pretrain import PretrainConfig
from instruct_jax.stages.reward_model import RewardModelConfig
from instruct_jax.stages.sft import SFTConfig
from instruct_jax.training import checkpoint, hosts
from instruct_jax.training.checkpoint import load_item
from instruct_jax.training.mesh import make_mesh

STAGES = ("pretrain", "sft", "reward_model", "ppo")
# PPO whose rollouts lag by an iteration, and wait in the checkpoints.
LAGGING = "ppo_lagging"
ROWS, BATCH, WIDTH = 64, 16, 16
VOCAB, EOS, PAD = 29, 28, 29
PROMPT, RESPONSE = 6, 8
SHAPE = TransformerConfig(
    vocab_size=VOCAB,
    num_layers=1,
    d_model=32,
    num_heads=2,
    max_length=32,
    vocab_multiple=32,
    init_std=0.2,
)
DROPPING = dataclasses.replace(SHAPE, residual_dropout=0.1)
FIT: dict[str, Any] = {
    "batch_size": BATCH,
    "learning_rate": 1e-2,
    "residual_dropout": 0.1,
    "log_every": 1,
    "save_every": 1,
    "micro_batches": 2,
    # With Adam's usual eps a gradient that is zero but for rounding moves a parameter all the same.
    "adam": AdamConfig(eps=1e-3),
}
# Everything that a checkpoint must hold moves: two optimizers in warm-up, average, penalty, keys.
PPO = PPOConfig(
    rollout_batch=16,
    minibatch=8,
    prompt_length=PROMPT,
    response_length=RESPONSE,
    learning_rate=3e-3,
    value_learning_rate=1e-3,
    warmup_iterations=3,
    ptx_ratio=2,
    ptx_coef=0.5,
    kl_coef=0.1,
    kl_target=0.5,
    kl_horizon=200,
    save_every=1,
    eval_every=2,
)


def text(rows: int = ROWS) -> np.ndarray:
    """Packed text int32[rows, WIDTH]."""
    return np.random.default_rng(1).integers(0, VOCAB, (rows, WIDTH)).astype(np.int32)


def prompts() -> dict[str, np.ndarray]:
    """Left-padded prompts of 1 to PROMPT tokens."""
    rng = np.random.default_rng(2)
    mask = np.arange(PROMPT)[None] >= PROMPT - rng.integers(1, PROMPT + 1, ROWS)[:, None]
    tokens = np.where(mask, rng.integers(0, VOCAB - 1, mask.shape), PAD)
    return {"tokens": tokens.astype(np.int32), "mask": mask}


def demonstrations() -> dict[str, np.ndarray]:
    """Rows whose second half is a response."""
    tokens = text()
    mask = np.ones(tokens.shape, bool)
    return {"tokens": tokens, "mask": mask, "loss_mask": mask & (np.arange(WIDTH) >= WIDTH // 2)}


def comparisons() -> dict[str, np.ndarray]:
    """Prompts of two tokens with three completions each."""
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, VOCAB - 1, (ROWS, 3, WIDTH)).astype(np.int32)
    tokens[:, :, :2] = tokens[:, :1, :2]
    ranks = rng.permuted(np.tile(np.arange(3, dtype=np.int32), (ROWS, 1)), axis=1)
    return {
        "tokens": tokens,
        "mask": np.ones(tokens.shape, bool),
        "ranks": ranks,
        "where": np.ones(ranks.shape, bool),
        "prompt_lengths": np.full(ROWS, 2, np.int32),
    }


def train(stage: str, workdir: Path, steps: int, *, mesh: str, lora: int = 0) -> Any:
    """`steps` steps of `stage`, with evaluations; what its `train` returns."""
    devices = make_mesh(mesh)
    where: dict[str, Any] = {"mesh": devices, "workdir": workdir}
    fit = FIT | {"epochs": steps * BATCH / ROWS, "lora": LoraConfig(rank=lora)}

    def evaluate(step: int, state: Any) -> dict[str, float]:
        return {"valid_loss": held_out_loss(model, state.params, text(10), mesh=devices)}

    model = language_model(DROPPING)
    params = model.init(jax.random.key(0))
    scalar_params = scalar_from_language(params, jax.random.key(1), SHAPE)
    if stage == "pretrain":
        return pretrain.train(
            PretrainConfig(**fit, eval_every=3, warmup=2),
            model,
            params,
            text(),
            evaluate=evaluate,
            **where,
        )
    if stage == "sft":
        # Half of every batch is text, so an epoch of demonstrations takes twice as many steps.
        sft_config = SFTConfig(**fit | {"epochs": steps * BATCH / 2 / ROWS}, pretrain_fraction=0.5)
        rows = demonstrations()
        return sft.train(
            sft_config, model, params, rows, pretraining=text(), evaluate=evaluate, **where
        )
    if stage == "reward_model":
        standard = {name: rows for name, rows in demonstrations().items() if name != "loss_mask"}
        return reward_model.train(
            RewardModelConfig(**fit, completions=3),
            scalar_model(DROPPING),
            scalar_params,
            comparisons(),
            standard=standard,
            **where,
        )

    def evaluate_policy(step: int, state: ppo.PPOState) -> dict[str, float]:
        loss = held_out_loss(language_model(SHAPE), state.policy.ema, text(10), mesh=devices)
        return {"valid_pretrain_loss": loss}

    config = dataclasses.replace(
        PPO, episodes=steps * PPO.rollout_batch, rollout_lag=1 if stage == LAGGING else 0
    )
    mix = Batches({"tokens": text()}, config.updates * config.minibatch * config.ptx_ratio, seed=1)
    return ppo.train(
        config,
        language_model(SHAPE),
        scalar_model(SHAPE),
        params,
        scalar_params,
        Batches(prompts(), config.prompts, seed=0),
        ptx=mix,
        eos_id=EOS,
        evaluate=evaluate_policy,
        **where,
    )


def last_state(workdir: Path, step: int) -> Any:
    """Everything that the checkpoint of `step` holds, as NumPy arrays."""
    folder = workdir / "checkpoints" / str(step)
    key = load_item(folder, "key")
    return hosts.fetch(load_item(folder, "state")), np.asarray(jax.random.key_data(key))


def fingerprint(tree: Any) -> str:
    """The sha256 of every bit of `tree`."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


# --- deaths -------------------------------------------------------------------------------------


def die() -> None:
    """As by the kernel or a pre-emption without notice: no handler runs."""
    os.kill(os.getpid(), signal.SIGKILL)


def dying(function: Callable[..., Any], nth: int, *, after: bool = False) -> Callable[..., Any]:
    """`function`, whose `nth` call (from 1) is the last thing the process does."""
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth and not after:
            die()
        result = function(*args, **kwargs)
        if calls == nth:
            die()
        return result

    return call


def arm(phase: str, nth: int) -> None:
    """Sees to it that this process dies the `nth` time that it comes to `phase`.

    batch: between two steps. save: before anything of a checkpoint is written. write: while it is
    written in the background. commit: all is written, the manifest is not. prune: while an older
    step is deleted. rollout, score, update: within an iteration of PPO. after: `nth`
    milliseconds after the first batch.
    """
    if phase == "after":
        take, timer = Batches.take, threading.Timer(nth / 1000, die)

        def counted_down(*args: Any) -> Any:
            if timer.ident is None:
                timer.start()
            return take(*args)

        Batches.take = counted_down
    elif phase == "batch":
        Batches.take = dying(Batches.take, nth)
    elif phase in ("save", "write"):
        # Orbax's own call, from which a save returns with its files half written.
        steps = checkpoint.ocp.training.Checkpointer
        steps.save_checkpointables_async = dying(
            steps.save_checkpointables_async, nth, after=phase == "write"
        )
    elif phase == "commit":
        checkpoint.write_manifest = dying(checkpoint.write_manifest, nth)
    elif phase == "prune":
        shutil.rmtree = dying(shutil.rmtree, nth, after=True)
    elif phase == "rollout":
        ppo.generate = dying(ppo.generate, nth, after=True)
    elif phase in ("score", "update"):
        make_programs = ppo.make_programs

        def armed(*args: Any, **kwargs: Any) -> ppo.Programs:
            programs = make_programs(*args, **kwargs)
            program = dying(getattr(programs, phase), nth, after=True)
            return programs._replace(**{phase: program})

        ppo.make_programs = armed
    else:
        raise ValueError(phase)


def run_once(
    stage: str, workdir: str, steps: int, phase: str | None, nth: int, cache: str, result: str
) -> None:
    """The body of a process that may be killed; leaves the sha256 of its last state in `result`."""
    os.environ["XLA_FLAGS"] = ""
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if phase is not None:
        arm(phase, nth)
    train(stage, Path(workdir), steps, mesh="data:1")
    Path(result).write_text(fingerprint(last_state(Path(workdir), steps)))


def main(stage: str, workdir: str, steps: str, mesh: str = "auto", pause: str = "0") -> None:
    """One process of several, or the only one."""
    if processes.announced():
        processes.join()
    if float(pause):
        Batches.take = _slowly(Batches.take, float(pause))
    train(stage, Path(workdir), int(steps), mesh=mesh)
    state = last_state(Path(workdir), int(steps))
    if jax.process_index() == 0:
        np.savez(Path(workdir) / "last.npz", *jax.tree.leaves(state))
        print(fingerprint(state))


def _slowly(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        time.sleep(seconds)
        return function(*args)

    return call


if __name__ == "__main__":
    with processes.together():
        main(*sys.argv[1:])
