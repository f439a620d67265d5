"""The layers of the decoder, in the forms that a `TransformerConfig` asks for.

Every layer computes

    x <- x + dropout(Attention(norm(x)))     Attention = softmax(q k^T / sqrt(H) + mask) v W_out
    x <- x + dropout(MLP(norm(x)))           MLP = act(x W_up) W_down, or, gated,
                                                   (act(x W_gate) * x W_up) W_down

`norm_order` moves the norms: "post" is x <- norm(x + f(x)), "sandwich" x <- x + norm(f(norm(x))).
With `parallel_residual` the MLP reads what the attention read. In a local layer (an "l" of
`attention_pattern`) query t sees the last `window` tokens only, and may turn by a base of its own.

Axes: B batch, T/S query/key length, D model, N heads, K key/value heads, G = N/K query heads per
key/value head, H head size, F feed-forward, V vocabulary rows, L layers.

Parameters are fp32; `dtype` is what matrices are multiplied in. Norm statistics and softmax are
fp32. The GPT-3 presets are dense in every layer ("g"); its alternation with locally banded ones is
`attention_pattern="gl"`.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from instruct_jax.models.attention import attend
from instruct_jax.models.config import TransformerConfig
from instruct_jax.models.rows import Rows
from instruct_jax.models.sharding import (
    HEADS,
    POSITIONS,
    ROWS,
    WHOLE,
    constrain,
    constrain_hidden,
    merge_tokens,
)

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(nn.gelu, approximate=True),
    "gelu_exact": functools.partial(nn.gelu, approximate=False),
    "relu": nn.relu,
    "swiglu": nn.silu,
    "geglu": functools.partial(nn.gelu, approximate=True),
}


class View(NamedTuple):
    """Who sees whom, and where everyone stands."""

    seen: jax.Array | Rows  # bool[B, 1, 1, T, S], or what makes it
    rotation: tuple[jax.Array, jax.Array] | None  # cos and sin, f32[B, 1, T, H/2]


class Context(NamedTuple):
    """What a layer needs to know about the rows.

    Where global and local layers alternate, `local` is the view of the local ones, and `is_local`
    says which this layer is: an array in a scan over the layers, a bool where they are unrolled.
    """

    everywhere: View
    index: jax.Array | int  # the cache slot of the first query
    local: View | None = None
    is_local: jax.Array | bool | None = None

    @property
    def view(self) -> View:
        """This layer's view."""
        if self.local is None:
            return self.everywhere
        if isinstance(self.is_local, bool):
            return self.local if self.is_local else self.everywhere
        return jax.tree.map(
            functools.partial(jnp.where, self.is_local), self.local, self.everywhere
        )


class Norm(nn.Module):
    """LayerNorm (with bias) or RMSNorm over the last axis, in fp32."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> dtype[..., D]."""
        c, size, others = self.config, x.shape[-1], tuple(range(x.ndim - 1))
        x = x.astype(jnp.float32)
        if c.norm == "layernorm":
            x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + c.norm_eps)
        ones = nn.initializers.constant(1.0 - c.norm_offset)
        scale = self.param("scale", ones, (size,), jnp.float32).astype(jnp.float32)
        if c.norm_offset:
            scale = scale + c.norm_offset
        x = x * jnp.expand_dims(scale, others)
        if c.norm == "layernorm":
            bias = self.param("bias", nn.initializers.zeros, (size,), jnp.float32)
            x = x + jnp.expand_dims(bias.astype(jnp.float32), others)
        return x.astype(c.dtype)


class Attention(nn.Module):
    """Causal attention with grouped key/value heads, global or local."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, context: Context, cache: tuple[jax.Array, jax.Array] | None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """[B, T, D] and this layer's cached keys and values -> [B, T, D] and the written cache."""
        c = self.config
        batch, length, _ = x.shape
        seen, rotation = context.view
        x = merge_tokens(x)

        def heads(name: str, count: int) -> jax.Array:
            bias = c.use_bias if c.qkv_bias is None else c.qkv_bias
            y = _dense(c, count * c.head_size, name, use_bias=bias)(x)
            return y.reshape(batch, length, count, c.head_size).swapaxes(1, 2)

        q, k, v = heads("query", c.num_heads), heads("key", c.kv_heads), heads("value", c.kv_heads)
        if c.qk_norm:
            q, k = Norm(c, name="query_norm")(q), Norm(c, name="key_norm")(k)
        if rotation is not None:
            q, k = _rotate(q, *rotation), _rotate(k, *rotation)
        if cache is None:
            q = constrain(q, ROWS, HEADS, POSITIONS, WHOLE)
            k, v = (constrain(x, ROWS, HEADS, WHOLE, WHOLE) for x in (k, v))
        else:
            write = functools.partial(
                jax.lax.dynamic_update_slice_in_dim, start_index=context.index, axis=2
            )
            k, v = cache = write(cache[0], k), write(cache[1], v)

        q = q * (c.query_scalar or c.head_size) ** -0.5
        dropout = functools.partial(_dropout, self, c.attention_dropout)
        y = attend(c, q, k, v, seen, is_local=context.is_local, dropout=dropout).swapaxes(1, 2)
        y = merge_tokens(y.reshape(batch, length, c.num_heads * c.head_size))
        y = _dense(c, c.d_model, "out", depth_scaled=True)(y)
        return y.reshape(batch, length, c.d_model), cache


