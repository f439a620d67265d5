"""From experience to the next state: minibatches, the two losses, the pretraining mix."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from instruct_jax.models.transformer import PARTITION_RULES
from instruct_jax.stages import ppo
from instruct_jax.stages.experience import Experience
from instruct_jax.stages.ppo_config import PPOConfig
from instruct_jax.stages.ppo_losses import _ratio_sums, policy_loss, ptx_loss, ratio_logs
from instruct_jax.stages.ppo_models import PPOState
from instruct_jax.stages.ppo_update import update_on_rollout
from instruct_jax.training.mesh import batch_sharding, make_mesh
from instruct_jax.training.state import accumulate_gradients, init_state, shard_state
from tests.stages import lab as labs
from tests.stages.lab import CONFIG, KEY, MINIBATCH

G = 0.5
MIX = dataclasses.replace(CONFIG, ptx_coef=G)


@pytest.fixture(scope="module")
def batch():
    """The first minibatch of a policy that has moved away from the reference."""
    lab = labs.make_lab(reference=1)
    experience, _ = labs.score(lab, labs.sample(lab))
    return labs.first(experience)


def moved(lab, state):
    """How one update moved the policy."""
    return labs.flat(state.policy.params) - labs.flat(lab.state.policy.params)


# --- minibatches --------------------------------------------------------------------------------


def ledger(config, key, *, kl=0.0, kl_coef=0.02):
    """The episodes that every update of an iteration was given, and the state after it.

    Instead of learning, each update writes down the numbers of its rows.
    """

    def note(state, batch, ptx, key):
        del ptx, key
        policy = state.policy
        rows = policy.params["rows"].at[policy.step].set(batch.tokens[:, 0])
        policy = dataclasses.replace(
            policy, params={"rows": rows}, step=policy.step + 1, skipped=policy.skipped + 1
        )
        names = ("excess", "excess_square", "error", "max", "min_negated")
        metrics = {f"ratio_{name}": policy.step.astype(jnp.float32) for name in names}
        return PPOState(policy, state.value, state.kl_coef), metrics

    mesh = make_mesh("data:1")
    empty = {"rows": jnp.zeros((config.updates, config.minibatch), jnp.int32)}
    tx = optax.identity()
    state = PPOState(init_state(empty, tx), init_state(empty, tx), jnp.float32(kl_coef))
    column = jnp.zeros((config.rollout_batch, 1))
    numbers = jnp.arange(config.rollout_batch, dtype=jnp.int32)[:, None]
    experience = Experience(numbers, column == 0, column == 0, *[column] * 5)
    update = partial(update_on_rollout, config, note, batch_sharding(mesh))
    state, metrics = jax.jit(update)(state, experience, None, jnp.float32(kl), key)
    return np.asarray(state.policy.params["rows"]), state, metrics


def test_every_episode_is_used_once_in_every_inner_epoch():
    """T32: 8 minibatches of 64 partition the 512; a new permutation for each epoch and key."""
    config = PPOConfig(inner_epochs=2)
    rows, _, metrics = ledger(config, KEY)
    assert rows.shape == (16, 64)
    epochs = rows.reshape(2, 512)
    assert (np.sort(epochs, axis=1) == np.arange(512)).all()
    orders = [*epochs, *ledger(config, jax.random.fold_in(KEY, 1))[0].reshape(2, 512)]
    for i, order in enumerate(orders):
        assert all((order != other).mean() > 0.9 for other in [np.arange(512), *orders[:i]])
    assert np.array_equal(ledger(config, KEY)[0], rows), "the key decides"
    assert metrics["ratio_error"] == 1.0, "logged of the first minibatch (T1)"
    assert metrics["skipped"] == 16, "counted over the run (T44)"


def test_the_controller_moves_the_penalty_once_an_iteration_or_never():
    """T27, PPO-17: the golden value; without a target the coefficient stays."""
    config = PPOConfig(kl_target=6.0, kl_horizon=10_000)
    _, state, _ = ledger(config, KEY, kl=12.0, kl_coef=0.15)
    np.testing.assert_allclose(state.kl_coef, 0.151536, rtol=1e-6)
    _, state, _ = ledger(PPOConfig(), KEY, kl=12.0)
    assert state.kl_coef == jnp.float32(0.02)


@pytest.mark.parametrize("kl", [np.nan, np.inf, -np.inf])
def test_a_kl_that_is_not_finite_leaves_the_penalty_as_it_was(kl):
    """One would make it NaN for good."""
    config = PPOConfig(kl_target=6.0, kl_horizon=10_000)
    _, state, _ = ledger(config, KEY, kl=kl, kl_coef=0.15)
    assert state.kl_coef == jnp.float32(0.15)


def test_the_variance_of_the_ratio_is_no_difference_of_large_numbers():
    """At 1e-6, what the paper's learning rates give, E[rho^2] - E[rho]^2 is rounding noise."""
    rng = np.random.default_rng(0)
    log_ratio = rng.normal(0, 1e-6, (2, 4, 64)).astype(np.float32)
    where = jnp.asarray(rng.random((4, 64)) < 0.8)
    history = []
    for minibatch in log_ratio:
        sums = _ratio_sums(jnp.asarray(minibatch), where)
        history.append({k: v[0] / v[1] if isinstance(v, tuple) else v for k, v in sums.items()})
    logs = ratio_logs(jax.tree.map(lambda *x: jnp.stack(x), *history))
    ratio = np.exp(log_ratio.astype(np.float64))[:, np.asarray(where)]
    np.testing.assert_allclose(logs["ratio_var"], ratio.var(), rtol=1e-3)
    np.testing.assert_allclose(logs["ratio"], ratio.mean(), rtol=1e-7)
    np.testing.assert_allclose(logs["ratio_error"], np.abs(ratio[0] - 1).mean(), rtol=1e-4)
    bounds = [logs["ratio_min"], logs["ratio_max"]]
    np.testing.assert_allclose(bounds, [ratio.min(), ratio.max()], rtol=2e-7)


