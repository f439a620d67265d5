"""The generation loop, on a model that is a table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax.sampling import generate

VOCAB, EOS = 12, 11
CHI_SQUARE_LIMIT = 24.32  # 7 degrees of freedom, p = 1e-3


def prompts_of(*rows: list[int], width: int = 5, pad: int = VOCAB):
    tokens = np.full((len(rows), width), pad, np.int32)
    for line, row in zip(tokens, rows, strict=True):
        line[width - len(row) :] = row
    return jnp.asarray(tokens), jnp.asarray(tokens != pad)


def keys_of(count: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), count)


def chain(vocab: int = VOCAB) -> np.ndarray:
    """Logits under which token i is all but surely followed by i + 1."""
    rows = np.zeros((vocab, vocab), np.float32)
    rows[np.arange(vocab), (np.arange(vocab) + 1) % vocab] = 30.0
    return rows


def random_rows(seed: int = 0, vocab: int = VOCAB, scale: float = 1.5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(vocab, vocab)).astype(np.float32) * scale


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samples_follow_the_full_softmax_at_the_temperature(table_model, temperature):
    """T8: 1e5 first tokens pass a chi-square test; no truncation unless it is asked for."""
    fake, count = table_model(8), 100_000
    rows = random_rows(1, 8)
    prompts = jnp.full((count, 1), 2, jnp.int32)
    rollout = generate(
        fake.model, fake.params(rows), prompts, prompts == 2, keys_of(count, 5),
        max_new_tokens=1, eos_id=7, temperature=temperature,
    )  # fmt: skip
    weights = np.exp(rows[2].astype(np.float64) / temperature)
    expected = count * weights / weights.sum()
    observed = np.bincount(np.asarray(rollout.tokens)[:, 1], minlength=8)
    assert len(observed) == 8
    assert ((observed - expected) ** 2 / expected).sum() < CHI_SQUARE_LIMIT


def test_kl_estimates_go_negative_under_truncation(table_model):
    """T8: log_probs are of the full softmax, so top-k makes mean(log p - log p_full) misleading."""
    fake, count = table_model(8), 2_000
    rows = random_rows(1, 8)
    prompts = jnp.full((count, 1), 2, jnp.int32)
    reference = rows[2] - np.log(np.exp(rows[2]).sum())
    uniform = -np.log(8.0)

    def mean_log_ratio(top_k):
        rollout = generate(
            fake.model, fake.params(rows), prompts, prompts == 2, keys_of(count),
            max_new_tokens=1, eos_id=7, top_k=top_k,
        )  # fmt: skip
        drawn = np.asarray(rollout.tokens)[:, 1]
        np.testing.assert_allclose(rollout.log_probs[:, 0], reference[drawn], atol=1e-5)
        return float(np.mean(uniform - np.asarray(rollout.log_probs)[:, 0]))

    assert mean_log_ratio(2) < mean_log_ratio(None) < 0  # minus the KL to the uniform, and below it


def test_the_same_keys_give_the_same_rollout_and_the_next_ones_another(table_model):
    """T9: bit for bit."""
    fake = table_model(VOCAB)
    params = fake.params(random_rows())
    prompts, mask = prompts_of([1, 2], [3], [4, 5, 6], [1, 2])

    def rollout(iteration):
        root = jax.random.fold_in(jax.random.key(0), iteration)
        return generate(
            fake.model, params, prompts, mask, jax.random.split(root, 4),
            max_new_tokens=16, eos_id=EOS,
        )  # fmt: skip

    first, again, other = rollout(0), rollout(0), rollout(1)
    for one, two in zip(first, again, strict=True):
        assert np.array_equal(one, two)
    assert not np.array_equal(first.tokens, other.tokens)
    # Rows 0 and 3 hold the same prompt: their keys differ, so do their answers.
    assert not np.array_equal(first.tokens[0], first.tokens[3])


def test_neither_pad_nor_an_unused_column_is_ever_sampled(table_model):
    """T10: 64k tokens, all real."""
    fake, count = table_model(VOCAB), 1_000
    prompts = jnp.full((count, 1), 3, jnp.int32)
    rollout = generate(
        fake.model, fake.params(random_rows() * 0), prompts, prompts == 3, keys_of(count),
        max_new_tokens=64, eos_id=EOS, min_new_tokens=64, temperature=3.0,
    )  # fmt: skip
    assert np.asarray(rollout.tokens).max() < VOCAB
    # The normaliser leaves them out as well: the uniform over the real vocabulary.
    np.testing.assert_allclose(rollout.log_probs, -np.log(VOCAB), rtol=1e-5)


def test_all_after_the_first_end_token_is_pad(table_model):
    """T11: the end token itself has mask 1; log-probs are 0 where the mask is."""
    fake = table_model(VOCAB)
    prompts, mask = prompts_of([8], [2, 9], [10], [1, 5])
    rollout = generate(
        fake.model, fake.params(chain()), prompts, mask, keys_of(4), max_new_tokens=6, eos_id=EOS
    )
    responses = np.asarray(rollout.tokens)[:, 5:]
    assert responses.tolist() == [
        [9, 10, EOS, VOCAB, VOCAB, VOCAB],
        [10, EOS, VOCAB, VOCAB, VOCAB, VOCAB],
        [EOS, VOCAB, VOCAB, VOCAB, VOCAB, VOCAB],
        [6, 7, 8, 9, 10, EOS],
    ]
    assert np.array_equal(rollout.response_mask, responses != VOCAB)
    assert np.array_equal(rollout.mask[:, 5:], rollout.response_mask)
    assert np.array_equal(rollout.tokens[:, :5], prompts)
    assert np.array_equal(rollout.mask[:, :5], mask)
    assert np.all(np.asarray(rollout.log_probs)[~np.asarray(rollout.response_mask)] == 0)
    assert np.all(np.asarray(rollout.log_probs) <= 0)


def test_a_full_length_response_keeps_its_last_token(table_model):
    """T15: no end token is written over what was sampled when the budget runs out."""
    fake = table_model(VOCAB)
    prompts, mask = prompts_of([1])
    rollout = generate(
        fake.model, fake.params(chain()), prompts, mask, keys_of(1), max_new_tokens=4, eos_id=EOS
    )
    assert rollout.tokens[0, 5:].tolist() == [2, 3, 4, 5]
    assert rollout.response_mask.all()


def test_an_end_token_in_the_prompt_stops_nothing(table_model):
    """T14: also as the last token of the prompt."""
    fake = table_model(VOCAB)
    prompts, mask = prompts_of([EOS, 3, 4], [4, EOS])
    rollout = generate(
        fake.model, fake.params(chain()), prompts, mask, keys_of(2), max_new_tokens=3, eos_id=EOS
    )
    assert rollout.tokens[:, 5:].tolist() == [[5, 6, 7], [0, 1, 2]]


def test_stop_tokens_end_a_row_like_the_end_token(table_model):
    """T16: the configured stop ids end the row and count as its last token."""
    fake = table_model(VOCAB)
    prompts, mask = prompts_of([3], [6], [8])
    rollout = generate(
        fake.model, fake.params(chain()), prompts, mask, keys_of(3),
        max_new_tokens=6, eos_id=EOS, stop_ids=(5, 8),
    )  # fmt: skip
    assert rollout.response_mask.sum(axis=1).tolist() == [2, 2, 3]
    assert rollout.tokens[:, 5:8].tolist() == [[4, 5, VOCAB], [7, 8, VOCAB], [9, 10, EOS]]


def test_no_end_or_stop_token_comes_before_the_minimum_length(table_model):
    fake = table_model(VOCAB)
    prompts, mask = prompts_of([10], [4])
    rollout = generate(
        fake.model, fake.params(chain()), prompts, mask, keys_of(2, 4),
        max_new_tokens=8, eos_id=EOS, stop_ids=(5,), min_new_tokens=3,
    )  # fmt: skip
    responses = np.asarray(rollout.tokens)[:, 5:]
    assert not np.isin(responses[:, :3], (EOS, 5, VOCAB)).any()


def test_greedy_is_the_argmax_loop(table_model):
    fake = table_model(VOCAB)
    rows = random_rows(4)
    prompts, mask = prompts_of([1], [2], [3])
    rollout = generate(
        fake.model, fake.params(rows), prompts, mask, keys_of(3),
        max_new_tokens=9, eos_id=EOS, temperature=0,
    )  # fmt: skip
    log_probs = rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True))
    for b, token in enumerate([1, 2, 3]):
        for t in range(int(rollout.response_mask[b].sum())):
            best = int(rows[token].argmax())
            assert int(rollout.tokens[b, 5 + t]) == best
            np.testing.assert_allclose(rollout.log_probs[b, t], log_probs[token, best], atol=1e-5)
            token = best


def test_the_loop_ends_with_its_longest_row(table_model):
    """JAX-2: as many steps as the longest response, not as many as the budget."""
    fake = table_model(VOCAB)
    prompts, mask = prompts_of([8], [6], [10])
    rollout = generate(
        fake.model, fake.params(chain()), prompts, mask, keys_of(3), max_new_tokens=500, eos_id=EOS
    )
    jax.block_until_ready(rollout)
    jax.effects_barrier()
    assert fake.steps == 5


def test_a_row_without_a_prompt_stays_empty_and_holds_nothing_up(table_model):
    fake = table_model(VOCAB)
    prompts, mask = prompts_of([9], [])
    rollout = generate(
        fake.model, fake.params(chain()), prompts, mask, keys_of(2), max_new_tokens=50, eos_id=EOS
    )
    jax.block_until_ready(rollout)
    jax.effects_barrier()
    assert fake.steps == 2
    assert not rollout.response_mask[1].any() and (rollout.tokens[1] == VOCAB).all()


def test_one_program_for_one_set_of_settings(table_model):
    """T56: new keys, prompts and parameters do not compile again."""
    traces = 0
    fake = table_model(VOCAB)
    decode = fake.model.decode

    def counted(*args, **kwargs):
        nonlocal traces
        traces += 1
        return decode(*args, **kwargs)

    model = fake.model._replace(decode=counted)
    after_the_first = 0
    for seed in range(3):
        prompts, mask = prompts_of([1 + seed], [2, 3])
        generate(
            model, fake.params(random_rows(seed)), prompts, mask, keys_of(2, seed),
            max_new_tokens=4, eos_id=EOS,
        )  # fmt: skip
        after_the_first = after_the_first or traces
    assert traces == after_the_first > 0


BAD = {
    "temperature": dict(temperature=-0.1),
    "top_k": dict(top_k=0),
    "top_p": dict(top_p=0.0),
    "min_new_tokens": dict(min_new_tokens=5),
    "max_length": dict(max_new_tokens=5000),
    "outside the vocabulary": dict(eos_id=VOCAB),
    "end token -1": dict(stop_ids=(-1,)),
}


@pytest.mark.parametrize("message", BAD)
def test_settings_that_make_no_sense_are_refused(table_model, message):
    fake = table_model(VOCAB)
    prompts, mask = prompts_of([1])
    settings = dict(max_new_tokens=4, eos_id=EOS) | BAD[message]
    with pytest.raises(ValueError, match=message):
        generate(fake.model, fake.params(chain()), prompts, mask, keys_of(1), **settings)


def test_arrays_that_do_not_fit_are_refused(table_model):
    fake = table_model(VOCAB)
    prompts, mask = prompts_of([1], [2])
    params, settings = fake.params(chain()), dict(max_new_tokens=4, eos_id=EOS)
    with pytest.raises(ValueError, match="keys"):
        generate(fake.model, params, prompts, mask, jax.random.key(0), **settings)
    with pytest.raises(ValueError, match="keys"):
        generate(fake.model, params, prompts, mask, jnp.zeros((2,), jnp.uint32), **settings)
    with pytest.raises(ValueError, match="prompt_mask"):
        generate(fake.model, params, prompts, mask[:, :3], keys_of(2), **settings)
    with pytest.raises(ValueError, match="prompts"):
        generate(fake.model, params, prompts.astype(jnp.float32), mask, keys_of(2), **settings)
