"""Tokens scored from hidden states: the numbers of the dense read-out, for every kind of head."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from instruct_jax.losses import chunked, token_entropy, token_log_probs
from instruct_jax.models.adapters import LoraConfig, adapt, freeze, init_adapter, join
from instruct_jax.models.transformer import PARTITION_RULES, TransformerConfig, language_model
from instruct_jax.sampling.scores import row_blocks, token_scores
from instruct_jax.training.mesh import make_mesh, tree_shardings

KEY = jax.random.key(0)
TIED = TransformerConfig(
    vocab_size=29, num_layers=1, d_model=32, num_heads=2, vocab_multiple=32, init_std=0.2
)
UNTIED = dataclasses.replace(TIED, tie_embeddings=False)
SHAPES = {
    "tied": TIED,
    "untied": UNTIED,
    "soft cap": dataclasses.replace(TIED, logit_softcap=3.0),
    "untied soft cap": dataclasses.replace(UNTIED, logit_softcap=3.0),
}


@pytest.fixture(params=["one chunk", "chunks"])
def chunks(request, monkeypatch):
    """160 positions in one chunk, or in three."""
    if request.param == "chunks":
        monkeypatch.setattr(chunked, "CHUNK_LOGITS", 1)


def scored(model, tokens, where, **options):
    """A scalar of all scores, and the scores, chunked."""

    def of(params):
        hidden = model.hidden(params, tokens)
        scores = token_scores(
            model, params, hidden, tokens, where=where, moments=True, hits=True, **options
        )
        weights = jnp.linspace(0.5, 1.5, tokens.size).reshape(tokens.shape)
        total = (weights * (scores.log_probs + 0.1 * scores.entropy)).sum()
        return total, (scores.log_probs, scores.entropy, scores.hits)

    return of


def dense(model, tokens, where, **options):
    """The same from float[B, T, V]."""

    def of(params):
        logits = model.apply(params, tokens)
        hits = (logits.argmax(-1) == tokens).astype(jnp.float32)
        all_of = token_log_probs(logits, tokens, **options), token_entropy(logits, **options), hits
        log_probs, entropy, hits = (jnp.where(where, x, 0.0) for x in all_of)
        weights = jnp.linspace(0.5, 1.5, tokens.size).reshape(tokens.shape)
        return (weights * (log_probs + 0.1 * entropy)).sum(), (log_probs, entropy, hits)

    return of


def rows(rng):
    tokens = jnp.asarray(rng.integers(0, 29, (8, 20)), jnp.int32)
    return tokens, jnp.asarray(rng.random((8, 20)) < [[0.9]] + 7 * [[0.2]])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.usefixtures("chunks")
def test_scores_and_gradients_are_those_of_the_dense_read_out(shape, rng):
    """Padded columns, any temperature, a mask that leaves most positions out."""
    model = language_model(shape)
    params = model.init(KEY)
    tokens, where = rows(rng)
    (_, values), gradient = jax.jit(
        jax.value_and_grad(scored(model, tokens, where, temperature=0.7), has_aux=True)
    )(params)
    (_, wanted), wanted_gradient = jax.jit(
        jax.value_and_grad(dense(model, tokens, where, temperature=0.7), has_aux=True)
    )(params)
    for value, want in zip(values, wanted, strict=True):
        # Two programs: their products round apart, by up to 2.2e-6 on the processors seen.
        np.testing.assert_allclose(value, want, atol=5e-6)
    for value, want in zip(
        jax.tree.leaves(gradient), jax.tree.leaves(wanted_gradient), strict=True
    ):
        np.testing.assert_allclose(value, want, atol=1e-5 * max(1.0, np.abs(want).max()))


def test_a_quantised_table_and_an_adapter_score_as_they_read_out(rng):
    """QLoRA: the head is expanded for scoring as it is for the logits."""
    plain, lora = language_model(UNTIED), LoraConfig(rank=2, base="int8")
    model, params = adapt(plain, lora), plain.init(KEY)
    adapter = init_adapter(KEY, params, lora)
    adapter = jax.tree.map(lambda x: x + 0.1, adapter)
    params = join(freeze(params, lora), adapter)
    tokens, where = rows(rng)
    values = jax.jit(scored(model, tokens, where))(params)[1]
    wanted = jax.jit(dense(model, tokens, where))(params)[1]
    for value, want in zip(values, wanted, strict=True):
        np.testing.assert_allclose(value, want, atol=2e-6)


@pytest.mark.usefixtures("chunks")
def test_rows_over_data_and_fsdp_and_a_vocabulary_over_tensor_change_nothing(rng):
    """Each device sorts its own rows: the fullest has several times the targets of the others."""
    model = language_model(TIED)
    params = model.init(KEY)
    tokens, where = rows(rng)
    mesh = make_mesh("data:2,fsdp:2,tensor:2")
    step = jax.value_and_grad(
        lambda params, tokens, where: scored(model, tokens, where)(params), has_aux=True
    )
    (_, wanted), wanted_gradient = jax.jit(step)(params, tokens, where)
    spread = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    placed = jax.device_put(params, tree_shardings(mesh, PARTITION_RULES, params))
    with jax.set_mesh(mesh):
        inputs = placed, *jax.device_put((tokens, where), spread)
        (_, values), gradient = jax.jit(step)(*inputs)
    for value, want in zip(values, wanted, strict=True):
        np.testing.assert_allclose(value, want, atol=5e-6)
    for value, want in zip(
        jax.tree.leaves(gradient), jax.tree.leaves(wanted_gradient), strict=True
    ):
        np.testing.assert_allclose(value, want, atol=1e-5 * max(1.0, np.abs(want).max()))


def test_rows_that_the_mesh_does_not_divide_are_one_block():
    """As where there is no mesh."""
    assert row_blocks(8) == 1
    with jax.set_mesh(make_mesh("data:4,tensor:2")):
        assert (row_blocks(8), row_blocks(6)) == (4, 1)
