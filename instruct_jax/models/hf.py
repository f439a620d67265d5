"""Hugging Face folders (config.json and safetensors) into our configuration and parameters.

A family is a function from its config.json to a `TransformerConfig` and a table from our parameter
paths to its tensor names. Nothing is unpickled and no code of the folder is run. Names and shapes
are checked against the safetensors headers before any tensor is read.

A table entry names the tensor ("{}" stands for the layer), and says whether it is stored as
[out, in] and must be transposed (`Linear`; GPT-2's `Conv1D` is [in, out] like ours) and which
third of a fused query-key-value tensor it is.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from instruct_jax.errors import UserError
from instruct_jax.models.layers import TransformerConfig
from instruct_jax.models.transformer import Params, language_model

_FLOATS = ("F64", "F32", "F16", "BF16")


class _Tensor(NamedTuple):
    name: str
    transpose: bool = False
    third: int | None = None


class _Family(NamedTuple):
    config: Callable[[dict[str, Any]], TransformerConfig]
    tensors: dict[str, _Tensor]
    prefix: str  # some folders leave it out
    ignored: str  # buffers that hold no parameters


def load_pretrained(directory: str | Path) -> tuple[TransformerConfig, Params]:
    """The model in a Hugging Face folder; fp32 NumPy parameters, vocabulary padded to our rule.

    Raises UserError for a folder, a family or an option that cannot be read, and lists the names
    that are missing or unexpected.
    """
    directory = Path(directory)
    raw = _read_json(directory / "config.json")
    family = _FAMILIES.get(raw.get("model_type", ""))
    if family is None:
        raise UserError(
            f"{directory / 'config.json'}: model_type={raw.get('model_type')!r} is not supported; "
            f"supported: {', '.join(_FAMILIES)}"
        )
    try:
        config = family.config(raw)
    except KeyError as error:
        raise UserError(f"{directory / 'config.json'}: {error.args[0]!r} is missing") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{directory / 'config.json'}: {error}") from error
    with ExitStack() as stack:
        stored = _open_shards(directory, family, stack)
        return config, _read_params(directory, config, family, stored)


def _gpt2_config(raw: dict[str, Any]) -> TransformerConfig:
    for option, wanted in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        if raw.get(option, wanted) != wanted:
            raise ValueError(f"{option}={raw[option]!r} is not supported")
    return TransformerConfig(
        vocab_size=raw["vocab_size"],
        num_layers=raw["n_layer"],
        d_model=raw["n_embd"],
        num_heads=raw["n_head"],
        d_ff=raw.get("n_inner"),
        max_length=raw["n_positions"],
        activation=_choice(
            raw,
            "activation_function",
            {
                "gelu_new": "gelu",
                "gelu_pytorch_tanh": "gelu",
                "gelu": "gelu_exact",
                "relu": "relu",
            },
            "gelu_new",
        ),
        norm_eps=raw.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=raw.get("tie_word_embeddings", True),
    )


def _llama_config(raw: dict[str, Any]) -> TransformerConfig:
    # transformers 5 gathers what used to be rope_theta and rope_scaling.
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    for option, value, wanted in (
        ("rope type", kind, "default"),
        ("attention_bias", raw.get("attention_bias", False), False),
        ("mlp_bias", raw.get("mlp_bias", False), False),
    ):
        if value != wanted:
            raise ValueError(f"{option}={value!r} is not supported")
    return TransformerConfig(
        vocab_size=raw["vocab_size"],
        num_layers=raw["num_hidden_layers"],
        d_model=raw["hidden_size"],
        num_heads=raw["num_attention_heads"],
        num_kv_heads=raw.get("num_key_value_heads"),
        head_dim=raw.get("head_dim"),
        d_ff=raw["intermediate_size"],
        max_length=raw.get("max_position_embeddings", 2048),
        norm="rmsnorm",
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        activation=_choice(raw, "hidden_act", {"silu": "swiglu", "swish": "swiglu"}, "silu"),
        positions="rope",
        rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0))),
        use_bias=False,
        tie_embeddings=raw.get("tie_word_embeddings", False),
    )


def _choice(raw: dict[str, Any], key: str, names: dict[str, str], default: str) -> str:
    value = raw.get(key, default)
    if value not in names:
        raise ValueError(f"{key}={value!r} is not supported; supported: {', '.join(names)}")
    return names[value]


_FAMILIES = {
    "gpt2": _Family(
        config=_gpt2_config,
        prefix="transformer.",
        ignored=r"h\.\d+\.attn\.(masked_)?bias",
        tensors={
            "embedder/tokens": _Tensor("wte.weight"),
            "embedder/positions": _Tensor("wpe.weight"),
            "final_norm/scale": _Tensor("ln_f.weight"),
            "final_norm/bias": _Tensor("ln_f.bias"),
            "unembedding/kernel": _Tensor("lm_head.weight", transpose=True),
            "layers/attention_norm/scale": _Tensor("h.{}.ln_1.weight"),
            "layers/attention_norm/bias": _Tensor("h.{}.ln_1.bias"),
            "layers/attention/query/kernel": _Tensor("h.{}.attn.c_attn.weight", third=0),
            "layers/attention/query/bias": _Tensor("h.{}.attn.c_attn.bias", third=0),
            "layers/attention/key/kernel": _Tensor("h.{}.attn.c_attn.weight", third=1),
            "layers/attention/key/bias": _Tensor("h.{}.attn.c_attn.bias", third=1),
            "layers/attention/value/kernel": _Tensor("h.{}.attn.c_attn.weight", third=2),
            "layers/attention/value/bias": _Tensor("h.{}.attn.c_attn.bias", third=2),
            "layers/attention/out/kernel": _Tensor("h.{}.attn.c_proj.weight"),
            "layers/attention/out/bias": _Tensor("h.{}.attn.c_proj.bias"),
            "layers/mlp_norm/scale": _Tensor("h.{}.ln_2.weight"),
            "layers/mlp_norm/bias": _Tensor("h.{}.ln_2.bias"),
            "layers/mlp/up/kernel": _Tensor("h.{}.mlp.c_fc.weight"),
            "layers/mlp/up/bias": _Tensor("h.{}.mlp.c_fc.bias"),
            "layers/mlp/down/kernel": _Tensor("h.{}.mlp.c_proj.weight"),
            "layers/mlp/down/bias": _Tensor("h.{}.mlp.c_proj.bias"),
        },
    ),
    "llama": _Family(
        config=_llama_config,
        prefix="model.",
        ignored=r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        tensors={
            "embedder/tokens": _Tensor("embed_tokens.weight"),
            "final_norm/scale": _Tensor("norm.weight"),
            "unembedding/kernel": _Tensor("lm_head.weight", transpose=True),
            "layers/attention_norm/scale": _Tensor("layers.{}.input_layernorm.weight"),
            "layers/attention/query/kernel": _Tensor("layers.{}.self_attn.q_proj.weight", True),
            "layers/attention/key/kernel": _Tensor("layers.{}.self_attn.k_proj.weight", True),
            "layers/attention/value/kernel": _Tensor("layers.{}.self_attn.v_proj.weight", True),
            "layers/attention/out/kernel": _Tensor("layers.{}.self_attn.o_proj.weight", True),
            "layers/mlp_norm/scale": _Tensor("layers.{}.post_attention_layernorm.weight"),
            "layers/mlp/gate/kernel": _Tensor("layers.{}.mlp.gate_proj.weight", True),
            "layers/mlp/up/kernel": _Tensor("layers.{}.mlp.up_proj.weight", True),
            "layers/mlp/down/kernel": _Tensor("layers.{}.mlp.down_proj.weight", True),
        },
    ),
}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _open_shards(directory: Path, family: _Family, stack: ExitStack) -> dict[str, Any]:
    """Tensor name without the family's prefix -> its slice in the file that holds it."""
    index = directory / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.exists():
        files = set(_read_json(index).get("weight_map", {}).values())
        if not files or any(not isinstance(f, str) or Path(f).name != f for f in files):
            raise UserError(f"{index}: weight_map must name files of its own folder")
    stored: dict[str, Any] = {}
    for path in (directory / file for file in sorted(files)):
        if not path.is_file():
            raise UserError(f"{path}: no such file (only safetensors weights are read)")
        try:
            shard = stack.enter_context(safe_open(path, framework="numpy"))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from error
        for name in shard.keys():  # noqa: SIM118  a handle is not a dict
            short = name.removeprefix(family.prefix)
            if short in stored:
                raise UserError(f"{path}: the tensor {name!r} is there twice")
            stored[short] = shard.get_slice(name)
    return stored


