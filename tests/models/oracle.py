"""The decoder once more: NumPy, float64, one row, loops over layers, heads and queries.

Rotary positions are complex multiplications and masks are list slices, so that nothing but the
parameter names is shared with the implementation.
"""

import numpy as np

from instruct_jax.models import TransformerConfig


def row_hidden(config: TransformerConfig, params: dict, tokens: np.ndarray) -> np.ndarray:
    """int[T] -> float64[T, D] after the last norm."""
    table = params["embedder"]
    x = np.stack([_f64(table["tokens"])[token] for token in tokens])
    if config.positions == "learned":
        x = x + _f64(table["positions"])[: len(tokens)]
    for i in range(config.num_layers):
        layer = _layer(params["layers"], i)
        x = x + _attention(config, layer["attention"], _norm(config, layer["attention_norm"], x))
        x = x + _mlp(config, layer["mlp"], _norm(config, layer["mlp_norm"], x))
    return _norm(config, params["final_norm"], x)


def row_logits(config: TransformerConfig, params: dict, tokens: np.ndarray) -> np.ndarray:
    """int[T] -> float64[T, vocab_size]."""
    if config.tie_embeddings:
        kernel = _f64(params["embedder"]["tokens"]).T
    else:
        kernel = _f64(params["unembedding"]["kernel"])
    return (row_hidden(config, params, tokens) @ kernel)[:, : config.vocab_size]


def row_scores(config: TransformerConfig, params: dict, tokens: np.ndarray) -> np.ndarray:
    """int[T] -> float64[T]."""
    return _linear(params["head"], row_hidden(config, params, tokens))[:, 0]


def _f64(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _layer(tree: dict, i: int) -> dict:
    return {k: _layer(v, i) if isinstance(v, dict) else _f64(v)[i] for k, v in tree.items()}


def _linear(weights: dict, x: np.ndarray) -> np.ndarray:
    return x @ _f64(weights["kernel"]) + (_f64(weights["bias"]) if "bias" in weights else 0.0)


def _norm(config: TransformerConfig, weights: dict, x: np.ndarray) -> np.ndarray:
    rows = []
    for row in x:
        if config.norm == "layernorm":
            row = (row - row.mean()) / np.sqrt(row.var() + config.norm_eps)
            rows.append(row * _f64(weights["scale"]) + _f64(weights["bias"]))
        else:
            row = row / np.sqrt((row**2).mean() + config.norm_eps)
            rows.append(row * _f64(weights["scale"]))
    return np.stack(rows)


def _attention(config: TransformerConfig, weights: dict, x: np.ndarray) -> np.ndarray:
    size, group = config.head_size, config.num_heads // config.kv_heads
    q, k, v = (_linear(weights[name], x) for name in ("query", "key", "value"))
    out = []
    for n in range(config.num_heads):
        mine, shared = slice(n * size, (n + 1) * size), n // group
        theirs = slice(shared * size, (shared + 1) * size)
        qn, kn, vn = q[:, mine], k[:, theirs], v[:, theirs]
        if config.positions == "rope":
            qn, kn = _turn(config, qn), _turn(config, kn)
        rows = []
        for t in range(len(x)):
            scores = kn[: t + 1] @ qn[t] / np.sqrt(size)
            weight = np.exp(scores - scores.max())
            rows.append(weight / weight.sum() @ vn[: t + 1])
        out.append(np.stack(rows))
    return _linear(weights["out"], np.concatenate(out, axis=1))


def _turn(config: TransformerConfig, x: np.ndarray) -> np.ndarray:
    half = config.head_size // 2
    speed = config.rope_theta ** (-np.arange(half) / half)
    angle = np.arange(len(x))[:, None] * speed[None, :]
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=1)


def _mlp(config: TransformerConfig, weights: dict, x: np.ndarray) -> np.ndarray:
    up = _linear(weights["up"], x)
    if config.activation == "swiglu":
        gate = _linear(weights["gate"], x)
        up = gate / (1 + np.exp(-gate)) * up
    elif config.activation == "relu":
        up = np.maximum(up, 0)
    else:
        up = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
    return _linear(weights["down"], up)
