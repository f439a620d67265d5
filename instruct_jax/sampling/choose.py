"""How one token is chosen from one row of logits.

    p(y) = softmax(logits / temperature), restricted to the top-k / top-p / min-p set, renormalised
    y    = min { i : sum_{j<=i} p_j > u },  u ~ Uniform[0, 1)          (inverse CDF)

One uniform number a token instead of one Gumbel variate a vocabulary entry: the same distribution
to the resolution of a float32 uniform (about 1e-7), and 20 times faster than
`jax.random.categorical` on a CPU. An entry with p = 0 is never drawn.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

# Finite (NUM-6): exp(EXCLUDED - max) is exactly 0 in float32, and no row can become NaN.
EXCLUDED = -1e9

# Columns whose weights are summed before one is looked for among them.
_BLOCK = 128


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn and what ends a response; hashable, the same for all rows of a program.

    Temperature 0 is greedy. `stop_ids` holds the end token and whatever else ends a response by
    itself; a stop sequence ends it with its last token. Raises ValueError for what makes no sense.
    """

    stop_ids: tuple[int, ...]
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        """Refuse what would otherwise be drawn from silently."""
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be >= 0 (0 is greedy), got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be >= 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")
        if not all(self.stop_sequences):
            raise ValueError("a stop sequence is empty: every response would end at once")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError for an end token that a model of `vocab_size` tokens cannot sample."""
        for stop in (*self.stop_ids, *(i for sequence in self.stop_sequences for i in sequence)):
            if not 0 <= stop < vocab_size:
                raise ValueError(f"end token {stop} is outside the vocabulary of {vocab_size}")

    def ending(self, response: tuple[int, ...]) -> int:
        """How many tokens at the end of `response` are what ended it; 0 for the budget."""
        if response and response[-1] in self.stop_ids:
            return 1
        lengths = (len(s) for s in self.stop_sequences if response[-len(s) :] == s)
        return max(lengths, default=0)


def choose(
    logits: jax.Array,
    keys: jax.Array,
    length: jax.Array,
    minimum: jax.Array | None,
    sampling: Sampling,
) -> tuple[jax.Array, jax.Array]:
    """The next token of every row, and its log-probability: int32[B], float32[B].

    float32[B, V], keys[B] and `length` int32[B], the tokens of the response so far: token t of a
    row is drawn with fold_in(row key, t). No stop id comes while `length` is below `minimum`
    int32[B]. The log-probabilities are those of the whole softmax at the temperature (1 when it is
    0).
    """
    scaled = allowed = logits.astype(jnp.float32) / (sampling.temperature or 1.0)
    if minimum is not None:
        ends = jnp.isin(jnp.arange(logits.shape[-1]), jnp.array(sampling.stop_ids))
        allowed = jnp.where((length < minimum)[:, None] & ends[None, :], EXCLUDED, allowed)
    if sampling.temperature:
        allowed = truncate(
            allowed, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p
        )
        token = draw(jax.vmap(jax.random.fold_in)(keys, length), allowed)
    else:
        token = jnp.argmax(allowed, axis=-1).astype(jnp.int32)
    shifted = scaled - jnp.max(scaled, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(shifted, token[:, None], axis=-1)[:, 0]
    return token, chosen - jnp.log(jnp.sum(jnp.exp(shifted), axis=-1))


def truncate(
    logits: jax.Array,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> jax.Array:
    """Keep the `top_k` largest logits, of those the smallest set with mass >= `top_p`, and of those
    the ones at least `min_p` times as probable as the first.

    float32[B, V] -> float32[B, V], everything else EXCLUDED. Logits equal to the last one kept are
    kept too, so ties never depend on the order of the vocabulary; the most probable token always
    stays.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, EXCLUDED, logits)
    if top_p is not None and top_p < 1.0:
        descending = -jnp.sort(-logits, axis=-1)
        probs = jax.nn.softmax(descending, axis=-1)
        # A token belongs to the set when the mass strictly before it has not reached top_p.
        inside = jnp.cumsum(probs, axis=-1) - probs < top_p
        smallest = jnp.min(jnp.where(inside, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, EXCLUDED, logits)
    if min_p:
        smallest = jnp.max(logits, axis=-1, keepdims=True) + math.log(min_p)
        logits = jnp.where(logits < smallest, EXCLUDED, logits)
    return logits


def draw(keys: jax.Array, logits: jax.Array) -> jax.Array:
    """One draw a row from softmax(logits): keys[B], float32[B, V] -> int32[B].

    Row b uses keys[b] only, so a draw does not depend on the rows beside it. The block of columns
    that u falls in is found by the sums of the blocks, then the column inside it, so that no prefix
    sum of V numbers is needed: 0.24 ms of processor time for 32 rows of 8,320, where one over all
    columns took 1.4.
    """
    columns = logits.shape[-1]
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    blocks = jnp.pad(weights, ((0, 0), (0, -columns % _BLOCK))).reshape(len(keys), -1, _BLOCK)
    sums = blocks.sum(-1)
    block, rest = _first_past(sums, jax.vmap(jax.random.uniform)(keys) * sums.sum(-1))
    column, _ = _first_past(jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0], rest)
    return (block * _BLOCK + column).astype(jnp.int32)


def _first_past(weights: jax.Array, threshold: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first index whose cumulative weight is above `threshold`, and what of that is its own.

    float32[B, N] >= 0, float32[B] -> int32[B], float32[B].
    """
    cumulative = jnp.cumsum(weights, axis=-1)
    # By name and not by an empty interval: a parallel prefix sum is not monotone in its last bit.
    past = (cumulative > threshold[:, None]) & (weights > 0)
    # Rounding can leave the threshold above all of them, about once in 1e7 draws.
    index = jnp.where(past.any(-1), jnp.argmax(past, axis=-1), jnp.argmax(weights, axis=-1))
    before = jnp.take_along_axis(cumulative - weights, index[:, None], axis=-1)[:, 0]
    return index, threshold - before
