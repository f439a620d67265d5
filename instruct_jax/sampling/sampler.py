"""Generation: a batch of prompts in, a batch of sampled responses out, in one compiled loop.

Each turn of the loop feeds the last token of every row to the cached model and draws the next one:

    logits_t, cache = decode(y_{t-1}, cache)        y_t ~ softmax(logits_t / temperature)

- Prompts are LEFT-padded, so that all rows write their token t in the same column (PPO-4).
- A row ends with its first end or stop token, which counts (response_mask 1); all that follows is
  PAD (T11). A row that uses up its budget keeps its last token as sampled (T15). End tokens inside
  a prompt stop nothing.
- Token t of a row is drawn with fold_in(row key, t): a sample depends on its key and its prompt,
  not on the rows beside it, the batch size or the padding (JAX-1).
- The loop leaves as soon as every row has ended (JAX-2).
- log_probs are those of the full softmax at the sampling temperature, log pi(y_t), *before* top-k,
  top-p or the ban on ending: what `losses.token_log_probs` computes from the same logits. Under
  truncation they are therefore not the probabilities the tokens were drawn with, and a KL estimate
  from them is biased (T8). Greedy decoding (temperature 0) reports them at temperature 1.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from instruct_jax.models.transformer import Model, init_cache, unstack_layers
from instruct_jax.sampling.choose import EXCLUDED, draw, truncate


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
    min_new_tokens: int = 0,
    stop_ids: Sequence[int] = (),
) -> Rollout:
    """Sample one response a row; one typed key a row, prompts left-padded.

    int32[B, P], bool[B, P], keys[B] -> Rollout. Temperature 0 is greedy. Neither `eos_id` nor
    `stop_ids` can come among the first `min_new_tokens`. A row whose prompt is all padding stays
    empty and holds nothing up. Every keyword is static: one compiled program for each set of them,
    each `model` and each shape. On a mesh, call it under `jax.set_mesh` with the rows spread over
    data and fsdp: the cache follows them.

    Raises ValueError for shapes, keys or settings that make no sense, before anything is compiled.
    """
    stop_ids = (int(eos_id), *(int(stop) for stop in stop_ids))
    _check_arrays(prompts, prompt_mask, keys)
    _check_settings(
        model, prompts.shape[1] + max_new_tokens, max_new_tokens, min_new_tokens, stop_ids
    )
    _check_distribution(temperature, top_k, top_p)
    return _generate(
        model,
        params,
        prompts,
        prompt_mask,
        keys,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        temperature=float(temperature),
        top_k=top_k,
        top_p=top_p,
        min_new_tokens=min_new_tokens,
    )


class _Loop(NamedTuple):
    step: jax.Array  # int32[], t: the index of the token drawn next
    token: jax.Array  # int32[B], the token fed next
    live: jax.Array  # bool[B], rows that have not ended
    feed: jax.Array  # bool[B], rows whose fed token is real
    lengths: jax.Array  # int32[B]
    responses: jax.Array  # int32[B, R]
    log_probs: jax.Array  # float32[B, R]
    cache: Any


@partial(
    jax.jit,
    static_argnames=(
        "model",
        "max_new_tokens",
        "stop_ids",
        "temperature",
        "top_k",
        "top_p",
        "min_new_tokens",
    ),
)
def _generate(
    model: Model,
    params: Any,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    keys: jax.Array,
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_new_tokens: int,
) -> Rollout:
    rows, prompt_length = prompts.shape
    pad_id = model.config.pad_id
    params = unstack_layers(params, dtype=model.config.dtype)
    # Everything but the last prompt token is prefilled, and its logits are never read, so XLA
    # drops that vocabulary projection; the last token is the first one the loop feeds.
    cache = init_cache(model.config, rows, prompt_length - 1 + max_new_tokens)
    if prompt_length > 1:
        _, cache = model.decode(params, prompts[:, :-1], cache, mask=prompt_mask[:, :-1])

    def choose(logits: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        scaled = logits.astype(jnp.float32) / (temperature or 1.0)
        allowed = scaled
        if min_new_tokens:
            ends = jnp.isin(jnp.arange(logits.shape[-1]), jnp.array(stop_ids))
            allowed = jnp.where((step < min_new_tokens) & ends[None, :], EXCLUDED, allowed)
        if temperature:
            step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
            token = draw(step_keys, truncate(allowed, top_k=top_k, top_p=top_p))
        else:
            token = jnp.argmax(allowed, axis=-1).astype(jnp.int32)
        chosen = jnp.take_along_axis(scaled, token[:, None], axis=-1)[:, 0]
        return token, chosen - jax.nn.logsumexp(scaled, axis=-1)

    def body(loop: _Loop) -> _Loop:
        logits, cache = model.decode(
            params, loop.token[:, None], loop.cache, mask=loop.feed[:, None]
        )
        token, log_prob = choose(logits[:, 0], loop.step)
        token = jnp.where(loop.live, token, pad_id)
        log_prob = jnp.where(loop.live, log_prob, 0.0)
        write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=loop.step, axis=1)
        return _Loop(
            step=loop.step + 1,
            token=token,
            live=loop.live & ~jnp.isin(token, jnp.array(stop_ids)),
            feed=loop.live,
            lengths=loop.lengths + loop.live.astype(jnp.int32),
            responses=write(loop.responses, token[:, None]),
            log_probs=write(loop.log_probs, log_prob[:, None]),
            cache=cache,
        )

    end = jax.lax.while_loop(
        lambda loop: (loop.step < max_new_tokens) & jnp.any(loop.live),
        body,
        _Loop(
            step=jnp.zeros((), jnp.int32),
            token=prompts[:, -1],
            live=jnp.any(prompt_mask, axis=1),
            feed=prompt_mask[:, -1],
            lengths=jnp.zeros((rows,), jnp.int32),
            responses=jnp.full((rows, max_new_tokens), pad_id, jnp.int32),
            log_probs=jnp.zeros((rows, max_new_tokens), jnp.float32),
            cache=cache,
        ),
    )
    response_mask = jnp.arange(max_new_tokens)[None, :] < end.lengths[:, None]
    return Rollout(
        tokens=jnp.concatenate([prompts, end.responses], axis=1),
        mask=jnp.concatenate([prompt_mask, response_mask], axis=1),
        response_mask=response_mask,
        log_probs=end.log_probs,
    )


def _check_arrays(prompts: jax.Array, prompt_mask: jax.Array, keys: jax.Array) -> None:
    if prompts.ndim != 2 or prompts.shape[1] < 1 or prompts.dtype != jnp.int32:
        raise ValueError(
            f"prompts must be int32[B, P >= 1], got {prompts.dtype}{list(prompts.shape)}"
        )
    if prompt_mask.shape != prompts.shape or prompt_mask.dtype != jnp.bool_:
        raise ValueError(
            f"prompt_mask must be bool{list(prompts.shape)}, "
            f"got {prompt_mask.dtype}{list(prompt_mask.shape)}"
        )
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) or keys.shape != prompts.shape[:1]:
        raise ValueError(
            f"keys must be one jax.random.key a row, shape {list(prompts.shape[:1])}, "
            f"got {keys.dtype}{list(keys.shape)}"
        )


def _check_settings(
    model: Model, length: int, max_new_tokens: int, min_new_tokens: int, stop_ids: tuple[int, ...]
) -> None:
    if not 0 <= min_new_tokens <= max_new_tokens or max_new_tokens < 1:
        raise ValueError(
            f"need 0 <= min_new_tokens <= max_new_tokens and max_new_tokens >= 1, "
            f"got {min_new_tokens} and {max_new_tokens}"
        )
    if length > model.config.max_length:
        raise ValueError(
            f"prompt columns + max_new_tokens = {length} exceed the model's "
            f"max_length {model.config.max_length}"
        )
    vocab_size = model.config.vocab_size
    for stop in stop_ids:
        if not 0 <= stop < vocab_size:
            raise ValueError(f"end token {stop} is outside the vocabulary of {vocab_size}")


def _check_distribution(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if temperature < 0:
        raise ValueError(f"temperature must be >= 0 (0 is greedy), got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be >= 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
