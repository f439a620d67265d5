"""Oracles of policy gradients and of the preference family; see `oracles.py` for the rules."""

import math

import numpy as np

from tests.losses.oracles import bounded_exp, clamp, log_sigmoid, mean, valid
from tests.losses.oracles_direct import distributions, kl, matmul, sigmoid, surrogate


def sampler_mismatch_weights(
    log_probs, sampler_log_probs, *, where=None, level="token", outside="truncate", low=0.0,
    high=2.0,
):  # fmt: skip
    where = np.ones(log_probs.shape, bool) if where is None else where
    out = np.zeros(log_probs.shape)
    for b, t in np.argwhere(where):
        gap = log_probs[b, t] - sampler_log_probs[b, t]
        if level == "sequence":
            gap = math.fsum(valid(log_probs[b] - sampler_log_probs[b], where[b]))
        ratio = bounded_exp(gap)
        if outside == "truncate":
            out[b, t] = clamp(ratio, low, high)
        else:
            out[b, t] = ratio if low <= ratio <= high else 0.0
    return out


def gspo_token_loss(log_probs, old_log_probs, advantages, *, where, clip=3e-4, clip_high=4e-4):
    out = np.zeros(log_probs.shape)
    for b, t in np.argwhere(where):
        ratio = mean(valid(log_probs[b] - old_log_probs[b], where[b]))
        out[b, t] = surrogate(ratio, advantages[b, t], clip, clip_high)
    return out


def gspo_token_slope(log_probs, old_log_probs, advantages, *, where, clip, clip_high):
    """The ratio of the response is held constant."""
    out = np.zeros(log_probs.shape)
    for b, t in np.argwhere(where):
        ratio = math.exp(mean(valid(log_probs[b] - old_log_probs[b], where[b])))
        advantage = advantages[b, t]
        free = ratio <= 1 + clip_high if advantage > 0 else ratio >= 1 - clip
        out[b, t] = -advantage * ratio if free else 0.0
    return out


def cispo_loss(log_probs, old_log_probs, advantages, *, low=0.0, high=5.0):
    out = np.zeros(log_probs.shape)
    for i in np.ndindex(out.shape):
        weight = clamp(bounded_exp(log_probs[i] - old_log_probs[i]), low, high)
        out[i] = -weight * advantages[i] * log_probs[i]
    return out


def cispo_slope(log_probs, old_log_probs, advantages, *, low=0.0, high=5.0):
    """The weight is held constant."""
    out = np.zeros(log_probs.shape)
    for i in np.ndindex(out.shape):
        weight = clamp(bounded_exp(log_probs[i] - old_log_probs[i]), low, high)
        out[i] = -weight * advantages[i]
    return out


def sapo_loss(log_probs, old_log_probs, advantages, *, sharpness=1.0, sharpness_negative=1.05):
    out = np.zeros(log_probs.shape)
    for i in np.ndindex(out.shape):
        tau = sharpness if advantages[i] > 0 else sharpness_negative
        ratio = bounded_exp(log_probs[i] - old_log_probs[i])
        out[i] = -advantages[i] * 4 / tau / (1 + math.exp(-tau * (ratio - 1)))
    return out


# --- preference family ----------------------------------------------------------------------------


def link(u, divergence, alpha):
    """f'(u) of the f-divergence, from its generator: a difference quotient would lose digits."""
    return {
        "reverse_kl": lambda: math.log(u),
        "forward_kl": lambda: 1 - 1 / u,
        "js": lambda: math.log(2 * u / (1 + u)),
        "alpha": lambda: (1 - u ** (-alpha)) / alpha,
    }[divergence]()


def implicit_rewards(log_probs, ref_log_probs, *, beta=0.1, divergence="reverse_kl", alpha=0.5):
    ratios = np.exp(log_probs - ref_log_probs)
    return np.array([beta * link(u, divergence, alpha) for u in ratios])


def preference_form(form, c, r, *, beta, margin, epsilon, tau):
    h = c - r - margin
    if form == "logistic":
        return -(1 - epsilon) * log_sigmoid(h) - epsilon * log_sigmoid(-h)
    if form == "hinge":
        return max(0.0, 1 - h)
    if form == "square":
        return (h / beta - 1 / (2 * beta)) ** 2
    if form == "exo":
        p, q = sigmoid(h), 1 - epsilon
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    if form == "discopop":
        mix = sigmoid(h / tau)
        return (1 - mix) * math.log1p(math.exp(-h)) + mix * math.exp(-h)
    if form == "nca":
        return -math.log(sigmoid(c)) - 0.5 * (math.log(1 - sigmoid(c)) + math.log(1 - sigmoid(r)))
    if form == "sppo":
        return (c / beta - 0.5 / beta) ** 2 + (r / beta + 0.5 / beta) ** 2
    if form == "apo_zero":
        return 1 - sigmoid(c) + sigmoid(r)
    return sigmoid(c) + 1 - sigmoid(h)


def preference_loss(
    chosen, rejected, ref_chosen, ref_rejected, *, form="logistic", beta=0.1, margin=None,
    label_smoothing=None, tau=0.05, divergence="reverse_kl", alpha=0.5,
):  # fmt: skip
    weights = form if isinstance(form, dict) else {form: 1.0}
    margins = np.broadcast_to(0.0 if margin is None else margin, chosen.shape)
    pairs = (
        implicit_rewards(x, ref, beta=beta, divergence=divergence, alpha=alpha)
        for x, ref in ((chosen, ref_chosen), (rejected, ref_rejected))
    )
    out = []
    for c, r, m in zip(*pairs, margins, strict=True):
        total = 0.0
        for name, weight in weights.items():
            own = {"logistic": 0.0, "exo": 1e-3}.get(name, 0.0)
            epsilon = own if label_smoothing is None else label_smoothing
            total += weight * preference_form(
                name, c, r, beta=beta, margin=m, epsilon=epsilon, tau=tau
            )
        out.append(total)
    return np.array(out)


# --- chunked distillation: the whole logits, then the divergence ----------------------------------


def chunked_divergence(
    student_hidden, student_head, teacher_hidden, teacher_head, *, kind="forward_kl", beta=0.5,
    chunk=None, temperature=1.0, vocab_size=None, student_softcap=None, teacher_softcap=None,
    row_blocks=1,
):  # fmt: skip
    def logits(hidden, head, cap):
        z = matmul(hidden, head)
        return z if cap is None else cap * np.tanh(z / cap)

    student = logits(student_hidden, student_head, student_softcap)
    teacher = logits(teacher_hidden, teacher_head, teacher_softcap)
    out = np.zeros(student.shape[:2])
    for b, t, q, p in distributions(student, teacher, temperature, vocab_size):
        mixture = [beta * x + (1 - beta) * y for x, y in zip(p, q, strict=True)]
        out[b, t] = {
            "forward_kl": lambda p=p, q=q: kl(p, q),
            "reverse_kl": lambda p=p, q=q: kl(q, p),
            "jsd": lambda p=p, q=q, m=mixture: beta * kl(p, m) + (1 - beta) * kl(q, m),
        }[kind]()
    return out
