"""Rows sorted by length and computed no wider than they need: the same results in less time."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax.errors import ConfigError
from instruct_jax.stages.lengths import by_length, response_widths, shorter_forms
from instruct_jax.stages.ppo_update import minibatch_update, update_on_rollout
from instruct_jax.training.state import Forms, accumulate_gradients, split_rows
from tests.stages import lab as labs
from tests.stages.lab import CONFIG, KEY, PROMPT, RESPONSE, ROWS

SORTED = dataclasses.replace(CONFIG, micro_batches=2, length_buckets=3)


def with_lengths(rollout, lengths):
    """The rollout with responses of these lengths, padding behind them."""
    where = np.arange(RESPONSE)[None] < np.asarray(lengths)[:, None]
    prompt = np.asarray(rollout.mask)[:, :PROMPT]
    tokens = np.array(rollout.tokens)
    tokens[:, PROMPT:][~where] = labs.SHAPE.pad_id
    return rollout._replace(
        tokens=jnp.asarray(tokens),
        mask=jnp.asarray(np.concatenate([prompt, where], 1)),
        response_mask=jnp.asarray(where),
        log_probs=jnp.where(where, rollout.log_probs, 0.0),
    )


@pytest.fixture(scope="module")
def skewed():
    """A rollout of lengths 1 to RESPONSE, most of them short, in no order."""
    lengths = np.random.default_rng(0).integers(1, 4, ROWS)
    lengths[3] = RESPONSE
    return with_lengths(labs.sample(labs.make_lab(reference=1)), lengths)


def test_parts_go_by_length_and_lose_no_row():
    lengths = np.array([3, 9, 1, 7, 5, 2, 8, 4])
    where = jnp.arange(9)[None] < lengths[:, None]
    order = by_length(where, 4, buckets=2)
    assert sorted(order.tolist()) == list(range(8))
    parts = split_rows(jnp.asarray(lengths)[order], 4)
    assert parts.tolist() == [[1, 2], [3, 4], [5, 7], [8, 9]]


def test_widths_end_with_the_whole_response():
    assert response_widths(24, 5) == (5, 10, 15, 20, 24)
    assert response_widths(3, 3) == (1, 2, 3)


@pytest.mark.parametrize(("longest", "width"), [(1, 4), (4, 4), (5, 8), (8, 8), (9, 12), (12, 12)])
def test_a_part_gets_the_least_width_with_room_for_its_longest_response(longest, width):
    forms = shorter_forms(lambda rows: rows["where"], 12, 3)
    rows = {"where": jnp.arange(12)[None] < jnp.array([[1], [longest]])}
    rows["tokens"] = jnp.zeros((2, 5 + 12), jnp.int32)
    cut = forms.cuts[int(forms.smallest(rows))](rows)
    assert cut["where"].shape == (2, width) and cut["tokens"].shape == (2, 5 + width)


def test_scores_and_advantages_are_those_of_whole_rows(skewed):
    whole, of_whole = labs.score(labs.make_lab(reference=1), skewed)
    short, of_short = labs.score(labs.make_lab(SORTED, reference=1), skewed)
    for name in ("log_probs", "ref_log_probs", "advantages", "values", "returns"):
        np.testing.assert_allclose(getattr(short, name), getattr(whole, name), atol=1e-5)
    assert of_whole.keys() == of_short.keys()
    for name, value in of_whole.items():
        np.testing.assert_allclose(of_short[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "reduction",
    [
        "token_mean",
        pytest.param("seq_mean", marks=pytest.mark.slow),
        pytest.param("seq_sum_const", marks=pytest.mark.slow),
    ],
)
def test_an_iterations_updates_are_those_of_whole_rows(skewed, reduction):
    """The state after all minibatches; `seq_sum_const` divides by the budget, not the width."""
    states = []
    for config in (dataclasses.replace(SORTED, length_buckets=1), SORTED):
        config = dataclasses.replace(config, loss_reduction=reduction)
        lab = labs.make_lab(config, reference=1)
        experience, _ = labs.score(lab, skewed)
        step = partial(minibatch_update, lab.recipe(), lab.frozen)
        rows = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        run = jax.jit(partial(update_on_rollout, config, step, rows))
        states.append(run(lab.state, experience, None, jnp.float32(0.0), KEY)[0])
    assert labs.distance(states[0].policy.params, states[1].policy.params) <= 1e-5
    assert labs.distance(states[0].value.params, states[1].value.params) <= 1e-5
    moved = labs.distance(states[0].policy.params, labs.policy_params())
    assert moved > 1e-3, "there was something to compare"


def test_a_short_part_is_not_computed_wide():
    """The form that is chosen is the one that runs: others would give another sum."""

    def loss(params, rows, key):
        return params * rows.shape[1], jnp.float32(1.0), {}

    forms = Forms(
        lambda rows: (rows.sum() > 4).astype(jnp.int32), (lambda x: x[:, :2], lambda x: x)
    )
    batch = jnp.concatenate([jnp.ones((2, 6)), jnp.zeros((2, 6))])
    out = accumulate_gradients(
        loss, jnp.float32(1.0), batch[jnp.array([0, 2, 1, 3])], KEY, micro_batches=2, forms=forms
    )
    assert float(out.grads) == (6 + 2) / 2


@pytest.mark.parametrize("buckets", [0, RESPONSE + 1])
def test_buckets_that_make_no_sense_are_refused(buckets):
    with pytest.raises(ConfigError, match=r"length_buckets.*(not between 1 and|1 or more)"):
        dataclasses.replace(CONFIG, length_buckets=buckets)
