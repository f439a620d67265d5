"""What a family says about itself, and what is made of it: config.json <-> our configuration."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from instruct_jax.models.config import TransformerConfig
from instruct_jax.models.hf.container import printable

Raw = dict[str, Any]
REQUIRED: Any = object()
_MOST_LAYERS = 10_000
_MOST = 2**31 - 1
_FLOATS = dict.fromkeys(("norm_eps", "attention_softcap", "logit_softcap"), float)


class Key(NamedTuple):
    """Where a field stands in config.json, and its value where it does not."""

    name: str
    default: Any = REQUIRED
    optional: bool = False
    """Whether null means something, beside its being the default."""

    def read(self, raw: Raw, kind: type | None = None) -> Any:
        """The value, checked; KeyError or ValueError."""
        if self.default is REQUIRED and self.name not in raw:
            raise KeyError(self.name)
        value = raw.get(self.name, self.default)
        if value is None and (self.optional or self.default is None):
            return None
        kind = kind or (float if isinstance(self.default, float) else type(self.default))
        if kind is bool:
            if not isinstance(value, bool):
                raise ValueError(f"{self.name}={shown(value)} is not true or false")
            return value
        if kind is float:
            return number(self.name, value)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MOST:
            raise ValueError(f"{self.name}={shown(value)} is not a size")
        return value


class Tensor(NamedTuple):
    """Where a parameter is stored."""

    name: str
    transpose: bool = False
    fused: tuple[str, ...] = ()
    """The modules whose outputs lie side by side in this tensor, in their order."""
    per_head: bool = False
    """Whether they do so head by head."""
    skip: int = 0
    """Rows before the first of ours."""


@dataclasses.dataclass(frozen=True)
class Family:
    """How one model_type is read and written."""

    language: str
    scalar: str
    keys: dict[str, Key]
    activation: Key
    activations: dict[str, str]
    tensors: dict[str, Tensor]
    prefix: str
    """Of every tensor but the heads; some folders leave it, or its first part, out."""
    fixed: Raw = dataclasses.field(default_factory=dict)
    refused: Raw = dataclasses.field(default_factory=dict)
    more: tuple[Callable[[Raw], Raw], Callable[[TransformerConfig], Raw]] = (
        lambda raw: {},
        lambda config: {},
    )
    ignored: str = r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
    """Buffers that hold no parameters."""
    aliases: dict[str, str] = dataclasses.field(default_factory=dict)
    """Older names of tensors."""


def read_config(family: Family, raw: Raw) -> TransformerConfig:
    """Our configuration of a config.json; KeyError, TypeError or ValueError name the key."""
    for option, wanted in family.refused.items():
        if raw.get(option, wanted) != wanted and (raw.get(option) or wanted):
            raise ValueError(f"{option}={shown(raw[option])} is not supported")
    name = family.activation.name
    activation = raw.get(name) or family.activation.default
    if not isinstance(activation, str) or activation not in family.activations:
        known = ", ".join(family.activations)
        raise ValueError(f"{name}={shown(activation)!r} is not supported; supported: {known}")
    values = {ours: key.read(raw, _FLOATS.get(ours)) for ours, key in family.keys.items()}
    if values["num_layers"] > _MOST_LAYERS:
        raise ValueError(f"{family.keys['num_layers'].name}={values['num_layers']} is absurd")
    values |= {"activation": family.activations[activation]} | family.fixed | family.more[0](raw)
    return TransformerConfig(**values)


def write_config(family: Family, config: TransformerConfig) -> Raw:
    """The keys of a config.json; read back, they are `config` when the family can hold it."""
    c = resolved(config)
    ours = {theirs: name for name, theirs in reversed(list(family.activations.items()))}
    values = dataclasses.asdict(c)
    if c.query_scalar is not None and c.query_scalar.is_integer():
        values["query_scalar"] = int(c.query_scalar)  # transformers refuses 256.0
    return {
        **{key.name: values[field] for field, key in family.keys.items()},
        **family.refused,
        family.activation.name: ours.get(c.activation, c.activation),
        **family.more[1](c),
    }


def resolved(config: TransformerConfig) -> TransformerConfig:
    """`config` with its defaults spelt out, and without what belongs to a run."""
    c = config
    any_local, rope = any(c.local_layers), c.positions == "rope"
    scaled = rope and c.rope_factor != 1.0
    return TransformerConfig(
        vocab_size=c.vocab_size,
        num_layers=c.num_layers,
        d_model=c.d_model,
        num_heads=c.num_heads,
        num_kv_heads=c.kv_heads,
        head_dim=c.head_size,
        d_ff=c.ff_size,
        max_length=c.max_length,
        norm=c.norm,
        norm_order=c.norm_order,
        norm_offset=c.norm_offset,
        norm_eps=c.norm_eps,
        activation=c.activation,
        use_bias=c.use_bias,
        qkv_bias=c.use_bias if c.qkv_bias is None else c.qkv_bias,
        qk_norm=c.qk_norm,
        query_scalar=float(c.query_scalar or c.head_size),
        parallel_residual=c.parallel_residual,
        attention_softcap=c.attention_softcap,
        logit_softcap=c.logit_softcap,
        attention_pattern=period("".join("gl"[local] for local in c.local_layers)),
        window=c.window if any_local else None,
        positions=c.positions,
        rope_theta=c.rope_theta if rope else 10_000.0,
        rope_local_theta=(c.rope_local_theta or c.rope_theta) if rope and any_local else None,
        rope_fraction=c.rotary_size / c.head_size if rope else 1.0,
        rope_factor=c.rope_factor if rope else 1.0,
        rope_original_length=c.rope_original_length if scaled else None,
        rope_low_factor=c.rope_low_factor if scaled and c.rope_original_length else 1.0,
        rope_high_factor=c.rope_high_factor if scaled and c.rope_original_length else 4.0,
        scale_embeddings=c.scale_embeddings,
        tie_embeddings=c.tie_embeddings,
    )


def period(pattern: str) -> str:
    """The shortest text that `pattern` repeats."""
    for size in range(1, len(pattern)):
        if (pattern[:size] * (len(pattern) // size + 1))[: len(pattern)] == pattern:
            return pattern[:size]
    return pattern


def number(name: str, value: Any) -> float:
    """`value` as a finite float, or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
        raise ValueError(f"{name}={shown(value)} is not a number")
    return float(value)


def mapping(raw: Raw, name: str) -> Raw:
    """The object called `name`, {} where it is missing or null; ValueError for anything else."""
    value = raw.get(name)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name}={shown(value)} is not an object")
    return value or {}


def shown(value: Any) -> str:
    """The beginning of a value of a config.json, in one line."""
    return "null" if value is None else printable(str(value), 40)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float is near to
        return False
