"""The families: how each one's config.json and tensor names say what our configuration says.

A family is a `Family` and nothing else: no model code. To add one:

1. Name its config keys in `keys`: our field -> `Key(theirs, default)`, the default being the one
   that transformers takes when the key is missing. Sizes, floats and bools are checked on reading.
2. Put what is the same in all its models into `fixed` (our fields), and options that we do not
   have into `refused` (their key -> the only value that is read).
3. List its activations: their name -> ours; the first name of one of ours is the one written.
4. What is no plain key (rotary positions, layer types, norm order) is a pair of functions in
   `more`: theirs -> our fields, and our config -> their keys.
5. Table its tensors: our parameter path -> `Tensor(their name)`, "{}" for the layer, `transpose`
   where theirs is [out, in] (torch's Linear), `fused` where one tensor holds several of ours.
   Paths that a configuration does not have are not asked for.
6. Add it to `FAMILIES`, and a tiny model of it to tests/fixtures/models/record.py.

A configuration can be written as a family when reading back what was written gives the same
configuration; so a field that a family has no word for is refused, never dropped.
"""

import dataclasses
import difflib
from typing import Any

from instruct_jax.models.config import TransformerConfig
from instruct_jax.models.hf import options, tensors
from instruct_jax.models.hf.schema import Family, Key, read_config, resolved, write_config

_GELUS = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu",
    "gelu": "gelu_exact",
    "relu": "relu",
}
_SWIGLU = {"silu": "swiglu", "swish": "swiglu"}
_GEGLU = {"gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}

_SHAPE = {
    "vocab_size": Key("vocab_size"),
    "num_layers": Key("num_hidden_layers"),
    "d_model": Key("hidden_size"),
    "num_heads": Key("num_attention_heads"),
}
_LLAMA_KEYS = {
    **_SHAPE,
    "num_kv_heads": Key("num_key_value_heads", None),
    "head_dim": Key("head_dim", None),
    "d_ff": Key("intermediate_size"),
    "max_length": Key("max_position_embeddings", 2048),
    "norm_eps": Key("rms_norm_eps", 1e-6),
    "tie_embeddings": Key("tie_word_embeddings", False),
}
_GEMMA_KEYS = {
    **_LLAMA_KEYS,
    "head_dim": Key("head_dim", 256),
    "num_kv_heads": Key("num_key_value_heads", 4),
    "max_length": Key("max_position_embeddings", 8192),
    "query_scalar": Key("query_pre_attn_scalar", 256.0),
    "tie_embeddings": Key("tie_word_embeddings", True),
}
_LLAMA_FIXED = {"norm": "rmsnorm", "use_bias": False}
_GEMMA_FIXED = {
    **_LLAMA_FIXED,
    "norm_order": "sandwich",
    "norm_offset": 1.0,
    "scale_embeddings": True,
}


def _llama_like(name: str, **changes: Any) -> Family:
    usual = Family(
        language=f"{name}ForCausalLM",
        scalar=f"{name}ForSequenceClassification",
        keys=_LLAMA_KEYS,
        activation=Key("hidden_act", "silu"),
        activations=_SWIGLU,
        tensors=tensors.LLAMA,
        prefix="model.",
        fixed=_LLAMA_FIXED,
        refused={"attention_bias": False},
        more=(options.read_llama, options.write_rope),
    )
    return dataclasses.replace(usual, **changes)


FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        language="GPT2LMHeadModel",
        scalar="GPT2ForSequenceClassification",
        keys={
            "vocab_size": Key("vocab_size"),
            "num_layers": Key("n_layer"),
            "d_model": Key("n_embd"),
            "num_heads": Key("n_head"),
            "d_ff": Key("n_inner", None),
            "max_length": Key("n_positions"),
            "norm_eps": Key("layer_norm_epsilon", 1e-5),
            "tie_embeddings": Key("tie_word_embeddings", True),
        },
        activation=Key("activation_function", "gelu_new"),
        activations=_GELUS,
        refused={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        tensors=tensors.GPT2,
        prefix="transformer.",
        ignored=r"h\.\d+\.attn\.(masked_)?bias",
    ),
    "llama": _llama_like("Llama", refused={"attention_bias": False, "mlp_bias": False}),
    "mistral": _llama_like("Mistral", more=(options.windowed(4096), options.write_windowed)),
    "qwen2": _llama_like(
        "Qwen2",
        fixed={**_LLAMA_FIXED, "qkv_bias": True},
        refused={},
        more=(options.read_qwen, options.write_qwen),
    ),
    "qwen3": _llama_like(
        "Qwen3",
        keys={**_LLAMA_KEYS, "head_dim": Key("head_dim", 128)},
        fixed={**_LLAMA_FIXED, "qk_norm": True},
        more=(options.read_qwen, options.write_qwen),
    ),
    "gemma2": _llama_like(
        "Gemma2",
        keys={
            **_GEMMA_KEYS,
            "attention_softcap": Key("attn_logit_softcapping", 50.0, optional=True),
            "logit_softcap": Key("final_logit_softcapping", 30.0, optional=True),
        },
        activation=Key("hidden_activation", "gelu_pytorch_tanh"),
        activations=_GEGLU,
        tensors=tensors.GEMMA,
        fixed=_GEMMA_FIXED,
        refused={"attention_bias": False, "use_bidirectional_attention": False},
        more=(options.read_gemma2, options.write_gemma2),
    ),
    "gemma3_text": _llama_like(
        "Gemma3",
        scalar="Gemma3TextForSequenceClassification",
        keys={
            **_GEMMA_KEYS,
            "max_length": Key("max_position_embeddings", 131_072),
            "attention_softcap": Key("attn_logit_softcapping", None),
            "logit_softcap": Key("final_logit_softcapping", None),
        },
        activation=Key("hidden_activation", "gelu_pytorch_tanh"),
        activations=_GEGLU,
        tensors=tensors.GEMMA,
        fixed={**_GEMMA_FIXED, "qk_norm": True},
        refused={"attention_bias": False, "use_bidirectional_attention": False},
        more=(options.read_gemma3, options.write_gemma3),
    ),
    "phi3": _llama_like(
        "Phi3",
        keys={**_LLAMA_KEYS, "norm_eps": Key("rms_norm_eps", 1e-5)},
        tensors=tensors.PHI3,
        more=(options.windowed(None), options.write_phi3),
    ),
    "opt": Family(
        language="OPTForCausalLM",
        scalar="OPTForSequenceClassification",
        keys={
            **_SHAPE,
            "d_ff": Key("ffn_dim"),
            "max_length": Key("max_position_embeddings", 2048),
            "tie_embeddings": Key("tie_word_embeddings", True),
        },
        activation=Key("activation_function", "relu"),
        activations=_GELUS,
        refused={
            "enable_bias": True,
            "layer_norm_elementwise_affine": True,
            "_remove_final_layer_norm": False,
        },
        more=(options.read_opt, options.write_opt),
        tensors=tensors.OPT,
        prefix="model.decoder.",
    ),
    "gpt_neox": Family(
        language="GPTNeoXForCausalLM",
        scalar="GPTNeoXForSequenceClassification",
        keys={
            **_SHAPE,
            "d_ff": Key("intermediate_size"),
            "max_length": Key("max_position_embeddings", 2048),
            "norm_eps": Key("layer_norm_eps", 1e-5),
            "parallel_residual": Key("use_parallel_residual", True),
            "tie_embeddings": Key("tie_word_embeddings", False),
        },
        activation=Key("hidden_act", "gelu"),
        activations=_GELUS,
        refused={"attention_bias": True},
        more=(options.read_neox, options.write_neox),
        tensors=tensors.NEOX,
        prefix="gpt_neox.",
        ignored=r"layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",
        aliases={"lm_head.weight": "embed_out.weight"},
    ),
}


