"""Oracles of the losses beyond the paper's three stages; see `oracles.py` for the rules."""

import math

import numpy as np

from tests.losses.oracles import (
    bounded_exp,
    clamp,
    everyone,
    log_sigmoid,
    log_softmax,
    mean,
    next_token_loss,
    pairs_of,
    ranking_loss,
    real_rows,
    token_entropy,
    token_log_probs,
    valid,
)


def by_row(function, *columns):
    return np.array([function(*map(float, row)) for row in zip(*columns, strict=True)])


# --- chunked: the whole logits, then the dense oracles --------------------------------------------


def matmul(hidden, head):
    out = np.zeros((*hidden.shape[:2], head.shape[1]))
    for b, t, v in np.ndindex(out.shape):
        out[b, t, v] = math.fsum(hidden[b, t, d] * head[d, v] for d in range(head.shape[0]))
    return out


def chunked_token_log_probs(hidden, head, tokens, *, chunk=None, **keywords):
    return token_log_probs(matmul(hidden, head), tokens, **keywords)


def chunked_next_token_loss(hidden, head, tokens, *, chunk=None, **keywords):
    return next_token_loss(matmul(hidden, head), tokens, **keywords)


def chunked_cross_entropy_sum(hidden, head, tokens, *, where, chunk=None, **keywords):
    tokens = np.where(where, tokens, 0)
    log_probs = token_log_probs(matmul(hidden, head), tokens, **keywords)
    return np.array(-math.fsum(log_probs[where]))


def chunked_token_statistics(hidden, head, tokens, *, chunk=None, temperature=1.0, vocab_size=None):
    logits = matmul(hidden, head)
    normalizer, average = np.zeros(tokens.shape), np.zeros(tokens.shape)
    for b, t, row in real_rows(logits, temperature, vocab_size):
        normalizer[b, t] = log_softmax(row)[1]
        average[b, t] = mean(row) - normalizer[b, t]
    keywords = {"temperature": temperature, "vocab_size": vocab_size}
    return (
        token_log_probs(logits, tokens, **keywords),
        token_entropy(logits, **keywords),
        normalizer,
        average,
    )


# --- reward ---------------------------------------------------------------------------------------


def plackett_luce_loss(scores, ranks, *, where=None):
    out = []
    for r, rank, present in zip(scores, ranks, everyone(scores, where), strict=True):
        total = 0.0
        for i in range(len(r)):
            if present[i]:
                worse = [j for w, j in pairs_of(rank, present) if w == i]
                pool = math.fsum(math.exp(r[j]) for j in [i, *worse])
                total -= math.log(math.exp(r[i]) / pool)
        out.append(total)
    return np.array(out)


def labeler_ranking_loss(scores, ranks, labeler_weights, *, where=None, pair_norm="valid"):
    out = []
    for b in range(len(scores)):
        total = weight = 0.0
        for j in range(ranks.shape[1]):
            mask = None if where is None else where[b, j][None]
            if mask is not None and not mask.any():
                continue
            loss = ranking_loss(scores[b][None], ranks[b, j][None], where=mask, pair_norm=pair_norm)
            total += labeler_weights[b, j] * loss[0]
            weight += labeler_weights[b, j]
        out.append(total / weight if weight else 0.0)
    return np.array(out)


def diverging_pairwise_loss(chosen, rejected, chosen_tokens, rejected_tokens, *, where):
    out = []
    for c, r, ct, rt, m in zip(
        chosen, rejected, chosen_tokens, rejected_tokens, where, strict=True
    ):
        steps = [t for t in range(len(c)) if m[t]]
        first = next((t for t in steps if ct[t] != rt[t]), None)
        after = [] if first is None else [t for t in steps if t >= first]
        out.append(mean([-log_sigmoid(c[t] - r[t]) for t in after]))
    return np.array(out)


# --- ppo, kl --------------------------------------------------------------------------------------


def best_of_n_kl(n):
    return np.array([math.log(k) - (k - 1) / k for k in n])


# --- preference -----------------------------------------------------------------------------------


def sequence_log_probs(log_probs, where, *, mean=False):
    rows = [valid(x, m) for x, m in zip(log_probs, where, strict=True)]
    return np.array([math.fsum(r) / (max(len(r), 1) if mean else 1) for r in rows])


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1, label_smoothing=0.0):
    def loss(c, r, rc, rr):
        h = beta * ((c - rc) - (r - rr))
        return -(1 - label_smoothing) * log_sigmoid(h) - label_smoothing * log_sigmoid(-h)

    return by_row(loss, chosen, rejected, ref_chosen, ref_rejected)


