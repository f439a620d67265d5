"""Smaller variants of a trained model, by name; none of them trains anything.

int8, int4, nf4, fp8   the weights (quantization.py)
int8_activations       the inputs of int8 products as well
int8_cache             the keys and values of decoding alone: the weights are the original's
prune:SHARE            a share of the weights zeroed, 0 <= SHARE < 1 (pruning.py)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from instruct_jax.models.config import Quantization
from instruct_jax.models.matrices import tree_bytes
from instruct_jax.models.pruning import prune, sparse_bytes
from instruct_jax.models.quantization import quantize_params, quantized, with_int8_cache
from instruct_jax.models.transformer import Model, Params, unstack_layers

# The weight-only kinds, then the others; SHARE stands for a number.
NAMES = (*get_args(Quantization), "int8_activations", "int8_cache", "prune:SHARE")


@dataclass(frozen=True)
class Variant:
    """A model, the bytes that its parameters take in a file, and what else is to be told of it.

    `decoding` are the parameters in the form that decodes fastest, None where that is `params`.
    """

    model: Model
    params: Params
    stored_bytes: int
    notes: Mapping[str, Any] = field(default_factory=dict)
    decoding: Params | None = None


def as_it_is(model: Model, params: Params, **notes: Any) -> Variant:
    """The model itself."""
    return Variant(model, params, tree_bytes(params), notes)


def is_variant(name: str) -> bool:
    """Whether `compress` knows it.

    >>> is_variant("prune:0.5"), is_variant("prune:1"), is_variant("prune:SHARE")
    (True, False, False)
    """
    return name in NAMES[:-1] or _share(name) is not None


def compress(model: Model, params: Params, name: str) -> Variant:
    """The variant of that name of plain fp32 parameters. Raises ValueError for a name of none.

    The notes of a pruned one are its `layers`: what each matrix of each layer gave up.
    """
    if not is_variant(name):
        raise ValueError(f"{name!r} is none of {', '.join(NAMES)}")
    share = _share(name)
    if share is not None:
        pruned, report = prune(params, share)
        notes = {"layers": [row._asdict() for row in report]}
        return Variant(model, pruned, sparse_bytes(pruned), notes)
    if name == "int8_cache":
        return as_it_is(with_int8_cache(model), params)
    activations = name == "int8_activations"
    small = quantize_params(params, "int8" if activations else name)  # type: ignore[arg-type]
    # The sampler would cast the integers of a stack; separate layers it takes as they are.
    return Variant(
        quantized(model, activations=activations),
        small,
        tree_bytes(small),
        decoding=unstack_layers(small),
    )


def _share(name: str) -> float | None:
    """The SHARE of prune:SHARE, None where it is none."""
    kind, _, value = name.partition(":")
    try:
        share = float(value)
    except ValueError:
        return None
    return share if kind == "prune" and 0.0 <= share < 1.0 else None
