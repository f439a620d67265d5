"""Texts in, texts out: completions of a list of prompts in batches of one fixed shape.

Prompt i is sampled with fold_in(key, i), so neither the batch size nor the other prompts change
its completion; a shorter last batch is filled with empty rows, which hold nothing up (see
`generate`).
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from instruct_jax.data.tokenizer import Tokenizer
from instruct_jax.models.transformer import Model
from instruct_jax.sampling.sampler import Rollout, generate
from instruct_jax.training.mesh import batch_sharding

# Prompt widths are rounded up to a multiple of this, which bounds the number of compiled programs.
WIDTH_STEP = 16


class Completion(NamedTuple):
    """What a model answered to one prompt."""

    text: str  # without the end token
    ended: bool  # by an end or stop token, not by the budget
    tokens: tuple[int, ...]  # the response as sampled, end token included


def complete(
    model: Model,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    key: jax.Array,
    max_new_tokens: int,
    prompt_length: int | None = None,
    batch_size: int = 64,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_new_tokens: int = 0,
    stop_ids: Sequence[int] = (),
    mesh: Mesh | None = None,
) -> list[Completion]:
    """One Completion a prompt, in order, with the settings of `generate`.

    `prompt_length` is the width of the padded prompts (default: the longest one, rounded up). With
    a `mesh`, where `params` must already live, the rows of a batch are spread over its data and
    fsdp axes. Raises ValueError for a prompt that is empty or longer than `prompt_length`: how to
    cut it is the caller's decision.
    """
    if not prompts:
        return []
    room = model.config.max_length - max_new_tokens
    tokens, mask = pad_prompts(
        tokenizer.encode_batch(list(prompts)),
        pad_id=tokenizer.pad_id,
        width=prompt_length,
        room=room,
    )
    parts = mesh.shape["data"] * mesh.shape["fsdp"] if mesh else 1
    rows = -(-min(batch_size, len(prompts)) // parts) * parts
    completions: list[Completion] = []
    for start in range(0, len(prompts), rows):
        index = np.arange(start, start + rows, dtype=np.int32)
        real = index < len(prompts)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)
        source = np.minimum(index, len(prompts) - 1)
        batch = (tokens[source], mask[source] & real[:, None], keys)
        with jax.set_mesh(mesh) if mesh else nullcontext():
            rollout = generate(
                model,
                params,
                *jax.device_put(batch, batch_sharding(mesh) if mesh else None),
                max_new_tokens=max_new_tokens,
                eos_id=tokenizer.eos_id,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_new_tokens=min_new_tokens,
                stop_ids=stop_ids,
            )
        completions += completions_of(rollout, tokenizer, stop_ids=stop_ids)[: int(real.sum())]
    return completions


def completions_of(
    rollout: Rollout, tokenizer: Tokenizer, *, stop_ids: Sequence[int] = ()
) -> list[Completion]:
    """The responses of a rollout as Completions; `stop_ids` are those it was sampled with."""
    mask = np.asarray(rollout.response_mask)
    responses = np.asarray(rollout.tokens)[:, -mask.shape[1] :]
    ends = {tokenizer.eos_id, *stop_ids}
    completions = []
    for response, length in zip(responses, mask.sum(axis=1), strict=True):
        ids = tuple(int(token) for token in response[:length])
        ended = bool(ids) and ids[-1] in ends
        text = tokenizer.decode(list(ids[:-1] if ended else ids))
        completions.append(Completion(text=text, ended=ended, tokens=ids))
    return completions


def pad_prompts(
    prompts: Sequence[Sequence[int]],
    *,
    pad_id: int,
    width: int | None = None,
    room: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Left-pad token lists to one width: (int32[N, P], bool[N, P]).

    The default width is the longest prompt rounded up to WIDTH_STEP, but not above `room`. Raises
    ValueError for an empty prompt and for one that does not fit.
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    longest = int(lengths.max())
    if width is None:
        width = -(-longest // WIDTH_STEP) * WIDTH_STEP
        width = max(longest, min(width, room)) if room is not None else width
    if lengths.min() < 1:
        raise ValueError(f"prompt {int(lengths.argmin())} is empty: there is nothing to continue")
    if longest > width:
        raise ValueError(
            f"prompt {int(lengths.argmax())} has {longest} tokens, more than prompt_length {width}"
        )
    tokens = np.full((len(prompts), width), pad_id, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[width - len(prompt) :] = prompt
    return tokens, np.arange(width)[None, :] >= (width - lengths)[:, None]
