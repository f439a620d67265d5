"""What a phase must compute and move at least, and how fast some hardware could do it.

With N matmul parameters (the vocabulary head counts, the input embedding does not), L layers,
query width d, rows of T tokens, w and k bytes per weight and per cached number:

    f(N, T)      = 2 N T + 2 L d T^2                     the forward FLOPs of a causal row
    kappa        = 2 L n_kv d_h k                        the cached bytes of a token
    prefill      = B f(N, P)                             bytes  w N + B P kappa
    decode step  = 2 N B + 4 L d B S                     bytes  w N + B S kappa + 4 B V
    score        = sum over the models of B f(N, T)      bytes  w N each
    train        = 3 B f(N, T)                           bytes  30 per parameter and AdamW update
    ptx          = 3 B f(N, T)                           bytes  w N: the update is the policy's
    t_limit      = sum over the pieces of max(FLOPs / C, bytes / W)

A recomputed activation (`remat`), a padded token and a masked score are no useful work and count
nothing; so the limit over the measured time is a fraction of what is possible, not of what is done.
What is recomputed is told beside it, for plans.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from instruct_jax.models.families import parameter_count
from instruct_jax.models.transformer import TransformerConfig

Kind = Literal["language", "scalar"]

Optimizer = Literal["adamw", "adafactor", "lion", "muon"]

# Bytes of an update a parameter, in fp32: parameter, gradient and moments read, all but the
# gradient written (Adam has two moments, Lion and Muon one, Adafactor none but reads the gradient
# twice), and a bfloat16 copy for the products (2).
UPDATE_BYTES: dict[Optimizer, int] = {"adamw": 30, "lion": 22, "muon": 22, "adafactor": 18}
# Of Muon's; each reads a matrix and writes one in fp32.
ITERATIONS, ITERATION_BYTES = 5, 8
_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Peaks:
    """What some hardware can do at best: FLOP/s of matmuls by dtype, bytes/s and bytes of memory.

    `float32` is for products of full precision; a TPU makes them of six bfloat16 ones.
    """

    name: str
    bfloat16: float
    float32: float
    bandwidth: float
    memory: float

    def flops(self, dtype: str) -> float:
        """FLOP/s for "float32" or "bfloat16"."""
        return {"float32": self.float32, "bfloat16": self.bfloat16}[dtype]


def _tpu(name: str, bfloat16: float, bandwidth: float, gibibytes: float) -> Peaks:
    return Peaks(name, bfloat16, bfloat16 / 6, bandwidth, gibibytes * 2**30)


# One chip (TPU) or one card; dense bfloat16, as the vendors publish it.
PEAKS: dict[str, Peaks] = {
    peaks.name: peaks
    for peaks in (
        _tpu("v4", 275e12, 1228e9, 32),
        _tpu("v5e", 197e12, 819e9, 16),
        _tpu("v5p", 459e12, 2765e9, 95),
        _tpu("v6e", 918e12, 1640e9, 32),
        Peaks("h100", 989.4e12, 66.9e12, 3.35e12, 80e9),
        Peaks("h200", 989.4e12, 66.9e12, 4.8e12, 141e9),
    )
}


@dataclass(frozen=True)
class Cost:
    """Floating-point operations, and bytes between memory and the chip.

    `recomputed` are operations that the backward pass makes a second time; `flops` is without them.
    """

    flops: float = 0.0
    bytes: float = 0.0
    recomputed: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        """Both together, as one piece."""
        flops, recomputed = self.flops + other.flops, self.recomputed + other.recomputed
        return Cost(flops, self.bytes + other.bytes, recomputed)

    def __mul__(self, times: float) -> "Cost":
        """So many of it."""
        return Cost(self.flops * times, self.bytes * times, self.recomputed * times)

    def seconds(self, *, flops: float, bandwidth: float) -> float:
        """max(FLOPs / C, bytes / W): computing and moving overlap perfectly."""
        return max(self.flops / flops, self.bytes / bandwidth)


def time_limit(pieces: Iterable[Cost], *, flops: float, bandwidth: float) -> float:
    """The seconds of pieces that follow each other: within a piece the two overlap."""
    return sum(piece.seconds(flops=flops, bandwidth=bandwidth) for piece in pieces)


def total(pieces: Iterable[Cost]) -> Cost:
    """All pieces as one."""
    return sum(pieces, start=Cost())


def matmul_parameters(config: TransformerConfig, *, kind: Kind = "language") -> int:
    """N: the parameters that take part in matrix products, the head among them, biases not."""
    head = config.d_model * (config.vocab_size if kind == "language" else 1)
    return _layer_parameters(config) + head


def _layer_matrices(c: TransformerConfig) -> list[tuple[int, int]]:
    """The shorter and the longer side of each matrix of a layer."""
    heads, shared = c.num_heads * c.head_size, c.kv_heads * c.head_size
    outs = [heads, heads, shared, shared, *[c.ff_size] * (3 if c.gated else 2)]
    return [(min(c.d_model, out), max(c.d_model, out)) for out in outs]


def _layer_parameters(c: TransformerConfig) -> int:
    """The matrices of all layers."""
    return c.num_layers * sum(m * n for m, n in _layer_matrices(c))


def update(config: TransformerConfig, optimizer: Optimizer = "adamw") -> Cost:
    """One update of all parameters from their gradient. A Newton-Schulz iteration of Muon on a
    matrix of m by n, m <= n, is X X^T, its square, and their sum times X: 4 m^2 n + 2 m^3 FLOPs.
    """
    flops, moved = 0.0, float(UPDATE_BYTES[optimizer] * parameter_count(config))
    if optimizer == "muon":
        each = sum(4.0 * m**2 * n + 2.0 * m**3 for m, n in _layer_matrices(config))
        flops = ITERATIONS * config.num_layers * each
        moved += ITERATIONS * ITERATION_BYTES * _layer_parameters(config)
    return Cost(flops, moved)


def weight_bytes(config: TransformerConfig, *, kind: Kind = "language") -> int:
    """w N: one pass over the matrices in the compute dtype."""
    return _BYTES[config.dtype] * matmul_parameters(config, kind=kind)


def kv_bytes(config: TransformerConfig, *, element: int | None = None) -> int:
    """kappa: the bytes of one token in the cache; `element` is k, by default the dtype's."""
    k = _BYTES[config.dtype] if element is None else element
    return 2 * config.num_layers * config.kv_heads * config.head_size * k


