"""What every loss should return, in float64 NumPy with plain loops.

Written from the papers' formulas and not from the jax code: one entry at a time, `math.exp` and
`math.log`, no masks by multiplication, no scans. Slow, and readable next to the paper.
"""

import math

import numpy as np

LIMIT = 20.0  # the documented clamp of a log-ratio before exp


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def bounded_exp(x):
    return math.exp(min(max(x, -LIMIT), LIMIT))


def clamp(x, low, high):
    return min(max(x, low), high)


def each(function, *arrays):
    """Applies a scalar function entry by entry."""
    out = np.zeros(np.shape(arrays[0]))
    for index in np.ndindex(out.shape):
        out[index] = function(*(float(a[index]) for a in arrays))
    return out


# --- masked ---------------------------------------------------------------------------------------


def valid(x, where):
    return [float(x[i]) for i in np.ndindex(x.shape) if where[i]]


def mean(values):
    return math.fsum(values) / len(values) if values else 0.0


def sum_and_count(x, where):
    values = valid(x, where)
    return np.float64(math.fsum(values)), np.float64(len(values))


def masked_mean(x, where):
    return np.float64(mean(valid(x, where)))


def masked_whiten(x, where, *, shift_mean=True):
    values = valid(x, where)
    mu = mean(values)
    deviation = math.sqrt(mean([(v - mu) ** 2 for v in values]) + 1e-8)
    keep = 0.0 if shift_mean else mu
    out = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        if where[i]:
            out[i] = (x[i] - mu) / deviation + keep
    return out


def loss_sum_and_count(losses, where, *, reduction="token_mean", length=None):
    rows = [valid(x, m) for x, m in zip(losses, where, strict=True)]
    rows = [row for row in rows if row]
    if reduction == "token_mean":
        return np.float64(sum(sum(r) for r in rows)), np.float64(sum(len(r) for r in rows))
    if reduction == "seq_mean":
        return np.float64(sum(mean(r) for r in rows)), np.float64(len(rows))
    length = losses.shape[1] if length is None else length
    return np.float64(sum(sum(r) / length for r in rows)), np.float64(len(rows))


def reduce_loss(losses, where, *, reduction="token_mean", length=None):
    total, count = loss_sum_and_count(losses, where=where, reduction=reduction, length=length)
    return np.float64(total / count if count else 0.0)


# --- language -------------------------------------------------------------------------------------


def log_softmax(row):
    top = max(row)
    normalizer = top + math.log(math.fsum(math.exp(v - top) for v in row))
    return [v - normalizer for v in row], normalizer


def real_rows(logits, temperature=1.0, vocab_size=None):
    for b, t in np.ndindex(logits.shape[:2]):
        yield b, t, [float(v) / temperature for v in logits[b, t, :vocab_size]]


def token_log_probs(logits, tokens, *, temperature=1.0, vocab_size=None):
    out = np.zeros(tokens.shape)
    for b, t, row in real_rows(logits, temperature, vocab_size):
        out[b, t] = log_softmax(row)[0][tokens[b, t]]
    return out


def token_entropy(logits, *, temperature=1.0, vocab_size=None):
    out = np.zeros(logits.shape[:2])
    for b, t, row in real_rows(logits, temperature, vocab_size):
        log_p, _ = log_softmax(row)
        out[b, t] = -math.fsum(math.exp(v) * v for v in log_p)
    return out


def token_cross_entropy(logits, tokens, *, label_smoothing=0.0, z_loss=0.0, vocab_size=None):
    out = np.zeros(tokens.shape)
    for b, t, row in real_rows(logits, 1.0, vocab_size):
        log_p, normalizer = log_softmax(row)
        target = (1 - label_smoothing) * log_p[tokens[b, t]] + label_smoothing * mean(log_p)
        out[b, t] = -target + z_loss * normalizer**2
    return out


def next_token_loss(logits, tokens, **keywords):
    batch, length = tokens.shape
    out = np.zeros((batch, length - 1))
    for t in range(length - 1):
        here, following = logits[:, t : t + 1], tokens[:, t + 1 : t + 2]
        out[:, t] = token_cross_entropy(here, following, **keywords)[:, 0]
    return out


# --- reward ---------------------------------------------------------------------------------------


def pairs_of(ranks, present):
    """Ordered pairs (winner, loser) of one prompt."""
    k = len(ranks)
    return [
        (i, j)
        for i in range(k)
        for j in range(k)
        if present[i] and present[j] and ranks[i] < ranks[j]
    ]


def everyone(scores, where):
    return np.ones(scores.shape, bool) if where is None else where


def ranking_loss(scores, ranks, *, where=None, pair_norm="valid"):
    out = []
    for r, rank, present in zip(scores, ranks, everyone(scores, where), strict=True):
        pairs = pairs_of(rank, present)
        total = math.fsum(-log_sigmoid(r[i] - r[j]) for i, j in pairs)
        norm = len(pairs) if pair_norm == "valid" else math.comb(int(sum(present)), 2)
        out.append(total / norm if norm else 0.0)
    return np.array(out)


def pairwise_loss(chosen, rejected, *, margin=0.0):
    margin = np.broadcast_to(margin, chosen.shape)
    return each(lambda c, r, m: -log_sigmoid(c - r - m), chosen, rejected, margin)


