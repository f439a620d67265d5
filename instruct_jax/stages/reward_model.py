"""Stage 2: the reward model, trained on K-wise rankings (M2).

One prompt with its K ranked completions is one element of the batch (RM-2): a tree, whose branches
the completions are, so that the prompt is read once, and several trees in a row, so that little is
padding (`data/trees.py`). All pairs are in one gradient step, and every prompt has equal weight
(RM-1):

    loss(x) = -(1/|S|) sum_{(w,l) in S} log sigmoid(r(x, y_w) - r(x, y_l)),  S = pairs without ties

The loss does not see a shift of r, so training ends by moving the head's bias until the labelers'
demonstrations score 0 on average (RM-4). The bias is a parameter like any other: it is in the
checkpoint, and the value model, which starts as a copy of the reward model, starts with it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from instruct_jax.data.loader import Arrays
from instruct_jax.data.ragged import Rows
from instruct_jax.data.rows import PromptText
from instruct_jax.data.shares import Shares
from instruct_jax.data.templates import encode_texts
from instruct_jax.data.tokenizer import Tokenizer
from instruct_jax.data.trees import TreeBatches
from instruct_jax.errors import ConfigError
from instruct_jax.losses import pair_counts, ranking_loss, sum_and_count
from instruct_jax.models.sharding import WHOLE, constrain
from instruct_jax.models.transformer import Model, final_scores, scalar_model
from instruct_jax.sampling.complete import Completion
from instruct_jax.settings import setting
from instruct_jax.stages.rankings import TREE, by_prompt, refuse_labels, tree_batches
from instruct_jax.stages.stage import (
    FitConfig,
    OnBest,
    fit,
    in_batches,
    steps_of,
    trained_form,
)
from instruct_jax.stages.trained import TrainedModel
from instruct_jax.training.state import LossFn, TrainState

PairNorm = Literal["comb", "valid"]
Normalisation = Literal["demo_mean", "policy_meanstd", "none"]


@dataclass(frozen=True)
class RewardModelConfig(FitConfig):
    """RM-3: one epoch, 64 prompts a batch, cosine to 10 %; a second epoch overfits."""

    epochs: float = 1.0
    batch_size: int = 64
    learning_rate: float = 9e-6
    completions: int = setting(9, "ranked answers of a prompt, at most", low=2)
    prompt_length: int = setting(1024, "tokens of the longest prompt", low=1, unit="tokens")
    response_length: int = setting(
        1024, "tokens of a response, its stop token included", low=1, unit="tokens"
    )
    pair_norm: PairNorm = setting(
        "valid",
        "what a prompt's loss is divided by: its pairs without a tie, or all",
        needs="completions>2",
    )
    normalisation: Normalisation = setting(
        "demo_mean", "how the score is shifted: to mean 0 on demonstrations, on samples, or not"
    )


def sequence_scores(
    model: Model, params: Any, tokens: jax.Array, mask: jax.Array, *, key: jax.Array | None = None
) -> jax.Array:
    """Reward of whole sequences: the head's output at the last real token (MODEL-4).

    tokens int32[..., T] and mask bool[..., T] -> float32[...]. Left and right padding score alike.
    """
    flat = tokens.reshape(-1, tokens.shape[-1]), mask.reshape(-1, tokens.shape[-1])
    outputs = model.apply(params, flat[0], mask=flat[1], dropout_key=key)
    return final_scores(outputs, flat[1]).reshape(tokens.shape[:-1])


def branch_scores(
    model: Model, params: Any, batch: dict[str, jax.Array], *, key: jax.Array | None = None
) -> jax.Array:
    """Rewards of the branches of `pack_trees`, float32[B, K]; meaningless where none is there.

    The same as `sequence_scores` of prompt and completion, each alone.
    """
    rows = {name: batch[name] for name in TREE}
    outputs = model.apply(params, batch["tokens"], **rows, dropout_key=key)
    # A prompt and its tree may lie on different devices: all get the scores, one number a token.
    return constrain(outputs, WHOLE, WHOLE).reshape(-1)[batch["ends"]]


def reward_loss(model: Model, *, pair_norm: PairNorm = "valid", dropout: bool = False) -> LossFn:
    """K-wise ranking loss over a batch of `pack_trees`: tokens int32[R, W] ..., ranks int32[B, K].

    The count is the number of prompts with at least one pair that is not a tie, so that a prompt
    whose labeler saw only ties weighs nothing.
    """

    def loss(
        params: Any, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        ranks, where = batch["ranks"], batch["where"]
        scores = branch_scores(model, params, batch, key=key if dropout else None)
        losses = ranking_loss(scores, ranks, where=where, pair_norm=pair_norm)
        pairs = pair_counts(scores, ranks, where=where)
        count = (pairs.total > 0).sum(dtype=jnp.float32)
        metrics = {
            "accuracy": (pairs.correct.sum(), pairs.total.sum()),
            "score": sum_and_count(scores, where=where),
        }
        return losses.sum(), count, metrics

    return loss


def score_rows(
    model: Model, params: Any, tokens: Rows, mask: Rows, *, batch_size: int = 64
) -> np.ndarray:
    """Scores float32[N] or [N, K] of encoded rows int32[N, (K,) T], in batches of `batch_size`
    rows.
    """
    return in_batches(partial(_row_scores, model, params), batch_size, tokens, mask)


def score_comparisons(
    model: Model,
    params: Any,
    comparisons: Arrays,
    *,
    batch_size: int = 64,
) -> np.ndarray:
    """Scores float32[N, K] of encoded comparisons, in batches of `batch_size` prompts; those of
    completions that are not there mean nothing.
    """
    batches = TreeBatches(comparisons, batch_size, pad_id=model.config.pad_id)
    return by_prompt(batches, partial(_tree_scores, model, params))


# One program for all calls of a model: validation scores it again and again.
_row_scores = jax.jit(sequence_scores, static_argnames="model")
_tree_scores = jax.jit(branch_scores, static_argnames="model")


def score_answers(
    reward: TrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[PromptText],
    answers: Sequence[Completion],
    *,
    prompt_length: int,
    response_length: int,
) -> np.ndarray:
    """Scores float32[N] of what was sampled, each answer to its prompt.

    The tokens are read as they were drawn with `tokenizer`, as in PPO: an answer that ran out of
    budget has no EOS. A reward model of another tokenizer reads the text in its own, with its EOS
    where the answer ended. Of a longer answer the first `response_length` tokens are read. Raises
    ValueError where a prompt does not fit, since its score would be missing.
    """
    own = reward.tokenizer
    responses: list[Sequence[int]] = [answer.tokens for answer in answers]
    if tokenizer.fingerprint != own.fingerprint:
        texts = own.encode_batch([answer.text for answer in answers])
        ended = [[own.eos_id] * answer.ended for answer in answers]
        responses = [[*text, *end] for text, end in zip(texts, ended, strict=True)]
    tokens = np.full((len(answers), prompt_length + response_length), own.pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    pairs = zip(encode_texts(prompts, own), responses, strict=True)
    for i, (prompt, response) in enumerate(pairs):
        if len(prompt) > prompt_length:
            raise ValueError(f"a prompt has more than prompt_length {prompt_length} tokens")
        row = [*prompt, *response[:response_length]]
        tokens[i, : len(row)], mask[i, : len(row)] = row, True
    return score_rows(reward.model, reward.params, tokens, mask)


def normalise(model: Model, params: Any, rows: Arrays, *, kind: Normalisation) -> Any:
    """The same reward model with its scores on `rows` (tokens int32[N, T], mask) normalised.

    "demo_mean" (RM-4, the paper): rows are demonstrations, r <- r - mean(r). "policy_meanstd" (the
    2019 recipe): rows are samples of the pretrained policy, r <- (r - mean(r)) / sd(r). Both are
    affine, so they are folded into the head. "none" returns `params`.
    """
    if kind == "none":
        return params
    scores = score_rows(model, params, rows["tokens"], rows["mask"]).astype(np.float64)
    gain = 1.0 / scores.std() if kind == "policy_meanstd" else 1.0
    return affine_scores(params, gain=gain, shift=-gain * scores.mean())


def affine_scores(params: Any, *, gain: float = 1.0, shift: float = 0.0) -> Any:
    """The same reward model with every score r replaced by gain * r + shift."""
    head = params["head"]
    head = {
        "kernel": head["kernel"] * jnp.float32(gain),
        "bias": head["bias"] * jnp.float32(gain) + jnp.float32(shift),
    }
    return {**params, "head": head}


def train(
    config: RewardModelConfig,
    model: Model,
    params: Any,
    comparisons: Arrays,
    *,
    standard: Arrays | None,
    shares: Shares | None = None,
    mesh: Mesh,
    workdir: Path,
    evaluate: Callable[[int, TrainState], dict[str, float]] | None = None,
    on_best: OnBest | None = None,
) -> Any:
    """Trains a scalar model on encoded comparisons and sets its zero point; returns the parameters.

    `comparisons`: tokens int32[N, K, T], mask, ranks int32[N, K] (0 is best), where bool[N, K],
    prompt_lengths int32[N], as `encode_comparisons` makes them; `shares` says of which source each
    is, where sources have weights.
    `standard` (tokens int32[N, T], mask) are the rows that fix the scale of the score, see
    `normalise`; they may be None only when `config.normalisation` is "none". Resumes from
    `workdir/checkpoints` when there is one.
    """
    refuse_labels(comparisons, "a reward model")
    if standard is None and config.normalisation != "none":
        raise ConfigError(f"normalisation {config.normalisation!r} needs rows; none were given")
    steps = steps_of(config.epochs, len(comparisons["tokens"]), config.batch_size)
    rows = {"pad_id": model.config.pad_id, "steps": steps, "shares": shares}
    batches = tree_batches(config, comparisons, mesh=mesh, **rows)
    zero = partial(normalise, model, rows=standard or {}, kind=config.normalisation)
    params = fit(
        config,
        reward_loss(
            trained_form(scalar_model, model, config),
            pair_norm=config.pair_norm,
            dropout=config.residual_dropout > 0,
        ),
        params,
        batches,
        steps=steps,
        mesh=mesh,
        workdir=workdir,
        name="reward_model",
        evaluate=evaluate,
        on_best=None if on_best is None else lambda best, params: on_best(best, zero(params)),
    )
    return zero(params)
