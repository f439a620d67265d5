"""From a rollout to rewards, values and advantages: what one iteration takes as given."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax.models.transformer import TransformerConfig, language_model, scalar_model
from instruct_jax.sampling.sampler import Rollout
from instruct_jax.stages import experience as experiences
from instruct_jax.stages import ppo_losses
from instruct_jax.stages.ppo_config import PPOConfig
from instruct_jax.stages.ppo_logs import sampler_logs
from instruct_jax.stages.ppo_models import Models, Recipe
from instruct_jax.stages.pretrain import language_loss
from tests.stages import lab as labs
from tests.stages.lab import CONFIG, EOS, KEY, PROMPT, RESPONSE, ROWS, SHAPE

COOL = dataclasses.replace(CONFIG, temperature=0.7)
# Without a future, G_t = V_t + A_t = R_t: the returns are the rewards themselves.
REWARDS = dataclasses.replace(
    CONFIG, discount=0.0, whiten_advantages="none", missing_eos="replace", missing_eos_penalty=9.0
)
SHIFT = dataclasses.replace(CONFIG, discount=0.9, whiten_advantages="none")


@pytest.fixture(scope="module")
def start():
    """The lab in which the policy is the reference, with a rollout and its experience."""
    lab = labs.make_lab()
    rollout = labs.sample(lab)
    return lab, rollout, *labs.score(lab, rollout)


def ends(where):
    """E: the index of each row's last response token."""
    return np.asarray(where).sum(-1) - 1


def terminal_rewards(lab, rollout):
    """The score of each response under REWARDS: the reward model's, or -9 without an EOS."""
    ended = (np.asarray(rollout.tokens)[:, PROMPT:] == EOS).any(-1)
    return np.where(ended, labs.scores_of(lab, rollout), -9.0)


def ratio_errors(lab, batch):
    """|ratio - 1| of every valid token, from the loss that is trained."""
    loss = ppo_losses.policy_loss(lab.config, lab.policy)
    spots = (
        jnp.eye(batch.where.size, dtype=bool).reshape(-1, *batch.where.shape) & batch.where[None]
    )

    @jax.jit
    def errors(params, batch, spots):
        def error(where):
            return loss(params, batch._replace(where=where), KEY)[2]["ratio_error"][0]

        return jax.vmap(error)(spots)

    return np.asarray(errors(lab.state.policy.params, batch, spots))


# --- log-probs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, COOL], ids=["temperature 1", "temperature 0.7"])
def test_the_ratio_is_one_where_the_policy_has_not_moved(config):
    """T1, T4: max |rho - 1| <= 1e-5 over valid tokens, also far from the reference."""
    lab = labs.make_lab(config, reference=1)
    experience, _ = labs.score(lab, labs.sample(lab))
    errors = ratio_errors(lab, labs.first(experience))
    assert errors.max() <= 1e-5
    moved = experience._replace(log_probs=experience.log_probs - 0.01)
    assert ratio_errors(lab, labs.first(moved)).max() > 9e-3, "the measure itself"


def test_in_bfloat16_the_ratio_is_one_on_average():
    """T1: mean |rho - 1| <= 5e-3."""
    lab = labs.make_lab(reference=1, shape=dataclasses.replace(SHAPE, dtype="bfloat16"))
    experience, metrics = labs.score(lab, labs.sample(lab))
    batch = labs.first(experience)
    assert ratio_errors(lab, batch).sum() / np.asarray(batch.where).sum() <= 5e-3
    assert metrics["sampler_gap"] > 0, "bfloat16 it is"


def test_before_the_first_update_the_kl_is_zero_and_the_reward_is_the_score():
    """T2: and it stands at E alone."""
    lab = labs.make_lab(REWARDS)
    rollout = labs.sample(lab)
    experience, metrics = labs.score(lab, rollout)
    assert abs(metrics["kl"]) / RESPONSE <= 1e-6 and abs(metrics["kl_k3"]) / RESPONSE <= 1e-6
    rewards, last = np.array(experience.returns), ends(rollout.response_mask)
    at_end = rewards[np.arange(ROWS), last]
    np.testing.assert_allclose(at_end, terminal_rewards(lab, rollout), atol=1e-5)
    rewards[np.arange(ROWS), last] = 0.0
    assert np.abs(rewards).max() <= 1e-6


