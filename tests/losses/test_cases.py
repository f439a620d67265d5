"""Every public function keeps the promises of the library on the calls of the two tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax import losses
from tests.losses.case import finite_differences, leaves, weighted_sum
from tests.losses.table import CASES, FIRST

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def some(predicate):
    chosen = [case for case in CASES if predicate(case)]
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.name)


def as_jax(inputs: dict, dtype) -> dict:
    def cast(x):
        return jnp.asarray(x, dtype if np.issubdtype(np.asarray(x).dtype, np.floating) else None)

    return {name: cast(x) for name, x in inputs.items()}


@every_case
def test_agrees_with_the_oracle_in_float64_and_so_does_its_gradient(case):
    with jax.enable_x64(True):
        inputs = as_jax(case.inputs, jnp.float64)
        grad_names = (*case.differentiable, *case.stopped)

        @jax.jit
        def run(inputs):
            def scalar(subset):
                result = case.call(case.function, inputs | subset)
                return weighted_sum(result), result

            return jax.grad(scalar, has_aux=True)({n: inputs[n] for n in grad_names})

        grads, result = run(inputs)
        expected = leaves(case.call(case.oracle, case.inputs))
        assert len(leaves(result)) == len(expected)
        for got, want in zip(leaves(result), expected, strict=True):
            assert got.dtype == np.float64
            assert got.shape == want.shape
            np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)
        for name in case.differentiable:
            want = finite_differences(case, name)
            np.testing.assert_allclose(grads[name], want, rtol=1e-6, atol=1e-8, err_msg=name)
        for name in case.stopped:
            assert not np.any(grads[name]), name


@pytest.mark.parametrize("case", FIRST.values(), ids=FIRST.keys())
def test_agrees_with_the_oracle_in_float32_without_jit(case):
    result = case.call(case.function, as_jax(case.inputs, jnp.float32))
    expected = leaves(case.call(case.oracle, case.inputs))
    for got, want in zip(leaves(result), expected, strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-5)


@every_case
def test_vmap_of_jit_agrees_and_the_order_of_rows_does_not_matter(case):
    first = as_jax(case.inputs, jnp.float32)
    second = {n: x if n in case.shared or not x.ndim else x[::-1] for n, x in first.items()}
    stacked = {n: jnp.stack([first[n], second[n]]) for n in first}
    mapped = leaves(jax.vmap(jax.jit(lambda x: case.call(case.function, x)))(stacked))
    expected = leaves(case.call(case.oracle, case.inputs))
    for got, want in zip(mapped, expected, strict=True):
        flipped = want[::-1] if want.ndim else want
        np.testing.assert_allclose(got, np.stack([want, flipped]), rtol=2e-5, atol=1e-5)


@some(lambda case: case.time)
def test_masked_steps_change_nothing_whatever_they_hold(case):
    """T19, T22: what lies behind the mask, NaN included, reaches neither value nor gradient."""
    steps = 3
    length = next(case.inputs[n].shape[1] for n in case.time)

    def extend(name, x):
        if name not in case.time:
            return x
        fill = jnp.nan if x.dtype == jnp.float32 else 0
        return jnp.pad(x, [(0, 0), (0, steps)], constant_values=fill)

    def cut(x):
        return x[:, :length] if x.ndim == 2 else x

    @jax.jit
    def run(inputs):
        def scalar(subset):
            result = jax.tree.map(cut, case.call(case.function, inputs | subset))
            return weighted_sum(result), result

        return jax.grad(scalar, has_aux=True)({n: inputs[n] for n in case.differentiable})

    inputs = as_jax(case.inputs, jnp.float32)
    grads, result = run({name: extend(name, x) for name, x in inputs.items()})
    expected = leaves(case.call(case.oracle, case.inputs))
    for got, want in zip(leaves(result), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-5)
    for name in case.differentiable:
        want = finite_differences(case, name)
        np.testing.assert_allclose(cut(grads[name]), want, rtol=1e-4, atol=1e-5, err_msg=name)
        if name in case.time:
            assert not np.any(grads[name][:, length:]), name


@every_case
def test_integers_where_floats_belong_are_refused(case):
    inputs = as_jax(case.inputs, jnp.float32)
    floats = [n for n, x in inputs.items() if x.dtype == jnp.float32]
    for name in floats:
        wrong = inputs | {name: jnp.zeros(inputs[name].shape, jnp.int32)}
        with pytest.raises(AssertionError):
            case.call(case.function, wrong)


@pytest.mark.parametrize("case", FIRST.values(), ids=FIRST.keys())
def test_half_precision_inputs_are_computed_in_float32(case):
    inputs = as_jax(case.inputs, jnp.bfloat16)
    rounded = {
        n: np.asarray(x, np.float64) if x.dtype == jnp.bfloat16 else np.asarray(x)
        for n, x in inputs.items()
    }
    result = leaves(case.call(case.function, inputs))
    expected = leaves(case.call(case.oracle, rounded))
    for got, want in zip(result, expected, strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_every_public_function_has_a_case():
    functions = {n for n in losses.__all__ if not isinstance(getattr(losses, n), type)}
    assert functions == {case.function_name for case in CASES}
