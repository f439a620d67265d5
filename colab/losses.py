# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The losses, one by one
#
# `instruct_jax.losses` needs jax and chex, and nothing else of this project. Every function is
# pure: arrays are positional, hyper-parameters keyword-only, and nothing is reduced unless the
# name says so. This notebook draws each loss with its gradient, shows what the chunked head saves
# and what the estimators of KL do as losses, walks through advantages on examples that fit on the
# screen, and ends with complete training steps: by hand, in Flax Linen, Flax NNX and Equinox.
#
# About a minute on two CPU cores.

# %%
import importlib.util
import subprocess
import sys
from pathlib import Path

# The folder of a checkout of the project. In Colab: clone or upload it, and name its folder here.
REPOSITORY = "." if Path("pyproject.toml").is_file() else ".."

if importlib.util.find_spec("instruct_jax") is None:
    folder = Path(REPOSITORY).resolve()
    if not (folder / "pyproject.toml").is_file():
        raise SystemExit(f"{folder} is no checkout of the project: set REPOSITORY to one")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", str(folder)], check=True)

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

from instruct_jax import losses

plt.rcParams |= {
    "figure.constrained_layout.use": True,
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


# %% [markdown]
# A loss is unreduced, so one call gives a whole curve, and the gradient of its sum gives the slope
# at every point of the curve. Above each loss, below it its gradient.


# %%
def draw(axes, title, xlabel, x, curves, *, mark=None):
    """A loss above, its gradient below: functions float[N] -> float[N]."""
    above, below = axes
    for color, (label, function) in zip(("C0", "C3", "C2"), curves.items(), strict=False):
        slope = jax.grad(lambda x, function=function: function(x).sum())(x)
        above.plot(x, function(x), color=color, label=label)
        below.plot(x, slope, color=color)
    for ax in axes:
        ax.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        if mark is not None:
            ax.axvline(mark, color="0.8", linewidth=0.8, zorder=0)
    above.set_title(title)
    above.tick_params(labelbottom=False)
    below.set_xlabel(xlabel)
    if any(curves):
        above.legend(handlelength=1)


def grid(rows, columns):
    """Pairs of axes, row by row: a tall one for a loss and a low one for its gradient."""
    _, axes = plt.subplots(2 * rows, columns, figsize=(10, 3.2 * rows), height_ratios=(3, 2) * rows)
    for row, name in zip(axes, ("loss", "gradient") * rows, strict=True):
        row[0].set_ylabel(name)
    return [pair for i in range(rows) for pair in zip(*axes[2 * i : 2 * i + 2], strict=True)]


# %% [markdown]
# ## Rankings and scores
#
# The reward model of the paper ranks K answers to a prompt at once (`ranking_loss`, eq. 1): all
# pairs of a prompt are one example. The other forms: pairs with a margin, the best of K, the
# likelihood of the whole order (Plackett-Luce), and a regulariser that keeps scores near zero.

# %%
margin = jnp.linspace(-6.0, 6.0, 201)
zero = jnp.zeros_like(margin)
others = jnp.broadcast_to(jnp.array([1.0, 0.0, -1.0]), (margin.size, 3))
order = jnp.broadcast_to(jnp.arange(4), (margin.size, 4))
best = jnp.zeros(margin.shape, jnp.int32)


def raised(loss, label):
    """Four answers: the score of the best one moves, the others stand at 1, 0 and -1."""
    return lambda x: loss(jnp.concatenate([x[:, None], others], axis=1), label)


axes = grid(1, 4)
draw(
    axes[0],
    "pairwise_loss",
    "chosen - rejected",
    margin,
    {
        "margin 0": lambda x: losses.pairwise_loss(x, zero),
        "margin 2": lambda x: losses.pairwise_loss(x, zero, margin=2.0),
    },
)
draw(
    axes[1],
    "ranking_loss, K = 4",
    "score of the best answer",
    margin,
    {"all pairs": raised(losses.ranking_loss, order)},
    mark=1.0,
)
draw(
    axes[2],
    "the same answers, other losses",
    "score of the best answer",
    margin,
    {
        "best_of_k_loss": raised(losses.best_of_k_loss, best),
        "plackett_luce_loss": raised(losses.plackett_luce_loss, order),
    },
    mark=1.0,
)
draw(
    axes[3],
    "centering_loss",
    "chosen + rejected",
    margin,
    {"": lambda x: losses.centering_loss(x, zero)},
)
plt.show()

# %% [markdown]
# Two answers that tie say nothing, and an answer that only fills the batch is not there. Labelers
# who disagree are weighed before, not after, the mean (`labeler_ranking_loss`).

# %%
scores = jnp.array([[2.0, 1.0, 0.0, 9.0], [2.0, 1.0, 0.0, 9.0]])
ranks = jnp.array([[0, 1, 2, 3], [0, 0, 1, 3]])
where = jnp.array([[True, True, True, False]] * 2)
print("losses", losses.ranking_loss(scores, ranks, where=where))
for name, values in losses.pair_counts(scores, ranks, where=where)._asdict().items():
    print(f"{name:10}", values)

# %% [markdown]
# ## Direct preference losses
#
# A policy from comparisons, without a reward model. Written with
# $h = \log\frac{\pi(y_c)}{\pi_{ref}(y_c)} - \log\frac{\pi(y_r)}{\pi_{ref}(y_r)}$, of the chosen and
# the rejected answer. What to look for: DPO never stops pushing; cDPO turns back at a finite
# margin; robust DPO is unbiased under flipped labels, and pays with a loss that falls for ever;
# IPO aims at one margin; KTO needs no pairs and lets go of answers on both ends.

# %%
h = jnp.linspace(-30.0, 30.0, 201)
flat = jnp.zeros_like(h)
per_token = jnp.linspace(-4.0, -0.02, 201)  # mean log-prob of a token: below 0
fixed = jnp.full_like(per_token, -1.5)
yes, no, kl = jnp.ones(h.shape, bool), jnp.zeros(h.shape, bool), jnp.float32(0.0)

axes = grid(2, 4)
draw(
    axes[0],
    "dpo_loss",
    "h",
    h,
    {f"beta {b}": lambda x, b=b: losses.dpo_loss(x, flat, flat, flat, beta=b) for b in (0.1, 0.3)},
)
draw(
    axes[1],
    "dpo_loss, smoothed (cDPO)",
    "h",
    h,
    {
        f"smoothing {e}": lambda x, e=e: losses.dpo_loss(
            x, flat, flat, flat, beta=0.2, label_smoothing=e
        )
        for e in (0.1, 0.3)
    },
)
draw(
    axes[2],
    "robust_dpo_loss",
    "h",
    h,
    {
        f"flip rate {e}": lambda x, e=e: losses.robust_dpo_loss(
            x, flat, flat, flat, beta=0.2, flip_rate=e
        )
        for e in (0.1, 0.3)
    },
)
draw(
    axes[3],
    "ipo_loss, beta 0.05",
    "h",
    h,
    {"": lambda x: losses.ipo_loss(x, flat, flat, flat, beta=0.05)},
    mark=10.0,
)
draw(
    axes[4],
    "kto_loss, beta 0.2",
    "log of policy over reference",
    h,
    {
        "thumb up": lambda x: losses.kto_loss(x, flat, yes, kl, beta=0.2),
        "thumb down": lambda x: losses.kto_loss(x, flat, no, kl, beta=0.2),
    },
)
axes[4][0].set_ylim(top=1.7)  # room for the legend
draw(
    axes[5],
    "simpo_loss, beta 2",
    "mean log-prob of chosen",
    per_token,
    {
        f"gamma {g}": lambda x, g=g: losses.simpo_loss(x, fixed, beta=2.0, gamma=g)
        for g in (0.5, 2.0)
    },
    mark=-1.5,
)
draw(
    axes[6],
    "orpo_loss",
    "mean log-prob of chosen",
    per_token,
    {f"weight {w}": lambda x, w=w: losses.orpo_loss(x, fixed, weight=w) for w in (0.1, 1.0)},
    mark=-1.5,
)
draw(
    axes[7],
    "with a likelihood term",
    "log-prob of chosen (other: -15)",
    h - 30.0,
    {
        "cpo_loss": lambda x: losses.cpo_loss(x, flat - 15.0, nll_weight=0.1),
        "dpo_sft_loss": lambda x: losses.dpo_sft_loss(
            x, flat - 15.0, flat - 15.0, flat - 15.0, flat + 20.0
        ),
    },
    mark=-15.0,
)
plt.show()

# %% [markdown]
# ## Policy and value losses
#
# PPO's clip removes the gradient where a step has gone far enough *in the direction that pays*, and
# nowhere else: the panels for $A = +1$ and $A = -1$ are not mirror images. A ratio that explodes at
# negative advantage is what `dual_clip` is for. The value loss clips a move of the value, GRPO adds
# k3 of the reference, and GSPO clips one ratio a sequence.

# %%
ratio = jnp.linspace(0.025, 3.005, 299)  # no point on the edge of a clip
old = jnp.full_like(ratio, -1.0)
up, down = jnp.ones_like(ratio), -jnp.ones_like(ratio)


def of_ratio(loss, advantages, **hyper):
    """A loss of log-probabilities as a function of the ratio to the old policy."""
    return lambda x: loss(old + jnp.log(x), old, advantages, **hyper)


def gspo(x, advantages):
    """Two tokens a sequence, both at the ratio x; the loss is one value a sequence."""
    two = jnp.stack([old, old], axis=1)
    log_probs = two + jnp.log(x)[:, None]
    return losses.gspo_loss(
        log_probs, two, advantages, where=jnp.ones(two.shape, bool), clip=0.2, clip_high=0.3
    )


def grpo(x, kl_coef):
    """One token a sequence; the reference is the old policy."""
    column = old[:, None]
    return losses.grpo_loss(
        column + jnp.log(x)[:, None], column, column, up, clip=0.2, kl_coef=kl_coef
    )[:, 0]


policy = losses.clipped_policy_loss
values = jnp.linspace(-1.0, 2.0, 301)
start, target = jnp.zeros_like(values), jnp.full_like(values, 1.0)
log_probs = jnp.linspace(-4.0, 0.0, 201)

axes = grid(2, 4)
draw(
    axes[0],
    "clipped_policy_loss, A = +1",
    "new / old probability",
    ratio,
    {"clip 0.2": of_ratio(policy, up), "high 0.6": of_ratio(policy, up, clip_high=0.6)},
    mark=1.0,
)
draw(
    axes[1],
    "clipped_policy_loss, A = -1",
    "new / old probability",
    ratio,
    {"clip 0.2": of_ratio(policy, down), "dual clip 2": of_ratio(policy, down, dual_clip=2.0)},
    mark=1.0,
)
draw(
    axes[2],
    "grpo_loss, A = +1",
    "new / old probability",
    ratio,
    {f"KL {c}": lambda x, c=c: grpo(x, c) for c in (0.0, 0.5)},
    mark=1.0,
)
axes[2][0].set_ylim(-1.5, 2.5)  # k3 explodes where the policy has given a token up
axes[2][1].set_ylim(-3, 1)
draw(
    axes[3],
    "gspo_loss",
    "new / old, mean over tokens",
    ratio,
    {"A = +1": lambda x: gspo(x, up), "A = -1": lambda x: gspo(x, down)},
    mark=1.0,
)
draw(
    axes[4],
    "clipped_value_loss",
    "value (old 0, return 1)",
    values,
    {
        f"clip {c}": lambda x, c=c: losses.clipped_value_loss(x, start, target, clip=c)
        for c in (0.2, 10.0)
    },
    mark=1.0,
)
draw(
    axes[5],
    "reinforce_loss",
    "log-probability",
    log_probs,
    {
        f"return - baseline {a:+.0f}": lambda x, a=a: losses.reinforce_loss(
            x, jnp.full_like(x, a), jnp.zeros_like(x)
        )
        for a in (1.0, -1.0)
    },
)
axes[5][0].set_ylim(top=10)  # room for the legend
draw(
    axes[6],
    "sampler_mismatch_weights",
    "learner / sampler probability",
    ratio,
    {
        f"{outside}, at most 2 (no gradient)": lambda x, outside=outside: (
            losses.sampler_mismatch_weights(old + jnp.log(x), old, outside=outside)
        )
        for outside in ("truncate", "mask")
    },
    mark=1.0,
)
draw(
    axes[7],
    "clip_scores",
    "score of the reward model",
    h,
    {"limit 10": lambda x: losses.clip_scores(x, limit=10.0)},
)
plt.show()

# %% [markdown]
# ## Language and distillation
#
# Four logits; that of the right token moves and the others are 0. Label smoothing turns the loss
# around where the model is surer than the labels; z-loss does so where the normaliser drifts.
# On the right a student of two tokens with a teacher at 0.8: all three divergences vanish there,
# and differ in what they forgive. Reverse KL hardly minds a student that ignores the second token.

# %%
logit = jnp.linspace(-6.0, 10.0, 201)
right = jnp.zeros((1, logit.size), jnp.int32)


def moved(loss):
    """The first of four logits moves: float[N] -> float[1, N, 4] -> float[N]."""
    return lambda x: loss(jnp.stack([x, *[jnp.zeros_like(x)] * 3], axis=-1)[None])[0]


probability = jnp.linspace(0.01, 0.99, 197)
teacher = jnp.broadcast_to(jnp.log(jnp.array([0.8, 0.2])), (1, probability.size, 2))


def student(divergence):
    """A student that gives its first token the probability x."""
    return lambda x: divergence(jnp.log(jnp.stack([x, 1.0 - x], axis=-1))[None], teacher)[0]


axes = grid(1, 3)
draw(
    axes[0],
    "token_cross_entropy",
    "logit of the right token",
    logit,
    {
        "plain": moved(lambda z: losses.token_cross_entropy(z, right)),
        "smoothing 0.1": moved(lambda z: losses.token_cross_entropy(z, right, label_smoothing=0.1)),
        "z-loss 0.02": moved(lambda z: losses.token_cross_entropy(z, right, z_loss=0.02)),
    },
)
draw(
    axes[1],
    "token_entropy, token_log_probs",
    "logit of the right token",
    logit,
    {
        "entropy": moved(losses.token_entropy),
        "log-probability": moved(lambda z: losses.token_log_probs(z, right)),
    },
)
draw(
    axes[2],
    "distillation",
    "student's probability (teacher: 0.8)",
    probability,
    {
        "forward_kl": student(losses.forward_kl),
        "reverse_kl": student(losses.reverse_kl),
        "generalized_jsd": student(losses.generalized_jsd),
    },
    mark=0.8,
)
axes[2][1].set_ylim(-4, 4)
plt.show()

# %% [markdown]
# ## What chunking saves
#
# With the vocabulary of GPT-2 the logits of 8 sequences of 512 tokens are 785 MiB, and a training
# step holds several arrays of that size. The chunked losses take the hidden states and the head
# instead, and never hold more than the logits of `chunk` positions. The compiler says how much
# memory a step needs beside its arguments and results; nothing is run here.

# %%
B, T, D, V = 8, 512, 256, 50_257


def temporaries(loss):
    """MiB of temporaries of the loss and its gradient, from the compiler."""
    shapes = (
        jax.ShapeDtypeStruct((B, T, D), jnp.float32),
        jax.ShapeDtypeStruct((D, V), jnp.float32),
        jax.ShapeDtypeStruct((B, T), jnp.int32),
    )
    step = jax.jit(jax.value_and_grad(lambda *args: loss(*args).mean(), argnums=(0, 1)))
    return step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes / 2**20


dense = temporaries(lambda hidden, head, tokens: losses.next_token_loss(hidden @ head, tokens))
print(f"dense       {dense:6.0f} MiB")
for chunk in (8, 32, 128):
    chunked = temporaries(
        lambda hidden, head, tokens, chunk=chunk: losses.chunked_next_token_loss(
            hidden, head, tokens, chunk=chunk
        )
    )
    print(f"chunk {chunk:4}  {chunked:6.0f} MiB, 1/{dense / chunked:.0f}")
    assert chunk > 32 or 8 * chunked < dense

# %% [markdown]
# ## Three estimators of KL, and their gradients
#
# Tokens come from the policy; $d = \log \pi - \log \pi_{ref}$. All three estimate
# $KL(\pi \| \pi_{ref})$: k1 without bias and with noise, k2 with little bias, k3 with neither bias
# nor negative values. As *losses* they are different things. Below, both distributions are over six
# tokens, so that expectations are sums and not samples.

# %%
kinds = ("k1", "k2", "k3")
reference = jnp.array([1.0, 0.5, 0.0, -0.5, 0.2, -1.0])
policy_logits = jnp.array([0.2, 1.2, -0.4, 0.3, -0.2, 0.1])


def expected(logits, kind):
    """The mean of the estimator over tokens of the policy, which does the drawing and no more."""
    log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference)
    drawn = jax.lax.stop_gradient(jnp.exp(log_p))
    return jnp.sum(drawn * losses.kl_estimate(log_p, log_q, kind=kind))