# --- policy and value ---------------------------------------------------------------------------


def test_the_policy_learns_from_advantages_and_the_value_model_from_returns(batch):
    """T35: what changes one leaves the other's parameters bit-equal."""
    lab = labs.make_lab()
    state, _ = labs.step(lab, batch)
    assert not labs.same_bits(state.policy.params, lab.state.policy.params)
    assert not labs.same_bits(state.value.params, lab.state.value.params)
    other, _ = labs.step(lab, batch._replace(returns=batch.returns + 1.0))
    assert labs.same_bits(other.policy, state.policy)
    assert not labs.same_bits(other.value.params, state.value.params)
    other, _ = labs.step(lab, batch._replace(advantages=-batch.advantages))
    assert labs.same_bits(other.value, state.value)
    assert not labs.same_bits(other.policy.params, state.policy.params)


def test_where_policy_and_reference_agree_the_penalty_has_no_gradient():
    """T34: beta 0 and beta 0.02 give equal first-minibatch gradients, to 1e-6."""
    lab = labs.make_lab()
    rollout = labs.sample(lab)
    moves = []
    for beta in (0.0, 0.02):
        state = dataclasses.replace(lab.state, kl_coef=jnp.float32(beta))
        experience, _ = labs.score(lab._replace(state=state), rollout)
        moves.append(moved(lab, labs.step(lab, labs.first(experience))[0]))
    np.testing.assert_allclose(*moves, atol=1e-6)
    assert np.abs(moves[0]).max() > 1e-3


