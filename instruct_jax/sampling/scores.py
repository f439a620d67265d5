"""What a language model gives to tokens that are there already, from its hidden states.

The read-out is chunked (`losses/chunked.py`), so float[B, T, V] is never held, and only the
positions that are asked for are read out. Rows that are spread over data and fsdp of the ambient
mesh stay where they are. The matrix of the read-out is gathered once, before the loop over chunks,
except for its columns, which stay spread over tensor.
"""

from typing import Any

import jax

from instruct_jax.losses import (
    CrossEntropySum,
    TokenStatistics,
    chunked_cross_entropy_sum,
    chunked_divergence,
    chunked_token_statistics,
)
from instruct_jax.models.sharding import HEADS, WHOLE, constrain, row_blocks
from instruct_jax.models.transformer import Model, Params


def token_scores(
    model: Model,
    params: Params,
    hidden: jax.Array,
    tokens: jax.Array,
    *,
    where: jax.Array | None = None,
    temperature: float = 1.0,
    moments: bool = False,
    hits: bool = False,
) -> TokenStatistics:
    """`chunked_token_statistics` of `model`'s own read-out: `hidden[:, t]`, of `Model.hidden`,
    scores `tokens[:, t]`, int32[B, T]; 0 outside of `where` bool[B, T].
    """
    asked = {"where": where, "temperature": temperature, "moments": moments, "hits": hits}
    return chunked_token_statistics(
        hidden, tokens=tokens, **_readout(model, params, len(tokens)), **asked
    )


def cross_entropy_sum(
    model: Model,
    params: Params,
    hidden: jax.Array,
    tokens: jax.Array,
    *,
    where: jax.Array,
    hits: bool = False,
) -> CrossEntropySum:
    """`chunked_cross_entropy_sum` of `model`'s own read-out, of the arguments of `token_scores`."""
    of_model = _readout(model, params, len(tokens))
    return chunked_cross_entropy_sum(hidden, tokens=tokens, where=where, hits=hits, **of_model)


def divergence(
    student: Model,
    params: Params,
    hidden: jax.Array,
    teacher: Model,
    teacher_params: Params,
    teacher_hidden: jax.Array,
    *,
    where: jax.Array,
) -> jax.Array:
    """KL from the teacher's next-token distribution to the student's, float32[B, T], of their own
    read-outs of states [B, T, D]; 0 outside of `where` bool[B, T].
    """
    own = _readout(student, params, len(hidden))
    taught = _readout(teacher, teacher_params, len(hidden))
    return chunked_divergence(
        hidden,
        own["head"],
        teacher_hidden,
        taught["head"],
        where=where,
        vocab_size=own["vocab_size"],
        student_softcap=own["softcap"],
        teacher_softcap=taught["softcap"],
        row_blocks=own["row_blocks"],
    )


def _readout(model: Model, params: Params, rows: int) -> dict[str, Any]:
    """What the chunked functions are told of `model`'s read-out of so many rows."""
    return {
        "head": constrain(model.head(params), WHOLE, HEADS),
        "vocab_size": model.config.vocab_size,
        "softcap": model.config.logit_softcap,
        "row_blocks": row_blocks(rows),
    }