def divergence(a, b):
    """KL(a || b) of two rows of logits."""
    log_p, log_q = jax.nn.log_softmax(a), jax.nn.log_softmax(b)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q))


gradients = {kind: jax.grad(expected)(policy_logits, kind) for kind in kinds}
true = jax.grad(divergence)(policy_logits, reference)
turned = jax.grad(divergence, argnums=1)(reference, policy_logits)
print("KL", divergence(policy_logits, reference), *(expected(policy_logits, k) for k in kinds))
np.testing.assert_allclose(gradients["k1"], 0.0, atol=1e-6)
np.testing.assert_allclose(gradients["k2"], true, atol=1e-6)
np.testing.assert_allclose(gradients["k3"], turned, atol=1e-6)

figure, axes = plt.subplots(1, 2, figsize=(10, 2.8), width_ratios=(2, 3))
d = jnp.linspace(-2.0, 2.0, 201)
for kind in kinds:
    axes[0].plot(d, losses.kl_estimate(d, jnp.zeros_like(d), kind=kind), label=kind)
axes[0].axhline(0, color="0.8", linewidth=0.8, zorder=0)
axes[0].set(title="kl_estimate", xlabel="d = log of policy over reference", ylabel="estimate")
axes[0].legend()
bars = {f"loss {kind}": gradients[kind] for kind in kinds}
bars |= {r"true KL($\pi \| \pi_{ref}$)": true, r"true KL($\pi_{ref} \| \pi$)": turned}
for i, ((label, height), color) in enumerate(
    zip(bars.items(), ("C0", "C1", "C2", "0.35", "0.7"), strict=True)
):
    axes[1].bar(np.arange(6) + 0.16 * (i - 2), height, width=0.16, label=label, color=color)