def test_a_temperature_leaves_the_kl_at_zero():
    """T2, T4: at 0.7."""
    lab = labs.make_lab(COOL)
    _, metrics = labs.score(lab, labs.sample(lab))
    assert abs(metrics["kl"]) / RESPONSE <= 1e-6 and abs(metrics["kl_k3"]) / RESPONSE <= 1e-6
    assert metrics["sampler_gap_max"] < 1e-4, "the sampler divides as well"


@pytest.mark.parametrize("config", [CONFIG, COOL], ids=["temperature 1", "cool"])
def test_the_samplers_log_probs_can_be_the_old_ones(monkeypatch, config):
    """In float32 the ratio still starts at 1 (T1), and the policy is not asked once more."""
    lab = labs.make_lab(config)
    rollout = labs.sample(lab)
    by_forward, exact = labs.score(lab, rollout)
    lab = lab._replace(config=dataclasses.replace(config, old_log_probs="sampler"))
    asked = []
    original = experiences.response_scores

    def response_scores(model, params, *rows, **options):
        asked.append(params)
        return original(model, params, *rows, **options)

    monkeypatch.setattr(experiences, "response_scores", response_scores)
    by_sampler, metrics = labs.score(lab, rollout)
    assert len(asked) == 1, "the reference alone"
    for name in ("log_probs", "advantages", "returns"):
        np.testing.assert_allclose(getattr(by_sampler, name), getattr(by_forward, name), atol=2e-5)
    assert ratio_errors(lab, labs.first(by_sampler)).max() <= 1e-5
    assert "sampler_gap" not in metrics
    # An estimate from all the tokens that were drawn.
    tokens = float(np.asarray(rollout.response_mask).sum())
    assert abs(metrics["entropy"] - exact["entropy"]) < 5.0 / tokens**0.5


@pytest.mark.parametrize("forgetful", ["policy", "reference"])
def test_one_temperature_left_out_is_seen_in_the_kl(monkeypatch, forgetful):
    """T4: dividing by the temperature in one of the two only breaks T2 by more than 1e-2."""
    lab = labs.make_lab(COOL)
    rollout = labs.sample(lab)
    calls = []

    def response_scores(*rows, temperature, **options):
        calls.append(("policy", "reference")[len(calls)])
        temperature = 1.0 if calls[-1] == forgetful else temperature
        return original(*rows, temperature=temperature, **options)

    original = experiences.response_scores
    monkeypatch.setattr(experiences, "response_scores", response_scores)
    program = partial(labs.scoring, lab.recipe())
    _, metrics = jax.jit(program)(lab.state, lab.frozen, rollout)
    assert calls == ["policy", "reference"]
    assert abs(metrics["kl"]) / metrics["response_length"] > 1e-2


def test_the_loss_divides_by_the_temperature_too(monkeypatch):
    """T4: without it the ratio is not 1."""
    lab = labs.make_lab(COOL)
    experience, _ = labs.score(lab, labs.sample(lab))
    original = ppo_losses.response_scores
    monkeypatch.setattr(
        ppo_losses, "response_scores", lambda *rows, temperature: original(*rows, temperature=1.0)
    )
    assert ratio_errors(lab, labs.first(experience)).mean() > 1e-2


def test_dropout_is_off_in_rollout_scoring_and_loss(start):
    """T3: a model that was trained with dropout acts, scores and learns as one without."""
    lab, rollout, experience, metrics = start
    dropping = dataclasses.replace(
        SHAPE, residual_dropout=0.5, embedding_dropout=0.5, attention_dropout=0.5
    )
    other = labs.make_lab(shape=dropping)
    assert labs.same_bits(labs.sample(other), rollout)
    assert labs.same_bits(labs.score(other, rollout), (experience, metrics))
    batch = labs.first(experience)
    steps = [labs.step(other, batch, key=jax.random.key(i)) for i in (1, 2)]
    assert labs.same_bits(*steps) and labs.same_bits(steps[0], labs.step(lab, batch))
    text, params = labs.ptx_rows(rows=4), lab.state.policy.params
    for loss, drops in (
        (ppo_losses.ptx_loss(CONFIG, other.policy), False),
        (language_loss(other.policy, dropout=True), True),
    ):
        total = jax.jit(lambda key, loss=loss: loss(params, text, key)[0])
        assert (total(jax.random.key(1)) != total(jax.random.key(2))) == drops