def robust_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1, flip_rate=0.1):
    def loss(c, r, rc, rr):
        h = beta * ((c - rc) - (r - rr))
        kept, flipped = -log_sigmoid(h), -log_sigmoid(-h)
        return ((1 - flip_rate) * kept - flip_rate * flipped) / (1 - 2 * flip_rate)

    return by_row(loss, chosen, rejected, ref_chosen, ref_rejected)


def ipo_loss(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1):
    def loss(c, r, rc, rr):
        return (((c - rc) - (r - rr)) - 1 / (2 * beta)) ** 2

    return by_row(loss, chosen, rejected, ref_chosen, ref_rejected)


def kto_reference_kl(log_probs, ref_log_probs, *, where=None):
    gaps = log_probs - ref_log_probs
    return np.float64(max(0.0, mean(valid(gaps, everyone(gaps, where)))))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def kto_loss(
    log_probs,
    ref_log_probs,
    desirable,
    kl,
    *,
    beta=0.1,
    desirable_weight=1.0,
    undesirable_weight=1.0,
):
    out = []
    for lp, ref, good in zip(log_probs, ref_log_probs, desirable, strict=True):
        if good:
            out.append(desirable_weight * (1 - sigmoid(beta * (lp - ref - kl))))
        else:
            out.append(undesirable_weight * (1 - sigmoid(beta * (kl - (lp - ref)))))
    return np.array(out)


def orpo_loss(chosen, rejected, *, weight=0.1):
    def log_odds(lp):
        return math.log(math.exp(lp) / (1 - math.exp(lp)))

    return by_row(
        lambda c, r: -c - weight * log_sigmoid(log_odds(c) - log_odds(r)), chosen, rejected
    )


def simpo_loss(chosen, rejected, *, beta=2.0, gamma=1.0):
    return by_row(lambda c, r: -log_sigmoid(beta * (c - r) - gamma), chosen, rejected)


def cpo_loss(chosen, rejected, *, beta=0.1, label_smoothing=0.0, nll_weight=1.0):
    def loss(c, r):
        h = beta * (c - r)
        preference = (1 - label_smoothing) * log_sigmoid(h) + label_smoothing * log_sigmoid(-h)
        return -preference - nll_weight * c

    return by_row(loss, chosen, rejected)


def dpo_sft_loss(
    chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, *, beta=0.1, sft_weight=1.0
):
    preference = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta)
    return preference - sft_weight * chosen / chosen_lengths


# --- group ----------------------------------------------------------------------------------------


def deviation(values):
    if len(values) < 2:
        return 0.0
    mu = mean(values)
    return math.sqrt(math.fsum((v - mu) ** 2 for v in values) / (len(values) - 1))


def grpo_advantages(rewards, *, where=None, scale="group", epsilon=1e-4):
    where = everyone(rewards, where)
    out = np.zeros(rewards.shape)
    for b, k in np.ndindex(rewards.shape):
        if where[b, k]:
            group = valid(rewards[b], where[b])
            spread = deviation(group if scale == "group" else valid(rewards, where))
            divisor = 1.0 if scale == "none" else spread + epsilon
            out[b, k] = (rewards[b, k] - mean(group)) / divisor
    return out


def rloo_advantages(rewards, *, where=None):
    where = everyone(rewards, where)
    out = np.zeros(rewards.shape)
    for b, k in np.ndindex(rewards.shape):
        others = [rewards[b, j] for j in range(rewards.shape[1]) if j != k and where[b, j]]
        if where[b, k] and others:
            out[b, k] = rewards[b, k] - mean(others)
    return out


def reinforce_plus_plus_advantages(rewards, *, where, discount=1.0):
    to_go = np.zeros(rewards.shape)
    for b in range(len(rewards)):
        steps = [t for t in range(rewards.shape[1]) if where[b, t]]
        for i, t in enumerate(steps):
            to_go[b, t] = math.fsum(discount**j * rewards[b, s] for j, s in enumerate(steps[i:]))
    values = valid(to_go, where)
    mu = mean(values)
    spread = math.sqrt(mean([(v - mu) ** 2 for v in values]) + 1e-8)
    return np.where(where, (to_go - mu) / spread, 0.0)


