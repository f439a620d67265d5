import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax.errors import CheckpointError
from instruct_jax.training import checkpoint
from instruct_jax.training.checkpoint import Checkpointer, load_model, save_model
from instruct_jax.training.mesh import make_mesh
from instruct_jax.training.optim import adamw
from instruct_jax.training.state import init_state, shard_state
from tests.training import tiny

KEY = jax.random.key(3)


def make_state(mesh):
    state = init_state(tiny.init(KEY), adamw(1e-2, weight_decay=0.1), ema=True)
    return shard_state(state, make_mesh(mesh), tiny.RULES)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.mark.parametrize("mesh", ["data:2,fsdp:2,tensor:2", "fsdp:4", "data:1"])
def test_a_state_is_restored_onto_any_mesh(tmp_path, mesh):
    """T55: every bit, with the structure and the shardings that are asked for."""
    state = make_state("data:2,fsdp:2,tensor:2")
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(5, {"state": state}, {"note": "x", "numbers": [1, 2.5, None]})
    target = jax.tree.map(jnp.zeros_like, make_state(mesh))
    target = jax.device_put(target, jax.tree.map(lambda x: x.sharding, make_state(mesh)))
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step == 5
        items, metadata = checkpointer.restore({"state": target})
    assert_same(items["state"], state)
    assert metadata == {"note": "x", "numbers": [1, 2.5, None]}
    for restored, wanted in zip(
        jax.tree.leaves(items["state"]), jax.tree.leaves(target), strict=True
    ):
        assert restored.sharding == wanted.sharding


def test_keys_and_arrays_off_the_mesh_come_back_uncommitted(tmp_path):
    """A jit over a mesh takes them, as it did before the save."""
    items = {"key": KEY, "keys": jax.random.split(KEY, 3), "loose": (jnp.float32(0.02), KEY)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, items)
        checkpointer.wait()
        restored, _ = checkpointer.restore(jax.eval_shape(lambda: items))
    assert_same(
        jax.tree.map(jax.random.key_data, [restored["key"], restored["keys"]]),
        jax.tree.map(jax.random.key_data, [items["key"], items["keys"]]),
    )
    assert jax.random.key_impl(restored["key"]) == jax.random.key_impl(KEY)
    state = make_state("fsdp:8")
    kernel = state.params["hidden"]["kernel"]
    draw = jax.jit(lambda x, c, k: x * c + jax.random.normal(k, x.shape))
    assert_same(draw(kernel, *restored["loose"]), draw(kernel, *items["loose"]))


def test_saved_arrays_may_be_donated_at_once(tmp_path):
    """JAX-8: the write goes on in the background while the buffers are overwritten."""
    state = {"w": jnp.ones((16, 1 << 18))}
    update = jax.jit(lambda s: {"w": s["w"] + 1.0}, donate_argnums=0)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"state": state})
        for _ in range(10):
            state = update(state)
        checkpointer.wait()
        items, _ = checkpointer.restore({"state": jax.eval_shape(lambda: state)})
    assert items["state"]["w"].min() == items["state"]["w"].max() == 1.0


@pytest.mark.parametrize("mesh", ["data:1", "data:8", "data:2,fsdp:2,tensor:2"])
def test_a_placed_state_may_be_donated_at_once(tmp_path, mesh):
    """JAX-8: on a CPU the writer has views of the buffers, which are not given away under it."""
    state = make_state(mesh)
    expected = []
    update = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with Checkpointer(tmp_path, keep=9) as checkpointer:
        for step in range(3):
            expected.append(jax.tree.map(np.array, jax.device_get(state)))
            checkpointer.save(step, {"state": state})
            for _ in range(10):
                state = update(state)
        checkpointer.wait()
        for step in range(3):
            items, _ = checkpointer.restore({"state": make_state(mesh)}, step=step)
            assert_same(items["state"], expected[step])


