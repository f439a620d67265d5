"""The weights as the loop over tokens wants them: one tree a layer, in the compute dtype, and whole
over fsdp.

Training shards every matrix over fsdp and gathers it where it is used. A loop that did so would
send the whole model for every token: 3.2 TB a device in one rollout of 1,024 tokens of the 1.3B
policy on 64 devices, against 3.3 GB where it is gathered once before. What is split over tensor
stays split.
"""

from typing import Any

import jax

from instruct_jax.models.adapters import adapter_rules
from instruct_jax.models.sharding import HEADS, WHOLE, constrain
from instruct_jax.models.transformer import PARTITION_RULES, unstack_layers
from instruct_jax.training.mesh import match_partition_rules

_RULES = adapter_rules(PARTITION_RULES)


def decoding_weights(params: Any, *, dtype: str) -> Any:
    """`unstack_layers(params, dtype=dtype)`, gathered over fsdp of the ambient mesh.

    Trees whose layers are unstacked already come back as they are, and so does any tree where there
    is nothing to gather. Raises ValueError for a parameter that no partition rule knows.
    """
    unstacked = unstack_layers(params, dtype=dtype)
    mesh = jax.sharding.get_abstract_mesh()
    if unstacked is params or mesh.shape.get("fsdp", 1) == 1:
        return unstacked
    specs = match_partition_rules(_RULES, params)
    layers = [jax.tree.map(_of_layer, layer, specs["layers"]) for layer in unstacked["layers"]]
    rest = {name: tree for name, tree in unstacked.items() if name != "layers"}
    tables = {name: jax.tree.map(_gathered, tree, specs[name]) for name, tree in rest.items()}
    return {**tables, "layers": tuple(layers)}


def _gathered(w: jax.Array, spec: Any) -> jax.Array:
    axes = (*spec, *[None] * w.ndim)[: w.ndim]
    return constrain(w, *(HEADS if axis == "tensor" else WHOLE for axis in axes))


def _of_layer(w: jax.Array, spec: Any) -> jax.Array:
    """A layer's part of a stack whose first axis is the layers."""
    return _gathered(w, spec[1:])
