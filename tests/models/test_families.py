"""Every named size has the shape and the parameter count that its paper gives."""

import math
import re

import jax
import pytest

from instruct_jax.models import (
    PARTITION_RULES,
    PRESETS,
    language_model,
    parameter_count,
    preset,
    scalar_model,
)

SIZES = {  # layers, width, heads, head size, millions of non-embedding parameters: 12 * L * d^2
    "gpt3-125m": (12, 768, 12, 64, 84.9),
    "gpt3-350m": (24, 1024, 16, 64, 302.0),
    "gpt3-760m": (24, 1536, 16, 96, 679.5),
    "gpt3-1.3b": (24, 2048, 16, 128, 1_208.0),
    "gpt3-2.7b": (32, 2560, 32, 80, 2_516.6),
    "gpt3-6.7b": (32, 4096, 32, 128, 6_442.5),
    "gpt3-13b": (40, 5120, 40, 128, 12_582.9),
    "gpt3-175b": (96, 12_288, 96, 128, 173_946.2),
}
TOTALS = {  # as published; exact where a checkpoint is public
    "gpt2-small": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "opt-125m": 125_239_296 - 2 * 768,  # two of its positions are never used, and not kept here
    "opt-1.3b": 1_315_758_080 - 2 * 2048,
    "pythia-160m": 162_322_944,
    "pythia-1.4b": 1_414_647_808,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "gemma2-2b": 2_614_341_888,
    "gemma3-1b": 999_885_952,
    "phi3-mini": 3_821_079_552,
}


def parameters(config, model=language_model):
    abstract = jax.eval_shape(model(config).init, jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


def count(leaves):
    return sum(math.prod(leaf.shape) for leaf in leaves)


@pytest.mark.parametrize("name", SIZES)
def test_gpt3_sizes_are_those_of_the_table(name):
    """MODEL-2"""
    config = preset(name)
    layers, width, heads, head, millions = SIZES[name]
    assert (config.num_layers, config.d_model) == (layers, width)
    assert (config.num_heads, config.head_size) == (heads, head)
    assert (config.vocab_size, config.vocab_rows, config.max_length) == (50_257, 50_304, 2048)
    tree = parameters(config)
    matrices = count(v for k, v in tree.items() if re.match(r"layers/.*kernel", k))
    assert matrices == 12 * layers * width**2
    assert matrices / 1e6 == pytest.approx(millions, rel=1e-3)
    assert count(tree.values()) == parameter_count(config) + (50_304 - 50_257) * width


@pytest.mark.parametrize("name", TOTALS)
def test_public_models_have_their_published_parameter_count(name):
    config = preset(name)
    copies = 1 if config.tie_embeddings else 2
    padding = (config.vocab_rows - config.vocab_size) * config.d_model * copies
    assert parameter_count(config) == TOTALS[name]
    assert count(parameters(config).values()) - padding == TOTALS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_every_parameter_is_sharded_by_a_rule_that_fits_it(name):
    """On 8 x 8 devices for models above a billion, 2 x 2 below."""
    config = preset(name)
    ways = 8 if parameter_count(config) > 1e9 and config.kv_heads % 8 == 0 else 2
    for model in (language_model, scalar_model):
        for path, leaf in parameters(config, model).items():
            axes = next(spec for rule, spec in PARTITION_RULES if re.search(rule, path))
            assert len(axes) in (0, leaf.ndim), path
            for size, axis in zip(leaf.shape, axes, strict=False):
                assert axis is None or size % ways == 0, path
            assert axes or leaf.ndim < 3, f"{path} is a matrix and would be replicated"


def test_an_unknown_size_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"'gpt3-1\.3'; did you mean gpt3-1\.3b"):
        preset("gpt3-1.3")
    with pytest.raises(ValueError, match="did you mean tiny or mini"):
        preset("?")


def test_small_sizes_are_small():
    assert parameter_count(preset("tiny")) < 150_000
    assert 750_000 < parameter_count(preset("mini")) < 950_000
    assert 6e6 < parameter_count(preset("small")) < 8e6
    assert parameter_count(preset("small-qwen2")) == pytest.approx(
        parameter_count(preset("small")), rel=0.01
    )