def test_padding_on_the_left_changes_nothing(start):
    """T5: no log-prob, value, score or advantage by more than 1e-5 (n = 1 and 7: see models)."""
    lab, rollout, experience, metrics = start
    pads = 63
    wide = rollout._replace(
        tokens=jnp.pad(rollout.tokens, ((0, 0), (pads, 0)), constant_values=labs.PAD),
        mask=jnp.pad(rollout.mask, ((0, 0), (pads, 0))),
    )
    padded, padded_metrics = labs.score(lab, wide)
    for name in ("log_probs", "values", "advantages", "returns"):
        np.testing.assert_allclose(
            getattr(padded, name), getattr(experience, name), atol=1e-5, err_msg=name
        )
    for name in ("score", "score_min", "score_max", "kl", "entropy"):
        np.testing.assert_allclose(padded_metrics[name], metrics[name], atol=1e-5, err_msg=name)


def test_scoring_takes_the_memory_of_a_micro_batch_and_gives_the_numbers_of_the_whole(start):
    """NUM-5: the update's own shapes; the read-out of one part is held at a time."""
    lab, rollout, experience, _ = start
    sizes, config = [], dataclasses.replace(CONFIG, micro_batches=8)
    for each in (dataclasses.replace(CONFIG, minibatch=ROWS), config):
        recipe = lab._replace(config=each).recipe()
        read = jax.jit(partial(experiences.read_rollout, recipe))
        program = read.lower(lab.frozen.models(lab.state), rollout).compile()
        sizes.append(program.memory_analysis().temp_size_in_bytes)
    assert sizes[1] < 0.3 * sizes[0]
    parts, _ = labs.score(lab._replace(config=config), rollout)
    for name in ("log_probs", "ref_log_probs", "values", "advantages"):
        np.testing.assert_allclose(
            getattr(parts, name), getattr(experience, name), atol=1e-5, err_msg=name
        )


def test_the_memory_of_scoring_falls_with_the_micro_batches():
    """512 rows of 64 + 64 tokens, a model of 4 layers, 128 wide, vocabulary 512 (LOG, section 11):
    322 MiB when all rows were read at once, which no number of micro-batches changed.
    """
    shape = TransformerConfig(
        vocab_size=512, num_layers=4, d_model=128, num_heads=4, max_length=128
    )
    rows, prompt, response = 512, 64, 64
    models = language_model(shape), scalar_model(shape)
    params = [jax.eval_shape(model.init, labs.KEY) for model in models]
    tokens = jax.ShapeDtypeStruct((rows, prompt + response), jnp.int32)
    where = jax.ShapeDtypeStruct((rows, response), jnp.bool_)
    rollout = Rollout(
        tokens,
        jax.ShapeDtypeStruct(tokens.shape, jnp.bool_),
        where,
        jax.ShapeDtypeStruct(where.shape, jnp.float32),
    )
    sizes = []
    for parts in (1, 16):
        config = PPOConfig(
            episodes=rows,
            rollout_batch=rows,
            minibatch=64,
            micro_batches=parts,
            prompt_length=prompt,
            response_length=response,
            warmup_iterations=0,
        )
        recipe = Recipe(config, *models, labs.DESCENT, labs.DESCENT, EOS)
        policy, scalar = params
        read = jax.jit(partial(experiences.read_rollout, recipe))
        program = read.lower(Models(policy, policy, scalar, scalar), rollout).compile()
        sizes.append(program.memory_analysis().temp_size_in_bytes / 2**20)
    # One minibatch of the eight, then a sixteenth of that.
    assert sizes[0] < 60
    assert sizes[1] < min(30, 0.2 * sizes[0])


