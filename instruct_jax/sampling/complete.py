"""Texts in, texts out: completions of a list of prompts by the engine.

Prompt i is sampled with fold_in(key, i), so neither the number of rows decoded together nor the
other prompts change its completion.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from instruct_jax.data.rows import PromptText
from instruct_jax.data.templates import encode_texts
from instruct_jax.data.tokenizer import Tokenizer
from instruct_jax.models.transformer import Model
from instruct_jax.sampling.choose import Sampling
from instruct_jax.sampling.engine import respond
from instruct_jax.sampling.sampler import Rollout

# Widths of padded rows are rounded up to a multiple of this, which bounds the number of compiled
# programs.
WIDTH_STEP = 16


class Completion(NamedTuple):
    """What a model answered to one prompt."""

    text: str  # without the end token or stop sequence
    ended: bool  # by one of them, not by the budget
    tokens: tuple[int, ...]  # the response as sampled, end token included


def complete(
    model: Model,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[PromptText],
    *,
    key: jax.Array,
    max_new_tokens: int,
    prompt_length: int | None = None,
    batch_size: int = 64,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    min_new_tokens: int = 0,
    stop_ids: Sequence[int] = (),
    stop_sequences: Sequence[Sequence[int]] = (),
    mesh: Mesh | None = None,
) -> list[Completion]:
    """One Completion a prompt, in order, with the settings of `generate`.

    `batch_size` rows decode together; a prompt given several times is read once. With a `mesh`,
    where `params` must already live, the rows are spread over its data and fsdp axes; of several
    processes all ask alike, and each gets all answers. Raises ValueError for a prompt that is
    empty, longer than `prompt_length` or too long for the model: how to cut it is the caller's
    decision.
    """
    if not prompts:
        return []
    encoded = encode_texts(prompts, tokenizer)
    if prompt_length is not None:
        for i, ids in enumerate(encoded):
            if len(ids) > prompt_length:
                raise ValueError(
                    f"prompt {i} has {len(ids)} tokens, more than prompt_length {prompt_length}"
                )
    sampling = Sampling(
        stop_ids=(tokenizer.eos_id, *stop_ids),
        stop_sequences=tuple(tuple(sequence) for sequence in stop_sequences),
        temperature=float(temperature),
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )
    responses = respond(
        model,
        params,
        encoded,
        jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
            key, np.arange(len(prompts), dtype=np.int32)
        ),
        sampling,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        slots=batch_size,
        mesh=mesh,
    )
    return [_completion(response.tokens, tokenizer, sampling) for response in responses]


def completions_of(
    rollout: Rollout, tokenizer: Tokenizer, *, stop_ids: Sequence[int] = ()
) -> list[Completion]:
    """The responses of a rollout as Completions; `stop_ids` are those it was sampled with."""
    mask = np.asarray(rollout.response_mask)
    responses = np.asarray(rollout.tokens)[:, -mask.shape[1] :]
    sampling = Sampling(stop_ids=(tokenizer.eos_id, *stop_ids))
    return [
        _completion(tuple(response[:length].tolist()), tokenizer, sampling)
        for response, length in zip(responses, mask.sum(axis=1), strict=True)
    ]


def _completion(ids: tuple[int, ...], tokenizer: Tokenizer, sampling: Sampling) -> Completion:
    ending = sampling.ending(ids)
    text = tokenizer.decode(list(ids[: len(ids) - ending]))
    return Completion(text=text, ended=ending > 0, tokens=ids)