class MLP(nn.Module):
    """The feed-forward half of a layer, gated when the activation is."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        c = self.config
        activation, flat = _ACTIVATIONS[c.activation], merge_tokens(x)
        y = _dense(c, c.ff_size, "up")(flat)
        y = activation(_dense(c, c.ff_size, "gate")(flat)) * y if c.gated else activation(y)
        return _dense(c, c.d_model, "down", depth_scaled=True)(y).reshape(x.shape)


class Block(nn.Module):
    """One layer; returns the cache second, so that it can be scanned and unrolled."""

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

        def read(x: jax.Array, name: str) -> jax.Array:
            return x if c.norm_order == "post" else Norm(c, name=f"{name}_norm")(x)

        def write(x: jax.Array, y: jax.Array, name: str) -> jax.Array:
            if c.norm_order == "sandwich":
                y = Norm(c, name=f"{name}_post_norm")(y)
            x = constrain_hidden(x + _dropout(self, c.residual_dropout, y))
            return Norm(c, name=f"{name}_norm")(x) if c.norm_order == "post" else x

        y, cache = Attention(c, name="attention")(read(x, "attention"), context, cache)
        attended = write(x, y, "attention")
        y = MLP(c, name="mlp")(read(x if c.parallel_residual else attended, "mlp"))
        return write(attended, y, "mlp"), cache


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
        """int32[B, T] twice -> dtype[B, T, D]; NaN for ids past the vocabulary and PAD."""
        c = self.config
        # A gather from a table split on D makes the partitioner replicate its result.
        table = constrain(self.tokens, ("tensor",), WHOLE)
        x = constrain_hidden(jnp.take(table, tokens, axis=0, mode="clip")).astype(c.dtype)
        # An id that is neither a token nor PAD is seen in every number that is made of it.
        known = (tokens >= 0) & (tokens <= c.pad_id)
        x = jnp.where(known[..., None], x, jnp.asarray(jnp.nan, c.dtype))
        if c.scale_embeddings:
            x = x * jnp.asarray(math.sqrt(c.d_model), c.dtype)
        if c.positions == "learned":
            # Padding to the right of a full row counts one position too many.
            table = constrain(self.positions, WHOLE, WHOLE)
            places = constrain_hidden(jnp.take(table, positions, axis=0, mode="clip"))
            x = x + places.astype(c.dtype)
        return constrain_hidden(_dropout(self, c.embedding_dropout, x))


class Matrix(nn.Module):
    """One bias-free matrix, kept as a module so that it has a `kernel` like every other."""

    shape: tuple[int, int]
    std: float

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("kernel", nn.initializers.normal(self.std), self.shape, jnp.float32)


def make_context(
    c: TransformerConfig,
    visible: jax.Array | Rows,
    positions: jax.Array,
    index: jax.Array | int = 0,
) -> Context:
    """The context of visible bool[B, T, S], or rows, and positions int32[B, T].

    Keys stand in slots 0..S-1 and queries in those from `index` on.
    """
    kinds = set(c.local_layers)
    if isinstance(visible, Rows):
        seen = near = visible
    else:
        length, slots = visible.shape[1:]
        distance = (index + jnp.arange(length))[:, None] - jnp.arange(slots)[None]
        seen = visible[:, None, None]
        near = seen & (distance < (c.window or 0))[None, None, None]
    everywhere = View(seen, _rotation(c, positions))
    local = View(near, _rotation(c, positions, local=True))
    if len(kinds) == 1:
        return Context(local if kinds == {True} else everywhere, index)
    return Context(everywhere, index, local, jnp.array(c.local_layers))


def _rotation(
    c: TransformerConfig, positions: jax.Array, *, local: bool = False
) -> tuple[jax.Array, jax.Array] | None:
    """cos and sin of position * theta_i, with theta_i = base^(-2i/H)."""
    if c.positions != "rope":
        return None
    own_base = c.rope_local_theta if local else None
    base = c.rope_theta if own_base is None else own_base
    exponents = jnp.arange(0, c.rotary_size, 2, dtype=jnp.float32) / c.rotary_size
    frequencies = base**-exponents
    if c.rope_factor != 1.0 and own_base is None:
        kept = 0.0
        if c.rope_original_length is not None:
            # LLaMA 3: how often a frequency turns in the original length decides what is kept.
            turns = c.rope_original_length * frequencies / (2 * math.pi)
            low, high = c.rope_low_factor, c.rope_high_factor
            kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = frequencies * (kept + (1.0 - kept) / c.rope_factor)
    angles = positions.astype(jnp.float32)[:, None, :, None] * frequencies[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def _dense(
    c: TransformerConfig,
    features: int,
    name: str,
    *,
    depth_scaled: bool = False,
    use_bias: bool | None = None,
) -> nn.Dense:
    # GPT-2: the matrices that write to the residual stream start smaller, so that its variance
    # does not grow with the 2L sums.
    std = c.init_std * ((2 * c.num_layers) ** -0.5 if depth_scaled else 1.0)
    return nn.Dense(
        features,
        use_bias=c.use_bias if use_bias is None else use_bias,
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
    # Pairs are (i, i + H/2), as in Hugging Face checkpoints, not (2i, 2i + 1). What is past the
    # rotary size stays.
    size = 2 * cos.shape[-1]
    a, b = jnp.split(x[..., :size].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    if size == x.shape[-1]:
        return turned
    return jnp.concatenate([turned, x[..., size:]], axis=-1)
