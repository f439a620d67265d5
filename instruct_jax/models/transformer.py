"""One decoder-only transformer: GPT-2/GPT-3 or LLaMA by configuration, language or scalar read-out.

With x_0 = E[token] (+ P[position] when positions are learned), every layer computes

    x <- x + dropout(Attention(norm(x)))          Attention = softmax(q k^T / sqrt(H) + mask) v W_o
    x <- x + dropout(MLP(norm(x)))                MLP = act(x W_up) W_down, or (silu(x W_gate) * x W_up) W_down

and the read-out of norm(x_L) is vocabulary logits (`LanguageModel`) or one number per position
(`ScalarModel`: a reward or a value). Query t sees key s when s <= t, s is a real token, and both
belong to the same segment. Attention is dense in every layer: GPT-3's alternation with locally
banded layers is left out.

Axes: B batch, T/S query/key length, D model, N heads, K key/value heads, G = N/K query heads per
key/value head, H head size, F feed-forward, V vocabulary rows, L layers.

Modules are factories for pure functions; the rest of the package only sees `Model`. Parameters
are a nested dict of fp32 masters with the layers stacked on a leading L axis. Norm statistics,
softmax, logits and scalars are fp32 whatever `dtype` the matrices are multiplied in.

Vocabulary: ids below `vocab_size` are real, `pad_id == vocab_size`, and the table is rounded up to
a multiple of `vocab_multiple` rows. Logit columns from `vocab_size` on are a finite -1e9, so
padding is never sampled and never part of a normaliser.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

Params = Any  # a nested dict of arrays

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

# Megatron style: the first matrix of a pair is split by columns, the second by rows. The first
# matching pattern wins; () replicates.
PARTITION_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embedder/tokens$", ("tensor", "fsdp")),
    (r"embedder/positions$", (None, "fsdp")),
    (r"unembedding/kernel$", ("fsdp", "tensor")),
    (r"(query|key|value|gate|up)/kernel$", (None, "fsdp", "tensor")),
    (r"(query|key|value|gate|up)/bias$", (None, "tensor")),
    (r"(out|down)/kernel$", (None, "tensor", "fsdp")),
    (r"(out|down)/bias$", ()),
    (r"norm/(scale|bias)$", ()),
    (r"head/(kernel|bias)$", ()),
)


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


class Cache(NamedTuple):
    """Keys and values of the tokens read so far, one separate buffer per layer.

    A stacked buffer is copied whole on every token by a scan; separate ones are updated in place.
    """

    keys: tuple[jax.Array, ...]  # L times [B, K, S, H], in the compute dtype
    values: tuple[jax.Array, ...]  # L times [B, K, S, H]
    mask: jax.Array  # bool[B, S], true where a real token was written
    index: jax.Array  # int32[], the slot of the next token


class Model(NamedTuple):
    """The pure-function face of one configuration; `language_model` and `scalar_model` make it.

    `tokens` is int32[B, T], `mask` bool[B, T] is true at real tokens (all of them by default),
    `segment_ids` int32[B, T] keeps packed rows apart, dropout acts only when `dropout_key` is
    given. `apply` is `readout` after `hidden`.
    """

    config: TransformerConfig
    init: Callable[[jax.Array], Params]
    apply: Callable[..., jax.Array]
    """(params, tokens, *, mask, segment_ids, dropout_key) -> f32[B, T, V], or f32[B, T] (scalar)"""
    hidden: Callable[..., jax.Array]
    """(params, tokens, *, mask, segment_ids, dropout_key) -> dtype[B, T, D], after the last norm"""
    readout: Callable[[Params, jax.Array], jax.Array]
    """(params, [..., D]) -> f32[..., V], or f32[...] (scalar)"""
    decode: Callable[..., tuple[jax.Array, Cache]]
    """(params, tokens, cache, *, mask, last_only) -> (f32[B, T or 1, V], cache)"""


class _Context(NamedTuple):
    """What every layer needs to know about the rows: who sees whom, and where everyone stands."""

    mask: jax.Array  # bool[B, 1, 1, T, S]
    rotation: tuple[jax.Array, jax.Array] | None  # cos and sin, f32[B, 1, T, H/2]
    index: jax.Array | None  # the cache slot of the first query


class Norm(nn.Module):
    """LayerNorm (with bias) or RMSNorm over the last axis of [B, T, D], in fp32."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> dtype[B, T, D]."""
        c = self.config
        x = x.astype(jnp.float32)
        scale = self.param("scale", nn.initializers.ones, (c.d_model,), jnp.float32)
        if c.norm == "layernorm":
            x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + c.norm_eps) * scale[None, None]
        if c.norm == "layernorm":
            bias = self.param("bias", nn.initializers.zeros, (c.d_model,), jnp.float32)
            x = x + bias[None, None]
        return x.astype(c.dtype)


