"""What a decoder is made of: its sizes, the forms of its layers, and its numerics."""

import dataclasses
import math
from typing import Literal, get_args

from instruct_jax.errors import ConfigError
from instruct_jax.settings import Settings, setting

Dtype = Literal["float32", "bfloat16"]
Attention = Literal["auto", "xla", "blocks", "cudnn", "splash"]
Remat = Literal["none", "products", "full"]
Quantization = Literal["int8", "int4", "nf4", "fp8"]  # what weights are stored as

_GATED = ("swiglu", "geglu")
_CHOICES = {
    "norm": ("layernorm", "rmsnorm"),
    "norm_order": ("pre", "post", "sandwich"),
    "activation": ("gelu", "gelu_exact", "relu", *_GATED),
    "positions": ("learned", "rope"),
    "dtype": get_args(Dtype),
    "attention": get_args(Attention),
    "remat": get_args(Remat),
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape and numerics of one model; hashable, so equal configs share compiled programs.

    `num_kv_heads`, `head_dim` and `d_ff` default to `num_heads`, `d_model / num_heads` and
    `4 * d_model`; read the resolved sizes from `kv_heads`, `head_size` and `ff_size`.
    Raises ValueError for an unknown choice or sizes that do not fit together.

    What GPT and LLaMA do not have is off by default. `norm_offset` is added to every norm's scale
    (Gemma stores scale - 1). `qk_norm` normalises every query and key head. `query_scalar` stands
    for H under the root of the scores. A soft cap c turns x into c tanh(x / c). `rope_fraction` is
    the part of a head that turns. `rope_factor` divides the frequencies; with
    `rope_original_length` only the low ones, as LLaMA 3 does. `attention_pattern` says which layers
    are global and local, and is repeated: "lllllg" is Gemma 3's.

    `attention` is how whole rows are computed (`attention.py`): "auto" takes what is best here.
    `remat` is what the backward pass computes again, layer by layer, to save memory, from nothing
    to everything, and changes no result:

        none        nothing: all that a layer makes is kept, scores of attention included
        products    norms, activations and attention; the products with weights are kept
        full        the layer from its input, all but its last product

    XLA for CPUs undoes it where `scan_unroll` leaves no loop over the layers.
    """

    vocab_size: int
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    d_ff: int | None = None
    max_length: int = 1024
    norm: str = "layernorm"
    norm_order: str = "pre"
    norm_offset: float = 0.0
    norm_eps: float = 1e-5
    activation: str = "gelu"
    use_bias: bool = True
    qkv_bias: bool | None = None
    qk_norm: bool = False
    query_scalar: float | None = None
    parallel_residual: bool = False
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    attention_pattern: str = "g"
    window: int | None = None
    positions: str = "learned"
    rope_theta: float = 10_000.0
    rope_local_theta: float | None = None
    rope_fraction: float = 1.0
    rope_factor: float = 1.0
    rope_original_length: int | None = None
    rope_low_factor: float = 1.0
    rope_high_factor: float = 4.0
    scale_embeddings: bool = False
    tie_embeddings: bool = True
    residual_dropout: float = 0.0
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    vocab_multiple: int = 128
    init_std: float = 0.02
    dtype: str = "float32"
    attention: Attention = "auto"
    remat: Remat = "none"
    scan_unroll: int = 1

    def __post_init__(self) -> None:
        """Refuse what would otherwise fail deep inside a trace."""
        for field, choices in _CHOICES.items():
            value = getattr(self, field)
            if value not in choices:
                raise ValueError(f"{field}={value!r} is not one of {', '.join(choices)}")
        for field in ("vocab_size", "num_layers", "d_model", "num_heads", "max_length",
                      "vocab_multiple", "scan_unroll"):  # fmt: skip
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        for field in ("residual_dropout", "embedding_dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, field) < 1.0:
                raise ValueError(f"{field} must lie in [0, 1), got {getattr(self, field)}")
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ValueError(
                f"d_model={self.d_model} is not a multiple of num_heads={self.num_heads}; "
                "change one of them or set head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.kv_heads}"
            )
        if self.positions == "rope" and (self.rotary_size < 2 or self.rotary_size % 2):
            raise ValueError(
                "rotary positions need an even head size"
                f" (the part of it that turns), got {self.rotary_size}"
            )
        if not self.attention_pattern or set(self.attention_pattern) - set("gl"):
            raise ValueError(
                f"attention_pattern={self.attention_pattern!r}: g and l, for global and local"
            )
        if "l" in self.attention_pattern and (self.window is None or self.window < 1):
            raise ValueError(f"local layers need a window of at least 1, got {self.window}")
        if self.attention not in ("auto", "xla") and self.attention_dropout:
            raise ValueError(f"attention={self.attention!r} cannot drop weights; use 'xla'")
        if self.attention == "cudnn" and self.attention_softcap is not None:
            raise ValueError("attention='cudnn' has no soft cap; use 'xla'")
        if not 0.0 < self.rope_fraction <= 1.0:
            raise ValueError(f"rope_fraction must lie in (0, 1], got {self.rope_fraction}")
        if self.rope_original_length is not None and self.rope_low_factor >= self.rope_high_factor:
            raise ValueError(
                f"rope_low_factor={self.rope_low_factor} must be below "
                f"rope_high_factor={self.rope_high_factor}"
            )
        for field in ("norm_eps", "rope_theta", "rope_local_theta", "rope_factor", "query_scalar",
                      "attention_softcap", "logit_softcap"):  # fmt: skip
            value = getattr(self, field)
            if value is not None and not 0.0 < value < math.inf:
                raise ValueError(f"{field} must be positive, got {value}")

    @property
    def kv_heads(self) -> int:
        """Key/value heads, K."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        """Head size, H."""
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def ff_size(self) -> int:
        """Feed-forward width, F."""
        return 4 * self.d_model if self.d_ff is None else self.d_ff

    @property
    def gated(self) -> bool:
        """Whether the feed-forward half has a gate."""
        return self.activation in _GATED

    @property
    def rotary_size(self) -> int:
        """The part of a head that turns with its position."""
        return int(self.head_size * self.rope_fraction)

    @property
    def local_layers(self) -> tuple[bool, ...]:
        """Of every layer, whether it is local."""
        pattern = self.attention_pattern
        return tuple(pattern[i % len(pattern)] == "l" for i in range(self.num_layers))

    @property
    def pad_id(self) -> int:
        """The first id past the real vocabulary."""
        return self.vocab_size

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding table: vocabulary and PAD, rounded up to `vocab_multiple`."""
        return -(-(self.vocab_size + 1) // self.vocab_multiple) * self.vocab_multiple


@dataclasses.dataclass(frozen=True)
class ComputeConfig(Settings):
    """How a stage computes its models, whatever they were made with; it changes no parameter.

    None keeps what the model's folder (or its named size) says.
    """

    dtype: Dtype | None = setting(None, "what matrices are multiplied in; masters stay float32")
    remat: Remat | None = setting(
        None, "what the backward pass computes again, to save memory", may_change=True
    )
    attention: Attention | None = setting(
        None, "how attention over whole rows is computed", may_change=True
    )

    def on(self, config: TransformerConfig) -> TransformerConfig:
        """`config` computed so. Raises ConfigError where the model cannot be."""
        fields = dataclasses.fields(ComputeConfig)
        changes = {field.name: getattr(self, field.name) for field in fields}
        try:
            return dataclasses.replace(
                config, **{name: value for name, value in changes.items() if value is not None}
            )
        except ValueError as error:
            raise ConfigError(f"config.model: {error}") from error


def check_length(config: TransformerConfig, length: int, *, field: str) -> None:
    """ConfigError where rows of `length` tokens, which `field` asks for, have positions that the
    model has not.

    What counts is the position of a token in its own text: of rows that hold several texts give
    the longest text, not the width of the row.
    """
    if length > config.max_length:
        raise ConfigError(
            f"{field}: {length} tokens, the model reads {config.max_length} (its max_length); "
            "ask for fewer, or take a model that reads more"
        )
