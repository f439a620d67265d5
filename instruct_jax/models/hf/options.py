"""What is no plain key of a config.json: rotary positions, layer types, the order of norms.

Each pair of functions is a family's `more`: theirs -> our fields, our configuration -> their keys.
"""

from collections.abc import Callable
from typing import Any

from instruct_jax.models.config import TransformerConfig
from instruct_jax.models.hf.schema import REQUIRED, Key, Raw, mapping, period, shown
from instruct_jax.models.hf.schema import number as number_of


def read_rope(
    raw: Raw, *, theta: float = 10_000.0, fraction: float = 1.0, part: str | None = None
) -> Raw:
    """Base, part of a head and scaling of the rotary positions."""
    # transformers 5 gathers what used to be rope_theta and rope_scaling.
    new = mapping(raw, "rope_parameters")
    rope = {**mapping(raw, "rope_scaling"), **(new if part is None else mapping(new, part))}
    kind = rope.get("rope_type", rope.get("type", "default"))
    kinds = ("default", "linear", "llama3")
    if kind not in kinds:
        known = ", ".join(kinds)
        raise ValueError(f"rope type={shown(kind)!r} is not supported; supported: {known}")

    def number(name: str, default: Any = REQUIRED) -> float:
        value = rope.get(name, raw.get(name, default))
        if value is REQUIRED:
            raise KeyError(name)
        return number_of(name, value)

    old_theta = raw.get("rotary_emb_base", theta)
    values: Raw = {
        "positions": "rope",
        "rope_theta": number("rope_theta", old_theta),
        "rope_fraction": number("partial_rotary_factor", raw.get("rotary_pct", fraction)),
    }
    if kind != "default":
        values["rope_factor"] = number("factor")
    if kind == "llama3":
        original = Key("original_max_position_embeddings").read(rope, int)
        values["rope_original_length"] = original
        values["rope_low_factor"] = number("low_freq_factor")
        values["rope_high_factor"] = number("high_freq_factor")
    return values


def write_rope(c: TransformerConfig) -> Raw:
    """The keys of transformers 4, which 5 reads as well."""
    scaling: Raw | None = None
    if c.rope_original_length is not None:
        scaling = {
            "rope_type": "llama3",
            "factor": c.rope_factor,
            "low_freq_factor": c.rope_low_factor,
            "high_freq_factor": c.rope_high_factor,
            "original_max_position_embeddings": c.rope_original_length,
        }
    elif c.rope_factor != 1.0:
        scaling = {"rope_type": "linear", "factor": c.rope_factor}
    return {"rope_theta": c.rope_theta, "rope_scaling": scaling}


def _window(raw: Raw, default: int | None) -> int | None:
    return Key("sliding_window", default, optional=True).read(raw, int)


def _layer_types(raw: Raw, default: str) -> str:
    """The pattern of `layer_types`, as `attention_pattern`."""
    types = raw.get("layer_types")
    if types is None:
        return default
    letters = {"full_attention": "g", "sliding_attention": "l"}
    if not isinstance(types, list) or not types or not all(t in tuple(letters) for t in types):
        raise ValueError(f"layer_types: expected a list of {' and '.join(letters)}")
    if len(types) != raw.get("num_hidden_layers"):
        raise ValueError(f"layer_types has {len(types)} entries, one a layer is needed")
    return period("".join(letters[t] for t in types))


def write_layer_types(c: TransformerConfig) -> Raw:
    """One word a layer, and the window."""
    names = ("full_attention", "sliding_attention")
    return {
        "layer_types": [names[local] for local in c.local_layers],
        "sliding_window": c.window,
    }


def read_llama(raw: Raw) -> Raw:
    """Rotary positions."""
    return read_rope(raw)


def windowed(default: int | None) -> Callable[[Raw], Raw]:
    """Every layer is local when there is a window."""

    def read(raw: Raw) -> Raw:
        window = _window(raw, default)
        pattern = "g" if window is None else "l"
        return read_rope(raw) | {"window": window, "attention_pattern": pattern}

    return read


def write_windowed(c: TransformerConfig) -> Raw:
    """Rotary positions and the window of all layers."""
    return write_rope(c) | {"sliding_window": c.window}


def write_phi3(c: TransformerConfig) -> Raw:
    """As Mistral's, and the part of a head that turns."""
    return write_windowed(c) | {"partial_rotary_factor": c.rope_fraction}


def _count(raw: Raw, name: str, default: int) -> int:
    value = raw.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name}={shown(value)} is not a number of layers")
    return value


def read_qwen(raw: Raw) -> Raw:
    """Local layers, if any, come after the global ones."""
    if not raw.get("use_sliding_window", False):
        return read_rope(raw)
    layers = Key("num_hidden_layers").read(raw, int)
    first = min(_count(raw, "max_window_layers", 28), layers)
    pattern = _layer_types(raw, "g" * first + "l" * (layers - first))
    return read_rope(raw) | {"window": _window(raw, 4096), "attention_pattern": pattern}


def write_qwen(c: TransformerConfig) -> Raw:
    """Layer types in full."""
    return {**write_rope(c), **write_layer_types(c), "use_sliding_window": any(c.local_layers)}


def read_gemma2(raw: Raw) -> Raw:
    """Local and global layers take turns."""
    pattern = _layer_types(raw, "lg")
    return read_rope(raw) | {"window": _window(raw, 4096), "attention_pattern": pattern}


def write_gemma2(c: TransformerConfig) -> Raw:
    """Layer types in full."""
    return write_rope(c) | write_layer_types(c)


def read_gemma3(raw: Raw) -> Raw:
    """Five local layers, with a base of their own, to a global one."""
    # A global layer past the last one is none.
    layers = Key("num_hidden_layers").read(raw, int)
    every = min(Key("sliding_window_pattern", 6).read(raw), layers + 1)
    own = mapping(mapping(raw, "rope_parameters"), "sliding_attention")
    base = own.get("rope_theta", raw.get("rope_local_base_freq", 10_000.0))
    return read_rope(raw, theta=1e6, part="full_attention") | {
        "window": _window(raw, 4096),
        "attention_pattern": _layer_types(raw, "l" * (every - 1) + "g"),
        "rope_local_theta": number_of("rope_local_base_freq", base),
    }


def write_gemma3(c: TransformerConfig) -> Raw:
    """Layer types in full, and the local base."""
    base = c.rope_theta if c.rope_local_theta is None else c.rope_local_theta
    return write_rope(c) | write_layer_types(c) | {"rope_local_base_freq": base}


def read_neox(raw: Raw) -> Raw:
    """A quarter of a head turns."""
    return read_rope(raw, fraction=0.25)


def write_neox(c: TransformerConfig) -> Raw:
    """The names that this family has for it."""
    rope = write_rope(c)
    theta = rope.pop("rope_theta")
    return {**rope, "rotary_emb_base": theta, "rotary_pct": c.rope_fraction}


def read_opt(raw: Raw) -> Raw:
    """Norms before or after; no projections."""
    if raw.get("word_embed_proj_dim", raw["hidden_size"]) != raw["hidden_size"]:
        told = shown(raw["word_embed_proj_dim"])
        raise ValueError(
            f"word_embed_proj_dim={told}: embeddings narrower than the model, with projections "
            "(OPT-350m), are not supported"
        )
    return {"norm_order": "pre" if raw.get("do_layer_norm_before", True) else "post"}


def write_opt(c: TransformerConfig) -> Raw:
    """Norms before or after."""
    return {"do_layer_norm_before": c.norm_order == "pre", "word_embed_proj_dim": c.d_model}
