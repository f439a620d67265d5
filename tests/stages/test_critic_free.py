"""RLOO, GRPO and kin through PPO's iteration: groups, advantages, ratios, no value model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax.errors import ConfigError
from instruct_jax.losses import critic_free_advantages, gspo_loss, reinforce_loss
from instruct_jax.sampling.sampler import generate
from instruct_jax.stages import ppo
from instruct_jax.stages.algorithms import ALGORITHMS, named
from instruct_jax.stages.ppo_config import PPOConfig
from instruct_jax.stages.ppo_losses import policy_loss
from tests.stages import lab as labs
from tests.stages import run_ppo
from tests.stages.lab import CONFIG, KEY, PROMPT, RESPONSE, ROWS

K = 4
FREE = dataclasses.replace(
    CONFIG, samples_per_prompt=K, whiten_advantages="none", missing_eos="subtract"
)
RLOO = dataclasses.replace(FREE, estimator="rloo", ratio="sequence", kl_coef=0.1)
GRPO = dataclasses.replace(
    FREE, estimator="grpo", loss_reduction="seq_mean", kl_coef=0.0, kl_loss_coef=0.04
)
DR_GRPO = dataclasses.replace(
    GRPO, group_scale="none", loss_reduction="seq_sum_const", kl_loss_coef=0.0
)
GSPO = dataclasses.replace(GRPO, ratio="sequence_mean", kl_loss_coef=0.0, clip=3e-4, clip_high=4e-4)
REINFORCE = dataclasses.replace(FREE, estimator="reinforce++", kl_coef=0.1)
ALL = {"rloo": RLOO, "grpo": GRPO, "dr_grpo": DR_GRPO, "gspo": GSPO, "reinforce++": REINFORCE}


def rewards_of(rng):
    """Shaped rewards float64[8, R] of responses of 1 to R tokens, and their mask."""
    lengths = rng.integers(1, RESPONSE + 1, 2 * K)
    where = np.arange(RESPONSE)[None] < lengths[:, None]
    return np.where(where, rng.normal(size=where.shape), 0.0), where


def oracle(config, rewards, where):
    """The advantages in float64, one row after the other."""
    out = np.zeros_like(rewards)
    if config.estimator == "reinforce++":
        for i in range(len(rewards)):
            group = rewards[i // K * K : i // K * K + K].sum(1).mean()
            steps = rewards[i].copy()
            steps[where[i].sum() - 1] -= group
            out[i] = np.cumsum(steps[::-1])[::-1]
        valid = out[where]
        return np.where(where, (out - valid.mean()) / np.sqrt(valid.var() + 1e-8), 0.0)
    totals = rewards.sum(1)
    for i, total in enumerate(totals):
        group = totals[i // K * K : i // K * K + K]
        if config.estimator == "rloo":
            a = total - (group.sum() - total) / (K - 1)
        else:
            a = total - group.mean()
            if config.group_scale == "group":
                a /= group.std(ddof=1) + 1e-4
        out[i] = np.where(where[i], a, 0.0)
    return out


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_has_a_constructor_of_its_papers_values(name):
    """It is what it is called, also where sizes and weights are tuned, and no other."""
    config = ALGORITHMS[name]
    assert named(config) == name
    sizes = {"rollout_batch": 64, "minibatch": 16, "samples_per_prompt": K, "temperature": 0.7}
    weights = {f: 3 * getattr(config, f) for f in ("kl_coef", "kl_loss_coef", "learning_rate")}
    assert named(dataclasses.replace(config, **sizes, **weights)) == name
    assert config.whiten_advantages == "none"
    whitened = named(dataclasses.replace(config, whiten_advantages="rollout"))
    assert whitened == f"{name} but for whiten_advantages 'rollout', there 'none'"


def test_fields_that_make_no_algorithm_are_said():
    """The estimator alone is not GRPO: PPO's penalty and whitening stay on."""
    said = named(PPOConfig(estimator="grpo", samples_per_prompt=4))
    for part in ("whiten_advantages 'rollout'", "kl_coef 0.02"):
        assert part in said
    said = named(dataclasses.replace(ALGORITHMS["GSPO"], clip=0.2, clip_high=None))
    assert said.startswith("GSPO but for clip 0.2, there 0.0003")
    assert named(PPOConfig()) == "PPO" and named(PPOConfig(ptx_coef=27.8)) == "PPO-ptx"
    made = {name: named(config) for name, config in ALL.items()}
    assert made == {
        "rloo": "RLOO", "grpo": "GRPO", "dr_grpo": "Dr. GRPO", "gspo": "GSPO",
        "reinforce++": "REINFORCE++",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "name"),
    [
        ("grpo.py:toyworld", "GRPO"),
        ("grpo.py:deepseekmath", "GRPO"),
        ("grpo.py:dr_grpo", "Dr. GRPO"),
        ("grpo.py:dapo", "DAPO"),
        ("grpo.py:gspo", "GSPO"),
        ("rloo.py:toyworld", "RLOO"),
        ("rloo.py:tldr_6p9b", "RLOO"),
        ("rloo.py:reinforce_pp", "REINFORCE++"),
        ("ppo.py:toyworld_ptx", "PPO-ptx"),
        ("ppo.py:tldr_1b", "PPO"),
    ],
)
def test_presets_make_the_algorithm_that_they_are_called(preset, name):
    from experiments.ppo import Config
    from instruct_jax.cli.config import load_config, resolve

    assert named(resolve(Config, load_config(f"configs/{preset}"), {}).ppo) == name


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
def test_advantages_are_those_of_a_plain_loop_over_groups(config):
    rewards, where = rewards_of(np.random.default_rng(0))
    found = critic_free_advantages(
        jnp.asarray(rewards, jnp.float32),
        where=jnp.asarray(where),
        samples=K,
        estimator=config.estimator,
        scale=config.group_scale,
    )
    np.testing.assert_allclose(found, oracle(config, rewards, where), atol=2e-5)


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
def test_there_is_no_value_model_and_the_ratio_starts_at_one(config):
    lab = labs.make_lab(config)
    experience, metrics = labs.score(lab, labs.sample(lab))
    assert lab.state.value is None
    assert experience.values is None
    assert experience.returns is None
    assert not {"value", "explained_variance", "return_mean"} & metrics.keys()
    assert metrics["score_sd_in_group"] > 0
    state, metrics = labs.step(lab, labs.first(experience))
    assert state.value is None
    assert not {"value_loss", "grad_norm_value"} & metrics.keys()
    assert abs(float(metrics["ratio_error"])) < 1e-5
    assert not labs.same_bits(state.policy.params, lab.state.policy.params)


