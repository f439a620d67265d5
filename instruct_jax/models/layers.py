"""The layers of the decoder, and the configuration that says which of their forms it uses.

Every layer computes

    x <- x + dropout(Attention(norm(x)))     Attention = softmax(q k^T / sqrt(H) + mask) v W_out
    x <- x + dropout(MLP(norm(x)))           MLP = act(x W_up) W_down, or, gated,
                                                   (silu(x W_gate) * x W_up) W_down

Axes: B batch, T/S query/key length, D model, N heads, K key/value heads, G = N/K query heads per
key/value head, H head size, F feed-forward, V vocabulary rows, L layers.

Parameters are fp32; `dtype` is what matrices are multiplied in. Norm statistics and softmax are
fp32. Attention is dense in every layer: GPT-3's alternation with locally banded ones is left out.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

# Finite, so a row with no visible key averages its values instead of dividing zero by zero.
MASKED = -1e9

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(nn.gelu, approximate=True),
    "gelu_exact": functools.partial(nn.gelu, approximate=False),
    "relu": nn.relu,
    "swiglu": nn.silu,
}
_CHOICES = {
    "norm": ("layernorm", "rmsnorm"),
    "activation": tuple(_ACTIVATIONS),
    "positions": ("learned", "rope"),
    "dtype": ("float32", "bfloat16"),
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape and numerics of one model; hashable, so equal configs share compiled programs.

    `num_kv_heads`, `head_dim` and `d_ff` default to `num_heads`, `d_model / num_heads` and
    `4 * d_model`; read the resolved sizes from `kv_heads`, `head_size` and `ff_size`.
    Raises ValueError for an unknown choice or sizes that do not fit together.
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
    activation: str = "gelu"
    positions: str = "learned"
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    use_bias: bool = True
    tie_embeddings: bool = True
    residual_dropout: float = 0.0
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    vocab_multiple: int = 128
    init_std: float = 0.02
    dtype: str = "float32"
    remat: bool = False
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
        if self.positions == "rope" and self.head_size % 2:
            raise ValueError(f"rotary positions need an even head size, got {self.head_size}")

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
    def pad_id(self) -> int:
        """The first id past the real vocabulary."""
        return self.vocab_size

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding table: vocabulary and PAD, rounded up to `vocab_multiple`."""
        return -(-(self.vocab_size + 1) // self.vocab_multiple) * self.vocab_multiple


class Context(NamedTuple):
    """What every layer needs to know about the rows: who sees whom, and where everyone stands."""

    mask: jax.Array  # bool[B, 1, 1, T, S]
    rotation: tuple[jax.Array, jax.Array] | None  # cos and sin, f32[B, 1, T, H/2]
    index: jax.Array | int  # the cache slot of the first query


class Norm(nn.Module):
    """LayerNorm (with bias) or RMSNorm over the last axis of [B, T, D], in fp32."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> dtype[B, T, D]."""
        c = self.config
        x = x.astype(jnp.float32)
        if c.norm == "layernorm":
            x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + c.norm_eps)
        scale = self.param("scale", nn.initializers.ones, (c.d_model,), jnp.float32)
        x = x * scale.astype(jnp.float32)[None, None]
        if c.norm == "layernorm":
            bias = self.param("bias", nn.initializers.zeros, (c.d_model,), jnp.float32)
            x = x + bias.astype(jnp.float32)[None, None]
        return x.astype(c.dtype)


class Attention(nn.Module):
    """Causal attention with grouped key/value heads."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, context: Context, cache: tuple[jax.Array, jax.Array] | None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """[B, T, D] and this layer's cached keys and values -> [B, T, D] and the written cache."""
        c = self.config
        batch, length, _ = x.shape

        def heads(name: str, count: int) -> jax.Array:
            y = _dense(c, count * c.head_size, name)(x)
            return y.reshape(batch, length, count, c.head_size).swapaxes(1, 2)

        q, k, v = heads("query", c.num_heads), heads("key", c.kv_heads), heads("value", c.kv_heads)
        if context.rotation is not None:
            q, k = _rotate(q, *context.rotation), _rotate(k, *context.rotation)
        if cache is not None:
            write = functools.partial(
                jax.lax.dynamic_update_slice_in_dim, start_index=context.index, axis=2
            )
            k, v = cache = write(cache[0], k), write(cache[1], v)

        q = (q * c.head_size**-0.5).reshape(batch, c.kv_heads, -1, length, c.head_size)
        scores = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32)
        weights = nn.softmax(jnp.where(context.mask, scores, MASKED)).astype(c.dtype)
        weights = _dropout(self, c.attention_dropout, weights)
        y = jnp.einsum("bkgts,bksh->bkgth", weights, v)
        y = y.reshape(batch, c.num_heads, length, c.head_size).swapaxes(1, 2)
        y = y.reshape(batch, length, c.num_heads * c.head_size)
        return _dense(c, c.d_model, "out", depth_scaled=True)(y), cache


