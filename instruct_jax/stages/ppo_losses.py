"""The three losses of an update: policy, clipped value, pretraining mix (PPO-10, 11, 13).

Each is a `LossFn`: a sum and its count, so that micro-batches and devices change nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp

from instruct_jax.losses import (
    cispo_loss,
    clipped_policy_loss,
    clipped_value_loss,
    kl_estimate,
    loss_sum_and_count,
    masked_mean,
    policy_clipped,
    sapo_loss,
    sequence_log_probs,
    sum_and_count,
    value_clipped,
)
from instruct_jax.models.transformer import Model, response_values
from instruct_jax.stages.experience import Experience, response_scores
from instruct_jax.stages.ppo_config import OF_RESPONSES, PPOConfig
from instruct_jax.stages.pretrain import language_loss
from instruct_jax.training.state import LossFn


def policy_loss(config: PPOConfig, policy: Model) -> LossFn:
    """The policy loss of one minibatch of `Experience`, as a sum and its count: PPO-10, or what
    `policy_loss` puts in the place of its clip.

    The log-probs are those of the tempered distribution that sampled, so that the ratio starts at
    1. Reductions: "token_mean" weighs tokens alike (long answers weigh more), "seq_mean" answers
    alike (tokens of long answers weigh less), "seq_sum_const" sums tokens and divides by the
    response budget (tokens alike, and no answer's length changes another's weight). With a ratio of
    whole responses there is one loss a response and their mean is taken.
    """

    def loss(
        params: Any, batch: Experience, key: jax.Array
    ) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        del key  # No dropout: the ratio must be 1 where the policy has not moved.
        where = batch.where
        rows = batch.tokens, batch.mask, where
        scores = response_scores(policy, params, *rows, temperature=config.temperature)
        log_probs = scores.log_probs
        new, old, advantages, of = _ratio_terms(config, log_probs, batch)
        losses, bounded = _surrogate(config, new, old, advantages, of)
        if batch.weights is not None:
            losses *= batch.weights if losses.shape == where.shape else batch.weights[:, :1]
        if config.kl_loss_coef:
            k3 = kl_estimate(log_probs, batch.ref_log_probs, where=where, kind="k3")
            losses += config.kl_loss_coef * k3
        total, count = loss_sum_and_count(
            losses,
            where=of,
            reduction=config.loss_reduction,
            length=1 if config.ratio in OF_RESPONSES else config.response_length,
        )
        metrics = _ratio_sums(new - old, of)
        if bounded is not None:
            metrics["clip_fraction"] = sum_and_count(bounded, where=of)
        return total, count, metrics

    return loss


def _surrogate(
    config: PPOConfig, new: jax.Array, old: jax.Array, advantages: jax.Array, of: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """The loss of whatever has a ratio, and where that is bounded; None where nothing is."""
    if config.policy_loss == "cispo":
        low, high = config.cispo_low, config.cispo_high
        ratio = jnp.exp(new - old)
        losses = cispo_loss(new, old, advantages, where=of, low=low, high=high)
        return losses, ((ratio < low) | (ratio > high)).astype(jnp.float32)
    if config.policy_loss == "sapo":
        taus = {
            "sharpness": config.sapo_sharpness,
            "sharpness_negative": config.sapo_sharpness_negative,
        }
        return sapo_loss(new, old, advantages, where=of, **taus), None
    bounds = {"clip": config.clip, "clip_high": config.clip_high}
    losses = clipped_policy_loss(
        new, old, advantages, where=of, dual_clip=config.dual_clip, **bounds
    )
    return losses, policy_clipped(new, old, advantages, **bounds)


def _ratio_sums(log_ratio: jax.Array, of: jax.Array) -> dict[str, Any]:
    """Of rho - 1, not of rho: at the paper's learning rates its variance is 1e-12, and a difference
    of two sums near 1 is rounding. `ratio_logs` makes of it what is logged.
    """
    excess = jnp.expm1(log_ratio)
    return {
        "ratio_excess": sum_and_count(excess, where=of),
        "ratio_excess_square": sum_and_count(jnp.square(excess), where=of),
        "ratio_error": sum_and_count(jnp.abs(excess), where=of),
        "ratio_max": jnp.where(of, 1.0 + excess, -jnp.inf).max(),
        "ratio_min_negated": jnp.where(of, -1.0 - excess, -jnp.inf).max(),
        "approx_kl": sum_and_count(0.5 * jnp.square(log_ratio), where=of),
    }


def ratio_logs(history: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Mean, variance, bounds and first error of the ratio over the minibatches of an iteration,
    from the metrics of `policy_loss`, float32[updates] each.
    """
    excess = history["ratio_excess"].mean()
    return {
        "ratio": 1.0 + excess,
        "ratio_var": history["ratio_excess_square"].mean() - jnp.square(excess),
        "ratio_max": history["ratio_max"].max(),
        "ratio_min": -history["ratio_min_negated"].max(),
        # Where the policy has not moved yet the ratio is 1; a drift here is a bug or a precision
        # loss (T1), or the updates that a lagging rollout has not seen.
        "ratio_error": history["ratio_error"][0],
    }