@pytest.mark.parametrize("broken", ["advantages", "returns"])
def test_a_minibatch_that_is_not_finite_is_skipped_and_counted(batch, broken):
    """T44: parameters, optimizer and average keep every bit; the other model goes on."""
    lab = labs.make_lab(MIX)
    spoilt = getattr(batch, broken).at[0, 0].set(jnp.nan)
    state, _ = labs.step(lab, batch._replace(**{broken: spoilt}), labs.ptx_rows(rows=MINIBATCH))
    kept, learnt = ("policy", "value") if broken == "advantages" else ("value", "policy")
    before, after = getattr(lab.state, kept), getattr(state, kept)
    for name in ("params", "opt_state", "ema"):
        assert labs.same_bits(getattr(after, name), getattr(before, name)), name
    assert [int(x) for x in (after.step, after.skipped, after.updates)] == [1, 1, 0]
    other = getattr(state, learnt)
    assert [int(x) for x in (other.step, other.skipped, other.updates)] == [1, 0, 1]


# --- the pretraining mix ------------------------------------------------------------------------


def gradients(lab, batch, text):
    """dL_pg and dL_ptx, each by itself."""

    @jax.jit
    def both(params):
        pg = accumulate_gradients(policy_loss(lab.config, lab.policy), params, batch, KEY)
        mix = accumulate_gradients(ptx_loss(lab.config, lab.policy), params, text, KEY)
        return (pg.grads, mix.grads), (pg.loss, mix.loss)

    return both(lab.state.policy.params)


def test_the_update_takes_the_sum_of_both_gradients_once(batch):
    """T36: its input is dL_pg + g * dL_ptx to 1e-6, and there is one update."""
    lab = labs.make_lab(MIX)
    text = labs.ptx_rows(rows=MINIBATCH)
    state, metrics = labs.step(lab, batch, text)
    (pg, mix), losses = gradients(lab, batch, text)
    pg, mix = labs.flat(pg), labs.flat(mix)
    np.testing.assert_allclose(-moved(lab, state), pg + G * mix, atol=1e-6)
    assert int(state.policy.step) == int(state.policy.updates) == 1
    logged = [metrics[k] for k in ("policy_loss", "pretrain_nll", "grad_norm_pg", "grad_norm_ptx")]
    norms = np.linalg.norm(pg), G * np.linalg.norm(mix)
    np.testing.assert_allclose(logged, [*losses, *norms], rtol=1e-5)
    cosine = pg @ mix / np.linalg.norm(pg) / np.linalg.norm(mix)
    np.testing.assert_allclose(metrics["grad_cosine"], cosine, atol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(pg + G * mix), rtol=1e-5)


def test_twice_the_coefficient_turns_the_one_update(batch):
    """T37: the coefficient weighs the two gradients against each other; no second update."""
    text = labs.ptx_rows(rows=MINIBATCH)
    moves = []
    for coefficient in (G, 2 * G):
        lab = labs.make_lab(dataclasses.replace(CONFIG, ptx_coef=coefficient))
        state, _ = labs.step(lab, batch, text)
        assert jax.tree.leaves(state.policy.opt_state) == [1]
        moves.append(moved(lab, state))
    cosine = moves[0] @ moves[1] / np.linalg.norm(moves[0]) / np.linalg.norm(moves[1])
    assert 0.0 < cosine < 0.995
    (pg, mix), _ = gradients(lab, batch, text)
    pg, mix = labs.flat(pg), labs.flat(mix)
    np.testing.assert_allclose(-moves[1], pg + 2 * G * mix, atol=1e-6)
    adam = [np.sign(pg + g * mix) for g in (G, 2 * G)]
    assert (adam[0] != adam[1]).mean() > 0.01, "Adam's first step is the sign, and that turns too"


def test_the_mix_gives_eight_rows_an_episode_without_mask_or_padding():
    """T38: 512 sequences per 64 episodes, 2.048M in all; every token is real and is a target."""
    config = PPOConfig(ptx_coef=27.8)
    rows = config.minibatch * config.ptx_ratio
    assert rows == 512
    assert config.iterations * config.updates * rows == 2_048_000
    text = labs.text_rows(rows=config.updates * rows, length=3)
    batches = ppo.IterationBatches(labs.prompt_rows, lambda step: text, config.updates)
    ptx = batches(0)["text"]
    assert set(ptx) == {"tokens", "mask", "loss_mask"}
    assert ptx["tokens"].shape == (8, 512, 3)
    assert np.array_equal(ptx["tokens"].reshape(-1, 3), text["tokens"])
    assert ptx["mask"].all() and ptx["loss_mask"].all()


