"""The engine: slots that refill, a cache that moves, and the rollout both must agree with."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax.losses import token_log_probs
from instruct_jax.models.quantization import with_int8_cache
from instruct_jax.models.transformer import PARTITION_RULES, TransformerConfig, language_model
from instruct_jax.sampling import Engine, Sampling, choose, generate, respond
from instruct_jax.training.mesh import make_mesh, tree_shardings

VOCAB, EOS, BUDGET, WIDTH, ROOM = 31, 30, 16, 21, 40
CONFIG = TransformerConfig(
    vocab_size=VOCAB,
    num_layers=2,
    d_model=16,
    num_heads=4,
    num_kv_heads=2,
    max_length=96,
    vocab_multiple=32,
    init_std=0.4,
    positions="rope",
    # One global and one local layer: what a local one sees hangs on columns, not on positions.
    attention_pattern="gl",
    window=6,
)
SAMPLING = Sampling(stop_ids=(EOS,))
# Two widths of prefix, and a cache that is moved; two prompts are asked for more than once.
LENGTHS = (3, 20, 1, 17, 9, 18, 2, 14, 5, 12)


@pytest.fixture(scope="module")
def lm():
    """(model, params)."""
    model = language_model(CONFIG)
    return model, model.init(jax.random.key(0))


@pytest.fixture(scope="module")
def prompts():
    """Distinct prompts, then the second and the fifth again, three times each."""
    rng = np.random.default_rng(0)
    distinct = [rng.integers(0, VOCAB - 1, n).tolist() for n in LENGTHS]
    return [*distinct, *[distinct[1]] * 3, *[distinct[4]] * 3]


def keys_of(count, seed=0):
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), jnp.arange(count))


def padded(prompts, width=WIDTH):
    tokens = np.full((len(prompts), width), VOCAB, np.int32)
    for line, prompt in zip(tokens, prompts, strict=True):
        line[width - len(prompt) :] = prompt
    return jnp.asarray(tokens), jnp.asarray(tokens != VOCAB)


def static(lm, prompts, keys, **settings):
    """Tokens and log-probs of every row by one `generate` over all of them."""
    settings = dict(max_new_tokens=BUDGET, eos_id=EOS) | settings
    rollout = generate(*lm, *padded(prompts), keys, **settings)
    lengths = np.asarray(rollout.response_mask).sum(axis=1)
    responses = np.asarray(rollout.tokens)[:, WIDTH:]
    return [
        (tuple(tokens[:n].tolist()), log_probs[:n])
        for tokens, log_probs, n in zip(
            responses, np.asarray(rollout.log_probs), lengths, strict=True
        )
    ]


@functools.cache
def full_forward():
    model = language_model(CONFIG)
    return jax.jit(lambda params, tokens, mask: model.apply(params, tokens, mask=mask))


def naive(lm, prompts, keys, sampling, *, minimum=0):
    """The same without a cache: every token by a forward over the whole row, right-padded."""
    tokens = np.full((len(prompts), ROOM), VOCAB, np.int32)
    ends = np.array([len(prompt) for prompt in prompts])
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    responses, log_probs, rows = [[] for _ in prompts], [[] for _ in prompts], np.arange(len(ends))
    live = np.ones(len(prompts), bool)
    one = jax.jit(choose, static_argnames="sampling")
    for t in range(BUDGET):
        logits = full_forward()(lm[1], tokens, tokens != VOCAB)[rows, ends - 1]
        steps = jnp.full(ends.shape, t, jnp.int32)
        drawn, log_prob = one(logits, keys, steps, jnp.full_like(steps, minimum), sampling=sampling)
        for b in np.flatnonzero(live):
            responses[b].append(int(drawn[b]))
            log_probs[b].append(float(log_prob[b]))
            tokens[b, ends[b]] = drawn[b]
            live[b] = not (t + 1 >= minimum and sampling.ending(tuple(responses[b])))
            ends[b] += 1
    return [(tuple(r), np.array(p)) for r, p in zip(responses, log_probs, strict=True)]


def same(responses, expected, atol=1e-5):
    assert [r.tokens for r in responses] == [tokens for tokens, _ in expected]
    for response, (_, log_probs) in zip(responses, expected, strict=True):
        np.testing.assert_allclose(response.log_probs, log_probs, atol=atol)


def lengths_vary(expected):
    lengths = [len(tokens) for tokens, _ in expected]
    return min(lengths) < BUDGET // 3 and max(lengths) == BUDGET


MODES = {
    "plain": {},
    "greedy": dict(temperature=0.0),
    "truncated": dict(temperature=0.7, top_k=12, top_p=0.9, min_p=0.02),
}


@pytest.mark.parametrize("mode", MODES)
def test_refilled_slots_draw_what_one_shot_and_what_a_loop_without_a_cache_draws(lm, prompts, mode):
    """Refill = static = naive, token for token; log-probs to 1e-5."""
    sampling, keys = dataclasses.replace(SAMPLING, **MODES[mode]), keys_of(len(prompts))
    expected = static(lm, prompts, keys, **MODES[mode])
    if mode == "plain":
        assert lengths_vary(expected)
    same(respond(*lm, prompts, keys, sampling, max_new_tokens=BUDGET, slots=4), expected)
    tokens, log_probs = zip(*naive(lm, prompts, keys, sampling), strict=True)
    assert list(tokens) == [tokens for tokens, _ in expected]
    for ours, (_, theirs) in zip(log_probs, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("slots", [1, 64])
def test_neither_the_number_of_slots_nor_the_rows_beside_it_change_a_response(lm, prompts, slots):
    keys = keys_of(len(prompts))
    expected = static(lm, prompts, keys)
    same(respond(*lm, prompts, keys, SAMPLING, max_new_tokens=BUDGET, slots=slots), expected)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_order_of_arrival_changes_nothing(lm, prompts, seed):
    """Shuffled, and half of the rows submitted while the others decode."""
    keys, expected = keys_of(len(prompts)), static(lm, prompts, keys_of(len(prompts)))
    order = np.random.default_rng(seed).permutation(len(prompts)).tolist()
    engine = Engine(*lm, SAMPLING, slots=4)
    half, responses = len(order) // 2, {}
    for part in (order[:half], order[half:]):
        numbers = engine.submit(
            [prompts[i] for i in part], keys[np.array(part)], max_new_tokens=BUDGET
        )
        assert numbers == list(range(numbers[0], numbers[0] + len(part)))
        responses |= engine.step()
    responses |= dict(engine.run())
    assert engine.step() == {}
    same([responses[order.index(i)] for i in range(len(order))], expected)


def test_log_probs_are_those_of_the_training_forward(lm, prompts):
    """To 1e-5, at the sampling temperature."""
    sampling = Sampling(stop_ids=(EOS,), temperature=0.7)
    responses = respond(
        *lm, prompts, keys_of(len(prompts)), sampling, max_new_tokens=BUDGET, slots=4
    )
    rows = [[*prompt, *r.tokens] for prompt, r in zip(prompts, responses, strict=True)]
    tokens = np.full((len(rows), ROOM), VOCAB, np.int32)
    for line, row in zip(tokens, rows, strict=True):
        line[: len(row)] = row
    logits = full_forward()(lm[1], tokens, tokens != VOCAB)
    targets = jnp.minimum(jnp.roll(jnp.asarray(tokens), -1, axis=1), VOCAB - 1)
    scored = np.asarray(token_log_probs(logits, targets, temperature=0.7))
    for line, prompt, response in zip(scored, prompts, responses, strict=True):
        start = len(prompt) - 1
        np.testing.assert_allclose(
            response.log_probs, line[start : start + len(response.tokens)], atol=1e-5
        )


def test_rows_have_limits_of_their_own(lm, prompts):
    """A row's budget and minimum are its own, also beside others'."""
    keys, engine = keys_of(len(prompts)), Engine(*lm, SAMPLING, slots=4)
    limits = [(BUDGET, 0), (BUDGET, 12), (1, 1)]
    for i, prompt in enumerate(prompts):
        budget, minimum = limits[i % 3]
        engine.submit([prompt], keys[i : i + 1], max_new_tokens=budget, min_new_tokens=minimum)
    responses = dict(engine.run())
    for j, (budget, minimum) in enumerate(limits):
        expected = static(lm, prompts, keys, max_new_tokens=budget, min_new_tokens=minimum)[j::3]
        same([responses[i] for i in range(j, len(prompts), 3)], expected)
        assert all(minimum <= len(tokens) <= budget for tokens, _ in expected)


def test_a_stop_sequence_ends_a_row_with_its_last_token(lm, prompts):
    """Engine = static = naive; a sequence in the prompt, or across its end, stops nothing."""
    keys = keys_of(len(prompts))
    free = [tokens for tokens, _ in static(lm, prompts, keys)]
    sequence = next(t[3:5] for t in free if len(t) > 8 and t[3:5] != t[2:4])
    across = (prompts[0][-1], next(t[0] for t in free[:1]))
    sampling = Sampling(stop_ids=(EOS,), stop_sequences=(sequence, across))
    expected = static(lm, prompts, keys, stop_sequences=sampling.stop_sequences)
    responses = respond(*lm, prompts, keys, sampling, max_new_tokens=BUDGET, slots=4)
    same(responses, expected)
    assert [t for t, _ in naive(lm, prompts, keys, sampling)] == [t for t, _ in expected]
    stopped = [r for r in responses if r.tokens[-2:] == sequence]
    assert stopped and all(r.ended for r in stopped)
    assert len(responses[0].tokens) > 1
    for response, whole in zip(responses, free, strict=True):
        assert response.tokens == whole[: len(response.tokens)]


def test_no_stop_sequence_counts_before_the_minimum(lm, prompts):
    keys = keys_of(len(prompts))
    free = [tokens for tokens, _ in static(lm, prompts, keys, min_new_tokens=8)]
    sampling = Sampling(stop_ids=(EOS,), stop_sequences=(free[0][2:4], free[0][6:8]))
    responses = respond(
        *lm, prompts, keys, sampling, max_new_tokens=BUDGET, min_new_tokens=8, slots=4
    )
    assert responses[0].tokens == free[0][:8] and responses[0].ended
    expected = naive(lm, prompts, keys, sampling, minimum=8)
    assert [r.tokens for r in responses] == [tokens for tokens, _ in expected]


def test_slots_on_a_mesh_draw_what_one_device_draws(lm, prompts):
    model, params = lm
    mesh, keys = make_mesh("data:2,fsdp:2,tensor:2"), keys_of(len(prompts))
    sharded = jax.device_put(params, tree_shardings(mesh, PARTITION_RULES, params))
    responses = respond(
        model, sharded, prompts, keys, SAMPLING, max_new_tokens=BUDGET, slots=4, mesh=mesh
    )
    same(responses, static(lm, prompts, keys), atol=1e-4)


def test_slots_with_an_int8_cache_draw_what_one_shot_with_it_draws(lm, prompts):
    """The sampler's own log-probs are those of the rounded cache, and differ from the full ones."""
    model, params = lm
    rounded, keys = (with_int8_cache(model), params), keys_of(len(prompts))
    expected = static(rounded, prompts, keys)
    responses = respond(*rounded, prompts, keys, SAMPLING, max_new_tokens=BUDGET, slots=4)
    # A last bit may tip a key over to the next of its 255 values, and that a draw that was nearly
    # a tie: on some processors one row goes another way, after the same beginning.
    whole = sum(r.tokens == tokens for r, (tokens, _) in zip(responses, expected, strict=True))
    assert whole >= len(prompts) - 2
    for response, (tokens, log_probs) in zip(responses, expected, strict=True):
        pairs = zip(response.tokens, tokens, strict=False)
        common = next((i for i, (a, b) in enumerate(pairs) if a != b), len(tokens))
        assert common > 0
        np.testing.assert_allclose(response.log_probs[:common], log_probs[:common], atol=0.02)
    exact = static(lm, prompts, keys)
    gaps = [
        abs(theirs[0] - ours[0])
        for (whole, theirs), (tokens, ours) in zip(exact, expected, strict=True)
        if whole[0] == tokens[0]
    ]
    assert 1e-5 < max(gaps) < 0.2


