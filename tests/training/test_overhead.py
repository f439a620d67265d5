"""What checkpoints, guards and logging cost a step, measured on and off in turns."""

import statistics
import time

import jax
import numpy as np
import optax
import pytest

from instruct_jax.models.transformer import TransformerConfig, language_model
from instruct_jax.stages.pretrain import language_loss, language_rows
from instruct_jax.stages.stage import place_params
from instruct_jax.training.checkpoint import Checkpointer
from instruct_jax.training.loop import train
from instruct_jax.training.mesh import make_mesh
from instruct_jax.training.metrics import MetricLogger
from instruct_jax.training.optim import adamw
from instruct_jax.training.state import (
    accumulate_gradients,
    compile_step,
    init_state,
    make_train_step,
)

# 7M parameters; a step of 2,048 tokens takes about a second on two cores.
SHAPE = TransformerConfig(vocab_size=8192, num_layers=6, d_model=256, num_heads=4, max_length=256)
ROWS, LENGTH = 8, 256
TURNS, STEPS = 24, 3
SAVE_EVERY = 100


def bare_step(loss_fn, tx):
    """An update without guard, counters or metrics."""

    def step(state, batch, key):
        params, opt_state = state
        grads = accumulate_gradients(loss_fn, params, batch, key).grads
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), {}

    return step


@pytest.mark.slow
def test_checkpoints_guards_and_logging_cost_less_than_three_percent(tmp_path, capsys):
    """In processor time, which others on the machine disturb least: the loop makes STEPS guarded
    steps, then its evaluation makes as many bare ones, and so on. A save every SAVE_EVERY steps is
    counted in full: the copy, the write and the sums.
    """
    mesh = make_mesh("data:1")
    model, tx, key = language_model(SHAPE), adamw(1e-4), jax.random.key(0)
    rng = np.random.default_rng(0)
    batch = language_rows(rng.integers(0, 8192, (ROWS, LENGTH)).astype(np.int32))
    params = place_params(model.init(key), mesh)
    loss = language_loss(model)
    full = init_state(params, tx)
    bare = (place_params(params, mesh), tx.init(place_params(params, mesh)))
    guarded = compile_step(make_train_step(loss, tx), mesh, full)
    plain = jax.jit(bare_step(loss, tx), donate_argnums=0)
    on, off, mark = [], [], 0.0

    def take_turns(step, state):
        nonlocal bare, mark
        began = time.process_time()
        on.append((began - mark) / STEPS)
        for i in range(STEPS):
            bare, _ = plain(bare, batch, jax.random.fold_in(key, i))
        jax.block_until_ready(bare)
        mark = time.process_time()
        off.append((mark - began) / STEPS)
        return {}

    with (
        Checkpointer(tmp_path / "run") as checkpointer,
        MetricLogger(tmp_path, "x", total=10**6) as logger,
    ):
        full = train(
            guarded,
            full,
            batch_at=lambda i: batch,
            steps=(TURNS + 1) * STEPS,
            key=key,
            logger=logger,
            checkpointer=checkpointer,
            evaluate=take_turns,
            eval_every=STEPS,
        )
    saves = []
    with Checkpointer(tmp_path / "saves") as checkpointer:
        for step in range(1, 6):
            began = time.process_time()
            checkpointer.save(step, {"state": full, "key": key}, {})
            checkpointer.wait()
            saves.append(time.process_time() - began)
    step = statistics.median(off[1:])  # the first turn compiles
    extra = (np.array(on[1:]) - np.array(off[1:])) / step
    resampled = np.median(rng.choice(extra, (10_000, TURNS)), axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    steps, save = float(np.median(extra)), statistics.median(saves)
    saving = save / SAVE_EVERY / step
    with capsys.disabled():
        print(
            f"\na step {step:.3f} s of processor time; guards and logging {steps:+.2%}"
            f" [{low:+.2%}, {high:+.2%}] of {TURNS} pairs, a save {save:.2f} s, every"
            f" {SAVE_EVERY} steps {saving:.2%}"
        )
    assert steps + saving < 0.03
