"""Named sizes. A size is a shape: dtype, dropout and remat belong to the run that uses it.

- gpt3-*: Brown et al. 2020, table 2.1, with two of its misprints mended: XL says 24 heads of 128,
  which is 3072 and not its width 2048 (16 heads here), and 13B says width 5140, which is not
  40 * 128 (5120 here). Dense attention in every layer.
- gpt2-*: Radford et al. 2019. llama-*, llama2-*: Touvron et al. 2023.
- opt-*, pythia-*, llama3*, mistral-*, qwen*, gemma*, phi3-*: as published with their weights, which
  `models/hf` reads; the vocabulary is their table's, spare rows included.
- tiny, mini, small: for tests, for two CPU cores in minutes, and for benchmarks. mini takes ReLU:
  elementwise work runs on one core there, and the tanh of GELU costs a fifth of a training step;
  and rotary positions: after 1.8M tokens it copies from its context (few-shot accuracy 93 %), which
  with learned positions it had not begun to (72 %).
"""

import dataclasses
import difflib
import functools
import math

from instruct_jax.models.config import TransformerConfig

_GPT = functools.partial(TransformerConfig, vocab_size=50_257)
_LLAMA = functools.partial(
    TransformerConfig,
    vocab_size=32_000,
    norm="rmsnorm",
    norm_eps=1e-6,
    activation="swiglu",
    positions="rope",
    use_bias=False,
    tie_embeddings=False,
    max_length=2048,
)
_LLAMA2 = functools.partial(_LLAMA, norm_eps=1e-5, max_length=4096)
_LLAMA3 = functools.partial(
    _LLAMA, norm_eps=1e-5, vocab_size=128_256, rope_theta=500_000.0, num_kv_heads=8
)
_OPT = functools.partial(_GPT, vocab_size=50_272, activation="relu", max_length=2048)
_PYTHIA = functools.partial(
    TransformerConfig,
    vocab_size=50_304,
    activation="gelu_exact",
    positions="rope",
    rope_fraction=0.25,
    parallel_residual=True,
    tie_embeddings=False,
    max_length=2048,
)
_QWEN = functools.partial(_LLAMA, vocab_size=151_936, rope_theta=1e6, tie_embeddings=True)
_GEMMA = functools.partial(
    _LLAMA,
    norm_order="sandwich",
    norm_offset=1.0,
    activation="geglu",
    head_dim=256,
    query_scalar=256.0,
    scale_embeddings=True,
    tie_embeddings=True,
)


def _narrow(
    vocab_size: int, num_layers: int, d_model: int, num_heads: int, max_length: int, activation: str
) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=vocab_size,
        num_layers=num_layers,
        d_model=d_model,
        num_heads=num_heads,
        max_length=max_length,
        activation=activation,
        # 0.02 suits a width near 1000; sqrt(2 / 5D) (Nguyen and Salazar 2019) any width.
        init_std=round(math.sqrt(2 / (5 * d_model)), 3),
        # Faster on a CPU than a loop over layers; and where the CPU stands for several devices, a
        # loop that holds collectives can meet others in an order that differs between devices, and
        # then every device waits for another, for ever (XLA of jax 0.10).
        scan_unroll=num_layers,
    )