def critic_free_advantages(rewards, *, where, samples, estimator, scale="group", discount=1.0):
    out = np.zeros(rewards.shape)
    totals = np.array([math.fsum(valid(r, m)) for r, m in zip(rewards, where, strict=True)])
    groups, there = totals.reshape(-1, samples), where.any(1).reshape(-1, samples)
    if estimator == "reinforce++":
        shaped = rewards.copy()
        for b in range(len(rewards)):
            if samples > 1 and where[b].any():
                group = valid(groups[b // samples], there[b // samples])
                shaped[b, np.flatnonzero(where[b])[-1]] -= mean(group)
        return reinforce_plus_plus_advantages(shaped, where=where, discount=discount)
    if estimator == "rloo":
        of_responses = rloo_advantages(groups, where=there).ravel()
    else:
        of_responses = grpo_advantages(groups, where=there, scale=scale).ravel()
    for b, t in np.argwhere(where):
        out[b, t] = of_responses[b]
    return out


def reinforce_loss(log_probs, returns, baselines):
    return -(returns - baselines) * log_probs


def surrogate(log_ratio, advantage, clip, clip_high, dual_clip=None):
    ratio = bounded_exp(log_ratio)
    bounded = clamp(ratio, 1 - clip, 1 + (clip if clip_high is None else clip_high))
    objective = min(ratio * advantage, bounded * advantage)
    if dual_clip is not None and advantage < 0:
        objective = max(objective, dual_clip * advantage)
    return -objective


def grpo_loss(
    log_probs,
    old_log_probs,
    ref_log_probs,
    advantages,
    *,
    clip=0.2,
    clip_high=None,
    dual_clip=None,
    kl_coef=0.04,
):
    out = np.zeros(log_probs.shape)
    for b, t in np.ndindex(out.shape):
        lp, ref = log_probs[b, t], ref_log_probs[b, t]
        loss = surrogate(lp - old_log_probs[b, t], advantages[b], clip, clip_high, dual_clip)
        out[b, t] = loss + kl_coef * (bounded_exp(ref - lp) - 1 - (ref - lp))
    return out


def gspo_loss(log_probs, old_log_probs, advantages, *, where, clip=3e-4, clip_high=4e-4):
    out = []
    for lp, old, advantage, m in zip(log_probs, old_log_probs, advantages, where, strict=True):
        loss = surrogate(mean(valid(lp - old, m)), advantage, clip, clip_high)
        out.append(loss if m.any() else 0.0)
    return np.array(out)


# --- distillation ---------------------------------------------------------------------------------


def distributions(student_logits, teacher_logits, temperature, vocab_size):
    students = real_rows(student_logits, temperature, vocab_size)
    teachers = real_rows(teacher_logits, temperature, vocab_size)
    for (b, t, student), (_, _, teacher) in zip(students, teachers, strict=True):
        q, p = ([math.exp(v) for v in log_softmax(row)[0]] for row in (student, teacher))
        yield b, t, q, p


def kl(p, q):
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def forward_kl(student_logits, teacher_logits, *, temperature=1.0, vocab_size=None):
    out = np.zeros(student_logits.shape[:2])
    for b, t, q, p in distributions(student_logits, teacher_logits, temperature, vocab_size):
        out[b, t] = kl(p, q)
    return out


def reverse_kl(student_logits, teacher_logits, *, temperature=1.0, vocab_size=None):
    out = np.zeros(student_logits.shape[:2])
    for b, t, q, p in distributions(student_logits, teacher_logits, temperature, vocab_size):
        out[b, t] = kl(q, p)
    return out


def generalized_jsd(student_logits, teacher_logits, *, beta=0.5, temperature=1.0, vocab_size=None):
    out = np.zeros(student_logits.shape[:2])
    for b, t, q, p in distributions(student_logits, teacher_logits, temperature, vocab_size):
        mixture = [beta * x + (1 - beta) * y for x, y in zip(p, q, strict=True)]
        out[b, t] = beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)
    return out


# --- over-optimisation ----------------------------------------------------------------------------


def bend(d, kind):
    return d * d if kind == "bon" else (d * math.log(d) if d > 0 else 0.0)


def gold_score(distances, alpha, beta, *, kind):
    return np.array([alpha * d - beta * bend(d, kind) for d in distances])


def peak_distance(alpha, beta, *, kind):
    if beta <= 0:
        return np.float64(0.0 if beta == 0 and alpha <= 0 else math.inf)
    return np.float64(max(alpha / (2 * beta), 0) if kind == "bon" else math.exp(alpha / beta - 1))


def fit_gold_scores(distances, gold, *, kind, where=None):
    """The normal equations of two unknowns, by Cramer's rule."""
    where = everyone(gold, where)
    d, y = valid(distances, where), valid(gold, where)
    columns = list(zip(d, [-bend(x, kind) for x in d], y, strict=True))
    aa, ab, bb = (math.fsum(f(*c) for c in columns) for f in (
        lambda a, b, y: a * a, lambda a, b, y: a * b, lambda a, b, y: b * b
    ))  # fmt: skip
    ay, by = math.fsum(a * y for a, _, y in columns), math.fsum(b * y for _, b, y in columns)
    determinant = aa * bb - ab * ab
    alpha, beta = (ay * bb - by * ab) / determinant, (by * aa - ay * ab) / determinant
    residual = mean([(y - alpha * a - beta * b) ** 2 for a, b, y in columns])
    spread = mean([(v - mean(y)) ** 2 for v in y])
    return np.float64(alpha), np.float64(beta), np.float64(1 - residual / spread)