class _Read(NamedTuple):
    """One stored tensor, or a third of one, into one parameter or one layer of it."""

    path: str
    layer: int | None
    tensor: _Tensor
    name: str
    shape: tuple[int, ...]  # as stored


def _plan(config: TransformerConfig, family: _Family, shapes: dict[str, Any]) -> Iterator[_Read]:
    for path, leaf in shapes.items():
        tensor, shape = family.tensors[path], leaf.shape
        layers: Iterable[int | None] = [None]
        if path.startswith("layers/"):
            layers, shape = range(shape[0]), shape[1:]
        if path == "embedder/tokens":
            shape = (config.vocab_size, shape[1])
        if path == "unembedding/kernel":
            shape = (shape[0], config.vocab_size)
        if tensor.third is not None:
            shape = (*shape[:-1], 3 * shape[-1])
        if tensor.transpose:
            shape = shape[::-1]
        for layer in layers:
            yield _Read(path, layer, tensor, tensor.name.format(layer), shape)


def _read_params(
    directory: Path, config: TransformerConfig, family: _Family, stored: dict[str, Any]
) -> Params:
    abstract = jax.eval_shape(language_model(config).init, jax.random.key(0))
    shapes: dict[str, Any] = flatten_dict(abstract, sep="/")
    plan = list(_plan(config, family, shapes))
    _check(directory, config, family, plan, stored)
    params = {path: np.zeros(leaf.shape, np.float32) for path, leaf in shapes.items()}
    for read in plan:
        window = [slice(size) for size in read.shape]
        if read.tensor.third is not None:
            size = read.shape[-1] // 3
            window[-1] = slice(read.tensor.third * size, (read.tensor.third + 1) * size)
        value = stored[read.name][tuple(window)]
        value = value.T if read.tensor.transpose else value
        target = params[read.path] if read.layer is None else params[read.path][read.layer]
        target[tuple(slice(size) for size in value.shape)] = value  # the rest is vocabulary padding
    return unflatten_dict(params, sep="/")


def _check(
    directory: Path,
    config: TransformerConfig,
    family: _Family,
    plan: list[_Read],
    stored: dict[str, Any],
) -> None:
    known = {read.name for read in plan} | ({"lm_head.weight"} if config.tie_embeddings else set())
    problems = {
        "missing": {read.name for read in plan} - stored.keys(),
        "unexpected": {n for n in stored.keys() - known if not re.fullmatch(family.ignored, n)},
    }
    for read in plan:
        if read.name in stored:
            kind, shape = stored[read.name].get_dtype(), tuple(stored[read.name].get_shape())
            if kind not in _FLOATS or shape != read.shape:
                problems.setdefault(f"not float{list(read.shape)}", set()).add(
                    f"{read.name} is {kind}{list(shape)}"
                )
    told = [
        f"{len(names)} {problem}: {', '.join(sorted(names)[:8])}{', ...' if len(names) > 8 else ''}"
        for problem, names in problems.items()
        if names
    ]
    if told:
        raise UserError(f"{directory}: the tensors do not fit config.json; {'; '.join(told)}")