def family_of(config: TransformerConfig, name: str | None = None) -> str:
    """The model_type that can hold `config`: the one asked for, else the first; ValueError."""
    if name is not None and name not in FAMILIES:
        near = difflib.get_close_matches(name, FAMILIES, n=1) or FAMILIES
        raise ValueError(f"no family is called {name!r}; there are {', '.join(near)}")
    unsaid: dict[str, list[str]] = {}
    unreadable: dict[str, str] = {}
    for candidate in [name] if name else FAMILIES:
        family = FAMILIES[candidate]
        try:
            back = resolved(read_config(family, write_config(family, config)))
        except (TypeError, ValueError) as error:
            unreadable[candidate] = str(error)
            continue
        after, before = dataclasses.asdict(back), dataclasses.asdict(resolved(config))
        lost = [f"{field}={before[field]!r}" for field in before if before[field] != after[field]]
        if not lost:
            return candidate
        unsaid[candidate] = lost
    if name is not None:
        reasons = unsaid.get(name) or [unreadable[name]]
        raise ValueError(f"{name} cannot say {', '.join(reasons)}")
    told = ""
    if unsaid:
        nearest = min(unsaid, key=lambda candidate: len(unsaid[candidate]))
        told = f"; {nearest} is nearest, and cannot say {', '.join(unsaid[nearest])}"
    raise ValueError(f"no family of transformers has this configuration{told}")
