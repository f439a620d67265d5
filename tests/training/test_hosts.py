"""Arrays of a mesh that several processes share; here of the eight devices of one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from instruct_jax.data.loader import Batches
from instruct_jax.training import hosts
from instruct_jax.training.mesh import batch_sharding, make_mesh, replicated

MESHES = ["data:1", "data:8", "data:2,fsdp:2,tensor:2"]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
def test_what_is_placed_may_be_donated_and_spares_what_was_given(mesh, make):
    """JAX-8: whichever way it is sharded; `jax.device_put` shares the buffer of device 0."""
    given = {"a": make(np.arange(64.0, dtype=np.float32).reshape(8, 8)), "b": make(np.float32(3))}
    before = jax.tree.map(np.array, given)
    target = make_mesh(mesh)
    shardings = {"a": NamedSharding(target, PartitionSpec("fsdp")), "b": replicated(target)}
    double = jax.jit(lambda t: jax.tree.map(lambda x: x * 2, t), donate_argnums=0)
    for place in (shardings, replicated(target)):
        placed = hosts.place(given, place)
        double(placed)
        jax.tree.map(np.testing.assert_array_equal, given, before)
        double(hosts.place(hosts.place(given, place), replicated(target)))
        jax.tree.map(np.testing.assert_array_equal, given, before)


def test_what_is_fetched_is_a_copy():
    """The buffer that it was read from is donated, and may be written over."""
    mesh = make_mesh("data:8")
    state = hosts.place({"w": jnp.ones((64, 64)), "n": jnp.int32(1)}, replicated(mesh))
    fetched = hosts.fetch(state)
    assert all(x.flags.owndata for x in jax.tree.leaves(fetched))
    jax.block_until_ready(
        jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state)
    )
    assert fetched["n"] == 1 and (fetched["w"] == 1).all()


@pytest.mark.parametrize("mesh", MESHES)
def test_rows_held_are_those_of_the_devices(mesh):
    """In one process all of them, each once."""
    np.testing.assert_array_equal(hosts.rows_held(batch_sharding(make_mesh(mesh)), 16), range(16))


def test_a_batch_is_put_together_from_the_rows_of_the_processes(monkeypatch):
    """Of two processes that hold four devices each, either reads its half and nothing else."""
    mesh = make_mesh("data:4,tensor:2")
    arrays = {"x": np.arange(48).reshape(24, 2), "y": np.arange(24.0)}
    batches = Batches(arrays, 8, seed=3)
    whole = batches(1)
    for mine in (range(4), range(4, 8)):
        own = batches.take(batches.rows(1)[mine])
        for name, part in own.items():
            built = {}

            def build(shape, sharding, callback, built=built, mine=mine):
                for device, index in sharding.devices_indices_map(shape).items():
                    if index[0].indices(shape[0])[0] in mine:
                        built[device] = (index, callback(index))

            monkeypatch.setattr(jax, "make_array_from_callback", build)
            hosts._from_own(part, np.array(mine), 8, batch_sharding(mesh))
            monkeypatch.undo()
            assert len(built) == 4
            for index, rows in built.values():
                np.testing.assert_array_equal(rows, whole[name][index])


def test_one_process_asks_nobody():
    anyone = hosts.AnyProcess()
    assert [anyone.ask(flag) for flag in (False, True, False)] == [False, True, False]
    done = []
    hosts.first_alone(lambda: done.append(1))
    hosts.barrier("x")
    assert done == [1]
    source = Batches({"x": np.arange(8)}, 4, seed=0)
    assert hosts.global_batches(source, batch_sharding(make_mesh("data:4"))) is source