@pytest.mark.parametrize("coefficient", [0.0, 1.0])
def test_without_a_coefficient_there_is_no_mix_at_all(tmp_path, monkeypatch, coefficient):
    """T36: g = 0 runs the very program of PPO, even where text is at hand: bit-equal."""
    monkeypatch.setattr(ppo, "run_loop", lambda step, state, *, batch_at, **_: batch_at(0))
    batch = ppo.train(
        dataclasses.replace(CONFIG, ptx_coef=coefficient),
        labs.make_lab().policy,
        labs.make_lab().scalar,
        labs.policy_params(),
        labs.reward_params(),
        labs.prompt_rows,
        ptx=labs.text_rows,
        eos_id=labs.EOS,
        mesh=make_mesh("data:1"),
        workdir=tmp_path,
    )
    assert set(batch) == {"prompts", "prompt_mask"} | ({"text"} if coefficient else set())


def test_the_two_reductions_of_the_mix_differ_by_the_tokens_of_a_row(batch):
    """PPO-13: a mean over tokens, or the mean of the rows' sums."""
    text = labs.ptx_rows(rows=MINIBATCH)
    results = []
    for reduction in ("token_mean", "seq_sum_mean"):
        lab = labs.make_lab(dataclasses.replace(MIX, ptx_reduction=reduction))
        _, (_, loss) = gradients(lab, batch, text)
        results.append(loss)
    np.testing.assert_allclose(results[1], results[0] * (text["tokens"].shape[1] - 1), rtol=1e-6)


# --- meshes -------------------------------------------------------------------------------------


def iterate(mesh, micro_batches, ptx_micro_batches=None):
    """One whole iteration on a mesh: sampling, scoring, updates; whitening wherever there is."""
    config = dataclasses.replace(
        MIX,
        whiten_rewards=True,
        whiten_advantages="minibatch",
        micro_batches=micro_batches,
        ptx_micro_batches=ptx_micro_batches,
    )
    # At rate 0.1, so that the parameters stay near 1 and 1e-6 is within fp32.
    lab = labs.make_lab(config, reference=1, tx=optax.sgd(0.1))
    mesh = make_mesh(mesh)
    given = lab.frozen.reference, lab.frozen.reward
    frozen, state = ppo.placed_models(lab.recipe(), *given, mesh)
    # The reference is not where the policy starts.
    policy = shard_state(lab.state.policy, mesh, PARTITION_RULES)
    state = dataclasses.replace(state, policy=policy)
    run = ppo.make_iteration(lab.recipe(), frozen, state, mesh)
    batches = ppo.IterationBatches(labs.prompt_rows, labs.text_rows, config.updates)
    with jax.set_mesh(mesh):
        return jax.device_get(run(state, batches(0), KEY))


@pytest.fixture(scope="module")
def whole():
    """The iteration on one device, in one piece."""
    return iterate("data:1", 1)


@pytest.mark.parametrize(
    ("mesh", "micro_batches", "ptx_micro_batches"),
    [("data:8", 2, None), ("data:2,fsdp:2,tensor:2", 1, None), ("data:1", 1, 8), ("data:8", 2, 1)],
)
def test_devices_and_micro_batches_change_nothing(whole, mesh, micro_batches, ptx_micro_batches):
    """T24: whitening, losses and updates to 1e-6."""
    state, metrics = iterate(mesh, micro_batches, ptx_micro_batches)
    assert metrics.keys() == whole[1].keys()
    for name, value in whole[1].items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-6, atol=1e-6, err_msg=name)
    assert labs.distance(state, whole[0]) <= 1e-6