def attention_flops(config: TransformerConfig, lengths: Sequence[int] | np.ndarray) -> float:
    """2 L d T^2 summed over rows (or segments) of T real tokens: scores and sums, causal.

    A local layer of window W < T has T W - W^2 / 2 pairs instead of T^2 / 2.
    """
    t = np.asarray(lengths, np.float64)
    width = config.num_heads * config.head_size
    pairs = 0.0
    for is_local in config.local_layers:
        seen = np.minimum(t, config.window) if is_local and config.window else t
        pairs += float((t * seen - seen**2 / 2).sum())
    return 4.0 * width * pairs


def forward_flops(
    config: TransformerConfig, lengths: Sequence[int] | np.ndarray, *, kind: Kind = "language"
) -> float:
    """The sum of f(N, T) over rows (or packed segments) of T real tokens."""
    tokens = float(np.asarray(lengths, np.float64).sum())
    return 2.0 * matmul_parameters(config, kind=kind) * tokens + attention_flops(config, lengths)


def recomputed_flops(config: TransformerConfig, tokens: float, attention: float) -> float:
    """What `config.remat` computes again of a forward pass over so many real tokens.

    `attention` are the FLOPs of its scores and sums. The last product of a layer is never made
    again, unless a norm follows it: nothing in the layer's gradient depends on its result.
    """
    c = config
    if c.remat == "none":
        return 0.0
    if c.remat == "products":
        return attention
    last = c.num_layers * c.d_model * c.ff_size if c.norm_order == "pre" else 0
    return 2.0 * (_layer_parameters(c) - last) * tokens + attention


def prefill(config: TransformerConfig, prompts: Sequence[int] | np.ndarray) -> Cost:
    """Reading prompts of these lengths into a cache."""
    cached = float(np.asarray(prompts).sum()) * kv_bytes(config)
    return Cost(forward_flops(config, prompts), weight_bytes(config) + cached)


