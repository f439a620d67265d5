"""The chunked head is the dense head: same numbers, an eighth of the memory, any sharding."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from instruct_jax.losses import (
    chunked_cross_entropy_sum,
    chunked_next_token_loss,
    chunked_token_log_probs,
    chunked_token_statistics,
    next_token_loss,
    token_entropy,
    token_log_probs,
)


def arguments(rng, batch, length, width, vocab, dtype=jnp.float32):
    hidden = jnp.asarray(rng.standard_normal((batch, length, width)), dtype)
    head = jnp.asarray(rng.standard_normal((width, vocab)) / np.sqrt(width), dtype)
    return hidden, head, jnp.asarray(rng.integers(0, vocab, (batch, length)), jnp.int32)


def value_and_gradients(loss, hidden, head, tokens):
    weights = jnp.linspace(0.5, 1.5, tokens.size, dtype=jnp.float32).reshape(tokens.shape)

    def scalar(hidden, head):
        losses = loss(hidden, head, tokens)
        return (losses * weights[:, : losses.shape[1]]).sum(), losses

    return jax.jit(jax.grad(scalar, (0, 1), has_aux=True))(hidden, head)


@pytest.mark.parametrize("chunk", [3, 8])
def test_chunked_and_dense_agree_at_the_gpt2_vocabulary(rng, chunk):
    """50,257 columns; 3 does not divide the length."""
    inputs = arguments(rng, 1, 8, 4, 50_257)

    def dense(hidden, head, tokens):
        return token_log_probs(hidden @ head, tokens, temperature=0.7)

    def chunked(hidden, head, tokens):
        return chunked_token_log_probs(hidden, head, tokens, chunk=chunk, temperature=0.7)

    gradients, log_probs = value_and_gradients(chunked, *inputs)
    wanted_gradients, wanted = value_and_gradients(dense, *inputs)
    np.testing.assert_allclose(log_probs, wanted, atol=1e-5)
    for a, b in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("row_blocks", [1, 2])
def test_only_the_targets_are_read_out_and_they_are_as_in_the_dense_form(rng, share, row_blocks):
    """Targets anywhere in a row, one row without any; a soft cap, smoothing, z-loss."""
    hidden, head, tokens = arguments(rng, 4, 7, 6, 11)
    where = jnp.asarray(rng.random((4, 7)) < share).at[2].set(False)
    options = {"label_smoothing": 0.1, "z_loss": 1e-2, "vocab_size": 9}

    def chunked(hidden, head, tokens):
        more = {"chunk": 4, "softcap": 2.0, "row_blocks": row_blocks}
        return chunked_next_token_loss(hidden, head, tokens, where=where, **more, **options)

    def dense(hidden, head, tokens):
        logits = 2.0 * jnp.tanh(hidden @ head / 2.0)
        return jnp.where(where[:, 1:], next_token_loss(logits, tokens, **options), 0.0)

    gradients, losses = value_and_gradients(chunked, hidden, head, tokens)
    wanted_gradients, wanted = value_and_gradients(dense, hidden, head, tokens)
    np.testing.assert_allclose(losses, wanted, atol=1e-6)
    for a, b in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("chunk", [2, 4, 100])
@pytest.mark.parametrize("row_blocks", [1, 2])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_summed_cross_entropy_is_the_sum_of_the_losses(rng, share, row_blocks, chunk):
    """And so are its gradients, whatever they are scaled by: a soft cap, padded columns."""
    hidden, head, tokens = arguments(rng, 4, 7, 6, 11)
    tokens, where = tokens % 9, jnp.asarray(rng.random((4, 7)) < share).at[2].set(False)
    options = {"vocab_size": 9, "softcap": 2.0}

    def summed(hidden, head):
        more = {"chunk": chunk, "row_blocks": row_blocks, "hits": True}
        loss, hits = chunked_cross_entropy_sum(hidden, head, tokens, where=where, **more, **options)
        return 0.3 * loss, hits

    def dense(hidden, head):
        logits = jnp.where(jnp.arange(11) < 9, 2.0 * jnp.tanh(hidden @ head / 2.0), -1e9)
        hits = jnp.where(where, logits.argmax(-1) == tokens, False).sum()
        return -0.3 * jnp.where(where, token_log_probs(logits, tokens), 0.0).sum(), hits

    got, gradients = jax.jit(jax.value_and_grad(summed, (0, 1), has_aux=True))(hidden, head)
    wanted, wanted_gradients = jax.value_and_grad(dense, (0, 1), has_aux=True)(hidden, head)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(summed(hidden, head), wanted, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_summed_id_outside_of_the_head_is_nan_and_any_other_is_not_seen(rng):
    hidden, head, _ = arguments(rng, 1, 3, 4, 5)
    tokens = jnp.array([[1, 5, -100]])
    for where, finite in (([True, False, False], True), ([True, True, False], False)):
        loss, _ = chunked_cross_entropy_sum(hidden, head, tokens, where=jnp.array([where]))
        assert np.isfinite(loss) == finite


@pytest.mark.parametrize("chunk", [3, 100])
def test_a_hit_is_where_no_token_is_likelier(rng, chunk):
    """Of two that are equally likely both are."""
    hidden, head, tokens = arguments(rng, 2, 8, 4, 5)
    head = head.at[:, 3].set(head[:, 1])
    twins = jnp.where(tokens == 3, 1, tokens)
    statistics = chunked_token_statistics(
        hidden, head, tokens, chunk=chunk, moments=False, hits=True
    )
    np.testing.assert_array_equal(statistics.hits, (hidden @ head).argmax(-1) == twins)
    assert statistics.entropy is None


def summed_cross_entropy(hidden, head, tokens):
    return chunked_cross_entropy_sum(hidden, head, tokens, where=jnp.ones(tokens.shape, bool)).loss


def compiled_gradient(loss, width):
    """Value and gradient of the loss at [8, 512, 50257], compiled for the arguments' shapes."""
    shapes = (
        jax.ShapeDtypeStruct((8, 512, width), jnp.float32),
        jax.ShapeDtypeStruct((width, 50_257), jnp.float32),
        jax.ShapeDtypeStruct((8, 512), jnp.int32),
    )

    def scalar(hidden, head, tokens):
        return loss(hidden, head, tokens).sum()

    return jax.jit(jax.value_and_grad(scalar, (0, 1))).lower(*shapes).compile()


