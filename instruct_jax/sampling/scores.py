"""What a language model gives to tokens that are there already, from its hidden states.

The read-out is chunked (`losses/chunked.py`), so float[B, T, V] is never held, and only the
positions that are asked for are read out. Rows that are spread over data and fsdp of the ambient
mesh stay where they are. The matrix of the read-out is gathered once, before the loop over chunks,
except for its columns, which stay spread over tensor.
"""

import jax

from instruct_jax.losses import (
    CrossEntropySum,
    TokenStatistics,
    chunked_cross_entropy_sum,
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
    config = model.config
    return chunked_token_statistics(
        hidden,
        constrain(model.head(params), WHOLE, HEADS),
        tokens,
        where=where,
        temperature=temperature,
        vocab_size=config.vocab_size,
        softcap=config.logit_softcap,
        row_blocks=row_blocks(tokens.shape[0]),
        moments=moments,
        hits=hits,
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
    config = model.config
    return chunked_cross_entropy_sum(
        hidden,
        constrain(model.head(params), WHOLE, HEADS),
        tokens,
        where=where,
        vocab_size=config.vocab_size,
        softcap=config.logit_softcap,
        row_blocks=row_blocks(tokens.shape[0]),
        hits=hits,
    )