_SIZES: dict[str, TransformerConfig] = {
    "tiny": _narrow(256, 2, 64, 2, 256, "gelu"),
    "mini": dataclasses.replace(_narrow(511, 4, 128, 4, 256, "relu"), positions="rope"),
    # As mini, in the form of LLaMA, which llama.cpp runs (convert.py, to_gguf).
    "mini-llama": dataclasses.replace(
        _narrow(511, 4, 128, 4, 256, "swiglu"),
        d_ff=352, norm="rmsnorm", positions="rope", use_bias=False,
    ),
    "small": _narrow(8_191, 6, 256, 8, 512, "gelu"),
    # As many parameters as small, in the form of Qwen 2.
    "small-qwen2": dataclasses.replace(
        _narrow(8_191, 6, 256, 8, 512, "swiglu"),
        d_ff=704, norm="rmsnorm", norm_eps=1e-6, positions="rope", use_bias=False, qkv_bias=True,
    ),
    "gpt2-small": _GPT(num_layers=12, d_model=768, num_heads=12),
    "gpt2-medium": _GPT(num_layers=24, d_model=1024, num_heads=16),
    "gpt2-large": _GPT(num_layers=36, d_model=1280, num_heads=20),
    "gpt2-xl": _GPT(num_layers=48, d_model=1600, num_heads=25),
    "gpt3-125m": _GPT(num_layers=12, d_model=768, num_heads=12, max_length=2048),
    "gpt3-350m": _GPT(num_layers=24, d_model=1024, num_heads=16, max_length=2048),
    "gpt3-760m": _GPT(num_layers=24, d_model=1536, num_heads=16, max_length=2048),
    "gpt3-1.3b": _GPT(num_layers=24, d_model=2048, num_heads=16, max_length=2048),
    "gpt3-2.7b": _GPT(num_layers=32, d_model=2560, num_heads=32, max_length=2048),
    "gpt3-6.7b": _GPT(num_layers=32, d_model=4096, num_heads=32, max_length=2048),
    "gpt3-13b": _GPT(num_layers=40, d_model=5120, num_heads=40, max_length=2048),
    "gpt3-175b": _GPT(num_layers=96, d_model=12_288, num_heads=96, max_length=2048),
    "llama-7b": _LLAMA(num_layers=32, d_model=4096, num_heads=32, d_ff=11_008),
    "llama-13b": _LLAMA(num_layers=40, d_model=5120, num_heads=40, d_ff=13_824),
    "llama-33b": _LLAMA(num_layers=60, d_model=6656, num_heads=52, d_ff=17_920),
    "llama-65b": _LLAMA(num_layers=80, d_model=8192, num_heads=64, d_ff=22_016),
    "llama2-7b": _LLAMA2(num_layers=32, d_model=4096, num_heads=32, d_ff=11_008),
    "llama2-13b": _LLAMA2(num_layers=40, d_model=5120, num_heads=40, d_ff=13_824),
    "llama2-70b": _LLAMA2(
        num_layers=80, d_model=8192, num_heads=64, num_kv_heads=8, d_ff=28_672
    ),
    "llama3-8b": _LLAMA3(
        num_layers=32, d_model=4096, num_heads=32, d_ff=14_336, max_length=8192
    ),
    "llama3.2-1b": _LLAMA3(
        num_layers=16, d_model=2048, num_heads=32, d_ff=8192, max_length=131_072,
        tie_embeddings=True, rope_factor=32.0, rope_original_length=8192,
    ),
    "mistral-7b": _LLAMA2(
        num_layers=32, d_model=4096, num_heads=32, num_kv_heads=8, d_ff=14_336, max_length=32_768,
        attention_pattern="l", window=4096,
    ),
    "opt-125m": _OPT(num_layers=12, d_model=768, num_heads=12),
    "opt-1.3b": _OPT(num_layers=24, d_model=2048, num_heads=32),
    "pythia-160m": _PYTHIA(num_layers=12, d_model=768, num_heads=12),
    "pythia-1.4b": _PYTHIA(num_layers=24, d_model=2048, num_heads=16),
    "qwen2.5-0.5b": _QWEN(
        num_layers=24, d_model=896, num_heads=14, num_kv_heads=2, d_ff=4864, max_length=32_768,
        qkv_bias=True,
    ),
    "qwen3-0.6b": _QWEN(
        num_layers=28, d_model=1024, num_heads=16, num_kv_heads=8, head_dim=128, d_ff=3072,
        max_length=40_960, qk_norm=True,
    ),
    "gemma2-2b": _GEMMA(
        vocab_size=256_000, num_layers=26, d_model=2304, num_heads=8, num_kv_heads=4, d_ff=9216,
        max_length=8192, attention_pattern="lg", window=4096,
        attention_softcap=50.0, logit_softcap=30.0,
    ),
    "gemma3-1b": _GEMMA(
        vocab_size=262_144, num_layers=26, d_model=1152, num_heads=4, num_kv_heads=1, d_ff=6912,
        max_length=32_768, attention_pattern="lllllg", window=512, qk_norm=True,
        rope_theta=1e6, rope_local_theta=10_000.0,
    ),
    "phi3-mini": _LLAMA2(
        vocab_size=32_064, num_layers=32, d_model=3072, num_heads=32, d_ff=8192,
        attention_pattern="l", window=2047,
    ),
}  # fmt: skip
PRESETS = tuple(_SIZES)


def preset(name: str) -> TransformerConfig:
    """The configuration called `name`; raises ValueError with the nearest names."""
    if name not in _SIZES:
        near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.5) or PRESETS
        raise ValueError(f"no model size is called {name!r}; did you mean {' or '.join(near)}?")
    return _SIZES[name]


def parameter_count(config: TransformerConfig) -> int:
    """Parameters of the language model, the rows that only pad the vocabulary left out."""
    c, d = config, config.d_model
    query, key = c.num_heads * c.head_size, c.kv_heads * c.head_size
    matrices = 2 * d * query + 2 * d * key + (3 if c.gated else 2) * d * c.ff_size
    qkv_bias = c.use_bias if c.qkv_bias is None else c.qkv_bias
    biases = (query + 2 * key) * qkv_bias
    biases += (d + c.ff_size * (2 if c.gated else 1) + d) * c.use_bias
    each = 2 if c.norm == "layernorm" else 1
    norms = (4 if c.norm_order == "sandwich" else 2) * d + 2 * c.head_size * c.qk_norm
    layer = matrices + biases + each * norms
    tables = c.vocab_size * d * (1 if c.tie_embeddings else 2)
    tables += c.max_length * d * (c.positions == "learned")
    return c.num_layers * layer + each * d * (c.norm_order != "post") + tables
