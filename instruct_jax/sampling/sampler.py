"""One shot: a batch of prompts in, a batch of sampled responses out, in one compiled program.

The rows start together and the program ends with the longest of them, in fewer and fewer slots
where that is asked for; `engine.Engine` gives the slots of rows that end earlier to others, over
the same loop (`slots.py`, where its rules are).

- Prompts are LEFT-padded. With n keys a prompt, each prompt is read once for its n responses.
- log_probs are those of the full softmax at the sampling temperature, log pi(y_t), *before* top-k,
  top-p, min-p or the ban on ending: what `losses.token_log_probs` computes from the same logits.
  Under truncation they are therefore not the probabilities the tokens were drawn with, and a KL
  estimate from them is biased (T8). Greedy decoding (temperature 0) reports them at temperature 1.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from instruct_jax.models.transformer import Model
from instruct_jax.sampling.choose import Sampling
from instruct_jax.sampling.slots import Slots, advance_shrinking, prefill, spread_rows
from instruct_jax.sampling.weights import decoding_weights


class Rollout(NamedTuple):
    """Prompts and the responses sampled for them; P prompt columns, then R response columns."""

    tokens: jax.Array  # int32[B, P+R], the prompt as given, PAD after the end of the response
    mask: jax.Array  # bool[B, P+R], the real tokens of both
    response_mask: jax.Array  # bool[B, R], 1 through the end token
    log_probs: jax.Array  # float32[B, R], the sampler's own, 0 outside the response


def generate(
    model: Model,
    params: Any,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    keys: jax.Array,
    *,
    max_new_tokens: int,
    eos_id: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    min_new_tokens: int = 0,
    stop_ids: Sequence[int] = (),
    stop_sequences: Sequence[Sequence[int]] = (),
    halvings: int = 0,
) -> Rollout:
    """Sample one response a key; prompts left-padded.

    int32[N, P], bool[N, P], keys[B] -> Rollout. B is a multiple of N: keys i*n to (i+1)*n, and the
    rows of the rollout, are the n samples of prompt i. Temperature 0 is greedy. Neither `eos_id`
    nor `stop_ids` can come among the first `min_new_tokens`, and no stop sequence ends a row there.
    A row whose prompt is all padding stays empty and holds nothing up. Where lengths differ much,
    `halvings` spares the turns of rows that have ended: so many times the rows that live go on in a
    batch of half the size, each of which is one more loop to compile. Every keyword is static: one
    compiled program for each set of them, each `model` and each shape. On a mesh, call it under
    `jax.set_mesh` with the rows spread over data and fsdp: the cache follows them.

    Raises ValueError for shapes, keys or settings that make no sense, before anything is compiled.
    """
    sampling = Sampling(
        stop_ids=(int(eos_id), *(int(stop) for stop in stop_ids)),
        stop_sequences=tuple(tuple(int(i) for i in sequence) for sequence in stop_sequences),
        temperature=float(temperature),
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )
    _check_arrays(prompts, prompt_mask, keys)
    check_lengths(model, prompts.shape[1], max_new_tokens, min_new_tokens)
    sampling.check_vocabulary(model.config.vocab_size)
    return _generate(
        model,
        params,
        prompts,
        prompt_mask,
        keys,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        halvings=halvings,
    )


@partial(
    jax.jit,
    static_argnames=("model", "sampling", "max_new_tokens", "min_new_tokens", "halvings"),
)
def _generate(
    model: Model,
    params: Any,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    keys: jax.Array,
    *,
    sampling: Sampling,
    max_new_tokens: int,
    min_new_tokens: int,
    halvings: int,
) -> Rollout:
    rows, width = keys.shape[0], prompts.shape[1]
    params = decoding_weights(params, dtype=model.config.dtype)
    cache = prefill(model, params, prompts, prompt_mask, columns=width - 1 + max_new_tokens)
    if samples := rows // prompts.shape[0] - 1:
        repeat = partial(jnp.repeat, repeats=samples + 1, axis=0)
        cache = jax.tree.map(lambda x: repeat(x) if x.ndim else x, cache)
        prompts, prompt_mask = repeat(prompts), repeat(prompt_mask)
    response = jnp.full((rows, max_new_tokens), model.config.pad_id, jnp.int32)
    slots = Slots(
        tokens=jnp.concatenate([prompts, response], axis=1),
        log_probs=jnp.zeros((rows, width + max_new_tokens), jnp.float32),
        keys=keys,
        length=jnp.zeros((rows,), jnp.int32),
        budget=jnp.full((rows,), max_new_tokens, jnp.int32),
        minimum=jnp.full((rows,), min_new_tokens, jnp.int32),
        live=jnp.any(prompt_mask, axis=1),
        head=jnp.int32(width - 1),
        cache=cache,
    )
    slots = advance_shrinking(model, params, spread_rows(slots), sampling, halvings=halvings)
    response_mask = jnp.arange(max_new_tokens)[None, :] < slots.length[:, None]
    return Rollout(
        tokens=slots.tokens,
        mask=jnp.concatenate([prompt_mask, response_mask], axis=1),
        response_mask=response_mask,
        log_probs=slots.log_probs[:, width:],
    )


def check_lengths(model: Model, prompt: int, max_new_tokens: int, min_new_tokens: int) -> None:
    """Raises ValueError where prompt and response do not fit the model, or each other."""
    if not 0 <= min_new_tokens <= max_new_tokens or max_new_tokens < 1:
        raise ValueError(
            f"need 0 <= min_new_tokens <= max_new_tokens and max_new_tokens >= 1, "
            f"got {min_new_tokens} and {max_new_tokens}"
        )
    if prompt + max_new_tokens > model.config.max_length:
        raise ValueError(
            f"prompt columns + max_new_tokens = {prompt + max_new_tokens} exceed the model's "
            f"max_length {model.config.max_length}"
        )


def _check_arrays(prompts: jax.Array, prompt_mask: jax.Array, keys: jax.Array) -> None:
    if prompts.ndim != 2 or prompts.shape[1] < 1 or prompts.dtype != jnp.int32:
        raise ValueError(
            f"prompts must be int32[N, P >= 1], got {prompts.dtype}{list(prompts.shape)}"
        )
    if prompt_mask.shape != prompts.shape or prompt_mask.dtype != jnp.bool_:
        raise ValueError(
            f"prompt_mask must be bool{list(prompts.shape)}, "
            f"got {prompt_mask.dtype}{list(prompt_mask.shape)}"
        )
    rows = len(prompts)
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) or (
        keys.ndim != 1 or rows == 0 or len(keys) % rows or len(keys) < rows
    ):
        raise ValueError(
            f"keys must be one jax.random.key for each response, a multiple of {rows}, "
            f"got {keys.dtype}{list(keys.shape)}"
        )
