"""A loss is the same on one device, inside of a checked `shard_map` and on an Explicit mesh.

Eager, jit and vmap are compared in `test_cases.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.losses.case import weighted_sum
from tests.losses.table import FIRST, MASKED

ROWS, WHOLE = PartitionSpec("rows"), PartitionSpec()
SPREAD = {
    case.function_name: case
    for case in [*FIRST.values(), *reversed(MASKED)]
    if case.shared != ("all",)
}


def halves(case):
    """Two batches of float32 inputs, the second with its rows in another order."""
    first = {
        name: jnp.asarray(x, jnp.float32 if np.issubdtype(x.dtype, np.floating) else None)
        for name, x in case.inputs.items()
    }
    return first, {n: x[::-1] if by_row(case, x, n) else x for n, x in first.items()}


def by_row(case, x, name):
    return x.ndim > 0 and name not in case.shared


def both(case, first, second):
    return {n: jnp.concatenate([x, second[n]]) if by_row(case, x, n) else x
            for n, x in first.items()}  # fmt: skip


def gradients_and_result(case):
    def run(inputs):
        floats = {n: x for n, x in inputs.items() if x.dtype == jnp.float32}

        def scalar(floats):
            result = case.call(case.function, inputs | floats)
            return weighted_sum(result), result

        return jax.grad(scalar, has_aux=True)(floats)

    return run


def agree(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)


def specs(case, inputs):
    return {n: ROWS if by_row(case, x, n) else WHOLE for n, x in inputs.items()}


@pytest.mark.parametrize("case", SPREAD.values(), ids=SPREAD.keys())
def test_inside_of_a_checked_shard_map_each_device_has_the_loss_of_its_rows(case):
    run, (first, second) = gradients_and_result(case), halves(case)
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,))
    of_inputs = specs(case, first)

    def local(inputs):
        gradients, result = run(inputs)
        return gradients, jax.tree.map(lambda x: x[None], result)

    one = jax.jit(run)
    (grads_1, result_1), (grads_2, result_2) = one(first), one(second)
    out = {n: of_inputs[n] for n in grads_1}, jax.tree.map(lambda _: ROWS, result_1)
    spread = jax.shard_map(local, mesh=mesh, in_specs=(of_inputs,), out_specs=out)
    gradients, result = jax.jit(spread)(both(case, first, second))
    agree(result, jax.tree.map(lambda a, b: jnp.stack([a, b]), result_1, result_2))
    for name, gradient in gradients.items():
        a, b = grads_1[name], grads_2[name]
        agree(gradient, jnp.concatenate([a, b]) if of_inputs[name] == ROWS else a + b)


@pytest.mark.parametrize("case", SPREAD.values(), ids=SPREAD.keys())
def test_on_an_explicit_mesh_it_is_the_loss_of_one_device(case):
    """`jax.make_mesh` as it is by default."""
    run, inputs = jax.jit(gradients_and_result(case)), both(case, *halves(case))
    mesh = jax.make_mesh((2,), ("rows",))
    assert mesh.axis_types == (AxisType.Explicit,)
    wanted = run(inputs)
    with jax.set_mesh(mesh):
        placed = {
            n: jax.device_put(inputs[n], NamedSharding(mesh, spec))
            for n, spec in specs(case, inputs).items()
        }
        agree(run(placed), wanted)
