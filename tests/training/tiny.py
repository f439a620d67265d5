"""A model small enough to reason about: a two-layer perceptron on rows of uneven length."""

import jax
import jax.numpy as jnp
import numpy as np

D, F, T = 8, 16, 6
RULES = (("kernel$", ("fsdp", "tensor")), ("bias$", ("tensor",)))


def init(key):
    """float32 parameters."""
    keys = jax.random.split(key)
    return {
        "hidden": {"kernel": jax.random.normal(keys[0], (D, F)) / D**0.5, "bias": jnp.zeros(F)},
        "head": {"kernel": jax.random.normal(keys[1], (F, 1)) / F**0.5, "bias": jnp.zeros(1)},
    }


def batch(step, *, rows=16, seed=0):
    """x [B, T, D], y [B, T] and a mask whose rows are 1 to T long: a function of (seed, step)."""
    rng = np.random.default_rng((seed, step))
    lengths = rng.integers(1, T + 1, rows)
    return {
        "x": rng.normal(size=(rows, T, D)).astype(np.float32),
        "y": rng.normal(size=(rows, T)).astype(np.float32),
        "mask": np.arange(T) < lengths[:, None],
    }


def loss_fn(params, batch, key):
    """The squared error of the positions in the mask."""
    del key
    hidden = jnp.tanh(
        jnp.einsum("BTD,DF->BTF", batch["x"], params["hidden"]["kernel"])
        + params["hidden"]["bias"][None, None]
    )
    out = jnp.einsum("BTF,FO->BTO", hidden, params["head"]["kernel"])[..., 0]
    error = out + params["head"]["bias"][None] - batch["y"]
    total = jnp.sum(jnp.square(error), where=batch["mask"])
    count = batch["mask"].sum(dtype=jnp.float32)
    return total, count, {"absolute": (jnp.sum(jnp.abs(error), where=batch["mask"]), count)}
