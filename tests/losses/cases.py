"""One table of calls for the losses of the paper's stages: what the generic tests and fixtures run.

The table of the other losses is in `cases_direct.py`.
"""

from __future__ import annotations

import numpy as np

from tests.losses import oracles
from tests.losses.case import Case, Draw

B, T, V, K = 3, 6, 7, 4


def masked_cases() -> list[Case]:
    d = Draw("masked")
    x, where = d.normal(B, T), d.where(B, T)
    mask = {"differentiable": ("x",), "time": ("x", "where")}
    loss = {"differentiable": ("losses",), "time": ("losses", "where")}
    out = [
        Case("sum_and_count", oracles.sum_and_count, {"x": x}, {"where": where}, **mask),
        Case("masked_mean", oracles.masked_mean, {"x": x}, {"where": where}, **mask),
        Case("masked_whiten", oracles.masked_whiten, {"x": x}, {"where": where}, **mask),
        Case(
            "masked_whiten/keep_mean",
            oracles.masked_whiten,
            {"x": x + 2},
            {"where": where},
            {"shift_mean": False},
            **mask,
        ),
    ]
    for name in ("loss_sum_and_count", "reduce_loss"):
        for reduction in ("token_mean", "seq_mean", "seq_sum_const"):
            out.append(
                Case(
                    f"{name}/{reduction}",
                    getattr(oracles, name),
                    {"losses": x},
                    {"where": where},
                    {"reduction": reduction, "length": 8},
                    **loss,
                )
            )
    return out


def language_cases() -> list[Case]:
    d = Draw("language")
    logits, tokens, real = d.normal(B, T, V, scale=2.0), d.tokens(B, T), d.tokens(B, T, vocab=V - 2)
    text = {"logits": logits, "tokens": tokens}
    padded = {"logits": logits, "tokens": real}
    grad = {"differentiable": ("logits",)}
    smooth = {"label_smoothing": 0.1, "z_loss": 1e-2}
    return [
        Case("token_log_probs", oracles.token_log_probs, text, **grad),
        Case(
            "token_log_probs/temperature",
            oracles.token_log_probs,
            padded,
            hyper={"temperature": 0.7, "vocab_size": V - 2},
            **grad,
        ),
        Case("token_entropy", oracles.token_entropy, {"logits": logits}, **grad),
        Case(
            "token_entropy/temperature",
            oracles.token_entropy,
            {"logits": logits},
            hyper={"temperature": 0.7, "vocab_size": V - 2},
            **grad,
        ),
        Case("token_cross_entropy", oracles.token_cross_entropy, text, hyper=smooth, **grad),
        Case("next_token_loss", oracles.next_token_loss, text, **grad),
        Case(
            "next_token_loss/smooth",
            oracles.next_token_loss,
            padded,
            hyper=smooth | {"vocab_size": V - 2},
            **grad,
        ),
    ]


def reward_cases() -> list[Case]:
    d = Draw("reward")
    scores = d.normal(B, K)
    ranks = np.array([[0, 1, 2, 3], [0, 0, 1, 1], [2, 0, 1, 0]], np.int32)
    where = np.array([[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 1]], bool)
    chosen, rejected = d.normal(B), d.normal(B)
    ranking = {"scores": scores, "ranks": ranks}
    pair = {"chosen": chosen, "rejected": rejected}
    both = {"differentiable": ("chosen", "rejected")}
    grad = {"differentiable": ("scores",)}
    best = {"scores": scores, "best": np.array([0, 3, 2], np.int32)}
    return [
        Case("ranking_loss", oracles.ranking_loss, ranking, **grad),
        Case("ranking_loss/where", oracles.ranking_loss, ranking, {"where": where}, **grad),
        Case(
            "ranking_loss/comb",
            oracles.ranking_loss,
            ranking,
            {"where": where},
            {"pair_norm": "comb"},
            **grad,
        ),
        Case("pairwise_loss", oracles.pairwise_loss, pair, **both),
        Case("pairwise_loss/margin", oracles.pairwise_loss, pair, hyper={"margin": 0.5}, **both),
        Case("best_of_k_loss", oracles.best_of_k_loss, best, **grad),
        Case("best_of_k_loss/where", oracles.best_of_k_loss, best, {"where": where}, **grad),
        Case("centering_loss", oracles.centering_loss, pair, **both),
        Case("pair_counts", oracles.pair_counts, ranking, {"where": where}),
        Case("pair_counts/tied", oracles.pair_counts, ranking | {"scores": np.round(scores)}),
    ]


