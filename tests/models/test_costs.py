import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from instruct_jax.models import costs
from instruct_jax.models.families import PRESETS, preset
from instruct_jax.models.transformer import TransformerConfig, language_model

GPT2 = preset("gpt2-small")
SMALL = TransformerConfig(
    vocab_size=511, num_layers=2, d_model=128, num_heads=4, max_length=64, scan_unroll=2
)


def test_the_input_embedding_and_the_positions_are_no_matmul_parameters():
    # 12 layers of 12 d^2, and the tied table once, as the head: 123.5M of 124.4M.
    assert costs.matmul_parameters(GPT2) == 12 * 12 * 768**2 + 50_257 * 768
    assert costs.matmul_parameters(GPT2, kind="scalar") == 12 * 12 * 768**2 + 768


def test_grouped_heads_and_gates_are_counted():
    # LLaMA 3 8B: q and o 4096^2, k and v 4096 * 1024, three matrices of 4096 * 14336, own head.
    layer = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14_336
    assert costs.matmul_parameters(preset("llama3-8b")) == 32 * layer + 128_256 * 4096
    assert costs.kv_bytes(dataclasses.replace(preset("llama3-8b"), dtype="bfloat16")) == 131_072


def test_a_training_token_of_gpt2_costs_6n_and_its_attention():
    n = 123_532_032
    cost = costs.train(GPT2, [1024] * 8)
    assert cost.flops == pytest.approx(6 * n * 8192 + 3 * 8 * 2 * 12 * 768 * 1024**2)
    assert cost.bytes == pytest.approx(30 * 124_439_808)


def test_an_update_moves_the_moments_that_its_optimizer_has_and_muon_multiplies():
    n = 124_439_808
    assert costs.update(GPT2) == costs.Cost(0.0, 30.0 * n)
    assert costs.update(GPT2, "lion").bytes == 22 * n and costs.update(GPT2, "lion").flops == 0
    assert costs.update(GPT2, "adafactor").bytes == 18 * n
    muon, d = costs.update(GPT2, "muon"), 768
    layer = 4 * (4 * d**3 + 2 * d**3) + 2 * (4 * d**2 * 4 * d + 2 * d**3)
    assert muon.flops == 5 * 12 * layer
    assert muon.bytes == 22 * n + 5 * 8 * 12 * 12 * d**2
    plain, other = (costs.train(GPT2, [8], updates=2, optimizer=x) for x in ("adamw", "muon"))
    assert other.flops - plain.flops == 2 * muon.flops


def test_a_decode_step_reads_the_weights_the_cache_and_the_logits():
    # GPT-2 in fp32: 494 MB of weights, 73,728 bytes a cached token.
    cost = costs.decode_step(GPT2, 16, 96)
    assert cost.bytes == 4 * 123_532_032 + 16 * 96 * 73_728 + 4 * 16 * 50_257
    assert cost.flops == 2 * 123_532_032 * 16 + 4 * 12 * 768 * 16 * 96


def test_the_published_decode_ceilings_of_an_h200_come_out():
    """performance: bf16, B = 256, S = 384: GPT-2 317k tokens/s, 1.3B 56k."""
    h200 = costs.PEAKS["h200"]

    def ceiling(name: str) -> float:
        config = dataclasses.replace(preset(name), dtype="bfloat16")
        step = costs.decode_step(config, 256, 384)
        return 256 / step.seconds(flops=h200.bfloat16, bandwidth=h200.bandwidth)

    assert ceiling("gpt2-small") == pytest.approx(317e3, rel=0.03)
    assert ceiling("gpt3-1.3b") == pytest.approx(56e3, rel=0.03)


def test_prefill_and_score_of_equal_rows_are_the_formulas():
    rows, length, n = 4, 64, 123_532_032
    f = 2 * n * length + 2 * 12 * 768 * length**2
    assert costs.prefill(GPT2, [length] * rows).flops == rows * f
    scalar = f - 2 * length * 768 * 50_256
    assert costs.score(GPT2, GPT2, [length] * rows).flops == rows * (f + 2 * scalar)
    assert costs.ptx(GPT2, [length] * rows).flops == 3 * rows * f


def test_rows_that_have_ended_decode_nothing():
    even = costs.generate(SMALL, [8, 8], [4, 4])
    skewed = costs.generate(SMALL, [8, 8], [4, 1])
    assert len(even) == len(skewed) == 5
    assert skewed[0] == even[0]
    assert skewed[1] == even[1]
    assert skewed[2] == costs.decode_step(SMALL, 1, 9)


def test_a_prompt_is_read_once_for_all_its_samples():
    shared = costs.generate(SMALL, [8], [4, 4], samples=2)
    assert shared[0] == costs.prefill(SMALL, [8])
    assert shared[1:] == costs.generate(SMALL, [8, 8], [4, 4])[1:]