def test_the_gap_of_the_sampler_is_told_by_its_size_and_its_bands():
    """NUM-4: in nats, and the shares of exp(trainer - sampler) in three bands."""
    gaps = np.array([0.0, 0.0005, -0.0015, 0.0015, 0.005, -0.03, 0.2, 9.0])
    where = jnp.arange(8)[None] < 7
    logs = sampler_logs(jnp.asarray(gaps, jnp.float32)[None] - 1.0, jnp.full((1, 8), -1.0), where)
    found = gaps[:7]
    wanted = {
        "sampler_gap": np.abs(found).mean(),
        "sampler_gap_rms": np.sqrt((found**2).mean()),
        "sampler_gap_max": 0.2,
        "sampler_within_0.001": 3 / 7,
        "sampler_within_0.01": 5 / 7,
        "sampler_within_0.05": 6 / 7,
    }
    assert logs.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(logs[name], value, rtol=1e-4, err_msg=name)


# --- rewards ------------------------------------------------------------------------------------


def test_the_score_enters_at_the_last_token_of_the_response():
    """T17: at index 2 of [a, b, EOS, PAD, PAD], at R - 1 of a full one, at 0 of [EOS]."""
    lab = labs.make_lab(REWARDS)
    full = [1, 2, 3, 4, 5, 6, 7]
    rollout = labs.written([3, 4, EOS], [*full, EOS], [*full, 8], [EOS], prompt=[9, 8, 7])
    experience, _ = labs.score(lab, rollout)
    expected = np.zeros((4, RESPONSE), np.float32)
    spots = [2, RESPONSE - 1, RESPONSE - 1, 0]
    expected[np.arange(4), spots] = terminal_rewards(lab, rollout)[:4]
    np.testing.assert_allclose(experience.returns[:4], expected, atol=1e-5)
    assert expected[2, -1] == -9.0, "a full response without its end has broken the rule"


