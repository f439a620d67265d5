"""Numbers of any width, ids of any integer type, and axes of length 0."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax import losses
from tests.losses.case import leaves, weighted_sum
from tests.losses.table import CASES, FIRST, MASKED

NARROW = ("int8", "int16", "uint8", "uint16", "uint32")
WIDE = (*NARROW, "int64", "uint64")
VARIED = {case.function_name: case for case in [*FIRST.values(), *reversed(MASKED)]}


def integers(case):
    return [n for n, x in case.arrays.items() if x.dtype == np.int32]


def with_types(case, floating, integer="int32"):
    types = {"f": floating, "i": integer, "b": bool}
    with np.errstate(over="ignore"):  # 1e30 behind a mask is infinite in float16
        return {n: jnp.asarray(x, types[x.dtype.kind]) for n, x in case.inputs.items()}


def called(case, inputs):
    """The arrays of the result, compiled: a third of the time of one operation after the other."""
    return leaves(jax.jit(lambda x: case.call(case.function, x))(inputs))


def positive(case):
    """The case with 0 where it has the -100 that an unsigned type has not."""
    clean = {n: np.maximum(x, 0) if x.dtype == np.int32 else x for n, x in case.arrays.items()}
    return replace(case, arrays=clean)


@pytest.mark.parametrize("name", [n for n, case in VARIED.items() if integers(case)])
def test_ids_of_every_integer_type_are_the_same_ids(name):
    """Under strict promotion, with 64 bits as well."""
    case = VARIED[name]
    wanted = called(case, with_types(case, "float32"))
    for integer in NARROW:
        now = positive(case) if integer.startswith("u") else case
        found = called(now, with_types(now, "float32", integer))
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, err_msg=integer)
    with jax.enable_x64(True):
        for integer in ("int8", "int64", "uint64"):
            now = positive(case) if integer.startswith("u") else case
            found = called(now, with_types(now, "float32", integer))
            for a, b in zip(found, wanted, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=integer)


def read_out(function, logits, tokens):
    """A function of tokens on the given logits, dense or from states that are the logits."""
    if function.startswith("chunked"):
        head = jnp.eye(logits.shape[-1], dtype=logits.dtype)
        keywords = {"where": jnp.ones(tokens.shape, bool), "chunk": 2}
        result = getattr(losses, function)(logits, head, tokens, **keywords)
        return result[0] if isinstance(result, tuple) else result
    return getattr(losses, function)(logits, tokens)


READERS = (
    "token_log_probs",
    "token_cross_entropy",
    "next_token_loss",
    "chunked_token_log_probs",
    "chunked_token_statistics",
    "chunked_next_token_loss",
    "chunked_cross_entropy_sum",
)


@pytest.mark.parametrize("function", READERS)
def test_a_narrow_id_does_not_wrap_around_a_wide_vocabulary(function, rng):
    """300 columns are 44 in int8; an id of 200 in uint8 is no negative number."""
    logits = jnp.asarray(rng.standard_normal((1, 3, 300)), jnp.float32)
    read = jax.jit(partial(read_out, function))
    for ids, integer in (([1, 100, 127], "int8"), ([1, 200, 255], "uint8")):
        found, wanted = (read(logits, jnp.array([ids], t)) for t in (integer, "int32"))
        np.testing.assert_array_equal(found, wanted)
    with jax.enable_x64(True):
        beyond = jnp.array([[1, 2**32 + 1, 2]], "int64")
        assert np.isnan(read(logits, beyond)).any()


@pytest.mark.parametrize("function", READERS)
@pytest.mark.parametrize(("bad", "integer"), [(-100, "int8"), (7, "int32"), (255, "uint8")])
def test_an_id_outside_of_the_vocabulary_is_nan_in_value_and_in_gradient(
    function, bad, integer, rng
):
    """And harmless to the positions beside it where a mask that is applied later hides it."""
    logits = jnp.asarray(rng.standard_normal((1, 4, 5)), jnp.float32)
    tokens = jnp.array([[0, 1, bad % 256 if integer == "uint8" else bad, 2]], integer)
    read = jax.jit(partial(read_out, function))
    value, gradient = jax.value_and_grad(lambda z: read(z, tokens).sum())(logits)
    assert np.isnan(value)
    row = 1 if "next_token" in function else 2
    assert np.isnan(gradient[0, row]).all()
    if "sum" not in function:
        later = jax.grad(lambda z: read(z, tokens)[0, 0])(logits)
        assert np.isfinite(later).all()


def test_a_pick_outside_of_the_completions_is_nan_in_value_and_in_gradient():
    scores = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    for integer in ("int8", "int32"):
        best = jnp.array([-3, 1], integer)
        found = losses.best_of_k_loss(scores, best)
        gradient = jax.grad(lambda r, b=best: losses.best_of_k_loss(r, b).sum())(scores)
        np.testing.assert_array_equal(np.isnan(found), [True, False])
        np.testing.assert_array_equal(np.isnan(gradient), [[True] * 2, [False] * 2])


@pytest.mark.parametrize("case", VARIED.values(), ids=VARIED.keys())
def test_one_wide_input_makes_the_computation_wide(case):
    """Strict promotion under 64 bits: float32, float64 and int64 side by side."""
    with jax.enable_x64(True):
        inputs = with_types(case, "float64", "int64")
        floats = [n for n in case.arrays if inputs[n].dtype == jnp.float64]
        for name in floats[:1]:
            mixed = inputs | {name: inputs[name].astype(jnp.float32)}
            narrow = with_types(case, "float32", "int64")
            found = called(case, mixed if len(floats) > 1 else narrow)
            wanted = leaves(case.call(case.oracle, case.inputs))
            for a, b in zip(found, wanted, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", FIRST.values(), ids=FIRST.keys())
def test_half_precision_gradients_have_the_dtype_of_their_input_and_are_finite(case, half):
    inputs = with_types(case, half)
    floats = {n: x for n, x in inputs.items() if x.dtype == half}

    @jax.jit
    def gradient(floats):
        return jax.grad(lambda f: weighted_sum(case.call(case.function, inputs | f)))(floats)

    for name, x in gradient(floats).items():
        assert x.dtype == half
        assert np.isfinite(x.astype(jnp.float32)).all(), name


def emptied(case, axis):
    """The inputs without rows, or without what is on their second axis."""
    out = {}
    for name, x in case.inputs.items():
        of = -1 if case.function_name == "labeler_ranking_loss" and axis else axis
        fixed = name in case.shared or case.shared == ("all",) or x.ndim <= axis
        fixed |= name == "labeler_weights" and axis == 1
        out[name] = x if fixed else np.take(x, [], axis=of)
    arrays, masks = ({name: out[name] for name in of} for of in (case.arrays, case.masks))
    return replace(case, arrays=arrays, masks=masks)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("case", VARIED.values(), ids=VARIED.keys())
def test_nothing_in_gives_nothing_out(case, axis):
    """Axes of length 0: finite values and gradients of the right shapes."""
    case = emptied(case, axis)
    inputs = with_types(case, "float32")
    floats = {n: x for n, x in inputs.items() if x.dtype == jnp.float32}

    @jax.jit
    def run(floats):
        def scalar(floats):
            result = case.call(case.function, inputs | floats)
            return weighted_sum(result), result

        return jax.grad(scalar, has_aux=True)(floats)

    gradients, result = run(floats)
    assert all(np.isfinite(x).all() for x in leaves(result))
    for name, gradient in gradients.items():
        assert gradient.shape == inputs[name].shape
        assert np.isfinite(gradient).all(), name


def test_the_tables_have_what_these_tests_need():
    assert {n for n in VARIED if integers(VARIED[n])} >= set(READERS)
    assert len(CASES) > len(FIRST)
