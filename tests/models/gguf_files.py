"""Small GGUF files of the recorded tiny models, written with the package `gguf` as llama.cpp's own
converter writes them.
"""

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import pre_tokenizers

from tests.fixtures.models import rule
from tests.models.folders import recorded

# Of the cases, the architecture.
ARCHITECTURES = {
    "llama": "llama",
    "llama3": "llama",
    "llama_linear": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "phi3": "phi3",
    "gpt2": "gpt2",
}
_NAMES = {
    "embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "mlp.gate_up_proj": "ffn_up",
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
    "wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "ln_1": "attn_norm",
    "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip


def config_of(case: str) -> dict[str, Any]:
    """config.json of a case, as far as GGUF can say it."""
    raw = dict(recorded(case)[0]["config"])
    if case.startswith("gemma"):  # whose readers know the scale of its queries
        raw["query_pre_attn_scalar"] = raw["head_dim"]
    if case == "llama3":  # GGUF has the factors alone, and no model has others than LLaMA 3's
        raw["rope_parameters"] = raw["rope_parameters"] | {"high_freq_factor": 4.0}
    return raw


def tensors_of(case: str) -> dict[str, np.ndarray]:
    """The tensors of a case by transformers' names."""
    about, _ = recorded(case)
    return {name: rule.tensor(name, tuple(shape)) for name, shape in about["shapes"].items()}


def write_gguf(path: Path, case: str, *, kind: str = "F32", **changes: Any) -> Path:
    """A file of the case `case`, its matrices of `kind`; a key that is None in `changes` is not
    written.
    """
    import gguf

    raw, arch = config_of(case), ARCHITECTURES[case]
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (keys_of(case, raw, arch) | changes).items():
        _add(writer, key, value)
    for name, value in tensors_of(case).items():
        if name == "lm_head.weight" and raw["tie_word_embeddings"]:
            continue
        value = _formed(name, value, raw, arch)
        of = gguf.GGMLQuantizationType[kind if value.ndim > 1 else "F32"]
        if value.shape[-1] % gguf.GGML_QUANT_SIZES[of][0]:
            of = gguf.GGMLQuantizationType.F32
        writer.add_tensor(_name(name, arch), gguf.quants.quantize(value, of), raw_dtype=of)
    rope = raw.get("rope_parameters", {})
    if rope.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3(raw, rope))
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    return path


def keys_of(case: str, raw: dict[str, Any], arch: str) -> dict[str, Any]:
    """The metadata of a case, its tokenizer of bytes included."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["\u0120", "AB", *alphabet[: raw["vocab_size"] - 3], "<|endoftext|>"]
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 1) + [3],
        "tokenizer.ggml.merges": ["A B"],
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
    }
    if arch == "gpt2":
        sizes = {"context_length": raw["n_positions"], "embedding_length": raw["n_embd"],
                 "block_count": raw["n_layer"], "attention.head_count": raw["n_head"],
                 "feed_forward_length": 4 * raw["n_embd"],
                 "attention.layer_norm_epsilon": raw["layer_norm_epsilon"]}  # fmt: skip
        return keys | {f"gpt2.{key}": value for key, value in sizes.items()}
    rope = raw["rope_parameters"]
    rope = rope.get("full_attention", rope)
    heads = raw["num_attention_heads"]
    size = raw.get("head_dim") or raw["hidden_size"] // heads
    sizes = {
        "context_length": raw["max_position_embeddings"], "embedding_length": raw["hidden_size"],
        "block_count": raw["num_hidden_layers"], "feed_forward_length": raw["intermediate_size"],
        "attention.head_count": heads, "attention.head_count_kv": raw["num_key_value_heads"],
        "attention.key_length": size, "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": raw["rms_norm_eps"],
        "rope.freq_base": rope["rope_theta"],
        "rope.dimension_count": int(size * rope.get("partial_rotary_factor", 1.0)),
    }  # fmt: skip
    if rope["rope_type"] == "linear":
        sizes |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
    if rope["rope_type"] == "llama3":
        original = rope["original_max_position_embeddings"]
        sizes["rope.scaling.original_context_length"] = original
    if raw.get("sliding_window"):
        sizes["attention.sliding_window"] = raw["sliding_window"]
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if raw.get(key):
            sizes[key] = raw[key]
    if arch == "gemma3":
        sizes["attention.sliding_window_pattern"] = 3
    return keys | {f"{arch}.{key}": value for key, value in sizes.items()}


def _add(writer: Any, key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        kinds = {bool: "bool", int: "uint32", float: "float32", str: "string"}
        getattr(writer, f"add_{kinds[type(value)]}")(key, value)


def _name(name: str, arch: str) -> str:
    base, end = name.rsplit(".", 1)
    if "layernorm" in base and base.endswith("post_attention_layernorm"):
        mapped = "post_attention_norm" if arch.startswith("gemma") else "ffn_norm"
    else:
        mapped = next(new for old, new in _NAMES.items() if base.endswith(old))
    layer = [part for part in base.split(".") if part.isdigit()]
    return f"blk.{layer[0]}.{mapped}.{end}" if layer else f"{mapped}.{end}"


def _formed(name: str, value: np.ndarray, raw: dict[str, Any], arch: str) -> np.ndarray:
    if arch == "llama" and ("q_proj" in name or "k_proj" in name):
        n = raw["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        half = value.shape[0] // n // 2
        return value.reshape(n, 2, half, -1).swapaxes(1, 2).reshape(value.shape)
    if arch.startswith("gemma") and name.endswith("norm.weight"):
        return value + 1
    if arch == "gpt2" and value.ndim == 2 and ".c_" in name:
        return value.T
    return value


def _llama3(raw: dict[str, Any], rope: dict[str, Any]) -> np.ndarray:
    """One factor a frequency, as transformers scales them (rope type llama3)."""
    size, factors = raw["head_dim"], []
    for i in range(0, size, 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (i / size)
        original = rope["original_max_position_embeddings"]
        if wavelength < original / rope["high_freq_factor"]:
            factors.append(1.0)
        elif wavelength > original / rope["low_freq_factor"]:
            factors.append(rope["factor"])
        else:
            smooth = (original / wavelength - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)