def test_a_prompt_is_read_once_for_its_samples(lm, prompts):
    """n keys a prompt: the rollout of each prompt n times in a row."""
    few, keys = prompts[:4], keys_of(12)
    settings = dict(max_new_tokens=BUDGET, eos_id=EOS)
    shared = generate(*lm, *padded(few), keys, **settings)
    apart = generate(*lm, *padded([p for p in few for _ in range(3)]), keys, **settings)
    for one, two in zip(shared[:3], apart[:3], strict=True):
        assert np.array_equal(one, two)
    np.testing.assert_allclose(shared.log_probs, apart.log_probs, atol=1e-5)


def test_what_cannot_be_decoded_is_refused(lm):
    engine = Engine(*lm, SAMPLING, slots=2)
    keys, settings = keys_of(2), dict(max_new_tokens=4)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        engine.submit([[1], []], keys, **settings)
    with pytest.raises(ValueError, match="exceed the model's max_length 96"):
        engine.submit([[1], [1] * 93], keys, **settings)
    with pytest.raises(ValueError, match=r"one jax.random.key a prompt, shape \[1\]"):
        engine.submit([[1]], keys, **settings)
    with pytest.raises(ValueError, match="slots must be at least 1"):
        Engine(*lm, SAMPLING, slots=0)
    with pytest.raises(ValueError, match="end token 31 is outside the vocabulary of 31"):
        Engine(*lm, Sampling(stop_ids=(EOS,), stop_sequences=((3, VOCAB),)), slots=1)
    assert engine.step() == {} and dict(engine.run()) == {}


def test_a_prompt_that_just_fits_the_model_is_answered(lm):
    """Widths are rounded up for fewer programs, but never past the model's positions."""
    model = language_model(dataclasses.replace(CONFIG, max_length=37))
    prompt = np.random.default_rng(1).integers(0, VOCAB - 1, 35).tolist()
    (response,) = respond(model, lm[1], [prompt], keys_of(1), SAMPLING, max_new_tokens=2)
    assert 1 <= len(response.tokens) <= 2
    with pytest.raises(ValueError, match="= 38 exceed the model's max_length 37"):
        respond(model, lm[1], [prompt], keys_of(1), SAMPLING, max_new_tokens=3)