class Attention(nn.Module):
    """Causal attention with grouped key/value heads."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, context: _Context, cache: tuple[jax.Array, jax.Array] | None
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
        context: _Context,
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
        table = _constrain(self.tokens, "tensor", None)
        x = table[tokens].astype(c.dtype)
        if c.positions == "learned":
            x = x + self.positions[positions].astype(c.dtype)
        return _constrain(_dropout(self, c.embedding_dropout, x), ("data", "fsdp"), None, None)


class _Trunk(nn.Module):
    """Everything below the read-out; the parameter names are the same for both models."""

    config: TransformerConfig

    def setup(self) -> None:
        """Create the trunk."""
        c = self.config
        block = nn.remat(Block, prevent_cse=c.scan_unroll > 1) if c.remat else Block
        self.embedder = Embedder(c)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=c.num_layers,
            unroll=min(c.scan_unroll, c.num_layers),
        )(c)
        self.final_norm = Norm(c)

    def embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """int32[B, T] twice -> dtype[B, T, D]."""
        return self.embedder(tokens, positions)

    def finish(self, x: jax.Array) -> jax.Array:
        """[B, T, D] after the last layer -> what `readout` takes."""
        return self.final_norm(x)

    def hidden(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """int32[B, T] -> dtype[B, T, D] after the last norm."""
        c, (_, length) = self.config, tokens.shape
        if mask is None:
            if c.positions == "learned" and length > c.max_length:
                raise ValueError(f"{length} tokens do not fit max_length={c.max_length}")
            mask = jnp.ones(tokens.shape, jnp.bool_)
        positions = token_positions(mask, segment_ids)
        visible = jnp.tril(jnp.ones((1, length, length), jnp.bool_)) & mask[:, None, :]
        if segment_ids is not None:
            visible &= segment_ids[:, :, None] == segment_ids[:, None, :]
        context = _context(c, visible, positions)
        x, _ = self.layers(self.embedder(tokens, _clip(c, positions)), context)
        return self.final_norm(x)


class LanguageModel(_Trunk):
    """Next-token logits; tied to the token table or with an `unembedding` of its own."""

    def setup(self) -> None:
        """Create the trunk and the unembedding."""
        super().setup()
        c = self.config
        if not c.tie_embeddings:
            self.unembedding = _Matrix((c.d_model, c.vocab_rows), c.init_std)

    def readout(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> f32[..., V]; products in `dtype`, sums in fp32."""
        c = self.config
        kernel = self.embedder.tokens.T if c.tie_embeddings else self.unembedding()
        logits = jnp.einsum(
            "...d,dv->...v", hidden, kernel.astype(c.dtype), preferred_element_type=jnp.float32
        )
        real = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) < c.vocab_size
        return jnp.where(real, logits, MASKED)

    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """int32[B, T] -> f32[B, T, V]; the logits at t are for token t + 1."""
        return self.readout(self.hidden(tokens, mask, segment_ids))