def test_samples_of_a_prompt_share_it_and_differ():
    """Every prompt is answered K times in a row, with K keys, and read once: what would come of K
    copies of it.
    """
    lab = labs.make_lab(RLOO)
    batch = ppo.IterationBatches(lambda step: labs.prompt_rows(step, rows=ROWS // K), None, 1)(0)
    keys = jax.random.split(KEY, ROWS)

    def sample(copies):
        prompts, mask = (
            jnp.repeat(jnp.asarray(batch[name]), copies, axis=0)
            for name in ("prompts", "prompt_mask")
        )
        options = {"max_new_tokens": labs.RESPONSE, "eos_id": labs.EOS}
        return generate(lab.policy, lab.state.policy.params, prompts, mask, keys, **options)

    once, copied = sample(1), sample(K)
    np.testing.assert_array_equal(once.tokens, copied.tokens)
    prompts = np.asarray(once.tokens[:, :PROMPT]).reshape(-1, K, PROMPT)
    assert (prompts == prompts[:, :1]).all()
    assert len(np.unique(prompts[:, 0], axis=0)) > 1
    assert len(np.unique(np.asarray(once.tokens[:K, PROMPT:]), axis=0)) > 1


def loss_and_gradient(config, lab, batch):
    def loss(params):
        total, count, _ = policy_loss(config, lab.policy)(params, batch, KEY)
        return total / count

    return jax.jit(jax.value_and_grad(loss))(lab.state.policy.params)


def log_probs_of(lab, params, batch):
    length = batch.where.shape[1]
    logits = lab.policy.apply(params, batch.tokens, mask=batch.mask)[:, -length - 1 : -1]
    chosen = jnp.take_along_axis(
        jax.nn.log_softmax(logits), batch.tokens[:, -length:, None], axis=-1
    )[..., 0]
    return jnp.where(batch.where, chosen, 0.0)


def test_rloo_where_the_policy_has_not_moved_is_reinforce_on_whole_responses():
    """Ahmadian et al. 2024: -(A) log pi(y), a mean over responses."""
    lab = labs.make_lab(RLOO)
    batch = labs.first(labs.score(lab, labs.sample(lab))[0])

    def reinforce(params):
        whole = log_probs_of(lab, params, batch).sum(1)
        advantages = batch.advantages[:, 0]
        return reinforce_loss(whole, advantages, jnp.zeros_like(advantages)).mean()

    _, grads = loss_and_gradient(RLOO, lab, batch)
    wanted = jax.jit(jax.grad(reinforce))(lab.state.policy.params)
    np.testing.assert_allclose(labs.flat(grads), labs.flat(wanted), atol=2e-5)
    assert np.abs(labs.flat(wanted)).max() > 1e-2


def test_gspo_is_the_published_loss_after_the_policy_has_moved():
    lab = labs.make_lab(GSPO)
    batch = labs.first(labs.score(lab, labs.sample(lab))[0])
    noise = 0.01 * np.random.default_rng(1).normal(size=batch.log_probs.shape)
    old = jnp.where(batch.where, batch.log_probs + noise.astype(np.float32), 0.0)
    # Advantages of a group sum to 0; one that does not makes the loss more than rounding.
    batch = batch._replace(log_probs=old, advantages=batch.advantages + 1.0)
    bounds = {"clip": GSPO.clip, "clip_high": GSPO.clip_high}
    value, _ = loss_and_gradient(GSPO, lab, batch)
    found = log_probs_of(lab, lab.state.policy.params, batch)
    wanted = gspo_loss(found, old, batch.advantages[:, 0], where=batch.where, **bounds)
    np.testing.assert_allclose(value, wanted.mean(), rtol=1e-5)


def test_the_kl_of_grpo_pulls_in_the_loss_and_not_in_the_reward():
    lab = labs.make_lab(GRPO, reference=1)
    experience, metrics = labs.score(lab, labs.sample(lab))
    assert metrics["reward_kl"] == 0.0
    assert metrics["kl"] > 0.1
    batch = labs.first(experience)
    d = np.asarray(batch.log_probs - batch.ref_log_probs, np.float64)
    where = np.asarray(batch.where)
    k3 = np.where(where, np.expm1(-d) + d, 0.0).sum(1) / where.sum(1)
    with_kl, _ = loss_and_gradient(GRPO, lab, batch)
    without, _ = loss_and_gradient(dataclasses.replace(GRPO, kl_loss_coef=0.0), lab, batch)
    np.testing.assert_allclose(with_kl - without, 0.04 * k3.mean(), rtol=1e-4)


@pytest.mark.parametrize(
    "config", [RLOO, pytest.param(GRPO, marks=pytest.mark.slow)], ids=["rloo", "grpo"]
)
def test_a_run_with_the_mix_taken_up_at_a_checkpoint_ends_with_the_same_bits(config, tmp_path):
    """R7, without a value model in the checkpoint."""
    config = dataclasses.replace(config, ptx_coef=0.5, save_every=1)
    whole = run_ppo.run(tmp_path / "whole", 3, config=config)
    with pytest.raises(run_ppo.Killed):
        run_ppo.run(tmp_path / "stopped", 3, config=config, stop_at=2)
    resumed = run_ppo.run(tmp_path / "stopped", 3, config=config)
    assert run_ppo.fingerprint(resumed) == run_ppo.fingerprint(whole)
    assert resumed.value is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"estimator": "rloo"}, "samples_per_prompt is 1, expected 2 or more"),
        ({"samples_per_prompt": 3}, "rollout_batch 512 is not a multiple of samples_per_prompt 3"),
        ({"ratio": "sequence"}, "ratio 'sequence' needs one advantage a response"),
        (
            {
                "estimator": "grpo",
                "samples_per_prompt": 4,
                "ratio": "sequence_mean",
                "kl_loss_coef": 0.1,
            },
            "kl_loss_coef is a token loss",
        ),
    ],
)
def test_choices_that_do_not_fit_together_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        PPOConfig(**changes)


def test_ppo_with_a_value_model_may_sample_a_prompt_several_times(tmp_path):
    state = run_ppo.run(tmp_path, 1, config=dataclasses.replace(FREE, ptx_coef=0.5))
    assert state.value is not None
