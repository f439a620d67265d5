"""R9: a number that is not finite, or a million times too large, leaves no trace in a model of PPO.

Put into what an update is made of: rewards, advantages (the loss of the policy), returns (that of
the value model), old log-probs (the ratio).
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from tests.stages import lab as labs

# The usual gradients have norms below 10.
CONFIG = dataclasses.replace(labs.CONFIG, skip_above=1e3)
BAD = [jnp.nan, jnp.inf, -jnp.inf, 1e6]


@pytest.fixture(scope="module")
def lab():
    return labs.make_lab(CONFIG)


@pytest.fixture(scope="module")
def rollout(lab):
    return labs.sample(lab)


@pytest.fixture(scope="module")
def batch(lab, rollout):
    return labs.first(labs.score(lab, rollout)[0])


def untouched(before, after):
    """Whether a step was counted as skipped and changed nothing else."""
    counts = [int(x) for x in (after.step, after.skipped, after.skipped_in_a_row, after.updates)]
    names = ("params", "opt_state", "ema")
    same = all(labs.same_bits(getattr(before, name), getattr(after, name)) for name in names)
    return counts == [1, 1, 1, 0] and same


def learnt(before, after):
    """Whether an update was made."""
    finite = all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(after.params))
    return int(after.updates) == 1 and finite and not labs.same_bits(before.params, after.params)


def test_what_is_usual_is_learnt_from(lab, batch):
    state, _ = labs.step(lab, batch)
    assert learnt(lab.state.policy, state.policy) and learnt(lab.state.value, state.value)


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_advantage_skips_the_policy_alone(lab, batch, bad):
    spoilt = batch._replace(advantages=batch.advantages.at[0, 0].set(bad))
    state, _ = labs.step(lab, spoilt)
    assert untouched(lab.state.policy, state.policy) and learnt(lab.state.value, state.value)


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_return_skips_the_value_model_alone(lab, batch, bad):
    spoilt = batch._replace(returns=batch.returns.at[0, 0].set(bad))
    state, _ = labs.step(lab, spoilt)
    assert learnt(lab.state.policy, state.policy) and untouched(lab.state.value, state.value)


@pytest.mark.parametrize("log_ratio", [jnp.nan, jnp.inf, -jnp.inf, jnp.log(1e6)])
def test_a_bad_ratio_moves_the_policy_nowhere(lab, batch, log_ratio):
    """Where the advantage is negative, the side on which the clip does not bound the loss. An
    infinite one is clamped, so that its token has no gradient; the others are learnt from.
    """
    old = batch.log_probs.at[0, 0].add(-log_ratio)
    spoilt = batch._replace(log_probs=old, advantages=batch.advantages.at[0, 0].set(-1.0))
    state, _ = labs.step(lab, spoilt)
    policy = learnt if jnp.isinf(log_ratio) else untouched
    assert policy(lab.state.policy, state.policy) and learnt(lab.state.value, state.value)


@pytest.mark.parametrize("bad", [*BAD, 1e29])
def test_a_bad_reward_skips_what_would_learn_from_it(lab, rollout, bad):
    """All of a rollout: a whitened advantage is finite where the reward is, up to 1e19 or so; of
    larger ones the variance overflows, and they were advantages of 0 without a word (R21).
    """
    head = lab.frozen.reward["head"]
    reward = lab.frozen.reward | {"head": head | {"bias": jnp.full((1,), bad)}}
    spoilt = lab._replace(frozen=lab.frozen._replace(reward=reward))
    state, _ = labs.step(lab, labs.first(labs.score(spoilt, rollout)[0]))
    policy = learnt if bad == 1e6 else untouched
    assert policy(lab.state.policy, state.policy) and untouched(lab.state.value, state.value)