def test_the_newest_steps_and_the_multiples_are_kept(tmp_path):
    with Checkpointer(tmp_path, keep=2, keep_every=4) as checkpointer:
        assert checkpointer.latest_step is None
        for step in range(1, 8):
            checkpointer.save(step, {"x": {"step": jnp.int32(step)}})
        checkpointer.wait()
        assert checkpointer.steps == [4, 6, 7]
        items, _ = checkpointer.restore({"x": {"step": jnp.int32(0)}}, step=4)
        assert items["x"]["step"] == 4
        checkpointer.save(7, {"x": {"step": jnp.int32(-1)}})  # exists: left as it is
        assert checkpointer.restore({"x": {"step": jnp.int32(0)}})[0]["x"]["step"] == 7


def test_a_directory_of_an_unfinished_write_is_not_a_step(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"x": {"a": jnp.ones(3)}})
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps == [1]


@pytest.mark.parametrize(
    "target",
    [
        {"x": {"a": jnp.ones(4)}},
        {"x": {"a": jnp.ones(3), "b": jnp.ones(3)}},
        {"x": {"b": jnp.ones(3)}},
        {"y": {"a": jnp.ones(3)}},
    ],
)
def test_what_a_checkpoint_does_not_hold_is_an_error(tmp_path, target):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"x": {"a": jnp.ones(3)}})
        checkpointer.wait()
        with pytest.raises(CheckpointError, match=str(tmp_path / "1")) as error:
            checkpointer.restore(target)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 4


def test_missing_damaged_and_future_checkpoints_are_refused(tmp_path, monkeypatch):
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(CheckpointError, match="no checkpoint of step None"):
            checkpointer.restore({"x": {"a": jnp.ones(3)}})
        checkpointer.save(1, {"x": {"a": jnp.ones(3)}})
        checkpointer.wait()
        with pytest.raises(CheckpointError, match="no checkpoint of step 2"):
            checkpointer.restore({"x": {"a": jnp.ones(3)}}, step=2)
        monkeypatch.setattr(checkpoint, "FORMAT", 1)
        with pytest.raises(CheckpointError, match="checkpoint format 2, this version reads 1 to 1"):
            checkpointer.restore({"x": {"a": jnp.ones(3)}})
        monkeypatch.undo()
        shutil.rmtree(tmp_path / "1" / "x")
        with pytest.raises(CheckpointError, match=str(tmp_path / "1")):
            checkpointer.restore({"x": {"a": jnp.ones(3)}})


def test_a_model_is_loaded_as_it_was_saved_or_as_it_is_wanted(tmp_path):
    params = make_state("data:2,fsdp:4").params
    save_model(tmp_path / "model", params, {"stage": "sft"})
    loaded, metadata = load_model(tmp_path / "model")
    assert_same(loaded, params)
    assert metadata == {"stage": "sft"}
    assert all(len(x.devices()) == 1 for x in jax.tree.leaves(loaded))

    def wanted(x):
        return jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding)

    target = jax.tree.map(wanted, make_state("fsdp:2,tensor:2").params)
    loaded, _ = load_model(tmp_path / "model", target)
    assert_same(loaded, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    assert jax.tree.map(lambda x: x.sharding, loaded) == jax.tree.map(lambda x: x.sharding, target)


def test_a_model_replaces_the_earlier_one(tmp_path):
    for value in (1.0, 2.0):
        save_model(tmp_path / "model", {"w": jnp.full(3, value)}, {"value": value})
    loaded, metadata = load_model(tmp_path / "model")
    assert loaded["w"][0] == 2.0 and metadata == {"value": 2.0}
    with pytest.raises(CheckpointError, match="nowhere: no model here"):
        load_model(tmp_path / "nowhere")


def test_a_file_of_the_users_among_the_parameters_is_kept_when_they_are_written_again(tmp_path):
    """Orbax empties the folder that it writes."""
    folder = tmp_path / "params"
    for value in (1.0, 2.0, 3.0):
        save_model(folder, {"w": jnp.full(3, value)}, {})
        (folder / "params" / "notes.txt").write_text(f"mine {value}")
    save_model(folder, {"w": jnp.full(3, 4.0)}, {})
    assert load_model(folder)[0]["w"][0] == 4.0
    kept = sorted(tmp_path.glob("params.kept*/params/notes.txt"))
    assert [path.read_text() for path in kept] == ["mine 1.0", "mine 2.0", "mine 3.0"]
