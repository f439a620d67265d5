"""Losses of reinforcement learning from human feedback: pure functions on jax and chex alone.

Arrays are positional, hyper-parameters keyword-only. Nothing is reduced unless the name says so;
`where` is a boolean mask. Nothing shifts by one except `next_token_loss`. Checks are on rank,
shape and dtype, and run at trace time.
"""

from instruct_jax.losses.language import (
    next_token_loss,
    token_cross_entropy,
    token_entropy,
    token_log_probs,
)
from instruct_jax.losses.masked import (
    loss_sum_and_count,
    masked_mean,
    masked_whiten,
    reduce_loss,
    sum_and_count,
)
from instruct_jax.losses.ppo import (
    adaptive_kl_update,
    clip_scores,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    fixed_kl_update,
    generalized_advantages,
    kl_estimate,
    kl_shaped_rewards,
    missing_eos_scores,
    policy_clipped,
    value_clipped,
)
from instruct_jax.losses.reward import (
    PairCounts,
    best_of_k_loss,
    centering_loss,
    pair_counts,
    pairwise_loss,
    ranking_loss,
)

__all__ = [
    "PairCounts",
    "adaptive_kl_update",
    "best_of_k_loss",
    "centering_loss",
    "clip_scores",
    "clipped_policy_loss",
    "clipped_value_loss",
    "explained_variance",
    "fixed_kl_update",
    "generalized_advantages",
    "kl_estimate",
    "kl_shaped_rewards",
    "loss_sum_and_count",
    "masked_mean",
    "masked_whiten",
    "missing_eos_scores",
    "next_token_loss",
    "pair_counts",
    "pairwise_loss",
    "policy_clipped",
    "ranking_loss",
    "reduce_loss",
    "sum_and_count",
    "token_cross_entropy",
    "token_entropy",
    "token_log_probs",
    "value_clipped",
]