def test_rewards_sum_to_the_score_less_the_penalty():
    """T18: for every response, to 1e-5."""
    lab = labs.make_lab(REWARDS, reference=1)
    rollout = labs.sample(lab)
    experience, metrics = labs.score(lab, rollout)
    forward = jax.jit(lambda p, rollout: lab.policy.apply(p, rollout.tokens, mask=rollout.mask))
    logits = forward(lab.frozen.reference, rollout)
    logits = np.asarray(logits, np.float64)[:, PROMPT - 1 : -1, : labs.VOCAB]
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    where = np.asarray(rollout.response_mask)
    tokens = np.where(where, rollout.tokens[:, PROMPT:], 0)
    reference = np.take_along_axis(log_probs, tokens[..., None], -1)[..., 0]
    kl = np.where(where, np.asarray(experience.log_probs) - reference, 0.0).sum(-1)
    scores = terminal_rewards(lab, rollout)
    np.testing.assert_allclose(
        experience.returns.sum(-1), scores - CONFIG.kl_coef * kl, rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(metrics["kl"], kl.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["reward_kl"], -CONFIG.kl_coef * kl.mean(), rtol=1e-5)
    np.testing.assert_allclose(
        metrics["reward_total"], scores.mean() + metrics["reward_kl"], rtol=1e-4
    )
    assert kl.mean() > 0.1, "two different networks"


def test_only_a_response_can_miss_its_end_and_the_end_is_the_configured_one():
    """T14, T16: an EOS in the prompt changes nothing; another stop id, another verdict."""
    lab = labs.make_lab(REWARDS)
    unended, ended = [1, 2, 3, 4, 5, 6, 7, 8], [1, EOS]
    rollout = labs.written(unended, ended, prompt=[9, EOS, 7])
    scores = labs.scores_of(lab, rollout)
    experience, metrics = labs.score(lab, rollout)
    np.testing.assert_allclose(experience.returns[0, RESPONSE - 1], -9.0, atol=1e-5)
    np.testing.assert_allclose(experience.returns[1, 1], scores[1], atol=1e-5)
    assert metrics["eos_rate"] == 0.5
    np.testing.assert_allclose(metrics["score"], scores.mean(), rtol=1e-5, err_msg="logged raw")

    other, metrics = labs.score(lab, rollout, eos_id=8)
    np.testing.assert_allclose(other.returns[0, RESPONSE - 1], scores[0], atol=1e-5)
    np.testing.assert_allclose(other.returns[1, 1], -9.0, atol=1e-5)
    assert metrics["eos_rate"] == 0.5


def test_what_stands_after_the_end_changes_nothing(start):
    """T19: tokens after E touch neither the experience nor a loss nor a gradient."""
    lab, rollout, experience, metrics = start
    after = np.concatenate([np.zeros((ROWS, PROMPT), bool), ~np.asarray(rollout.response_mask)], 1)
    assert after.any()
    noise = np.random.default_rng(0).integers(0, labs.VOCAB, after.shape)
    noisy = rollout._replace(tokens=jnp.where(after, noise, rollout.tokens).astype(jnp.int32))
    other, other_metrics = labs.score(lab, noisy)
    assert labs.same_bits(other._replace(tokens=experience.tokens), experience)
    assert labs.same_bits(other_metrics, metrics)
    a, b = (labs.step(lab, labs.first(x)) for x in (experience, other))
    assert labs.same_bits(a, b)


def test_values_and_advantages_after_the_end_reach_no_loss(start):
    """T19: whatever the arrays hold there."""
    lab, _, experience, _ = start
    spoilt = experience._replace(
        **{
            name: jnp.where(experience.where, getattr(experience, name), 9.0)
            for name in ("log_probs", "values", "advantages", "returns")
        }
    )
    a, b = (labs.step(lab, labs.first(x)) for x in (experience, spoilt))
    assert labs.same_bits(a, b)
    for name in ("log_probs", "values", "advantages", "returns"):
        assert not np.asarray(getattr(experience, name))[~np.asarray(experience.where)].any(), name


def test_a_shift_of_the_score_shifts_the_advantages_by_its_discounted_self():
    """T29: by c * (discount * lambda)^(E - t), at fixed values."""
    lab = labs.make_lab(SHIFT)
    rollout = labs.sample(lab)
    head = lab.frozen.reward["head"]
    shifted = {**lab.frozen.reward, "head": {**head, "bias": head["bias"] + 3.0}}
    before, metrics = labs.score(lab, rollout)
    after, shifted_metrics = labs.score(
        lab._replace(frozen=lab.frozen._replace(reward=shifted)), rollout
    )
    distance = ends(rollout.response_mask)[:, None] - np.arange(RESPONSE)[None]
    expected = np.where(rollout.response_mask, 3.0 * (0.9 * 0.95) ** np.maximum(distance, 0), 0.0)
    np.testing.assert_allclose(after.advantages - before.advantages, expected, atol=1e-5)
    np.testing.assert_allclose(shifted_metrics["score"] - metrics["score"], 3.0, rtol=1e-5)


def test_advantages_are_whitened_over_the_rollout_and_returns_are_not(start):
    """T22, PPO-8, PPO-9."""
    _, rollout, experience, metrics = start
    where = np.asarray(experience.where)
    valid = np.asarray(experience.advantages)[where]
    np.testing.assert_allclose([valid.mean(), valid.var()], [0.0, 1.0], atol=1e-4)
    plain = np.asarray(experience.returns - experience.values)[where]
    np.testing.assert_allclose(valid, (plain - plain.mean()) / plain.std(), atol=1e-4)
    returns = np.asarray(experience.returns, np.float64)[where]
    np.testing.assert_allclose(metrics["return_mean"], returns.mean(), atol=1e-5)
    np.testing.assert_allclose(metrics["return_var"], returns.var(), rtol=1e-4)
    explained = 1.0 - plain.var() / returns.var()
    np.testing.assert_allclose(metrics["explained_variance"], explained, rtol=1e-3)
    unwhitened, _ = labs.score(labs.make_lab(SHIFT), rollout)
    np.testing.assert_allclose(
        unwhitened.returns, unwhitened.values + unwhitened.advantages, atol=1e-6
    )


def test_the_value_model_starts_as_the_reward_model(start):
    """T43: V read at E is the score, bias included."""
    lab, rollout, _, _ = start
    forward = jax.jit(lambda p, rollout: lab.scalar.apply(p, rollout.tokens, mask=rollout.mask))
    values = np.asarray(forward(lab.state.value.params, rollout))
    at_end = values[np.arange(ROWS), PROMPT + ends(rollout.response_mask)]
    np.testing.assert_allclose(at_end, labs.scores_of(lab, rollout), atol=1e-6)