def _ratio_terms(
    config: PPOConfig, log_probs: jax.Array, batch: Experience
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """New and old log-probs, advantages and mask of whatever has a ratio of its own.

    Tokens, all float32[B, R]; or responses, float32[B, 1], with the sum of their tokens' log-probs
    (RLOO) or the mean (GSPO's geometric mean of ratios). A response has at least one token, and all
    its tokens have the same advantage. "sequence_mean_token" is `gspo_token_loss`: each token has
    its response's ratio, of the mean, and a gradient of its own.
    """
    where = batch.where
    if config.ratio in OF_RESPONSES:
        mean = config.ratio == "sequence_mean"
        new, old = (
            sequence_log_probs(x, where=where, mean=mean)[:, None]
            for x in (log_probs, batch.log_probs)
        )
        return new, old, batch.advantages[:, :1], where.any(axis=1, keepdims=True)
    old = batch.log_probs
    if config.ratio == "sequence_mean_token":
        of_response = masked_mean(log_probs - old, where=where, axis=1)[:, None]
        old = jax.lax.stop_gradient(log_probs - of_response)
    return log_probs, old, batch.advantages, where


def value_loss(config: PPOConfig, scalar: Model) -> LossFn:
    """The clipped value loss (PPO-11) of one minibatch of `Experience`, as a sum and its token
    count.
    """

    def loss(
        params: Any, batch: Experience, key: jax.Array
    ) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        del key
        where, length = batch.where, batch.where.shape[1]
        values = scalar.apply(params, batch.tokens, mask=batch.mask)
        values = response_values(values, prompt_length=batch.tokens.shape[1] - length)
        values = jnp.where(where, values, 0.0)
        assert batch.values is not None, "no value model, no value loss"
        assert batch.returns is not None, "no value model, no value loss"
        bound = {"where": where, "clip": config.value_clip}
        losses = clipped_value_loss(values, batch.values, batch.returns, **bound)
        clipped = value_clipped(values, batch.values, batch.returns, **bound)
        total, count = sum_and_count(losses, where=where)
        return total, count, {"value_clip_fraction": sum_and_count(clipped, where=where)}

    return loss


def ptx_loss(config: PPOConfig, policy: Model) -> LossFn:
    """Pretraining loss of PPO-13: a mean over tokens, or the mean over rows of their summed
    loss.
    """
    token_loss = language_loss(policy, accuracy=False)

    def loss(
        params: Any, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        total, count, _ = token_loss(params, batch, key)
        metrics = {"pretrain_nll": (total, count)}
        if config.ptx_reduction == "seq_sum_mean":
            count = jnp.float32(batch["tokens"].shape[0])
        return total, count, metrics

    return loss