axes[1].axhline(0, color="0.8", linewidth=0.8, zorder=0)
axes[1].set(title="expected gradient", xlabel="logit of token", ylabel="gradient")
axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# As a loss, k1 does nothing at all on average, k2 does what one wants, and k3 pulls towards the
# other KL. So KL goes into the *reward* as k1 (PPO), or into the loss as k2; GRPO takes k3.
#
# ## Generalised advantages on one episode
#
# Eight tokens of an answer; the reward model's score, 1.0, comes with the last one. Before that the
# rewards are what the KL to the reference costs. With $\lambda = 0$ an advantage looks one token
# ahead and trusts the values; with $\lambda = 1$ it waits for the end and trusts nothing.

# %%
answer = jnp.array([[-1.2, -0.4, -2.0, -0.3, -0.8, -0.5, -0.2, -0.9]])
reference_answer = jnp.array([[-1.3, -0.9, -1.1, -0.4, -0.8, -1.5, -0.3, -0.9]])
real = jnp.ones(answer.shape, bool)
rewards = losses.kl_shaped_rewards(
    jnp.array([1.0]), answer, reference_answer, where=real, kl_coef=0.1
)
value_estimates = jnp.array([[0.3, 0.35, 0.2, 0.4, 0.5, 0.7, 0.75, 0.9]])

