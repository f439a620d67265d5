import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from instruct_jax.errors import ConfigError
from instruct_jax.training.mesh import (
    check_batch_size,
    describe,
    make_mesh,
    match_partition_rules,
    parse_mesh,
    shard_batch,
    tree_shardings,
)

RULES = (("kernel$", (None, "fsdp", "tensor")), ("bias$", ()))


@pytest.mark.parametrize(
    ("spec", "sizes"),
    [
        ("auto", (8, 1, 1, 1)),
        ("data:2,fsdp:4", (2, 4, 1, 1)),
        ("tensor:2, data:4", (4, 1, 2, 1)),
        ("fsdp:-1,tensor:2", (1, 4, 2, 1)),
        ("fsdp:2,tensor:2,sequence:2", (1, 2, 2, 2)),
        ("data:1", (1, 1, 1, 1)),
    ],
)
def test_a_mesh_is_what_its_spec_says(spec, sizes):
    mesh = make_mesh(spec)
    assert mesh.devices.shape == sizes and mesh.axis_names == ("data", "fsdp", "tensor", "sequence")
    assert make_mesh(describe(mesh)) == mesh


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("data:16", "needs 16 devices, there are 8"),
        ("fsdp:-1,tensor:16", "needs 16 devices"),
        ("date:2", "'date:2' is not AXIS:SIZE"),
        ("data=2", "'data=2' is not AXIS:SIZE"),
        ("data:0", "'data:0' is not AXIS:SIZE"),
        ("", "'' is not AXIS:SIZE"),
        ("data:-1,fsdp:-1", "only one axis"),
    ],
)
def test_a_wrong_mesh_says_what_is_wrong(spec, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_mesh(spec, 8)


def test_the_first_rule_that_matches_gives_the_spec():
    tree = {
        "layers": {"kernel": jnp.zeros((2, 4, 6)), "bias": jnp.zeros((2, 6))},
        "n": jnp.ones([]),
    }
    assert match_partition_rules(RULES, tree) == {
        "layers": {"kernel": P(None, "fsdp", "tensor"), "bias": P()},
        "n": P(),
    }


def test_every_path_without_a_rule_is_named():
    tree = {"a": {"kernel": jnp.zeros((4, 4))}, "b": {"gain": jnp.zeros(3)}, "gain": jnp.zeros(2)}
    with pytest.raises(ValueError) as error:
        match_partition_rules(RULES, tree)
    assert "a/kernel (4, 4) has fewer dimensions" in str(error.value)
    assert "b/gain (3,) is matched by no rule" in str(error.value)
    assert "; gain (2,) is matched by no rule" in str(error.value)


def test_a_dimension_that_does_not_divide_stays_whole():
    mesh = make_mesh("fsdp:4,tensor:2")
    shape = jax.ShapeDtypeStruct((2, 6, 4), jnp.float32)
    assert tree_shardings(mesh, RULES, {"kernel": shape})["kernel"].spec == P(None, None, "tensor")


def test_rows_are_spread_over_data_and_fsdp():
    mesh = make_mesh("data:2,fsdp:2,sequence:2")
    batch = shard_batch({"tokens": np.arange(24, dtype=np.int32).reshape(8, 3)}, mesh)
    assert {s.data.shape for s in batch["tokens"].addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(batch["tokens"], np.arange(24).reshape(8, 3))


def test_a_batch_that_the_mesh_cannot_divide_is_a_config_error():
    mesh = make_mesh("data:2,fsdp:4")
    with pytest.raises(
        ConfigError, match=r"12 rows .* data:2,fsdp:4,tensor:1,sequence:1: use a multiple of 8"
    ):
        shard_batch({"tokens": np.zeros((12, 3))}, mesh)
    with pytest.raises(ConfigError, match="with 4 micro-batches: use a multiple of 32"):
        check_batch_size(16, mesh, micro_batches=4)
    check_batch_size(64, mesh, micro_batches=4)
