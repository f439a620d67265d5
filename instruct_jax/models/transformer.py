"""One decoder-only transformer: every family by configuration, language or scalar read-out.

x_0 = E[token] (+ P[position] when positions are learned); L layers (`layers.py`); the read-out of
norm(x_L) is vocabulary logits (`LanguageModel`) or one number per position (`ScalarModel`: a reward
or a value). Query t sees key s when s <= t, s is a real token, and both belong to one segment.

Modules are factories for pure functions; the rest of the package only sees `Model`. Parameters
are a nested dict of fp32 masters with the layers stacked on a leading L axis; logits and scalars
are fp32.

Vocabulary: ids below `vocab_size` are real, `pad_id == vocab_size`, and the table is rounded up to
a multiple of `vocab_multiple` rows. Logit columns from `vocab_size` on are a finite -1e9, so
padding is never sampled and never part of a normaliser.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from instruct_jax.models.attention import implementation, soft_cap
from instruct_jax.models.config import TransformerConfig
from instruct_jax.models.layers import Block, Context, Embedder, Matrix, Norm, make_context
from instruct_jax.models.rows import MASKED, Rows
from instruct_jax.models.sharding import POSITIONS, ROWS, WHOLE, constrain

Params = Any  # a nested dict of arrays

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
    `segment_ids` int32[B, T] keeps packed rows apart, `branches` int32[B, T] the continuations
    1, 2, ... of a common beginning 0, with the `positions` int32[B, T] of their tokens
    (`data/trees.py`), dropout acts only when `dropout_key` is given. `apply` is `readout` after
    `hidden`.

    All raise ValueError for rows wider than `config.max_length`. Packed rows may be: there the
    position of a token in its own segment counts, which no shape tells, and who packs must see to
    it (`models.config.check_length`). So it is with a cache, whose rows begin in different slots.
    """

    config: TransformerConfig
    init: Callable[[jax.Array], Params]
    apply: Callable[..., jax.Array]
    """(params, tokens, *, mask, segment_ids, branches, positions, dropout_key) -> f32[B, T, V], or
    f32[B, T] (scalar)"""
    hidden: Callable[..., jax.Array]
    """The same arguments -> dtype[B, T, D], after the last norm"""
    readout: Callable[[Params, jax.Array], jax.Array]
    """(params, [..., D]) -> f32[..., V], or f32[...] (scalar)"""
    head: Callable[[Params], jax.Array]
    """params -> [D, V], the matrix of a language model's `readout`, before its soft cap"""
    decode: Callable[..., tuple[jax.Array, Cache]]
    """(params, tokens, cache, *, mask, last_only) -> (f32[B, T or 1, V], cache)"""


# Every layer sees the same rows; whether it is local is its own.
_ALL: Any = nn.broadcast
_EACH: Any = 0
_SCANNED = Context(everywhere=_ALL, index=_ALL, local=_ALL, is_local=_EACH)

