"""Global magnitude pruning: the smallest weights of all matrices together become zero.

    threshold = the k-th smallest |w| of all matrices, k = round(sparsity * their number)
    w <- 0 where |w| <= threshold

One threshold for the whole model, so layers give up what they can spare: the report says how much
each did. Tables, norms, biases and heads are not touched. Zeros save memory only where the format
stores them apart: `sparse_bytes` is a bitmap and the values that remain.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from instruct_jax.errors import ConfigError
from instruct_jax.models.matrices import matrices, replace_leaves, tree_bytes
from instruct_jax.models.transformer import Params


class Pruned(NamedTuple):
    """What pruning did to one matrix of one layer."""

    path: str
    layer: int
    weights: int
    zeroed: float  # share of the weights
    energy_lost: float  # share of the sum of squares


def prune(params: Params, sparsity: float) -> tuple[Params, tuple[Pruned, ...]]:
    """`params` with a share `sparsity` in [0, 1) of its matrix weights zeroed, and the report.

    Weights equal to the threshold go with it. Raises ConfigError for another sparsity.
    """
    if not 0.0 <= sparsity < 1.0:
        raise ConfigError(f"sparsity must lie in [0, 1), got {sparsity}")
    kernels = matrices(params)
    count = round(sparsity * sum(kernel.size for kernel in kernels.values()))
    threshold = np.float32(_kth_smallest(list(kernels.values()), count) if count else -1.0)
    pruned = {
        path: jnp.where(jnp.abs(w) <= threshold, jnp.zeros_like(w), w)
        for path, w in kernels.items()
    }
    report = tuple(
        row for path in sorted(kernels) for row in _report(path, kernels[path], pruned[path])
    )
    return replace_leaves(params, pruned), report


def sparse_bytes(params: Params) -> int:
    """Bytes of `params` with each matrix as one bit a weight and the values that are not zero."""
    kernels = matrices(params)
    rest = tree_bytes(params) - tree_bytes(list(kernels.values()))
    return rest + sum(
        -(-kernel.size // 8)
        + int(np.asarray(jnp.count_nonzero(kernel, axis=(1, 2))).sum(dtype=np.int64))
        * kernel.dtype.itemsize
        for kernel in kernels.values()
    )


def _kth_smallest(arrays: list[jax.Array], k: int) -> float:
    # The bit patterns of non-negative floats are ordered as the floats are, so halving the range of
    # patterns finds the value exactly, with nothing sorted or gathered. Counts are taken a layer at
    # a time and added as Python integers: those of a whole model do not fit int32.
    low, high = 0, int(np.float32(np.inf).view(np.int32))
    while low < high:
        middle = (low + high) // 2
        counts = jax.device_get([_count(x, np.int32(middle)) for x in arrays])
        if sum(int(count.sum(dtype=np.int64)) for count in counts) >= k:
            high = middle
        else:
            low = middle + 1
    return float(np.int32(low).view(np.float32))


@jax.jit
def _count(x: jax.Array, bound: jax.Array) -> jax.Array:
    """int32[L]: elements whose magnitude has a bit pattern of at most `bound`."""
    magnitude = jnp.abs(x).astype(jnp.float32)
    return jnp.sum(
        jax.lax.bitcast_convert_type(magnitude, jnp.int32) <= bound, axis=(1, 2), dtype=jnp.int32
    )


def _report(path: str, before: jax.Array, after: jax.Array) -> list[Pruned]:
    layers, *shape = before.shape
    kept = np.asarray(jnp.count_nonzero(after, axis=(1, 2)))
    energy, left = (np.asarray(jnp.sum(jnp.square(x), axis=(1, 2))) for x in (before, after))
    size = int(np.prod(shape))
    return [
        Pruned(
            path=path,
            layer=layer,
            weights=size,
            zeroed=1.0 - float(kept[layer]) / size,
            energy_lost=1.0 - float(left[layer] / energy[layer]) if energy[layer] else 0.0,
        )
        for layer in range(layers)
    ]
