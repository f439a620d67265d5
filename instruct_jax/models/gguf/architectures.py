"""What GGUF calls what transformers calls otherwise: keys, tensors, and the forms of tensors.

An `Architecture` translates between the metadata of a GGUF file and the config.json of a family
(`models/hf/families.py`), in both directions, so that everything else about a model is said once,
there. Names of tensors are translated by the package `gguf`. Forms: the llama architecture has the
two halves of a rotary head interleaved in the rows of q and k, gemma's norms are stored with 1
added, GPT-2's matrices are [out, in] as everywhere else in GGUF.

llama.cpp knows some things by the architecture alone (the pattern of gemma's local layers, the
scale of its queries): what departs from them is not written.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from instruct_jax.models.gguf.container import Metadata, gguf_package
from instruct_jax.models.hf.schema import Raw, shown

Form = Callable[[np.ndarray], np.ndarray]
_ROPE_FACTORS = {
    "rope_factors_long.weight": "long_factor",
    "rope_factors_short.weight": "short_factor",
}
ROPE_TENSORS = ("rope_freqs.weight", *_ROPE_FACTORS)
# Of the bases of LLaMA 3, which GGUF has only as the factors that they give.
_LOW, _HIGH, _ORIGINAL = 1.0, 4.0, 8192


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One `general.architecture`, and the model_type that it is read as."""

    model_type: str
    keys: dict[str, str]
    """config.json -> metadata, without the architecture's own prefix."""
    floats: frozenset[str] = frozenset()
    """The keys that are no integers."""
    pattern: int | None = None
    """Every how manyth layer is global, where the others are local."""
    interleaved: bool = False
    norm_offset: float = 0.0
    transposed: tuple[str, ...] = ()
    """Ends of the names of matrices that transformers has the other way round."""


_USUAL = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
_FLOATS = frozenset({"rms_norm_eps", "rope_theta"})
_WINDOW = {"sliding_window": "attention.sliding_window"}
_GEMMA2 = {
    **_USUAL, **_WINDOW,
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}  # fmt: skip
_SOFTCAPS = frozenset({"attn_logit_softcapping", "final_logit_softcapping"})

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", _USUAL, _FLOATS, interleaved=True),
    "qwen2": Architecture("qwen2", _USUAL, _FLOATS),
    "qwen3": Architecture("qwen3", _USUAL, _FLOATS),
    "gemma2": Architecture("gemma2", _GEMMA2, _FLOATS | _SOFTCAPS, pattern=2, norm_offset=1.0),
    "gemma3": Architecture(
        "gemma3_text",
        {**_GEMMA2, "rope_local_base_freq": "rope.freq_base_swa"},
        _FLOATS | _SOFTCAPS | {"rope_local_base_freq"},
        pattern=6,
        norm_offset=1.0,
    ),
    "phi3": Architecture("phi3", {**_USUAL, **_WINDOW}, _FLOATS),
    "gpt2": Architecture(
        "gpt2",
        {
            "n_positions": "context_length",
            "n_embd": "embedding_length",
            "n_layer": "block_count",
            "n_inner": "feed_forward_length",
            "n_head": "attention.head_count",
            "layer_norm_epsilon": "attention.layer_norm_epsilon",
        },
        frozenset({"layer_norm_epsilon"}),
        transposed=("c_attn.weight", "c_proj.weight", "c_fc.weight"),
    ),
}
# Those that a file may leave out; llama.cpp wants the others.
_OPTIONAL = {"attention.head_count_kv", "attention.key_length", "rope.freq_base",
             "rope.freq_base_swa", *_WINDOW.values(), *_SOFTCAPS}  # fmt: skip
_MOST_LAYERS, _MOST = 10_000, 2**31 - 1


class Translation:
    """Names and forms of the tensors of one model, in both directions."""

    def __init__(self, name: str, raw: Raw) -> None:
        """`raw` is the config.json of a model of the architecture `name`."""
        package = gguf_package()
        self._architecture, self._raw = ARCHITECTURES[name], raw
        number = next(k for k, v in package.MODEL_ARCH_NAMES.items() if v == name)
        layers = raw["n_layer" if name == "gpt2" else "num_hidden_layers"]
        self._names = package.get_tensor_name_map(number, layers)

    def name(self, theirs: str) -> str:
        """The GGUF name of a tensor of transformers."""
        found = self._names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(f"GGUF has no name for {theirs}")
        return found

    def into(self, theirs: str) -> Form:
        """From transformers' form of the tensor `theirs` to that of GGUF."""
        return self._form(theirs, written=True)

    def out_of(self, theirs: str) -> Form:
        """From GGUF's form to that of transformers."""
        return self._form(theirs, written=False)

    def _form(self, theirs: str, *, written: bool) -> Form:
        form = self._architecture
        if form.transposed and theirs.endswith(form.transposed):
            return np.transpose
        if form.norm_offset and theirs.endswith("norm.weight"):
            offset = np.float32(form.norm_offset if written else -form.norm_offset)
            return lambda x: x + offset
        heads = self._rotary_heads(theirs)
        if heads is None:
            return lambda x: x
        halves = (heads, 2, -1) if written else (heads, -1, 2)
        return lambda x: x.reshape(*halves, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)

    def _rotary_heads(self, theirs: str) -> int | None:
        """How many heads lie in the rows of `theirs`, where their halves are interleaved."""
        if not self._architecture.interleaved:
            return None
        if ".q_proj." in theirs:
            return self._raw["num_attention_heads"]
        return self._raw["num_key_value_heads"] if ".k_proj." in theirs else None