# What the backward pass finds of a layer, beside its input. Scores have batch axes, weights none.
_KEPT = {
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class _Trunk(nn.Module):
    """Everything below the read-out; the parameter names are the same for both models."""

    config: TransformerConfig

    def setup(self) -> None:
        """Create the trunk."""
        c = self.config
        block = Block
        if c.remat != "none":
            # Unrolled layers are one program, where what is computed again would be found equal to
            # what was computed before, and kept.
            policy = _KEPT[c.remat]
            block = nn.remat(Block, prevent_cse=c.scan_unroll > 1, policy=policy)
        self.embedder = Embedder(c)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(_SCANNED,),
            length=c.num_layers,
            unroll=min(c.scan_unroll, c.num_layers),
        )(c)
        self.final_norm = Norm(c) if c.norm_order != "post" else (lambda x: x)

    def embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """int32[B, T] twice -> dtype[B, T, D]."""
        return self.embedder(tokens, positions)

    def hidden(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        branches: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """int32[B, T] -> dtype[B, T, D] after the last norm."""
        c, (_, length) = self.config, tokens.shape
        if positions is None and segment_ids is None:
            _check_width(c, length)
        if mask is None:
            mask = jnp.ones(tokens.shape, jnp.bool_)
        if branches is not None:
            if positions is None:
                raise ValueError("branches of a row need the positions of their tokens")
            if any(c.local_layers):
                raise ValueError("a sliding window counts slots; branches need full attention")
        if positions is None:
            positions = token_positions(mask, segment_ids)
        rows = Rows.of(mask, segment_ids, branches)
        seen = _visible(rows) if implementation(c, length) == "xla" else rows
        context = make_context(c, seen, positions)
        x, _ = self.layers(self.embedder(tokens, positions), context)
        return self.final_norm(x)


class LanguageModel(_Trunk):
    """Next-token logits; tied to the token table or with an `unembedding` of its own."""

    def setup(self) -> None:
        """Create the trunk and the unembedding."""
        super().setup()
        c = self.config
        if not c.tie_embeddings:
            self.unembedding = Matrix((c.d_model, c.vocab_rows), c.init_std)

    def kernel(self) -> jax.Array:
        """[D, V], the matrix of the read-out."""
        return self.embedder.tokens.T if self.config.tie_embeddings else self.unembedding()

    def readout(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> f32[..., V]; products in `dtype`, sums in fp32."""
        c, kernel = self.config, self.kernel()
        logits = jnp.einsum(
            "...d,dv->...v", hidden, kernel.astype(c.dtype), preferred_element_type=jnp.float32
        )
        logits = soft_cap(logits, c.logit_softcap)
        real = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) < c.vocab_size
        return jnp.where(real, logits, MASKED)

    def finish(self, x: jax.Array) -> jax.Array:
        """[B, T, D] after the last layer -> f32[B, T, V]."""
        return self.readout(self.final_norm(x))

    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        branches: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """int32[B, T] -> f32[B, T, V]; the logits at t are for token t + 1."""
        return self.readout(self.hidden(tokens, mask, segment_ids, branches, positions))


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
        branches: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """int32[B, T] -> f32[B, T]."""
        return self.readout(self.hidden(tokens, mask, segment_ids, branches, positions))


@functools.cache
def language_model(config: TransformerConfig) -> Model:
    """The language model of `config`; equal configs give the same functions, so jit never retraces.

    `decode` reads T more tokens into a cache: T = P on an empty cache is the prefill, T = 1 a step.
    Its `params` may come from `unstack_layers`. `last_only` reads out the last token alone.
    """
    module = LanguageModel(config)
    head = functools.partial(_call, module, "kernel")
    return _model(module, head, functools.partial(_decode, module))


@functools.cache
def scalar_model(config: TransformerConfig) -> Model:
    """The reward or value model of `config`; `decode` and `head` raise TypeError."""

    def decode(*args: Any, **kwargs: Any) -> tuple[jax.Array, Cache]:
        raise TypeError("a scalar model has no next token to decode; score whole rows with apply")

    def head(params: Params) -> jax.Array:
        raise TypeError("a scalar model has no vocabulary to read out")

    return _model(ScalarModel(config), head, decode)


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
    """Parameters for `Model.decode`: `layers` as a tuple of L dicts, matrices cast to `dtype`.

    Call it once before a token loop that is not compiled as a whole, where every token would slice
    (and cast) every layer again: measured 3.6 times slower at 6 layers of 512. Inside one jitted
    `while_loop` XLA does the same by itself. What is unstacked already comes back as it is.
    """
    if isinstance(params["layers"], tuple):
        return params
    if dtype is not None:
        params = {name: _cast_matrices(name, tree, dtype) for name, tree in params.items()}
    layers = params["layers"]
    count = jax.tree.leaves(layers)[0].shape[0]
    unstacked = tuple(jax.tree.map(lambda w, i=i: w[i], layers) for i in range(count))
    return {**params, "layers": unstacked}


def scalar_from_language(
    language_params: Params, key: jax.Array, config: TransformerConfig
) -> Params:
    """Scalar parameters with the language model's trunk and a fresh head."""
    d = config.d_model
    kernel = jax.random.normal(key, (d, 1), jnp.float32) * (d + 1) ** -0.5
    trunk = {name: tree for name, tree in language_params.items() if name != "unembedding"}
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


def _cast_matrices(name: str, tree: Params, dtype: str) -> Params:
    # Norms and biases stay fp32, quantised weights as they are; in the stack everything has one
    # axis more.
    axes = 3 if name == "layers" else 2

    def cast(w: Any) -> Any:
        # A quantised matrix is a tree of its values, which may be floats too (fp8), and its scales.
        plain = jax.tree_util.all_leaves([w]) and w.ndim == axes
        return w.astype(dtype) if plain and jnp.issubdtype(w.dtype, jnp.floating) else w

    return jax.tree.map(cast, tree, is_leaf=lambda node: not isinstance(node, dict))


def _check_width(config: TransformerConfig, length: int) -> None:
    if length > config.max_length:
        raise ValueError(f"{length} tokens do not fit max_length={config.max_length}")


def _visible(rows: Rows) -> jax.Array:
    """bool[B, T, T]: whether query t sees key s."""
    return constrain(jnp.tril(rows.meets(rows)), ROWS, POSITIONS, WHOLE)


def _call(
    module: nn.Module,
    method: str,
    params: Params,
    *args: Any,
    dropout_key: jax.Array | None = None,
) -> Any:
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    return module.apply({"params": params}, *args, rngs=rngs, method=method)


def _model(
    module: _Trunk,
    head: Callable[[Params], jax.Array],
    decode: Callable[..., tuple[jax.Array, Cache]],
) -> Model:
    def init(key: jax.Array) -> Params:
        return module.init({"params": key}, jnp.zeros((1, 1), jnp.int32))["params"]

    def run(method: str) -> Callable[..., jax.Array]:
        def function(
            params: Params,
            tokens: jax.Array,
            *,
            mask: jax.Array | None = None,
            segment_ids: jax.Array | None = None,
            branches: jax.Array | None = None,
            positions: jax.Array | None = None,
            dropout_key: jax.Array | None = None,
        ) -> jax.Array:
            rows = tokens, mask, segment_ids, branches, positions
            return _call(module, method, params, *rows, dropout_key=dropout_key)

        return function

    def readout(params: Params, hidden: jax.Array) -> jax.Array:
        return _call(module, "readout", params, hidden)

    init = jax.jit(init)
    return Model(module.config, init, run("__call__"), run("hidden"), readout, head, decode)


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
    _check_width(c, length)
    if length > slots:
        raise ValueError(f"{length} tokens do not fit a cache of {slots} slots")
    mask = jnp.ones(tokens.shape, jnp.bool_) if mask is None else mask
    seen = jnp.sum(cache.mask, axis=1, dtype=jnp.int32)[:, None]
    positions = seen + token_positions(mask)
    key_mask = jax.lax.dynamic_update_slice_in_dim(cache.mask, mask, cache.index, axis=1)
    queries = cache.index + jnp.arange(length)
    visible = key_mask[:, None, :] & (jnp.arange(slots)[None, :] <= queries[:, None])[None]
    context = make_context(c, visible, positions, cache.index)

    layers = unstack_layers(params)["layers"]
    block = Block(c)
    written = []
    x = _call(module, "embed", params, tokens, positions)
    for layer, local, *layer_cache in zip(
        layers, c.local_layers, cache.keys, cache.values, strict=True
    ):
        context = context._replace(is_local=local)
        x, layer_cache = _call(block, "__call__", layer, x, context, tuple(layer_cache))
        written.append(layer_cache)
    logits = _call(module, "finish", params, x[:, -1:] if last_only else x)
    keys, values = zip(*written, strict=True)
    return logits, Cache(keys, values, key_mask, cache.index + length)
