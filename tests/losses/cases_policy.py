"""The calls of policy gradients, of the preference family and of chunked distillation."""

from __future__ import annotations

from tests.losses import oracles, oracles_policy
from tests.losses.case import Case, Draw

B, T, V, D = 3, 6, 7, 5


def mismatch_cases() -> list[Case]:
    d = Draw("mismatch")
    lp = d.log_probs(B, T)
    pair = {"log_probs": lp, "sampler_log_probs": d.near(lp, 1.0)}
    mask = {"where": d.where(B, T)}
    return [
        Case(
            f"sampler_mismatch_weights/{name}",
            oracles_policy.sampler_mismatch_weights,
            pair,
            mask if name != "token_truncate" else {},
            hyper,
            stopped=tuple(pair),
        )
        for name, hyper in {
            "token_truncate": {},
            "token_mask": {"outside": "mask", "low": 0.5, "high": 1.5},
            "sequence_truncate": {"level": "sequence", "low": 0.9, "high": 1.1},
            "sequence_mask": {"level": "sequence", "outside": "mask", "high": 1.2},
        }.items()
    ]


def policy_cases() -> list[Case]:
    d = Draw("policy_gradient")
    lp = d.log_probs(B, T)
    arrays = {"log_probs": lp, "old_log_probs": d.near(lp), "advantages": d.normal(B, T)}
    stopped = ("old_log_probs", "advantages")
    common = {"differentiable": ("log_probs",), "stopped": stopped}
    time = (*arrays, "where")
    return [
        Case(
            "cispo_loss",
            oracles_policy.cispo_loss,
            arrays,
            hyper={"low": 0.8, "high": 1.2},
            slope=oracles_policy.cispo_slope,
            **common,
        ),
        Case("sapo_loss", oracles_policy.sapo_loss, arrays, **common),
        Case(
            "sapo_loss/sharp",
            oracles_policy.sapo_loss,
            arrays,
            hyper={"sharpness": 2.0, "sharpness_negative": 3.0},
            **common,
        ),
        Case(
            "gspo_token_loss",
            oracles_policy.gspo_token_loss,
            arrays,
            {"where": d.where(B, T)},
            {"clip": 0.05, "clip_high": 0.1},
            slope=oracles_policy.gspo_token_slope,
            time=time,
            **common,
        ),
    ]


def advantage_cases() -> list[Case]:
    d = Draw("advantages")
    gae = {"rewards": d.normal(B, T), "values": d.normal(B, T)}
    mask, both = {"where": d.where(B, T)}, ("rewards", "values")
    cut = mask | {"bootstrap": d.normal(B)}
    each = {"discount": d.rng.random((B, T)), "gae_lambda": d.rng.random((B, T))}
    return [
        Case(
            f"generalized_advantages/{name}",
            oracles.generalized_advantages,
            gae,
            masks,
            hyper,
            differentiable=(*both, *(n for n in masks if n != "where")),
            time=(*both, "where", *(n for n in each if n in masks)),
        )
        for name, masks, hyper in (
            ("truncated", cut, {"discount": 0.9}),
            ("discount_of_each_step", cut | each, {}),
        )
    ]


FORMS = ("logistic", "hinge", "square", "exo", "discopop", "nca", "sppo", "apo_zero", "apo_down")


def family_cases() -> list[Case]:
    d = Draw("preference_family")
    chosen, rejected = -5 - d.log_probs(B), -6 + d.log_probs(B)
    policy = {"chosen": chosen, "rejected": rejected}
    four = policy | {"ref_chosen": d.near(chosen, 2.0), "ref_rejected": d.near(rejected, 2.0)}
    single = {"log_probs": chosen, "ref_log_probs": four["ref_chosen"]}
    common = {"differentiable": tuple(policy), "stopped": ("ref_chosen", "ref_rejected")}
    calls: dict[str, tuple[dict, dict]] = {form: ({}, {"form": form}) for form in FORMS}
    calls |= {
        "smoothed_exo": ({}, {"form": "exo", "label_smoothing": 0.1}),
        "weighted": ({}, {"form": {"logistic": 0.8, "hinge": 0.3, "nca": 0.1}, "beta": 0.3}),
        "offset": ({"margin": d.normal(B)}, {"form": "hinge"}),
        "js": ({}, {"divergence": "js"}),
        "forward_kl": ({}, {"divergence": "forward_kl", "form": "square"}),
        "alpha": ({}, {"divergence": "alpha", "alpha": 0.3, "form": "apo_zero"}),
    }
    out = [
        Case(
            f"preference_loss/{name}", oracles_policy.preference_loss, four, masks, hyper, **common
        )
        for name, (masks, hyper) in calls.items()
    ]
    for divergence in ("reverse_kl", "forward_kl", "js", "alpha"):
        out.append(
            Case(
                f"implicit_rewards/{divergence}",
                oracles_policy.implicit_rewards,
                single,
                hyper={"divergence": divergence, "alpha": 0.7},
                differentiable=("log_probs",),
                stopped=("ref_log_probs",),
            )
        )
    return out


def distillation_cases() -> list[Case]:
    d = Draw("chunked_distillation")
    arrays = {
        "student_hidden": d.normal(B, T, D),
        "student_head": d.normal(D, V),
        "teacher_hidden": d.normal(B, T, D - 2),
        "teacher_head": d.normal(D - 2, V),
    }
    shared = ("student_head", "teacher_head")
    common = {
        "differentiable": ("student_hidden", "student_head"),
        "stopped": ("teacher_hidden", "teacher_head"),
        "shared": shared,
    }
    hot = {"chunk": 4, "temperature": 0.7, "vocab_size": V - 2, "student_softcap": 3.0}
    return [
        Case(f"chunked_divergence/{kind}", oracles_policy.chunked_divergence, arrays,
             hyper=hyper | {"kind": kind}, **common)
        for kind, hyper in (
            ("forward_kl", hot), ("reverse_kl", {"chunk": 5}), ("jsd", {"beta": 0.3}),
        )
    ]  # fmt: skip


CASES = [
    *mismatch_cases(),
    *policy_cases(),
    *advantage_cases(),
    *family_cases(),
    *distillation_cases(),
]
