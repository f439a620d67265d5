"""Losses of reinforcement learning from human feedback: pure functions on jax and chex alone.

Arrays are positional, hyper-parameters keyword-only. Nothing is reduced unless the name says so;
`where` is a boolean mask. Nothing shifts by one except `next_token_loss` and
`chunked_next_token_loss`. Checks are on rank, shape and dtype, and run at trace time.
"""

from instruct_jax.losses.chunked import (
    CrossEntropySum,
    TokenStatistics,
    chunked_cross_entropy_sum,
    chunked_next_token_loss,
    chunked_token_log_probs,
    chunked_token_statistics,
)
from instruct_jax.losses.chunked_distillation import (
    chunked_divergence,
)
from instruct_jax.losses.distillation import (
    forward_kl,
    generalized_jsd,
    reverse_kl,
)
from instruct_jax.losses.group import (
    critic_free_advantages,
    grpo_advantages,
    reinforce_plus_plus_advantages,
    rloo_advantages,
)
from instruct_jax.losses.kl import (
    adaptive_kl_update,
    best_of_n_kl,
    fixed_kl_update,
    kl_estimate,
)
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
from instruct_jax.losses.mismatch import (
    sampler_mismatch_weights,
)
from instruct_jax.losses.overoptimization import (
    GoldFit,
    fit_gold_scores,
    gold_score,
    peak_distance,
)
from instruct_jax.losses.policy_gradient import (
    cispo_loss,
    grpo_loss,
    gspo_loss,
    gspo_token_loss,
    reinforce_loss,
    sapo_loss,
)
from instruct_jax.losses.ppo import (
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    policy_clipped,
    value_clipped,
)
from instruct_jax.losses.preference import (
    dpo_loss,
    dpo_sft_loss,
    ipo_loss,
    kto_loss,
    kto_reference_kl,
    robust_dpo_loss,
    sequence_log_probs,
)
from instruct_jax.losses.preference_family import (
    implicit_rewards,
    preference_loss,
)
from instruct_jax.losses.reference_free import (
    cpo_loss,
    orpo_loss,
    simpo_loss,
)
from instruct_jax.losses.reward import (
    PairCounts,
    best_of_k_loss,
    centering_loss,
    diverging_pairwise_loss,
    labeler_ranking_loss,
    pair_counts,
    pairwise_loss,
    plackett_luce_loss,
    ranking_loss,
)
from instruct_jax.losses.shaping import (
    clip_scores,
    generalized_advantages,
    kl_shaped_rewards,
    missing_eos_scores,
)

__all__ = [
    "CrossEntropySum",
    "GoldFit",
    "PairCounts",
    "TokenStatistics",
    "adaptive_kl_update",
    "best_of_k_loss",
    "best_of_n_kl",
    "centering_loss",
    "chunked_cross_entropy_sum",
    "chunked_divergence",
    "chunked_next_token_loss",
    "chunked_token_log_probs",
    "chunked_token_statistics",
    "cispo_loss",
    "clip_scores",
    "clipped_policy_loss",
    "clipped_value_loss",
    "cpo_loss",
    "critic_free_advantages",
    "diverging_pairwise_loss",
    "dpo_loss",
    "dpo_sft_loss",
    "explained_variance",
    "fit_gold_scores",
    "fixed_kl_update",
    "forward_kl",
    "generalized_advantages",
    "generalized_jsd",
    "gold_score",
    "grpo_advantages",
    "grpo_loss",
    "gspo_loss",
    "gspo_token_loss",
    "implicit_rewards",
    "ipo_loss",
    "kl_estimate",
    "kl_shaped_rewards",
    "kto_loss",
    "kto_reference_kl",
    "labeler_ranking_loss",
    "loss_sum_and_count",
    "masked_mean",
    "masked_whiten",
    "missing_eos_scores",
    "next_token_loss",
    "orpo_loss",
    "pair_counts",
    "pairwise_loss",
    "peak_distance",
    "plackett_luce_loss",
    "policy_clipped",
    "preference_loss",
    "ranking_loss",
    "reduce_loss",
    "reinforce_loss",
    "reinforce_plus_plus_advantages",
    "reverse_kl",
    "rloo_advantages",
    "robust_dpo_loss",
    "sampler_mismatch_weights",
    "sapo_loss",
    "sequence_log_probs",
    "simpo_loss",
    "sum_and_count",
    "token_cross_entropy",
    "token_entropy",
    "token_log_probs",
    "value_clipped",
]