class MLP(nn.Module):
    """The feed-forward half of a layer, gated when the activation is."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        c = self.config
        activation = _ACTIVATIONS[c.activation]
        y = _dense(c, c.ff_size, "up")(x)
        if c.activation == "swiglu":
            y = activation(_dense(c, c.ff_size, "gate")(x)) * y
        else:
            y = activation(y)
        return _dense(c, c.d_model, "down", depth_scaled=True)(y)


class Block(nn.Module):
    """One pre-norm layer; returns the cache second, so that it can be scanned and unrolled."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: Context,
        cache: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """[B, T, D] -> [B, T, D] and the written cache."""
        c = self.config
        y = Norm(c, name="attention_norm")(x)
        y, cache = Attention(c, name="attention")(y, context, cache)
        x = x + _dropout(self, c.residual_dropout, y)
        y = MLP(c, name="mlp")(Norm(c, name="mlp_norm")(x))
        return x + _dropout(self, c.residual_dropout, y), cache


class Embedder(nn.Module):
    """Token and learned position tables; the token table is also the tied unembedding."""

    config: TransformerConfig

    def setup(self) -> None:
        """Create the tables."""
        c = self.config
        init = nn.initializers.normal(c.init_std)
        self.tokens = self.param("tokens", init, (c.vocab_rows, c.d_model), jnp.float32)
        if c.positions == "learned":
            self.positions = self.param("positions", init, (c.max_length, c.d_model), jnp.float32)

    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """int32[B, T] twice -> dtype[B, T, D]."""
        c = self.config
        # A gather from a table split on D as well makes the partitioner replicate its result.
        table = _constrain(self.tokens, ("tensor",), ())
        x = jnp.take(table, tokens, axis=0, mode="clip").astype(c.dtype)
        if c.positions == "learned":
            # Padding to the right of a full row counts one position too many.
            x = x + jnp.take(self.positions, positions, axis=0, mode="clip").astype(c.dtype)
        return _constrain(_dropout(self, c.embedding_dropout, x), ("data", "fsdp"), (), ())


class Matrix(nn.Module):
    """One bias-free matrix, kept as a module so that it has a `kernel` like every other."""

    shape: tuple[int, int]
    std: float

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("kernel", nn.initializers.normal(self.std), self.shape, jnp.float32)


def make_context(
    c: TransformerConfig, visible: jax.Array, positions: jax.Array, index: jax.Array | int = 0
) -> Context:
    """The context of visible bool[B, T, S] and positions int32[B, T]; theta_i = base^(-2i/H)."""
    rotation = None
    if c.positions == "rope":
        exponents = jnp.arange(0, c.head_size, 2, dtype=jnp.float32) / c.head_size
        frequencies = c.rope_theta**-exponents
        angles = positions.astype(jnp.float32)[:, None, :, None] * frequencies[None, None, None]
        rotation = jnp.cos(angles), jnp.sin(angles)
    return Context(visible[:, None, None], rotation, index)


def _dense(c: TransformerConfig, features: int, name: str, depth_scaled: bool = False) -> nn.Dense:
    # GPT-2: the matrices that write to the residual stream start smaller, so that its variance
    # does not grow with the 2L sums.
    std = c.init_std * ((2 * c.num_layers) ** -0.5 if depth_scaled else 1.0)
    return nn.Dense(
        features,
        use_bias=c.use_bias,
        dtype=c.dtype,
        kernel_init=nn.initializers.normal(std),
        name=name,
    )


def _dropout(module: nn.Module, rate: float, x: jax.Array) -> jax.Array:
    if rate == 0.0 or not module.has_rng("dropout"):
        return x
    keep = jax.random.bernoulli(module.make_rng("dropout"), 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    # Pairs are (i, i + H/2), as in Hugging Face checkpoints, not (2i, 2i + 1).
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _constrain(x: jax.Array, *axes: tuple[str, ...]) -> jax.Array:
    # The ambient mesh is set by `jax.set_mesh`. Without one, or where a dimension does not divide
    # (one row on eight devices), the layout is the partitioner's business.
    mesh = jax.sharding.get_abstract_mesh()
    if not {name for names in axes for name in names} <= set(mesh.axis_names):
        return x
    parts = [math.prod(mesh.shape[name] for name in names) for names in axes]
    if any(size % count for size, count in zip(x.shape, parts, strict=True)):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(names or None for names in axes)))