figure, axes = plt.subplots(1, 3, figsize=(10, 2.6))
steps = np.arange(1, 9)
axes[0].bar(steps, rewards[0], color="0.5")
axes[0].set(title="kl_shaped_rewards, KL coefficient 0.1", xlabel="token", ylabel="reward")
axes[1].plot(steps, value_estimates[0], "k.-", label="value")
for i, gae_lambda in enumerate((0.0, 0.95, 1.0)):
    advantages, returns = losses.generalized_advantages(
        rewards, value_estimates, where=real, gae_lambda=gae_lambda
    )
    np.testing.assert_allclose(returns, advantages + value_estimates, rtol=1e-6)
    axes[1].plot(steps, returns[0], ".-", color=f"C{i}", label=rf"$\lambda$ = {gae_lambda}")
    axes[2].plot(steps, advantages[0], ".-", color=f"C{i}", label=rf"$\lambda$ = {gae_lambda}")
axes[1].set(title="values and returns", xlabel="token", ylabel="return")
axes[2].axhline(0, color="0.8", linewidth=0.8, zorder=0)
axes[2].set(title="advantages", xlabel="token", ylabel="advantage")
axes[1].legend(fontsize=7)
axes[2].legend(fontsize=7)
plt.show()

# %% [markdown]
# ## Advantages without a critic
#
# Four answers a prompt; the second prompt is easy. GRPO divides by the deviation of the group, so
# that a lone failure among good answers weighs as much as a real difference; Dr. GRPO
# (`scale="none"`) does not. RLOO compares each answer with the mean of the others.