def temporaries(compiled):
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("width", [256, 768])
@pytest.mark.parametrize(
    ("chunked", "dense"),
    [
        (chunked_token_log_probs, token_log_probs),
        (chunked_next_token_loss, next_token_loss),
        (summed_cross_entropy, token_log_probs),
    ],
)
def test_a_training_step_needs_at_most_an_eighth_of_the_memory(chunked, dense, width):
    """At the default chunk, on top of what a chunk adds to the gradient of the head."""
    small = temporaries(compiled_gradient(chunked, width)) - 50_257 * width * 4
    large = temporaries(compiled_gradient(lambda h, w, t: dense(h @ w, t), width))
    assert large > 8 * 512 * 50_257 * 4
    assert small * 8 <= large


@pytest.mark.slow
@pytest.mark.parametrize("width", [256, 768])
@pytest.mark.parametrize(
    ("chunked", "limit"), [(chunked_next_token_loss, 1.3), (summed_cross_entropy, 1.0)]
)
def test_a_training_step_takes_hardly_longer(chunked, limit, width, rng, capsys):
    """At the default chunk: the two take turns, so that a busy machine slows both."""
    inputs = arguments(rng, 8, 512, width, 50_257)
    steps = (
        compiled_gradient(chunked, width),
        compiled_gradient(lambda h, w, t: next_token_loss(h @ w, t), width),
    )
    seconds = []
    for _ in range(6):
        clocks = [(time.perf_counter(), time.process_time())]
        for step in steps:
            jax.block_until_ready(step(*inputs))
            clocks.append((time.perf_counter(), time.process_time()))
        seconds.append(np.diff(clocks, axis=0))
    wall, cpu = np.moveaxis(np.array(seconds[1:]), 2, 0)  # the first call of each warms up
    fastest = wall.min(axis=0)
    with capsys.disabled():
        print(
            f"\nchunked / dense at [8, 512, 50257], D = {width}: "
            f"{fastest[0]:.2f} s / {fastest[1]:.2f} s = {fastest[0] / fastest[1]:.2f} (fastest), "
            f"{np.median(wall[:, 0] / wall[:, 1]):.2f} (median of pairs), "
            f"{np.median(cpu[:, 0] / cpu[:, 1]):.2f} (median of pairs, processor time)"
        )
    assert fastest[0] <= limit * fastest[1]