def test_a_window_bounds_what_attention_costs():
    local = dataclasses.replace(SMALL, attention_pattern="l", window=8)
    assert costs.attention_flops(local, [8]) == costs.attention_flops(SMALL, [8])
    # 64 queries, of which the k-th sees min(k, 8): 64 * 8 - 32 pairs for 64^2 / 2.
    ratio = costs.attention_flops(local, [64]) / costs.attention_flops(SMALL, [64])
    assert ratio == pytest.approx((64 * 8 - 32) / 2048)


def test_one_branch_costs_what_its_row_costs():
    one = costs.train_branches(SMALL, np.array([5]), np.array([[7]]))
    assert one.flops == pytest.approx(costs.train(SMALL, [12], kind="scalar").flops)
    two = costs.train_branches(SMALL, np.array([5]), np.array([[7, 7]]))
    assert one.flops < two.flops < 2 * one.flops


def test_a_limit_is_the_sum_of_its_pieces_limits():
    compute, move = costs.Cost(100.0, 1.0), costs.Cost(1.0, 100.0)
    assert costs.time_limit([compute, move], flops=10.0, bandwidth=20.0) == 10.0 + 5.0
    assert costs.total([compute, move]) == costs.Cost(101.0, 101.0)
    assert (compute * 2).seconds(flops=10.0, bandwidth=20.0) == 20.0


@pytest.mark.parametrize("name", [n for n in PRESETS if preset(n).tie_embeddings])
def test_matmul_parameters_are_nearly_all_parameters(name):
    from instruct_jax.models.families import parameter_count

    config = preset(name)
    positions = config.max_length * config.d_model * (config.positions == "learned")
    rest = parameter_count(config) - positions - costs.matmul_parameters(config)
    assert 0 <= rest < 0.02 * parameter_count(config)


def test_xla_counts_the_same_forward_and_training_flops():
    """Unrolled, since XLA counts the body of a loop once; short, as it counts masked scores."""
    model = language_model(SMALL)
    params = jax.eval_shape(model.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((4, 16), jnp.int32)

    def loss(params, tokens):
        return model.apply(params, tokens).astype(jnp.float32).sum()

    def counted(function) -> float:
        analysis = jax.jit(function).lower(params, tokens).compile().cost_analysis()
        return analysis["flops"]

    forward = costs.forward_flops(SMALL, [16] * 4)
    assert counted(model.apply) == pytest.approx(forward, rel=0.06)
    assert counted(jax.grad(loss)) == pytest.approx(3 * forward, rel=0.06)


def product_flops(jaxpr) -> float:
    """FLOPs of all matrix products, those of a loop as often as it turns."""
    flops = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            flops += 2.0 * eqn.outvars[0].aval.size * np.prod([shape[i] for i in contracted])
        inner = sum(map(product_flops, jaxprs_in_params(eqn.params)))
        flops += inner * eqn.params.get("length", 1)
    return flops


@pytest.mark.parametrize("remat", ["products", "full"])
@pytest.mark.parametrize("change", [{}, {"norm_order": "sandwich", "activation": "swiglu"}])
def test_what_remat_computes_again_is_what_the_gradient_has_more_of(remat, change):
    kept = dataclasses.replace(SMALL, scan_unroll=1, **change)
    again = dataclasses.replace(kept, remat=remat)
    tokens = jnp.zeros((4, 16), jnp.int32)

    def counted(config) -> float:
        model = language_model(config)
        params = jax.eval_shape(model.init, jax.random.key(0))
        gradient = jax.grad(lambda params: model.apply(params, tokens).sum())
        return product_flops(jax.make_jaxpr(gradient)(params).jaxpr)

    # Rows this short are computed with all their scores, the causal formula counts half.
    attention = 2 * costs.attention_flops(kept, [16] * 4)
    more = counted(again) - counted(kept)
    assert more == pytest.approx(costs.recomputed_flops(again, 4 * 16, attention))
    assert costs.recomputed_flops(kept, 4 * 16, attention) == 0


def test_recomputation_is_told_beside_the_work_and_is_none():
    full = dataclasses.replace(SMALL, remat="full")
    for cost in (costs.train, costs.ptx):
        kept, again = cost(SMALL, [8, 8]), cost(full, [8, 8])
        assert (kept.flops, kept.bytes, kept.recomputed) == (again.flops, again.bytes, 0)
        assert 0 < again.recomputed < again.flops / 3
        assert (again * 3 + again).recomputed == 4 * again.recomputed
    prompts, completions = np.array([5]), np.array([[7]])
    one = costs.train_branches(full, prompts, completions)
    assert one.recomputed == pytest.approx(costs.train(full, [12], kind="scalar").recomputed)
