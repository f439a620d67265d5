"""What lies behind a mask is not there: in every function, in every input, whatever it is."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax import losses
from tests.losses.case import behind_the_mask, hidden_entries, weighted_sum
from tests.losses.table import FIRST, MASKED

WITHOUT_A_BATCH = {
    "adaptive_kl_update", "best_of_n_kl", "fixed_kl_update", "gold_score", "peak_distance",
}  # fmt: skip
DIFFERENTIABLE_SETTINGS = ("discount", "gae_lambda", "kl_coef", "margin", "temperature")


def as_float32(inputs):
    return {
        name: jnp.asarray(x, jnp.float32 if np.issubdtype(x.dtype, np.floating) else None)
        for name, x in inputs.items()
    }


@pytest.mark.parametrize("case", MASKED, ids=lambda case: case.name)
def test_nothing_behind_a_mask_reaches_a_value_or_a_gradient(case):
    """NaN, infinities, -100 and other ids: as if nothing were there, of settings as well."""
    settings = {
        name: jnp.float32(case.settings[name])
        for name in DIFFERENTIABLE_SETTINGS
        if isinstance(case.settings.get(name), float)
    }

    @jax.jit
    def run(inputs, settings):
        floats = {n: x for n, x in inputs.items() if x.dtype == jnp.float32}

        def scalar(floats, settings):
            now = inputs | floats
            positional = [now[name] for name in case.arrays]
            keywords = {name: now[name] for name in case.masks}
            result = case.function(*positional, **keywords, **(case.hyper | settings))
            return weighted_sum(result), result

        return jax.grad(scalar, (0, 1), has_aux=True)(floats, settings)

    clean = run(as_float32(behind_the_mask(case, -0.25, 1)), settings)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(clean))
    for number, integer in ((np.nan, -100), (np.inf, 99), (-np.inf, 2**31 - 1)):
        found = run(as_float32(behind_the_mask(case, number, integer)), settings)
        jax.tree.map(np.testing.assert_array_equal, found, clean)
    for name, gradient in clean[0][0].items():
        hidden = hidden_entries(case, name)
        assert hidden is None or not np.asarray(gradient)[hidden].any(), name


def test_every_function_of_a_batch_has_a_mask_and_a_case_with_something_hidden():
    names = {n for n in losses.__all__ if not isinstance(getattr(losses, n), type)}
    assert names - WITHOUT_A_BATCH == {case.function_name for case in MASKED}
    for case in MASKED:
        hidden = [h for name in case.inputs if (h := hidden_entries(case, name)) is not None]
        assert hidden, case.name
        assert all(h.any() for h in hidden), case.name


@pytest.mark.parametrize("name", FIRST)
def test_arrays_are_positional_and_masks_and_settings_are_keywords(name):
    parameters = inspect.signature(getattr(losses, name)).parameters.values()
    positional = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    assert positional == list(FIRST[name].arrays)
    assert all(p.default is p.empty for p in parameters if p.kind is not p.KEYWORD_ONLY)


@pytest.mark.parametrize("case", MASKED, ids=lambda case: case.name)
def test_a_mask_that_is_not_boolean_is_refused(case):
    inputs = as_float32(case.inputs)
    wrong = inputs | {"where": inputs["where"].astype(jnp.float32)}
    with pytest.raises(AssertionError):
        case.call(case.function, wrong)