def test_entropy_comes_with_the_log_probs_and_has_the_dense_gradient(rng):
    hidden, head, tokens = arguments(rng, 2, 5, 6, 11)

    def chunked(hidden, head, tokens):
        return chunked_token_statistics(hidden, head, tokens, chunk=2).entropy

    gradients, entropy = value_and_gradients(chunked, hidden, head, tokens)
    wanted_gradients, wanted = value_and_gradients(
        lambda hidden, head, _: token_entropy(hidden @ head), hidden, head, tokens
    )
    np.testing.assert_allclose(entropy, wanted, atol=1e-5)
    for a, b in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_padded_columns_of_the_head_get_no_probability_and_no_gradient(rng):
    """MODEL-7: whatever they hold."""
    hidden, head, tokens = arguments(rng, 2, 5, 6, 11)
    padded = jnp.pad(head, [(0, 0), (0, 5)], constant_values=1e4)

    def chunked(hidden, head, tokens):
        return chunked_next_token_loss(
            hidden, head, tokens, chunk=2, vocab_size=11, label_smoothing=0.1, z_loss=1e-3
        )

    def dense(hidden, head, tokens):
        return next_token_loss(hidden @ head, tokens, label_smoothing=0.1, z_loss=1e-3)

    (to_hidden, to_head), losses = value_and_gradients(chunked, hidden, padded, tokens)
    wanted_gradients, wanted = value_and_gradients(dense, hidden, head, tokens)
    np.testing.assert_allclose(losses, wanted, atol=1e-5)
    np.testing.assert_allclose(to_hidden, wanted_gradients[0], atol=1e-5)
    np.testing.assert_allclose(to_head[:, :11], wanted_gradients[1], atol=1e-5)
    assert not to_head[:, 11:].any()


def test_half_precision_products_accumulate_in_float32(rng):
    """A bfloat16 sum over 512 positions would be off by several percent."""
    hidden, head, tokens = arguments(rng, 4, 512, 8, 13, jnp.bfloat16)

    def chunked(hidden, head, tokens):
        return chunked_token_log_probs(hidden, head, tokens, chunk=1)

    def exact(hidden, head, tokens):
        logits = hidden.astype(jnp.float32) @ head.astype(jnp.float32)
        return token_log_probs(logits, tokens)

    (_, to_head), log_probs = value_and_gradients(chunked, hidden, head.astype(jnp.float32), tokens)
    (_, wanted_to_head), wanted = value_and_gradients(exact, hidden, head, tokens)
    assert log_probs.dtype == to_head.dtype == jnp.float32
    np.testing.assert_allclose(log_probs, wanted, atol=2e-5)
    error = np.abs(to_head - wanted_to_head.astype(jnp.float32)).max()
    assert error < 1e-2 * np.abs(to_head).max()


def test_ids_outside_of_the_head_are_nan_as_in_the_dense_form(rng):
    hidden, head, _ = arguments(rng, 1, 3, 4, 5)
    tokens = jnp.array([[1, 5, -100]])
    log_probs = chunked_token_log_probs(hidden, head, tokens, chunk=2)
    np.testing.assert_array_equal(np.isnan(log_probs), [[False, True, True]])


@pytest.mark.parametrize("scale", [80.0, 1e4])
def test_huge_logits_stay_finite(scale):
    hidden, head = jnp.array([[[scale], [-scale]]]), jnp.array([[1.0, -1.0, 0.0]])

    def chunked(hidden, head, tokens):
        statistics = chunked_token_statistics(hidden, head, tokens, chunk=1)
        return statistics.log_probs + statistics.entropy

    gradients, values = value_and_gradients(chunked, hidden, head, jnp.array([[1, 1]]))
    assert np.isfinite(values).all()
    assert all(np.isfinite(g).all() for g in gradients)


def test_the_temperature_has_no_gradient(rng):
    hidden, head, tokens = arguments(rng, 1, 3, 4, 5)

    def loss(temperature):
        return chunked_token_log_probs(hidden, head, tokens, chunk=2, temperature=temperature).sum()

    assert jax.grad(loss)(jnp.float32(0.7)) == 0


@pytest.mark.parametrize("summed", [False, True])
def test_a_head_sharded_over_its_vocabulary_stays_sharded(rng, summed):
    """Batch over data, vocabulary over tensor: same numbers, and the head is never gathered."""
    hidden, head, tokens = arguments(rng, 4, 6, 8, 64)
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def place(x, *names):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*names)))

    def scalar(hidden, head, tokens):
        if summed:
            where = jnp.ones(tokens.shape, bool)
            more = {"where": where, "chunk": 2, "row_blocks": 2}
            return chunked_cross_entropy_sum(hidden, head, tokens, **more).loss
        return chunked_next_token_loss(hidden, head, tokens, chunk=2, row_blocks=2).sum()

    step = jax.jit(jax.value_and_grad(scalar, (0, 1)))
    sharded = place(hidden, "data"), place(head, None, "tensor"), place(tokens, "data")
    compiled = step.lower(*sharded).compile()
    value, (to_hidden, to_head) = compiled(*sharded)
    wanted, (wanted_to_hidden, wanted_to_head) = step(hidden, head, tokens)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    np.testing.assert_allclose(to_hidden, wanted_to_hidden, atol=1e-5)
    np.testing.assert_allclose(to_head, wanted_to_head, atol=1e-5)
    assert to_head.sharding.spec == PartitionSpec(None, "tensor")
    text = compiled.as_text()
    assert text
    assert "all-gather" not in text