# %%
group_rewards = jnp.array([[0.1, 0.9, 0.4, 0.6], [0.98, 1.0, 0.99, 0.90]])
forms = {
    "grpo_advantages": losses.grpo_advantages(group_rewards),
    'grpo_advantages, scale="none"': losses.grpo_advantages(group_rewards, scale="none"),
    "rloo_advantages": losses.rloo_advantages(group_rewards),
}
np.testing.assert_allclose(  # the same up to K / (K - 1)
    forms["rloo_advantages"], forms['grpo_advantages, scale="none"'] * 4 / 3, atol=1e-6
)
figure, axes = plt.subplots(1, 4, figsize=(10, 2.5))
for ax, (title, rows) in zip(axes, {"rewards": group_rewards, **forms}.items(), strict=True):
    for i, row in enumerate(rows):
        ax.bar(np.arange(1, 5) + 0.4 * i - 0.2, row, width=0.4, label=f"prompt {i + 1}")
    ax.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    ax.set(title=title, xlabel="answer", xticks=range(1, 5))
axes[0].set_ylim(0, 1.5)
axes[0].legend(ncols=2, loc="upper center", handlelength=1, columnspacing=1)
plt.show()

# %% [markdown]
# ## A loss in your own training step
#
# The losses know no model, no optimizer and no batch: they go wherever arrays are. First by hand:
# a table of bigrams learns by DPO to prefer one continuation to another. `log_probs[:, t]` is of
# token t, and the only shift is the one written here.