def config_of(name: str, metadata: Metadata, tensors: Mapping[str, Any]) -> Raw:
    """The config.json of a GGUF file without its vocabulary; ValueError names what is wrong.

    `tensors` gives those of `ROPE_TENSORS` that the file has, as arrays.
    """
    form = ARCHITECTURES[name]

    def value(key: str, kind: type) -> Any:
        return _value(f"{name}.{key}", metadata.get(f"{name}.{key}"), kind)

    for key in form.keys.values():
        if f"{name}.{key}" not in metadata and key not in _OPTIONAL:
            raise ValueError(f"{name}.{key} is missing")
    if value("expert_count", int):
        raise ValueError(f"{name}.expert_count={value('expert_count', int)}: mixtures are not read")
    raw: Raw = {"model_type": form.model_type}
    for theirs, key in form.keys.items():
        found = value(key, float if theirs in form.floats else int)
        if found == 0 and key in _OPTIONAL:
            continue  # no window, no cap
        if found is not None:
            raw[theirs] = found
            most = _MOST_LAYERS if key == "block_count" else _MOST
            if theirs not in form.floats and not 0 < found <= most:
                raise ValueError(f"{name}.{key}={found} is absurd")
    if form.model_type == "gpt2":
        return raw
    heads = raw["num_attention_heads"]
    raw.setdefault("num_key_value_heads", heads)
    raw.setdefault("rope_theta", 10_000.0)
    raw.setdefault("head_dim", raw["hidden_size"] // heads)
    if value("attention.value_length", int) not in (None, raw["head_dim"]):
        raise ValueError(f"{name}.attention.value_length is not {name}.attention.key_length")
    turned = value("rope.dimension_count", int) or raw["head_dim"]
    if turned != raw["head_dim"]:
        raw["partial_rotary_factor"] = turned / raw["head_dim"]
    raw["rope_scaling"] = _scaling(name, raw, value, tensors)
    if form.pattern is not None:
        raw |= _gemma(name, form, metadata, raw)
    return raw


def _gemma(name: str, form: Architecture, metadata: Metadata, raw: Raw) -> Raw:
    """The local layers and the scale of the queries, which older files leave to the reader."""
    pattern = metadata.get(f"{name}.attention.sliding_window_pattern", form.pattern)
    if name == "gemma3" and "sliding_window" not in raw:
        pattern = np.zeros(raw["num_hidden_layers"])
    if isinstance(pattern, np.ndarray):
        local = [bool(one) for one in pattern]
    else:
        every = _value(f"{name}.attention.sliding_window_pattern", pattern, int)
        local = [every < 1 or (i + 1) % every != 0 for i in range(raw["num_hidden_layers"])]
    return {
        "layer_types": ["sliding_attention" if one else "full_attention" for one in local],
        "query_pre_attn_scalar": _query_scalar(name, raw),
    }


def _query_scalar(name: str, raw: Raw) -> int:
    """As llama.cpp has it: of the largest models D / N, which is not the size of a head."""
    largest = {"gemma2": 46, "gemma3": 62}[name]
    if raw["num_hidden_layers"] == largest:
        return raw["hidden_size"] // raw["num_attention_heads"]
    return raw["head_dim"]


def _scaling(
    name: str, raw: Raw, value: Callable[[str, type], Any], tensors: Mapping[str, Any]
) -> Raw | None:
    if "rope_freqs.weight" in tensors:
        original = value("rope.scaling.original_context_length", int) or _ORIGINAL
        return _llama3(np.asarray(tensors["rope_freqs.weight"], np.float64), raw, original)
    kind = value("rope.scaling.type", str)
    factor = value("rope.scaling.factor", float) or value("rope.scale_linear", float)
    factors = {
        ours: np.asarray(tensors[theirs]).tolist()
        for theirs, ours in _ROPE_FACTORS.items()
        if theirs in tensors
    }
    if factors:
        kind = "longrope"
    if kind in (None, "none", "linear"):
        return None if factor in (None, 0.0, 1.0) else {"rope_type": "linear", "factor": factor}
    original = value("rope.scaling.original_context_length", int)
    return {
        "rope_type": kind,
        **({} if factor is None else {"factor": factor}),
        **({} if original is None else {"original_max_position_embeddings": original}),
        **factors,
    }


def llama3_factors(raw: Raw, scaling: Raw) -> np.ndarray:
    """f32[H/2], by which LLaMA 3 divides its frequencies (rope_freqs.weight)."""
    size = raw["head_dim"]
    frequencies = raw["rope_theta"] ** -(np.arange(0, size, 2, dtype=np.float64) / size)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high, factor = (scaling[k] for k in ("low_freq_factor", "high_freq_factor", "factor"))
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)