def decode_step(config: TransformerConfig, rows: float, live: float) -> Cost:
    """One token more for `rows` rows with `live` tokens each in the cache."""
    n, width = matmul_parameters(config), config.num_heads * config.head_size
    seen = [
        min(live, config.window) if is_local and config.window else live
        for is_local in config.local_layers
    ]
    flops = 2.0 * n * rows + 4.0 * width * rows * sum(seen)
    read = rows * sum(seen) * kv_bytes(config) / config.num_layers
    return Cost(flops, weight_bytes(config) + read + 4.0 * rows * config.vocab_size)


def generate(
    config: TransformerConfig,
    prompts: Sequence[int] | np.ndarray,
    responses: Sequence[int] | np.ndarray,
    *,
    samples: int = 1,
) -> list[Cost]:
    """The prefill of all prompts and every decode step, with the rows that still live in it.

    Prompt i has responses i * samples to (i + 1) * samples, and is read once.
    """
    before = np.repeat(np.asarray(prompts, np.float64), samples)
    lengths = np.asarray(responses)
    steps = [prefill(config, prompts)]
    for step in range(int(lengths.max(initial=0))):
        live = lengths > step
        steps.append(decode_step(config, float(live.sum()), float((before[live] + step).mean())))
    return steps


def score(
    policy: TransformerConfig,
    scalar: TransformerConfig,
    lengths: Sequence[int] | np.ndarray,
    *,
    scalars: int = 2,
) -> Cost:
    """The reference's log-probs, and `scalars` passes: the reward and, with a critic, the values.

    The sampler's own log-probs can serve as old ones, so no pass of the policy is counted.
    """
    reference = Cost(forward_flops(policy, lengths), weight_bytes(policy))
    one = Cost(forward_flops(scalar, lengths, kind="scalar"), weight_bytes(scalar, kind="scalar"))
    return reference + one * scalars


def train(
    config: TransformerConfig,
    lengths: Sequence[int] | np.ndarray,
    *,
    kind: Kind = "language",
    updates: int = 1,
    epochs: int = 1,
    optimizer: Optimizer = "adamw",
) -> Cost:
    """Forward and backward over rows (or segments), `epochs` times in all of `updates` updates."""
    flops = 3.0 * forward_flops(config, lengths, kind=kind)
    passes = Cost(flops, 0.0, _recomputed_rows(config, lengths)) * epochs
    return total([passes, update(config, optimizer) * updates])


def ptx(config: TransformerConfig, lengths: Sequence[int] | np.ndarray) -> Cost:
    """The gradient of the pretraining mix; its update is the policy's."""
    flops, bytes_moved = 3.0 * forward_flops(config, lengths), float(weight_bytes(config))
    return Cost(flops, bytes_moved, _recomputed_rows(config, lengths))


def _recomputed_rows(config: TransformerConfig, lengths: Sequence[int] | np.ndarray) -> float:
    """`recomputed_flops` of rows (or segments) of T real tokens."""
    tokens = float(np.asarray(lengths, np.float64).sum())
    return recomputed_flops(config, tokens, attention_flops(config, lengths))


def branch_lengths(prompts: np.ndarray, completions: np.ndarray) -> tuple[np.ndarray, float]:
    """What K branches of one prompt amount to: (tokens of each row, its visible pairs in all).

    int[B] and int[B, K] -> float[B], and sum over rows of P^2/2 + sum_k (C_k P + C_k^2/2).
    """
    p, c = prompts.astype(np.float64), completions.astype(np.float64)
    pairs = p**2 / 2 + (c * p[:, None] + c**2 / 2).sum(1)
    return p + c.sum(1), float(pairs.sum())


def train_branches(
    config: TransformerConfig,
    prompts: np.ndarray,
    completions: np.ndarray,
    *,
    updates: int = 1,
    optimizer: Optimizer = "adamw",
) -> Cost:
    """`train` of a reward model that reads prompts int[B] once for their completions int[B, K]."""
    tokens, pairs = branch_lengths(prompts, completions)
    width = config.num_heads * config.head_size
    count, attention = float(tokens.sum()), 4.0 * config.num_layers * width * pairs
    forward = 2.0 * matmul_parameters(config, kind="scalar") * count + attention
    passes = Cost(3.0 * forward, 0.0, recomputed_flops(config, count, attention))
    return total([passes, update(config, optimizer) * updates])