# %%
VOCABULARY, LENGTH = 12, 6
chosen, rejected = jax.random.randint(jax.random.key(0), (2, 32, LENGTH), 0, VOCABULARY)
reference_table = jnp.zeros((VOCABULARY, VOCABULARY))


def response_log_probs(table, tokens):
    """float[B]: the first token is the prompt, the rest the response."""
    log_probs = losses.token_log_probs(table[tokens[:, :-1]], tokens[:, 1:])
    return losses.sequence_log_probs(log_probs, where=jnp.ones(log_probs.shape, bool))


def preference(table):
    of_policy = (response_log_probs(table, tokens) for tokens in (chosen, rejected))
    of_reference = (response_log_probs(reference_table, tokens) for tokens in (chosen, rejected))
    return losses.dpo_loss(*of_policy, *of_reference, beta=0.5).mean()


@jax.jit
def by_hand(parameters):
    value, gradient = jax.value_and_grad(preference)(parameters)
    return parameters - 2.0 * gradient, value


table, by_hand_curve = reference_table, []
for _ in range(30):
    table, value = by_hand(table)
    by_hand_curve.append(float(value))
assert by_hand_curve[-1] < 0.5 * by_hand_curve[0]

# %% [markdown]
# **Flax Linen and optax**: a reward model on the ranking loss. Four answers a prompt, each a vector
# of features; the ranking follows a hidden direction.

# %%
features = jax.random.normal(jax.random.key(1), (64, 4, 8))
hidden_direction = jnp.arange(1.0, 9.0) / 8.0
true_scores = features @ hidden_direction
true_ranks = jnp.argsort(jnp.argsort(-true_scores, axis=1), axis=1)


