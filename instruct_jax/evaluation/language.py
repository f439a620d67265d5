"""Held-out loss and few-shot tasks of a language model: what alignment may cost (EVAL-8..10).

- Held-out loss is the mean negative log-likelihood of the target tokens. Sums and counts go over
  all rows before the one division, so batches and padding cannot change it (JAX-4).
- A task with choices is answered by the best *average* log-prob per token at temperature 1 (the
  paper prints "lowest", which its own HellaSwag result rules out); any other task by greedy
  decoding, cut at the first newline (EVAL-8).
- The tax is what alignment loses against the pretrained model; ptx recovers a share of it:

      recovery = (PPO-ptx - PPO) / (GPT - PPO)
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from instruct_jax.data.ragged import Rows
from instruct_jax.data.tokenizer import Tokenizer
from instruct_jax.errors import UserError
from instruct_jax.evaluation.intervals import Interval, bootstrap_mean
from instruct_jax.models.transformer import Model
from instruct_jax.sampling.complete import WIDTH_STEP, complete
from instruct_jax.sampling.scores import token_scores
from instruct_jax.training.hosts import fetch, spread
from instruct_jax.training.mesh import BATCH_AXES, axes_size, batch_sharding


class Question(NamedTuple):
    """One item of a task; `prompt + answer` is the text of a solved one, as in few-shot."""

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()  # answers to choose from, the right one among them


def held_out_loss(
    model: Model,
    params: Any,
    tokens: Rows,
    mask: Rows | None = None,
    loss_mask: Rows | None = None,
    *,
    batch_size: int = 32,
    mesh: Mesh | None = None,
) -> float:
    """Mean negative log-likelihood in nats of the target tokens of int32[N, T].

    `mask` bool[N, T] marks the real tokens (default: all), `loss_mask` the targets (default: the
    real tokens; the first token of a row is never one). Raises ValueError when there is no target.
    """
    sums, counts = target_log_probs(
        model, params, tokens, mask, loss_mask, batch_size=batch_size, mesh=mesh
    )
    if counts.sum() == 0:
        raise ValueError("no target token: there is nothing to average")
    return float(-sums.sum() / counts.sum())


def target_log_probs(
    model: Model,
    params: Any,
    tokens: Rows,
    mask: Rows | None = None,
    loss_mask: Rows | None = None,
    *,
    batch_size: int = 32,
    mesh: Mesh | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of log-probs of the targets of each row, float64[N], and their number, int64[N].

    Arguments as in `held_out_loss`; with a `mesh`, where `params` must live, the rows of a batch
    are spread over it.
    """
    if not len(tokens):
        raise UserError("no row is held out; raise data.valid_fraction, or give more data")
    parts = axes_size(mesh, BATCH_AXES) if mesh else 1
    rows = -(-min(batch_size, len(tokens)) // parts) * parts
    sums, counts = [], []
    with jax.set_mesh(mesh) if mesh else nullcontext():
        for batch in _batches(rows, tokens, mask, loss_mask):
            counts.append(batch[2][:, 1:].sum(axis=1))
            placed = spread(batch, batch_sharding(mesh)) if mesh else batch
            sums.append(fetch(_log_prob_sums(model, params, *placed)))
    return (
        np.concatenate(sums)[: len(tokens)].astype(np.float64),
        np.concatenate(counts)[: len(tokens)],
    )


@partial(jax.jit, static_argnames="model")
def _log_prob_sums(
    model: Model, params: Any, tokens: jax.Array, mask: jax.Array, loss_mask: jax.Array
) -> jax.Array:
    hidden = model.hidden(params, tokens, mask=mask)[:, :-1]
    targets = loss_mask[:, 1:]
    scores = token_scores(model, params, hidden, tokens[:, 1:], where=targets)
    return jnp.sum(scores.log_probs, axis=1)


def _batches(
    rows: int, tokens: Rows, mask: Rows | None, loss_mask: Rows | None
) -> Iterator[tuple[np.ndarray, ...]]:
    """Tokens, mask and targets, `rows` rows at a time; the last ones are filled up with zeros,
    which mask themselves.
    """
    for start in range(0, len(tokens), rows):
        here = slice(start, start + rows)
        ids = tokens[here]
        real = np.ones(ids.shape, bool) if mask is None else mask[here]
        targets = real if loss_mask is None else loss_mask[here] & real
        missing = rows - len(ids)
        yield tuple(np.pad(part, ((0, missing), (0, 0))) for part in (ids, real, targets))


def continuation_log_probs(
    model: Model,
    params: Any,
    tokenizer: Tokenizer,
    texts: Sequence[tuple[str, str]],
    *,
    batch_size: int = 32,
    mesh: Mesh | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Log-prob of each continuation given its prompt, float64[N], and its tokens, int64[N].

    Prompt and continuation are tokenised apart. Raises ValueError for an empty side and for a text
    that is longer than the model.
    """
    prompts = tokenizer.encode_batch([prompt for prompt, _ in texts])
    continuations = tokenizer.encode_batch([continuation for _, continuation in texts])
    lengths = np.array([len(p) + len(c) for p, c in zip(prompts, continuations, strict=True)])
    if not all(prompts) or not all(continuations):
        raise ValueError("a prompt or a continuation is empty")
    if lengths.max() > model.config.max_length:
        raise ValueError(
            f"text {int(lengths.argmax())} has {lengths.max()} tokens, over the model's "
            f"max_length {model.config.max_length}"
        )
    width = min(-(-lengths.max() // WIDTH_STEP) * WIDTH_STEP, model.config.max_length)
    tokens = np.full((len(texts), width), tokenizer.pad_id, np.int32)
    for row, prompt, continuation in zip(tokens, prompts, continuations, strict=True):
        row[: len(prompt) + len(continuation)] = [*prompt, *continuation]
    columns = np.arange(width)[None, :]
    mask = columns < lengths[:, None]
    targets = mask & (columns >= np.array([len(p) for p in prompts])[:, None])
    return target_log_probs(model, params, tokens, mask, targets, batch_size=batch_size, mesh=mesh)


def few_shot(
    questions: Sequence[Question],
    examples: Sequence[Question],
    *,
    shots: int,
    seed: int = 0,
    separator: str = "\n\n",
) -> list[Question]:
    """Put `shots` solved examples, in the questions' own format, before each question.

    The examples are drawn once per question from (seed, index), never the question itself. Raises
    ValueError when there are too few.
    """
    out = []
    for i, question in enumerate(questions):
        pool = [example for example in examples if example.prompt != question.prompt]
        if len(pool) < shots:
            raise ValueError(f"{shots} shots from {len(pool)} examples")
        chosen = np.random.default_rng([seed, i]).permutation(len(pool))[:shots]
        solved = [pool[j].prompt + pool[j].answer for j in chosen]
        out.append(question._replace(prompt=separator.join([*solved, question.prompt])))
    return out


def task_accuracy(
    model: Model,
    params: Any,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    max_new_tokens: int = 16,
    batch_size: int = 32,
    mesh: Mesh | None = None,
) -> Interval:
    """Share of questions answered right, with its interval: by choice where all have choices."""
    if all(question.choices for question in questions):
        picks = choose(model, params, tokenizer, questions, batch_size=batch_size, mesh=mesh)
        right = [q.choices[pick] == q.answer for q, pick in zip(questions, picks, strict=True)]
    else:
        answers = greedy_answers(
            model,
            params,
            tokenizer,
            [question.prompt for question in questions],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            mesh=mesh,
        )
        right = [answer == q.answer.strip() for q, answer in zip(questions, answers, strict=True)]
    return bootstrap_mean(np.array(right, np.float64))


def choose(
    model: Model,
    params: Any,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    batch_size: int = 32,
    mesh: Mesh | None = None,
) -> list[int]:
    """Index of the choice with the best average log-prob per token, for each question."""
    texts = [(q.prompt, choice) for q in questions for choice in q.choices]
    sums, counts = continuation_log_probs(
        model, params, tokenizer, texts, batch_size=batch_size, mesh=mesh
    )
    ends = np.cumsum([len(q.choices) for q in questions])[:-1]
    return [int(part.argmax()) for part in np.split(sums / counts, ends)]


def greedy_answers(
    model: Model,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    mesh: Mesh | None = None,
) -> list[str]:
    """Greedy continuations, cut at the first newline and stripped (EVAL-8)."""
    newline = tokenizer.encode("\n")
    completions = complete(
        model,
        params,
        tokenizer,
        prompts,
        key=jax.random.key(0),  # unused: greedy decoding draws nothing
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        temperature=0.0,
        stop_ids=newline if len(newline) == 1 else (),
        mesh=mesh,
    )
    return [completion.text.split("\n")[0].strip() for completion in completions]


def ptx_recovery(gpt: float, ppo: float, ppo_ptx: float) -> float:
    """Share of PPO's regression that PPO-ptx undoes (EVAL-10); NaN where PPO did not regress."""
    return (ppo_ptx - ppo) / (gpt - ppo) if gpt != ppo else float("nan")