def best_of_k_loss(scores, best, *, where=None):
    out = []
    for r, pick, present in zip(scores, best, everyone(scores, where), strict=True):
        scores_there = [float(v) for v, p in zip(r, present, strict=True) if p]
        out.append(log_softmax(scores_there)[1] - r[pick] if scores_there else 0.0)
    return np.array(out)


def centering_loss(chosen, rejected):
    return each(lambda c, r: (c + r) ** 2, chosen, rejected)


def pair_counts(scores, ranks, *, where=None):
    rows = []
    for r, rank, present in zip(scores, ranks, everyone(scores, where), strict=True):
        pairs = pairs_of(rank, present)
        right = sum(1 for i, j in pairs if r[i] > r[j])
        equal = sum(1 for i, j in pairs if r[i] == r[j])
        rows.append((right, equal, len(pairs)))
    return tuple(np.array(rows, np.float64).T)


# --- ppo ------------------------------------------------------------------------------------------


def kl_estimate(log_probs, ref_log_probs, *, kind="k1"):
    formula = {
        "k1": lambda d: d,
        "k2": lambda d: d * d / 2,
        "k3": lambda d: math.exp(-max(d, -LIMIT)) - 1 + max(d, -LIMIT),
    }[kind]
    return each(lambda lp, ref: formula(lp - ref), log_probs, ref_log_probs)


def missing_eos_scores(scores, has_eos, *, rule="none", penalty=1.0):
    changed = {
        "none": lambda s: s,
        "replace": lambda s: -penalty,
        "subtract": lambda s: s - penalty,
    }
    return np.array([s if e else changed[rule](s) for s, e in zip(scores, has_eos, strict=True)])


def clip_scores(scores, *, limit=None):
    return each(lambda s: s if limit is None else clamp(s, -limit, limit), scores)


def kl_shaped_rewards(scores, log_probs, ref_log_probs, *, where, kl_coef):
    out = np.zeros(log_probs.shape)
    for b in range(len(scores)):
        steps = [t for t in range(log_probs.shape[1]) if where[b, t]]
        for t in steps:
            out[b, t] = -kl_coef * (log_probs[b, t] - ref_log_probs[b, t])
        if steps:
            out[b, steps[-1]] += scores[b]
    return out


def generalized_advantages(
    rewards, values, *, where, bootstrap=None, discount=1.0, gae_lambda=0.95
):
    """The sum of eq. 16, term by term, over the valid steps: no recursion."""
    discount, gae_lambda = (np.broadcast_to(x, rewards.shape) for x in (discount, gae_lambda))
    advantages, returns = np.zeros(rewards.shape), np.zeros(rewards.shape)
    for b in range(rewards.shape[0]):
        steps = [t for t in range(rewards.shape[1]) if where[b, t]]
        value = [*(float(values[b, t]) for t in steps), 0.0 if bootstrap is None else bootstrap[b]]
        delta = [
            rewards[b, t] + discount[b, t] * value[i + 1] - value[i] for i, t in enumerate(steps)
        ]
        decay = [discount[b, t] * gae_lambda[b, t] for t in steps]
        for i, t in enumerate(steps):
            advantages[b, t] = math.fsum(
                math.prod(decay[i:j]) * delta[j] for j in range(i, len(steps))
            )
            returns[b, t] = advantages[b, t] + value[i]
    return advantages, returns


def clipped_policy_loss(
    log_probs, old_log_probs, advantages, *, clip=0.2, clip_high=None, dual_clip=None
):
    def loss(lp, old, advantage):
        ratio = bounded_exp(lp - old)
        bounded = clamp(ratio, 1 - clip, 1 + (clip if clip_high is None else clip_high))
        objective = min(advantage * ratio, advantage * bounded)
        if dual_clip is not None and advantage < 0:
            objective = max(objective, dual_clip * advantage)
        return -objective

    return each(loss, log_probs, old_log_probs, advantages)


def policy_clipped(log_probs, old_log_probs, advantages, *, clip=0.2, clip_high=None):
    def flag(lp, old, advantage):
        ratio = bounded_exp(lp - old)
        above = ratio > 1 + (clip if clip_high is None else clip_high) and advantage > 0
        below = ratio < 1 - clip and advantage < 0
        return float(above or below)

    return each(flag, log_probs, old_log_probs, advantages)


def clipped_value_loss(values, old_values, returns, *, clip=0.2):
    def loss(v, old, g):
        return 0.5 * max((v - g) ** 2, (clamp(v, old - clip, old + clip) - g) ** 2)

    return each(loss, values, old_values, returns)


def value_clipped(values, old_values, returns, *, clip=0.2):
    def flag(v, old, g):
        return float(abs(clamp(v, old - clip, old + clip) - g) > abs(v - g))

    return each(flag, values, old_values, returns)


def explained_variance(values, returns, *, where):
    v, g = valid(values, where), valid(returns, where)

    def variance(x):
        return mean([(e - mean(x)) ** 2 for e in x])

    residual = variance([b - a for a, b in zip(v, g, strict=True)])
    return np.float64(1 - residual / variance(g) if variance(g) else 0.0)


def fixed_kl_update(kl_coef, kl, **_):
    return np.float64(kl_coef)


def adaptive_kl_update(kl_coef, kl, *, target, horizon, batch_size):
    return np.float64(kl_coef * (1 + clamp(kl / target - 1, -0.2, 0.2) * batch_size / horizon))
