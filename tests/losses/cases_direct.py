"""The calls of the losses beyond the paper's three stages; see `cases.py`."""

from __future__ import annotations

import numpy as np

from tests.losses import oracles_direct as oracles
from tests.losses.case import Case, Draw

B, T, V, K, D = 3, 6, 7, 4, 5


def chunked_cases() -> list[Case]:
    d = Draw("chunked")
    hidden, head = d.normal(B, T, D), d.normal(D, V)
    full = {"hidden": hidden, "head": head, "tokens": d.tokens(B, T)}
    real = full | {"tokens": d.tokens(B, T, vocab=V - 2)}
    common = {"differentiable": ("hidden", "head"), "shared": ("head",)}
    hot = {"chunk": 4, "temperature": 0.7, "vocab_size": V - 2}
    smooth = {"chunk": 4, "label_smoothing": 0.1, "z_loss": 1e-2, "vocab_size": V - 2}
    return [
        Case(f"chunked_token_log_probs/{name}", oracles.chunked_token_log_probs, arrays,
             hyper=hyper, **common)
        for name, arrays, hyper in (
            ("even", full, {"chunk": 2}), ("ragged", real, hot), ("whole", full, {"chunk": 99})
        )
    ] + [
        Case("chunked_token_statistics", oracles.chunked_token_statistics, real, hyper=hot,
             **common),
        Case("chunked_cross_entropy_sum", oracles.chunked_cross_entropy_sum, real,
             {"where": d.rng.random((B, T)) < 0.5}, {"chunk": 4, "vocab_size": V - 2}, **common),
        Case("chunked_next_token_loss", oracles.chunked_next_token_loss, full, hyper={"chunk": 2},
             **common),
        Case("chunked_next_token_loss/smooth", oracles.chunked_next_token_loss, real, hyper=smooth,
             **common),
    ]  # fmt: skip


def reward_cases() -> list[Case]:
    d = Draw("reward_direct")
    scores = d.normal(B, K)
    ranks = np.array([[3, 1, 2, 0], [0, 0, 1, 1], [2, 0, 1, 0]], np.int32)
    where = np.array([[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 1]], bool)
    labelers = d.rng.permuted(np.tile(np.arange(K, dtype=np.int32), (B, 2, 1)), axis=2)
    trust = np.array([[1.0, 2.0], [0.5, 0.0], [0.3, 0.3]])
    tokens = d.tokens(B, T)
    others = tokens.copy()
    others[0, 2:], others[1, 4] = tokens[0, 2:] + 1, tokens[1, 4] + 1
    pair = {"chosen": d.normal(B, T), "rejected": d.normal(B, T)}
    text = {"chosen_tokens": tokens, "rejected_tokens": others}
    grad = {"differentiable": ("scores",)}
    ranking = {"scores": scores, "ranks": ranks}
    return [
        Case("plackett_luce_loss", oracles.plackett_luce_loss, ranking, **grad),
        Case("plackett_luce_loss/where", oracles.plackett_luce_loss, ranking, {"where": where},
             **grad),
        Case(
            "labeler_ranking_loss",
            oracles.labeler_ranking_loss,
            {"scores": scores, "ranks": labelers, "labeler_weights": trust},
            {"where": np.stack([where, where & (np.arange(K) != 3)], 1)},
            **grad,
        ),
        Case(
            "diverging_pairwise_loss",
            oracles.diverging_pairwise_loss,
            pair | text,
            {"where": d.where(B, T)},
            differentiable=tuple(pair),
            time=(*pair, *text, "where"),
        ),
    ]  # fmt: skip


def kl_cases() -> list[Case]:
    n = {"n": np.array([1, 4, 16], np.int32)}
    return [Case("best_of_n_kl", oracles.best_of_n_kl, n)]


def preference_cases() -> list[Case]:
    d = Draw("preference")
    chosen, rejected = -5 - d.log_probs(B), -6 + d.log_probs(B)
    policy = {"chosen": chosen, "rejected": rejected}
    four = policy | {"ref_chosen": d.near(chosen, 2.0), "ref_rejected": d.near(rejected, 2.0)}
    refs = ("ref_chosen", "ref_rejected")
    with_ref = {"differentiable": tuple(policy), "stopped": refs}
    means = {"chosen": d.log_probs(B), "rejected": d.log_probs(B)}
    no_ref = {"differentiable": tuple(policy)}
    single = {"log_probs": chosen, "ref_log_probs": four["ref_chosen"]}
    kto = single | {"desirable": np.array([True, False, True]), "kl": np.float64(0.4)}
    tokens, where = {"log_probs": d.log_probs(B, T)}, {"where": d.where(B, T)}
    lengths = {"chosen_lengths": np.array([3, 7, 1], np.int32)}
    smooth = {"label_smoothing": 0.1}
    out = [
        Case(f"sequence_log_probs/{name}", oracles.sequence_log_probs, tokens, where,
             {"mean": mean}, differentiable=("log_probs",), time=("log_probs", "where"))
        for name, mean in (("sum", False), ("mean", True))
    ] + [
        Case("kto_reference_kl", oracles.kto_reference_kl,
             single | {"log_probs": four["ref_chosen"] + 1.0, "ref_log_probs": chosen},
             {"where": np.array([True, True, False])}, stopped=tuple(single)),
        Case("kto_loss", oracles.kto_loss, kto, shared=("kl",), differentiable=("log_probs",),
             hyper={"desirable_weight": 1.2, "undesirable_weight": 0.9},
             stopped=("ref_log_probs", "kl")),
        Case("dpo_sft_loss", oracles.dpo_sft_loss, four | lengths, **with_ref),
        Case("orpo_loss", oracles.orpo_loss, means, hyper={"weight": 0.3}, **no_ref),
        Case("simpo_loss", oracles.simpo_loss, means, hyper={"gamma": 0.5}, **no_ref),
        Case("cpo_loss", oracles.cpo_loss, policy, hyper=smooth, **no_ref),
    ]  # fmt: skip
    for name, hyper in {
        "dpo_loss": {},
        "dpo_loss/conservative": smooth,
        "robust_dpo_loss": {"flip_rate": 0.2},
        "ipo_loss": {"beta": 0.2},
    }.items():
        out.append(Case(name, getattr(oracles, name.split("/")[0]), four, hyper=hyper, **with_ref))
    return out