class ScalarModel(_Trunk):
    """One number per position: the unembedding is replaced by a projection D -> 1.

    The head starts at N(0, 1/sqrt(D + 1)) with bias 0 (Ziegler et al. 2019, fc_layer).
    """

    def setup(self) -> None:
        """Create the trunk and the head."""
        super().setup()
        init = nn.initializers.normal((self.config.d_model + 1) ** -0.5)
        self.head = nn.Dense(1, kernel_init=init, dtype=jnp.float32)

    def readout(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> f32[...]."""
        return self.head(hidden.astype(jnp.float32))[..., 0]

    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """int32[B, T] -> f32[B, T]."""
        return self.readout(self.hidden(tokens, mask, segment_ids))


@functools.cache
def language_model(config: TransformerConfig) -> Model:
    """The language model of `config`; equal configs give the same functions, so jit never retraces.

    `decode` reads T more tokens into a cache: T = P on an empty cache is the prefill, T = 1 a step.
    Its `params` may come from `unstack_layers`. `last_only` reads out the last token alone.
    """
    return _model(LanguageModel(config), functools.partial(_decode, LanguageModel(config)))


@functools.cache
def scalar_model(config: TransformerConfig) -> Model:
    """The reward or value model of `config`; `decode` raises TypeError."""

    def decode(*args: Any, **kwargs: Any) -> tuple[jax.Array, Cache]:
        raise TypeError("a scalar model has no next token to decode; score whole rows with apply")

    return _model(ScalarModel(config), decode)


def init_cache(config: TransformerConfig, batch: int, length: int) -> Cache:
    """An empty cache for `batch` rows of at most `length` tokens, padding included."""
    shape = (batch, config.kv_heads, length, config.head_size)
    buffers = [jnp.zeros(shape, config.dtype) for _ in range(2 * config.num_layers)]
    return Cache(
        keys=tuple(buffers[::2]),
        values=tuple(buffers[1::2]),
        mask=jnp.zeros((batch, length), jnp.bool_),
        index=jnp.zeros((), jnp.int32),
    )


def unstack_layers(params: Params, *, dtype: str | None = None) -> Params:
    """Parameters for `Model.decode` with `layers` a tuple of L dicts; matrices cast to `dtype`.

    Call it once before a token loop. Otherwise every token slices (and casts) every layer again.
    """
    layers = params["layers"]
    if isinstance(layers, tuple):
        return params
    if dtype is not None:
        layers = jax.tree.map(lambda w: w.astype(dtype) if w.ndim == 3 else w, layers)
    count = jax.tree.leaves(layers)[0].shape[0]
    unstacked = tuple(jax.tree.map(lambda w, i=i: w[i], layers) for i in range(count))
    return {**params, "layers": unstacked}


def scalar_from_language(
    language_params: Params, key: jax.Array, config: TransformerConfig
) -> Params:
    """Scalar parameters with the language model's trunk and a fresh head."""
    d = config.d_model
    kernel = jax.random.normal(key, (d, 1), jnp.float32) * (d + 1) ** -0.5
    trunk = {name: language_params[name] for name in ("embedder", "layers", "final_norm")}
    return {**trunk, "head": {"kernel": kernel, "bias": jnp.zeros((1,), jnp.float32)}}


def token_positions(mask: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """int32[B, T]: real tokens before each one, counted from the start of its segment."""
    ones = mask.astype(jnp.int32)
    before = jnp.cumsum(ones, axis=1) - ones
    if segment_ids is None:
        return before
    new = jnp.concatenate(
        [jnp.ones_like(mask[:, :1]), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    return before - jax.lax.cummax(jnp.where(new, before, 0), axis=1)


def final_scores(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """f32[B, T] -> f32[B]: the score at each row's last real token, padded left or right."""
    last = scores.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.take_along_axis(scores, last[:, None], axis=1)[:, 0]


def response_values(values: jax.Array, *, prompt_length: int) -> jax.Array:
    """f32[B, P+R] -> f32[B, R]: V_t, the value at the position before response token t."""
    return values[:, prompt_length - 1 : -1]


class _Matrix(nn.Module):
    """One bias-free matrix, kept as a module so that it has a `kernel` like every other."""

    shape: tuple[int, int]
    std: float

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("kernel", nn.initializers.normal(self.std), self.shape, jnp.float32)


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


def _context(
    c: TransformerConfig, visible: jax.Array, positions: jax.Array, index: jax.Array | None = None
) -> _Context:
    rotation = None
    if c.positions == "rope":
        exponents = jnp.arange(0, c.head_size, 2, dtype=jnp.float32) / c.head_size
        frequencies = c.rope_theta**-exponents
        angles = positions.astype(jnp.float32)[:, None, :, None] * frequencies[None, None, None]
        rotation = jnp.cos(angles), jnp.sin(angles)
    return _Context(visible[:, None, None], rotation, index)


def _clip(c: TransformerConfig, positions: jax.Array) -> jax.Array:
    # Padding to the right of a full row counts one position too many.
    return jnp.minimum(positions, c.max_length - 1)


def _constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Shard `x` over the ambient mesh (`jax.set_mesh`); without one, or where it cannot divide, x."""
    mesh = jax.sharding.get_abstract_mesh()
    names = {name for axis in axes if axis for name in ((axis,) if isinstance(axis, str) else axis)}
    if mesh.empty or not names <= set(mesh.axis_names):
        return x
    for size, axis in zip(x.shape, axes, strict=True):
        parts = [mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis or ())]
        if size % functools.reduce(lambda p, q: p * q, parts, 1):
            return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def _model(module: _Trunk, decode: Callable[..., tuple[jax.Array, Cache]]) -> Model:
    def init(key: jax.Array) -> Params:
        return module.init({"params": key}, jnp.zeros((1, 1), jnp.int32))["params"]

    def run(method: str) -> Callable[..., jax.Array]:
        def function(
            params: Params,
            tokens: jax.Array,
            *,
            mask: jax.Array | None = None,
            segment_ids: jax.Array | None = None,
            dropout_key: jax.Array | None = None,
        ) -> jax.Array:
            rngs = None if dropout_key is None else {"dropout": dropout_key}
            variables = {"params": params}
            return module.apply(variables, tokens, mask, segment_ids, rngs=rngs, method=method)

        return function

    def readout(params: Params, hidden: jax.Array) -> jax.Array:
        return module.apply({"params": params}, hidden, method="readout")

    return Model(module.config, jax.jit(init), run("__call__"), run("hidden"), readout, decode)


def _decode(
    module: LanguageModel,
    params: Params,
    tokens: jax.Array,
    cache: Cache,
    *,
    mask: jax.Array | None = None,
    last_only: bool = False,
) -> tuple[jax.Array, Cache]:
    c, (_, length) = module.config, tokens.shape
    slots = cache.mask.shape[1]
    if length > slots:
        raise ValueError(f"{length} tokens do not fit a cache of {slots} slots")
    mask = jnp.ones(tokens.shape, jnp.bool_) if mask is None else mask
    seen = jnp.sum(cache.mask, axis=1, dtype=jnp.int32)[:, None]
    positions = seen + token_positions(mask)
    key_mask = jax.lax.dynamic_update_slice_in_dim(cache.mask, mask, cache.index, axis=1)
    queries = cache.index + jnp.arange(length)
    visible = key_mask[:, None, :] & (jnp.arange(slots)[None, :] <= queries[:, None])[None]
    context = _context(c, visible, positions, cache.index)

    params = unstack_layers(params)
    variables = {"params": {k: v for k, v in params.items() if k != "layers"}}
    x = module.apply(variables, tokens, _clip(c, positions), method="embed")
    block, written = Block(c), []
    for layer, keys, values in zip(params["layers"], cache.keys, cache.values, strict=True):
        x, layer_cache = block.apply({"params": layer}, x, context, (keys, values))
        written.append(layer_cache)
    x = module.apply(variables, x[:, -1:] if last_only else x, method="finish")
    logits = module.apply(variables, x, method="readout")
    keys, values = zip(*written, strict=True)
    return logits, Cache(keys, values, key_mask, cache.index + length)
