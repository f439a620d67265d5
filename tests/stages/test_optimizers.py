"""Every optimizer in the stages: it learns, is taken up to the bit, and is the same on any mesh."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest

from instruct_jax.models.adapters import LoraConfig
from instruct_jax.models.transformer import PARTITION_RULES, language_model
from instruct_jax.planning.abstract import device_bytes, placed
from instruct_jax.stages import pretrain
from instruct_jax.stages.optimizers import AdafactorConfig, AdamConfig
from instruct_jax.stages.pretrain import PretrainConfig, language_loss, language_rows
from instruct_jax.stages.stage import FitConfig, make_optimizer, make_step
from instruct_jax.training.checkpoint import Checkpointer
from instruct_jax.training.mesh import make_mesh, shard_batch, tree_paths
from instruct_jax.training.state import compile_step, init_state, shard_state, state_shardings
from tests.stages import lab as labs
from tests.stages.run_stage import VOCAB

OPTIMIZERS = ["adamw", "adafactor", "lion", "muon"]
SHAPE = dataclasses.replace(labs.SHAPE, num_heads=4)
MODEL = language_model(SHAPE)
# Two vectors for each matrix here too. With a small eps, or Lion's sign, a gradient that is nothing
# but rounding moves a parameter.
CONFIG = FitConfig(
    learning_rate=3e-3,
    warmup=2,
    adam=AdamConfig(eps=1e-3),
    adafactor=AdafactorConfig(min_factored=16),
)
STEPS = 6


def configured(optimizer, **changes):
    return dataclasses.replace(CONFIG, optimizer=optimizer, **changes)


def rows(step):
    """Text that can be learnt: a token follows its half, nearly always."""
    rng = np.random.default_rng(step)
    tokens = np.zeros((16, 16), np.int64)
    tokens[:, 0] = rng.integers(0, VOCAB - 1, 16)
    for t in range(1, 16):
        tokens[:, t] = (tokens[:, t - 1] * 3 + 1) % (VOCAB - 1)
    return language_rows(tokens.astype(np.int32))


class Run:
    """A fit on a mesh, without its loop."""

    def __init__(self, config, mesh, steps=STEPS):
        self.mesh, self.tx = make_mesh(mesh), make_optimizer(config, steps=steps)
        self.state = shard_state(
            init_state(labs.policy_params(), self.tx), self.mesh, PARTITION_RULES
        )
        step = make_step(config, language_loss(MODEL), self.tx)
        self.step = compile_step(step, self.mesh, self.state, {})

    def go(self, *steps):
        losses = []
        with jax.set_mesh(self.mesh):
            for i in steps:
                batch = shard_batch(rows(i), self.mesh)
                self.state, logs = self.step(self.state, batch, jax.random.fold_in(labs.KEY, i))
                losses.append(float(logs["loss"]))
        return losses


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_loss_goes_down(optimizer):
    losses = Run(configured(optimizer, learning_rate=1e-2), "data:1", 30).go(*range(30))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_eight_devices_compute_what_one_does(optimizer):
    """R8, of losses and of parameters, but for the keys' biases: softmax does not see them, so that
    their gradient is rounding, which all but Adam with its eps make a whole update of.
    """
    one, eight = (Run(configured(optimizer), mesh) for mesh in ("data:1", "fsdp:4,tensor:2"))
    losses = one.go(*range(STEPS)), eight.go(*range(STEPS))
    np.testing.assert_allclose(*losses, rtol=1e-5)
    for (path, a), (_, b) in zip(*(tree_paths(r.state.params) for r in (one, eight)), strict=True):
        if not path.endswith("key/bias"):
            off = np.abs(np.asarray(a) - np.asarray(b)) > 1e-5
            # Rounding may tip a sign of Lion's.
            assert off.mean() < (1e-2 if optimizer == "lion" else 1e-9), path


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_state_is_restored_onto_another_mesh(optimizer, tmp_path):
    """Moments keep their bits, and go on as on the mesh that they were saved on."""
    first = Run(configured(optimizer), "fsdp:4,tensor:2")
    first.go(*range(3))
    saved = jax.device_get(first.state)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, {"state": first.state})
    other = Run(configured(optimizer), "data:2,fsdp:2")
    with Checkpointer(tmp_path) as checkpointer:
        items, _ = checkpointer.restore({"state": other.state})
    before = jax.tree.map(lambda x: x.sharding, other.state)
    other.state = items["state"]
    assert jax.tree.map(lambda x: x.sharding, other.state) == before
    for a, b in zip(jax.tree.leaves(saved), jax.tree.leaves(other.state), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(first.go(3, 4), other.go(3, 4), rtol=1e-5)


def test_adafactors_vectors_are_sharded_like_what_is_left_of_their_matrix():
    run = Run(configured("adafactor"), "data:2,fsdp:2,tensor:2")
    (factored, *_) = run.state.opt_state[1].inner_states["layers"].inner_state
    matrices, where = run.state.params["layers"], lambda x: tuple(x.sharding.spec)
    for name, part in (("query", "attention"), ("out", "attention"), ("up", "mlp")):
        kernel = matrices[part][name]["kernel"]
        across, down = (
            getattr(factored, v)["layers"][part][name]["kernel"] for v in ("v_row", "v_col")
        )
        first, second = kernel.shape[1:]
        longest = (where(kernel)[:2], where(kernel)[::2])
        # The means by row are over the longer side, of equals over the last.
        kept = longest if first <= second else longest[::-1]
        assert (where(across), where(down)) == kept
        assert "fsdp" in str(kept) and "tensor" in str(kept)
    table = run.state.opt_state[1].inner_states["others"].inner_state[0].v_row["embedder"]["tokens"]
    assert table.ndim == 1 and where(table) == ("tensor",)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_bytes_of_a_state_are_those_that_are_planned(optimizer):
    """Of one device, to the byte."""
    run = Run(configured(optimizer), "fsdp:4,tensor:2")
    make = partial(init_state, tx=run.tx)
    shapes = jax.eval_shape(make, run.state.params)
    planned = placed(shapes, state_shardings(shapes, run.mesh, PARTITION_RULES))
    (device, *_) = run.mesh.devices.flat
    held = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(run.state)
        for shard in leaf.addressable_shards
        if shard.device == device
    )
    assert device_bytes(planned) == held


class Stopped(Exception):
    """The end of the process, for a test."""


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_is_taken_up_to_the_bit(optimizer, rank, tmp_path):
    """R1, with and without an adapter; the schedule goes on too."""
    values = vars(
        configured(optimizer, lora=LoraConfig(rank=rank), schedule="linear", save_every=1)
    )
    config = PretrainConfig(
        **values | {"batch_size": 16, "length": 16, "epochs": 1.0, "eval_every": 1}
    )
    text = np.concatenate([rows(i)["tokens"] for i in range(4)])

    def run(name, stop_at=None):
        def look(step, state):
            if step == stop_at:
                raise Stopped
            return {"looked": step}

        where = {"mesh": make_mesh("data:2"), "workdir": tmp_path / name, "evaluate": look}
        return pretrain.train(config, MODEL, labs.policy_params(), text, **where)

    whole = run("whole")
    with pytest.raises(Stopped):
        run("parts", stop_at=3)
    parts = run("parts")
    assert labs.same_bits(whole, parts) and not labs.same_bits(whole, labs.policy_params())