def group_cases() -> list[Case]:
    d = Draw("group")
    rewards, lp = d.normal(B, K), d.log_probs(B, T)
    where = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [0, 1, 0, 0]], bool)
    old, ref, adv = d.near(lp), d.near(lp), {"advantages": d.normal(B)}
    policy = {"log_probs": lp, "old_log_probs": old}
    with_ref = policy | {"ref_log_probs": ref} | adv
    token_where = d.where(B, T)
    group = {"rewards": rewards}
    grad = {"differentiable": ("rewards",)}
    lp_only = {"differentiable": ("log_probs",)}
    returns = {"returns": d.normal(B, T), "baselines": d.normal(B, T)}
    out = [
        Case(f"grpo_advantages/{scale}", oracles.grpo_advantages, group, hyper={"scale": scale},
             **grad)
        for scale in ("group", "batch", "none")
    ] + [
        Case("grpo_advantages/where", oracles.grpo_advantages, group, {"where": where}),
        Case("rloo_advantages", oracles.rloo_advantages, group, **grad),
        Case("rloo_advantages/where", oracles.rloo_advantages, group, {"where": where}, **grad),
        Case("reinforce_plus_plus_advantages", oracles.reinforce_plus_plus_advantages,
             {"rewards": d.normal(B, T)}, {"where": token_where}, {"discount": 0.9},
             time=("rewards", "where"), **grad),
        Case("reinforce_loss", oracles.reinforce_loss, {"log_probs": lp} | returns,
             stopped=tuple(returns), **lp_only),
        Case("gspo_loss", oracles.gspo_loss, policy | adv, {"where": token_where},
             {"clip": 0.05, "clip_high": 0.1}, stopped=("old_log_probs", "advantages"),
             time=(*policy, "where"), **lp_only),
    ]  # fmt: skip
    shaped, six = {"rewards": d.normal(6, T)}, d.where(6, T)
    six[4] = False
    for estimator in ("rloo", "grpo", "reinforce++"):
        out.append(
            Case(f"critic_free_advantages/{estimator}", oracles.critic_free_advantages, shaped,
                 {"where": six}, {"samples": 3, "estimator": estimator}, time=("rewards", "where"),
                 **grad)
        )  # fmt: skip
    for name, hyper in {
        "grpo": {},
        "dapo": {"clip_high": 0.28, "kl_coef": 0.0},
        "dual": {"dual_clip": 1.1},
    }.items():
        stopped = ("old_log_probs", "ref_log_probs", "advantages")
        out.append(
            Case(f"grpo_loss/{name}", oracles.grpo_loss, with_ref, hyper=hyper, stopped=stopped,
                 **lp_only)
        )  # fmt: skip
    return out


def distillation_cases() -> list[Case]:
    d = Draw("distillation")
    logits = {"student_logits": d.normal(B, T, V), "teacher_logits": d.normal(B, T, V)}
    common = {"differentiable": ("student_logits",), "stopped": ("teacher_logits",)}
    hot = {"temperature": 0.7, "vocab_size": V - 2}
    return [
        Case("forward_kl", oracles.forward_kl, logits, hyper=hot, **common),
        Case("reverse_kl", oracles.reverse_kl, logits, hyper=hot, **common),
        Case("generalized_jsd", oracles.generalized_jsd, logits, hyper={"beta": 0.3}, **common),
    ]


def overoptimization_cases() -> list[Case]:
    d = Draw("overoptimization")
    distances = np.linspace(0.0, 6.0, 12)
    curve = {"alpha": np.float64(1.2), "beta": np.float64(0.4)}
    points = {"distances": distances}
    out = []
    for kind in ("bon", "rl"):
        gold = oracles.gold_score(distances, 1.2, 0.4, kind=kind) + d.normal(12, scale=0.05)
        keep = {"where": np.arange(12) != 7}
        out += [
            Case(f"gold_score/{kind}", oracles.gold_score, points | curve, hyper={"kind": kind},
                 shared=tuple(curve), differentiable=tuple(curve)),
            Case(f"peak_distance/{kind}", oracles.peak_distance, curve, hyper={"kind": kind},
                 shared=("all",), differentiable=tuple(curve)),
            Case(f"peak_distance/{kind}_falling", oracles.peak_distance,
                 curve | {"alpha": np.float64(-0.3)}, hyper={"kind": kind}, shared=("all",),
                 differentiable=tuple(curve)),
            Case(f"fit_gold_scores/{kind}", oracles.fit_gold_scores, points | {"gold": gold}, keep,
                 {"kind": kind}, differentiable=("gold",)),
        ]  # fmt: skip
    return out


CASES = [
    *chunked_cases(),
    *reward_cases(),
    *kl_cases(),
    *preference_cases(),
    *group_cases(),
    *distillation_cases(),
    *overoptimization_cases(),
]