class RewardModel(nn.Module):
    """A score of each answer: float[B, K, D] -> float[B, K]."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.tanh(nn.Dense(16)(x)))[..., 0]


model = RewardModel()
parameters = model.init(jax.random.key(2), features)
tx = optax.sgd(0.2, momentum=0.9)


@jax.jit
def linen_step(parameters, opt_state):
    def loss(parameters):
        return losses.ranking_loss(model.apply(parameters, features), true_ranks).mean()

    value, gradients = jax.value_and_grad(loss)(parameters)
    updates, opt_state = tx.update(gradients, opt_state)
    return optax.apply_updates(parameters, updates), opt_state, value


opt_state, linen_curve = tx.init(parameters), []
for _ in range(60):
    parameters, opt_state, value = linen_step(parameters, opt_state)
    linen_curve.append(float(value))
counts = losses.pair_counts(model.apply(parameters, features), true_ranks)
print(f"pairs in the right order: {counts.correct.sum() / counts.total.sum():.2f}")
assert linen_curve[-1] < 0.5 * linen_curve[0]


# %% [markdown]
# **Flax NNX**: a language model whose head is never multiplied out. The chunked loss takes the
# hidden states and the kernel of the head; padding is left out by the mean, not by the loss.


# %%
class Bigrams(nnx.Module):
    """Embedding, one layer, and a head that only the loss applies."""

    def __init__(self, rngs):
        self.embedding = nnx.Embed(VOCABULARY, 16, rngs=rngs)
        self.layer = nnx.Linear(16, 16, rngs=rngs)
        self.head = nnx.Linear(16, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        return nnx.tanh(self.layer(self.embedding(tokens)))


# Each token is the one before plus 5; the rows have different lengths.
text = jnp.asarray((np.arange(16)[:, None] + 5 * np.arange(10)) % VOCABULARY, jnp.int32)
present = jnp.asarray(np.arange(10) < np.arange(3, 19)[:, None])

nnx_model = Bigrams(nnx.Rngs(0))
optimizer = nnx.Optimizer(nnx_model, optax.sgd(0.3, momentum=0.9), wrt=nnx.Param)


@nnx.jit
def nnx_step(model, optimizer):
    def loss(model):
        head = model.head.kernel[...]
        per_token = losses.chunked_next_token_loss(model(text), head, text, chunk=4)
        return losses.masked_mean(per_token, where=present[:, 1:])

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


nnx_curve = [float(nnx_step(nnx_model, optimizer)) for _ in range(40)]
assert nnx_curve[-1] < 0.2 * nnx_curve[0]

# %%
figure, axes = plt.subplots(1, 3, figsize=(10, 2.4))
for ax, (title, curve) in zip(
    axes,
    {
        "by hand: dpo_loss": by_hand_curve,
        "Flax Linen: ranking_loss": linen_curve,
        "Flax NNX: chunked_next_token_loss": nnx_curve,
    }.items(),
    strict=True,
):
    ax.plot(range(1, len(curve) + 1), curve)
    ax.set(title=title, xlabel="step", ylabel="loss", ylim=(0, None))
plt.show()

# %% [markdown]
# **Equinox**, which this project does not install. The model is a pytree, so the step is the one
# by hand, with the filtered transformations:
#
# ```python
# import equinox as eqx
#
# class RewardModel(eqx.Module):
#     network: eqx.nn.MLP
#
#     def __init__(self, key):
#         self.network = eqx.nn.MLP(in_size=8, out_size="scalar", width_size=16, depth=1, key=key)
#
#     def __call__(self, features):  # float[B, K, D] -> float[B, K]
#         return jax.vmap(jax.vmap(self.network))(features)
#
# model = RewardModel(jax.random.key(0))
# opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))
#
# @eqx.filter_jit
# def step(model, opt_state):
#     @eqx.filter_value_and_grad
#     def loss(model):
#         return losses.ranking_loss(model(features), true_ranks).mean()
#
#     value, gradients = loss(model)
#     updates, opt_state = tx.update(gradients, opt_state)
#     return eqx.apply_updates(model, updates), opt_state, value
# ```
#
# ## Sums, counts, and one division
#
# With gradient accumulation or several devices the mean of means is wrong as soon as rows differ in
# length. `loss_sum_and_count` gives both parts: add them up, and divide once.

# %%
per_token = jnp.array([[1.0, 1.0, 1.0, 1.0], [5.0, 0.0, 0.0, 0.0]])
lengths = jnp.array([[True, True, True, True], [True, False, False, False]])
parts = [losses.loss_sum_and_count(per_token[i : i + 1], where=lengths[i : i + 1]) for i in (0, 1)]
total, count = (sum(part) for part in zip(*parts, strict=True))
print("one division", total / count, "- mean of means", (1.0 + 5.0) / 2)
assert total / count == losses.reduce_loss(per_token, where=lengths)