def _llama3(factors: np.ndarray, raw: Raw, original: int) -> Raw | None:
    if factors.shape != (raw["head_dim"] // 2,):
        raise ValueError(f"rope_freqs.weight has the shape {list(factors.shape)}")
    if np.allclose(factors, 1.0):
        return None
    scaling = {
        "rope_type": "llama3",
        # The least of frequencies are divided by all of it. Stored with float32's rounding.
        "factor": float(f"{factors.max():.6g}"),
        "low_freq_factor": _LOW,
        "high_freq_factor": _HIGH,
        "original_max_position_embeddings": original,
    }
    if not np.allclose(llama3_factors(raw, scaling), factors, 1e-4):
        raise ValueError("rope_freqs.weight are not the frequencies of LLaMA 3")
    return scaling


def metadata_of(name: str, raw: Raw) -> tuple[dict[str, int | float | str], dict[str, np.ndarray]]:
    """Keys (without their prefix) and further tensors of a config.json.

    Raises ValueError for what llama.cpp would compute otherwise.
    """
    form = ARCHITECTURES[name]
    keys: dict[str, int | float | str] = {"vocab_size": raw["vocab_size"]}
    for theirs, key in form.keys.items():
        if raw.get(theirs) is not None:
            keys[key] = float(raw[theirs]) if theirs in form.floats else raw[theirs]
    if form.model_type == "gpt2":
        if raw["activation_function"] != "gelu_new":
            raise ValueError(f"activation_function={raw['activation_function']} is not GPT-2's")
        return keys, {}
    keys["attention.value_length"] = raw["head_dim"]
    keys["rope.dimension_count"] = int(raw["head_dim"] * raw.get("partial_rotary_factor", 1.0))
    kinds = set(raw.get("layer_types") or ())
    if form.pattern is None:
        if name != "phi3" and (raw.get("sliding_window") or "sliding_attention" in kinds):
            raise ValueError(f"llama.cpp has no local layers in {name}")
    else:
        _check_gemma(name, form, raw)
    scaling = raw.get("rope_scaling") or {}
    if scaling.get("rope_type") == "llama3":
        keys["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
        return keys, {"rope_freqs.weight": llama3_factors(raw, scaling)}
    if scaling:
        if scaling.get("rope_type") != "linear":
            raise ValueError(f"rope type {shown(scaling.get('rope_type'))} is not written")
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}
    return keys, {}


def _check_gemma(name: str, form: Architecture, raw: Raw) -> None:
    every = form.pattern or 1
    usual = ["full_attention" if (i + 1) % every == 0 else "sliding_attention"
             for i in range(raw["num_hidden_layers"])]  # fmt: skip
    if raw["layer_types"] != usual:
        raise ValueError(f"llama.cpp has one global layer to {every - 1} local ones in {name}")
    wanted = _query_scalar(name, raw)
    if raw["query_pre_attn_scalar"] != wanted:
        raise ValueError(
            f"llama.cpp divides by the root of {wanted} in {name}, not of "
            f"{raw['query_pre_attn_scalar']}"
        )
    for key in sorted(_SOFTCAPS):
        if (raw[key] is None) != (name == "gemma3"):
            raise ValueError(f"{key}={raw[key]} is not what llama.cpp computes in {name}")


def _value(key: str, value: Any, kind: type) -> Any:
    """A value of the metadata as Python has it; float32 by its shortest decimal."""
    if isinstance(value, np.ndarray) and value.size and kind is int and (value == value[0]).all():
        value = value[0].item()  # one for each layer, all the same
    if value is None:
        return None
    if kind is float and type(value) in (int, float):
        return float(str(np.float32(value))) if type(value) is float else float(value)
    if type(value) is not kind:
        raise ValueError(f"{key}={shown(value)} is not {_SAID[kind]}")
    return value


_SAID = {int: "an integer", float: "a number", str: "a text"}
