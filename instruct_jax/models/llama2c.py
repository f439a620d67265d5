"""llama2.c checkpoints (legacy version 0) and their tokenizer file.

Checkpoint: seven little-endian int32 (d, F, L, N, K, V, length; V is negative when the head is not
tied), then float32: the token table, then for all layers attention norms, W_q, W_k, W_v, W_o, MLP
norms, W_1 (gate), W_2 (down), W_3 (up), then the final norm, two unused rotary tables of
length * H / 2, and the head when it is not tied. Matrices are [out, in]. Rotary pairs are
(2i, 2i + 1) there and (i, i + H/2) here: the rows of W_q and W_k are reordered.
"""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from instruct_jax.errors import UserError
from instruct_jax.models.config import TransformerConfig
from instruct_jax.models.transformer import Params

_HEADER = struct.Struct("<7i")
_BOS, _EOS = 1, 2


def load_llama2c(path: str | Path) -> tuple[TransformerConfig, Params]:
    """The model in a llama2.c file; fp32 NumPy parameters, vocabulary padded to our rule.

    Raises UserError for a file that is not one, or whose size does not fit its header.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    if len(raw) < _HEADER.size:
        raise UserError(f"{path}: too short for a llama2.c header")
    d, ff, layers, heads, kv_heads, vocab, length = _HEADER.unpack_from(raw)
    if min(d, ff, layers, heads, kv_heads, abs(vocab), length) < 1:
        raise UserError(f"{path}: not a llama2.c file (a size in its header is not positive)")
    try:
        config = TransformerConfig(
            vocab_size=abs(vocab),
            num_layers=layers,
            d_model=d,
            num_heads=heads,
            num_kv_heads=kv_heads,
            d_ff=ff,
            max_length=length,
            norm="rmsnorm",
            activation="swiglu",
            positions="rope",
            use_bias=False,
            tie_embeddings=vocab > 0,
        )
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    q, kv, h = heads * config.head_size, kv_heads * config.head_size, config.head_size
    shapes = {
        "tokens": (abs(vocab), d),
        "attention_norm": (layers, d),
        "query": (layers, q, d),
        "key": (layers, kv, d),
        "value": (layers, kv, d),
        "out": (layers, d, q),
        "mlp_norm": (layers, d),
        "gate": (layers, ff, d),
        "down": (layers, d, ff),
        "up": (layers, ff, d),
        "final_norm": (d,),
        "rotary": (2, length, h // 2),
        "head": (0 if config.tie_embeddings else abs(vocab), d),
    }
    sizes = [int(np.prod(shape, dtype=object)) for shape in shapes.values()]
    if len(raw) != _HEADER.size + 4 * sum(sizes):
        raise UserError(
            f"{path}: {len(raw)} bytes, but its header describes {_HEADER.size + 4 * sum(sizes)}"
        )
    flat = np.split(np.frombuffer(raw, "<f4", offset=_HEADER.size), np.cumsum(sizes[:-1]))
    stored = {name: part.reshape(shapes[name]) for name, part in zip(shapes, flat, strict=True)}
    return config, _params(config, stored)


def load_llama2c_pieces(path: str | Path) -> list[bytes]:
    """The text of every token of a llama2.c tokenizer file."""
    raw = Path(path).read_bytes()
    pieces, offset = [], 4
    while offset < len(raw):
        _, size = struct.unpack_from("<fi", raw, offset)
        pieces.append(raw[offset + 8 : offset + 8 + size])
        offset += 8 + size
    return pieces


def llama2c_text(ids: Sequence[int], pieces: Sequence[bytes]) -> str:
    """The text of `ids`; BOS and EOS are dropped, and so is the space SentencePiece puts first."""
    out = b""
    for previous, token in zip([0, *ids], ids, strict=False):
        piece = pieces[token]
        if token in (_BOS, _EOS):
            continue
        if previous == _BOS:
            piece = piece.removeprefix(b" ")
        if len(piece) == 6 and piece.startswith(b"<0x") and piece.endswith(b">"):
            piece = bytes.fromhex(piece[3:5].decode())
        out += piece
    return out.decode("utf-8", errors="replace")


def _params(config: TransformerConfig, stored: dict[str, np.ndarray]) -> Params:
    def kernel(name: str) -> dict[str, np.ndarray]:
        return {"kernel": np.ascontiguousarray(stored[name].swapaxes(-1, -2))}

    def halves(name: str, heads: int) -> None:
        w = stored[name].reshape(config.num_layers, heads, -1, 2, config.d_model)
        stored[name] = w.swapaxes(2, 3).reshape(stored[name].shape)

    halves("query", config.num_heads)
    halves("key", config.kv_heads)
    spare = config.vocab_rows - config.vocab_size
    params: Params = {
        "embedder": {"tokens": np.pad(stored["tokens"], ((0, spare), (0, 0)))},
        "layers": {
            "attention_norm": {"scale": stored["attention_norm"]},
            "attention": {name: kernel(name) for name in ("query", "key", "value", "out")},
            "mlp_norm": {"scale": stored["mlp_norm"]},
            "mlp": {name: kernel(name) for name in ("gate", "up", "down")},
        },
        "final_norm": {"scale": stored["final_norm"]},
    }
    if not config.tie_embeddings:
        params["unembedding"] = {"kernel": np.pad(stored["head"].T, ((0, 0), (0, spare)))}
    return params