def ppo_cases() -> list[Case]:
    d = Draw("ppo")
    lp = d.log_probs(B, T)
    old, ref, where = d.near(lp), d.near(lp), d.where(B, T)
    adv, scores = d.normal(B, T), d.normal(B)
    values, rewards = d.normal(B, T), d.normal(B, T)
    old_values, returns = d.near(values), d.near(values, 1.0)
    ended = np.array([True, False, False])
    kl = {"log_probs": lp, "ref_log_probs": ref}
    policy = {"log_probs": lp, "old_log_probs": old, "advantages": adv}
    value = {"values": values, "old_values": old_values, "returns": returns}
    gae = {"rewards": rewards, "values": values}
    beta = {"kl_coef": np.float64(0.15), "kl": np.float64(6.6)}
    controller = {"target": 6.0, "horizon": 1e4, "batch_size": 512}
    stop = {"differentiable": ("log_probs",), "stopped": ("old_log_probs", "advantages")}
    holes = where & (np.arange(T) != 1)
    out = [
        Case(
            f"kl_estimate/{k}", oracles.kl_estimate, kl, hyper={"kind": k}, differentiable=tuple(kl)
        )
        for k in ("k1", "k2", "k3")
    ]
    out += [
        Case(
            f"missing_eos_scores/{rule}",
            oracles.missing_eos_scores,
            {"scores": scores, "has_eos": ended},
            hyper={"rule": rule, "penalty": 1.5},
        )
        for rule in ("none", "replace", "subtract")
    ]
    out += [
        Case(
            f"clipped_policy_loss/{name}",
            oracles.clipped_policy_loss,
            policy,
            hyper=hyper,
            **stop,
        )
        for name, hyper in {
            "ppo": {},
            "clip_higher": {"clip": 0.2, "clip_high": 0.28},
            "dual": {"dual_clip": 1.1},
        }.items()
    ]
    out += [
        Case("clip_scores", oracles.clip_scores, {"scores": scores}),
        Case("clip_scores/limit", oracles.clip_scores, {"scores": scores}, hyper={"limit": 0.5}),
        Case(
            "kl_shaped_rewards",
            oracles.kl_shaped_rewards,
            {"scores": scores} | kl,
            {"where": where},
            {"kl_coef": 0.05},
            differentiable=("scores", "log_probs", "ref_log_probs"),
            time=("log_probs", "ref_log_probs", "where"),
        ),
        Case("policy_clipped", oracles.policy_clipped, policy, hyper={"clip_high": 0.3}),
        Case(
            "clipped_value_loss",
            oracles.clipped_value_loss,
            value,
            differentiable=("values",),
            stopped=("old_values", "returns"),
        ),
        Case("value_clipped", oracles.value_clipped, value),
        Case(
            "explained_variance",
            oracles.explained_variance,
            {"values": values, "returns": returns},
            {"where": where},
            time=("values", "returns", "where"),
        ),
        Case("fixed_kl_update", oracles.fixed_kl_update, beta, shared=("all",)),
        Case(
            "adaptive_kl_update",
            oracles.adaptive_kl_update,
            beta,
            hyper=controller,
            shared=("all",),
        ),
    ]
    out += [
        Case(
            f"generalized_advantages/{name}",
            oracles.generalized_advantages,
            gae,
            {"where": mask},
            hyper,
            differentiable=("rewards", "values"),
            time=("rewards", "values", "where"),
        )
        for name, mask, hyper in (
            ("ragged", where, {}),
            ("holes", holes, {"discount": 0.9, "gae_lambda": 0.8}),
        )
    ]
    return out


CASES = [*masked_cases(), *language_cases(), *reward_cases(), *ppo_cases()]
