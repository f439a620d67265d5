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
# # InstructGPT in ten minutes
#
# A GPT continues text. InstructGPT does what it is asked to do. The way from one to the other
# (Ouyang et al. 2022, *Training language models to follow instructions with human feedback*) has
# three stages:
#
# 1. **SFT**: fine-tune the GPT on demonstrations that people wrote;
# 2. **Reward model**: let people rank several answers to one prompt; learn to predict the ranking;
# 3. **PPO-ptx**: let the policy answer, reward it with that model, keep it close to where it
#    started, and keep practising on pretraining text.
#
# Here all of it runs from nothing: a GPT of about a million parameters, in a small world that is
# made by code, with simulated labelers and with a judge that knows the truth, which the paper did
# not have. About ten minutes on two CPU cores; an accelerator is used when there is one.

# %%
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

# The folder of a checkout of the project. In Colab: clone or upload it, and name its folder here.
REPOSITORY = "." if Path("pyproject.toml").is_file() else ".."
EXTRA = "[gpu]" if shutil.which("nvidia-smi") else ""  # "[tpu]" on a TPU

if importlib.util.find_spec("instruct_jax") is None:
    folder = Path(REPOSITORY).resolve()
    if not (folder / "pyproject.toml").is_file():
        raise SystemExit(f"{folder} is no checkout of the project: set REPOSITORY to one")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", f"{folder}{EXTRA}"], check=True)

# %%
import os

from instruct_jax.cli import HOST_DEVICE_FLAGS

# Without an accelerator, two cores are two devices of a data-parallel mesh.
CPU_FLAGS = ("--xla_force_host_platform_device_count=2", *HOST_DEVICE_FLAGS)
os.environ.setdefault("XLA_FLAGS", " ".join(CPU_FLAGS))

import dataclasses
import json
import logging
import tempfile
from html import escape

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, Image

from instruct_jax.data import encoding, loader
from instruct_jax.data.packing import pack
from instruct_jax.data.tokenizer import train_bpe
from instruct_jax.data.toyworld import ToyWorld, possible_flaws
from instruct_jax.data.toyworld.spec import Spec
from instruct_jax.evaluation.figure import write_win_rates
from instruct_jax.evaluation.language import Question, held_out_loss, task_accuracy
from instruct_jax.evaluation.reward_model import fit_length_baseline, ordered_pairs, pair_metrics
from instruct_jax.evaluation.win_rate import preferences_from_scores, win_rate
from instruct_jax.feedback.labelers import accuracy, agreement, collect_rankings, simulated_labelers
from instruct_jax.losses import (
    generalized_advantages,
    kl_shaped_rewards,
    next_token_loss,
    ranking_loss,
)
from instruct_jax.models.families import parameter_count
from instruct_jax.models.transformer import (
    language_model,
    response_values,
    scalar_from_language,
    scalar_model,
)
from instruct_jax.sampling.complete import complete, completions_of
from instruct_jax.sampling.sampler import generate
from instruct_jax.stages import ppo, pretrain, reward_model, sft
from instruct_jax.stages.experience import response_scores
from instruct_jax.stages.ppo_config import PPOConfig
from instruct_jax.stages.stage import ModelConfig
from instruct_jax.training.mesh import make_mesh

# %%
SMOKE = os.environ.get("INSTRUCT_JAX_SMOKE") == "1"  # seconds instead of minutes, learns nothing


def size(full, smoke):
    """The size of something in a real run, and in one that only shows that all of it runs."""
    return smoke if SMOKE else full


SEED = 0
PROMPT, RESPONSE = 40, 24  # tokens
MESH = make_mesh()
WORKDIR = Path(tempfile.mkdtemp())  # each stage keeps its metrics and checkpoints in a folder here
logging.getLogger("instruct_jax").setLevel(logging.ERROR)  # not a line for each prompt left out


def fresh(name):
    """An empty folder for a stage; a stage whose folder has checkpoints goes on from them."""
    shutil.rmtree(WORKDIR / name, ignore_errors=True)
    return WORKDIR / name


def curve(folder, name):
    """Steps and values of one metric, to be plotted."""
    (file,) = folder.glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return tuple(zip(*((row["step"], row[name]) for row in rows if name in row), strict=True))


def table(head, *rows):
    """Rows of text and numbers as a table."""

    def line(tag, cells):
        texts = (f"{c:.2f}" if isinstance(c, float) else escape(str(c)) for c in cells)
        style = "style='text-align:left;vertical-align:top;white-space:pre-wrap'"
        return "<tr>" + "".join(f"<{tag} {style}>{text}</{tag}>" for text in texts) + "</tr>"

    return HTML(f"<table>{line('th', head)}{''.join(line('td', row) for row in rows)}</table>")


jax.devices()

# %% [markdown]
# ## The world
#
# Prompts come from contributors, in the paper's three kinds (plain, few-shot, user-based) and ten
# families of tasks. Labelers write demonstrations, and they err: about half of the answers have a
# flaw. The judge reads the hidden task of a prompt and grades an answer from 1 to 7, as the paper's
# labelers did. Training never sees the judge, only its noisy image in the labelers' rankings.

# %%
world = ToyWorld(SEED)
table(
    ("family", "kind", "prompt", "demonstration", "flaws", "grade"),
    *(
        (
            prompt.meta["family"],
            prompt.meta["kind"],
            prompt.text.strip(),
            demonstration.response,
            ", ".join(demonstration.meta["flaws"]),
            world.judge(prompt, demonstration.response).overall,
        )
        for prompt in world.prompts(12)
        for demonstration in [world.demonstrate(prompt)]
    ),
)

# %% [markdown]
# One prompt, answered well and with each flaw that it admits, and what the judge makes of it:
# helpful, honest and harmless apart, and the overall grade.


# %%
def judged(prompt, answer, flaw=""):
    """A row of the table below."""
    grade = world.judge(prompt, answer)
    return flaw, answer, grade.helpful, grade.honest, grade.harmless, grade.overall


request = next(row for row in world.prompts(200) if row.meta["skill"] == "name_some")
flaws = possible_flaws(Spec.from_meta(request.meta))
table(
    ("flaw", request.text.strip(), "helpful", "honest", "harmless", "overall"),
    judged(request, world.answer(request)),
    *(judged(request, world.answer(request, flaws=(flaw,)), flaw) for flaw in flaws),
    judged(request, request.text.strip(), "echo"),
)

# %% [markdown]
# ## Stage 0: a GPT
#
# The pretraining corpus holds stories, worksheets and notes. Questions come in lists, and answers,
# where there are any, are curt. So a base model learns the language and the tasks, but not to obey:
# asked a question, it asks another one, as GPT-3 does.
#
# The loss is the mean cross-entropy of the next token (`losses.next_token_loss`):
#
# $$L = -\frac{1}{N} \sum_b \sum_t \log p_\theta(x_{b,t+1} \mid x_{b,\le t})$$

# %%
corpus = world.pretraining_corpus(size(40_000, 300))
held_out = world.pretraining_corpus(len(corpus) + size(512, 60))[len(corpus) :]
tokenizer = train_bpe(world.tokenizer_texts(min(len(corpus), 4_000)), vocab_size=767)

model_config = ModelConfig(preset=size("mini", "tiny")).build(tokenizer)
lm, scalar = language_model(model_config), scalar_model(model_config)

text, held_out_text = (
    encoding.encode_documents(documents, tokenizer, length=112)["tokens"]
    for documents in (corpus, held_out)
)
print(f"{parameter_count(model_config):,} parameters, {text.size:,} tokens of text")
print(f"\n{corpus[0].text}\n---\n{corpus[2].text}")

# %% [markdown]
# Models are pairs of pure functions, `init(key) -> params` and `apply(params, tokens, mask=...)`.
# A stage's `train` takes parameters and rows of token ids, and returns parameters.

# %%
gpt = pretrain.train(
    pretrain.PretrainConfig(
        batch_size=32, length=112, learning_rate=3e-3, warmup=size(50, 2), log_every=20
    ),
    lm,
    lm.init(jax.random.key(SEED)),
    text,
    mesh=MESH,
    workdir=fresh("gpt"),
)

# %%
tokens = held_out_text[:1, :40]
losses = next_token_loss(jax.jit(lm.apply)(gpt, tokens), tokens)[0]

figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.2), width_ratios=(1, 2))
left.plot(*curve(WORKDIR / "gpt", "loss"))
left.axhline(held_out_loss(lm, gpt, held_out_text, mesh=MESH), color="grey", ls=":")
left.set(title="pretraining loss (dotted: held out)", xlabel="update", ylabel="nats a token")
right.bar(range(1, tokens.size), losses)
names = [tokenizer.decode(column).replace("\n", "↵") for column in tokens.T]
right.set_xticks(range(tokens.size), names, rotation=90, fontsize=8)
right.set(title="next_token_loss, token by token")
figure.tight_layout()

# %% [markdown]
# What can be known is known (the next letters of a word, the form of a list); what cannot (which
# animal comes next) costs its entropy. Now ask it something.


# %%
def fitting(rows):
    """The prompts of at most PROMPT tokens; longer ones are filtered, as in the paper."""
    return [row for row in rows if len(tokenizer.encode(row.text)) <= PROMPT]


def answers(params, rows, *, draw=0):
    """One sampled answer to each prompt: its text, and whether it ended by itself."""
    key = jax.random.fold_in(jax.random.key(SEED), draw)
    budget = {"max_new_tokens": RESPONSE, "prompt_length": PROMPT, "batch_size": size(128, 16)}
    return complete(lm, params, tokenizer, [row.text for row in rows], key=key, mesh=MESH, **budget)


def grades(rows, given):
    """The judge's overall grade of each answer, 1 to 7."""
    pairs = zip(rows, given, strict=True)
    return np.array([world.judge(row, answer.text, answer.ended).overall for row, answer in pairs])


def shown(answer, grade):
    """An answer and its grade as the tables show them; dots where it ran out of budget."""
    return f"{answer.text.strip() or '(nothing)'}{'' if answer.ended else ' ...'}\n({grade:.1f})"


def side_by_side(rows, **models):
    """The answers of several models to the first prompts, their mean grades over all."""
    given = [answers(params, rows) for params in models.values()]
    graded = [grades(rows, those) for those in given]
    columns = (map(shown, *both) for both in zip(given, graded, strict=True))
    head = (f"{name} (mean {g.mean():.2f})" for name, g in zip(models, graded, strict=True))
    prompts = [row.text.strip() for row in rows]
    return table(("prompt", *head), *list(zip(prompts, *columns, strict=True))[:8])


validation = fitting(world.prompts(size(256, 24), split="valid"))
side_by_side(validation, gpt=gpt)

# %% [markdown]
# ## Stage 1: supervised fine-tuning
#
# The same loss, on the response and its end token alone; the prompt $x$ is given:
#
# $$L = -\frac{1}{N} \sum_{(x,y)} \sum_t \log p_\theta(y_t \mid x, y_{<t})$$
#
# The paper trains two such models, one to sample comparisons from and to compare with, one with a
# tenth of pretraining rows in every batch to start PPO from. One of the second kind serves for both
# here.

# %%
demonstrations = world.demonstrations(size(10_000, 120))
demonstration_rows = encoding.encode_demonstrations(
    demonstrations, tokenizer, prompt_length=PROMPT, response_length=RESPONSE
)
sft_params = sft.train(
    sft.SFTConfig(
        epochs=2,
        batch_size=16,
        learning_rate=1e-3,
        residual_dropout=0.0,
        pretrain_fraction=0.1,
    ),
    lm,
    gpt,
    pack(demonstration_rows, length=112, pad_id=tokenizer.pad_id),
    pretraining=text,
    mesh=MESH,
    workdir=fresh("sft"),
)

# %%
plt.figure(figsize=(5, 3))
plt.plot(*curve(WORKDIR / "sft", "loss"))
plt.gca().set(title="fine-tuning loss", xlabel="update", ylabel="nats a token")
side_by_side(validation, gpt=gpt, sft=sft_params)

# %% [markdown]
# It answers now, in its writers' manner, their flaws included. To do better than its
# demonstrations it needs another signal: it is easier to tell which answer is better than to write
# a good one.
#
# ## Stage 2: rankings and a reward model
#
# The model answers each prompt four times, and a labeler ranks the answers (rank 0 is best; equal
# ranks are ties). Labelers differ in taste and are noisy; two of them agree about as often as the
# paper's did, on 73 % of pairs.


# %%
def ranked_answers(rows, *, k=4, draw):
    """Rankings of k answers to each prompt, a second labeler's, and the judge's grades."""
    flat = answers(sft_params, [row for row in rows for _ in range(k)], draw=draw)
    groups = [flat[i : i + k] for i in range(0, len(flat), k)]
    texts, ended = ([[getattr(a, f) for a in g] for g in groups] for f in ("text", "ended"))
    labelers = simulated_labelers(world.judge, 40)
    first, second = (collect_rankings(rows, texts, labelers, ended=ended, seed=s) for s in (0, 1))
    gold = np.array([grades([row] * k, group) for row, group in zip(rows, groups, strict=True)])
    return first, second, gold


unseen = fitting(world.prompts(size(3_200, 48), offset=len(demonstrations)))
rankings, second_opinion, _ = ranked_answers(unseen, draw=1)
valid_rankings, _, valid_gold = ranked_answers(validation, draw=2)
print(f"two labelers agree on {agreement(rankings, second_opinion).rate:.1%} of pairs")
example = max(rankings, key=lambda row: len(set(row.ranks)))
table(
    ("rank", example.prompt.strip()), *sorted(zip(example.ranks, example.completions, strict=True))
)

# %% [markdown]
# The reward model is the fine-tuned model with a scalar head in place of the logits, read at the
# last token. Its loss (`losses.ranking_loss`, eq. 1 of the paper) says that the score difference of
# two answers is the log-odds of preferring one; all pairs of a prompt enter together:
#
# $$\mathrm{loss}(\theta) = -\frac{1}{\binom{K}{2}}\, E_{(x, y_w, y_l)}
# \left[ \log \sigma\big(r_\theta(x, y_w) - r_\theta(x, y_l)\big) \right]$$
#
# Ties make no pair. The loss does not see a shift of $r$, so training ends by moving the bias until
# the demonstrations score 0 on average.

# %%
ranks = jnp.array([[0, 1, 2, 3]])
for scores in ([3.0, 2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 2.0, 3.0]):
    print(scores, *ranking_loss(jnp.array([scores]), ranks))

# %%
encode = {"completions": 4, "prompt_length": PROMPT, "response_length": RESPONSE}
ranking_rows, valid_rows = (
    encoding.encode_comparisons(rows, tokenizer, **encode) for rows in (rankings, valid_rankings)
)
reward_params = reward_model.train(
    reward_model.RewardModelConfig(batch_size=16, learning_rate=5e-4),
    scalar,
    scalar_from_language(sft_params, jax.random.key(SEED), model_config),
    ranking_rows,
    standard=demonstration_rows,
    mesh=MESH,
    workdir=fresh("reward_model"),
)

# %% [markdown]
# Has it learnt anything? On rankings of contributors it never saw, beside a model that knows only
# how long an answer is, and beside the judge, which is as good as the labelers' noise allows.

# %%
pairs = ordered_pairs(valid_rows["ranks"], valid_rows["where"])
train_pairs = ordered_pairs(ranking_rows["ranks"], ranking_rows["where"])
lengths, train_lengths = (rows["mask"].sum(-1) for rows in (valid_rows, ranking_rows))
valid_scores = reward_model.score_rows(
    scalar, reward_params, valid_rows["tokens"], valid_rows["mask"]
)
baseline = fit_length_baseline(train_lengths, train_pairs)
candidates = {
    "length only": baseline.scores(lengths),
    "reward model": valid_scores,
    "judge (ceiling)": valid_gold,
}
rates = {name: accuracy(valid_rankings, scores) for name, scores in candidates.items()}

# %%
bins = pair_metrics(valid_scores, pairs).calibration
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
errors = [1.96 * rate.standard_error for rate in rates.values()]
left.barh(list(rates), [r.rate for r in rates.values()], xerr=errors, color="C1", alpha=0.5)
left.set(title="accuracy on held-out pairs (a coin: 0.5)", xlim=(0.4, 1))
right.plot([0, 1], [0, 1], ":", color="grey")
right.plot([b.predicted for b in bins], [b.observed for b in bins], "o-")
right.set(title="calibration", xlabel="predicted preference", ylabel="share that came true")
figure.tight_layout()

# %% [markdown]
# ## Stage 3: PPO and PPO-ptx
#
# The objective (eq. 2 of the paper), $\pi^{RL}$ the policy, $\pi^{SFT}$ where it started:
#
# $$E_{x,\, y \sim \pi^{RL}} \left[ r_\theta(x, y)
# - \beta \log \frac{\pi^{RL}(y \mid x)}{\pi^{SFT}(y \mid x)} \right]
# + \gamma\, E_{z \sim \mathrm{pretraining}} \left[ \log \pi^{RL}(z) \right]$$
#
# - With $\gamma = 0$ it is PPO, otherwise PPO-ptx.
# - Each token is an action. Its reward (`losses.kl_shaped_rewards`) is the penalty, and at the end
#   $E$ the score too: $R_t = -\beta \log \frac{\pi(y_t)}{\pi^{SFT}(y_t)} + 1[t = E]\, r(x, y)$.
# - A value model, which starts as a copy of the reward model, predicts what is still to come.
#   `losses.generalized_advantages` says how much better a token did than predicted:
#   $\delta_t = R_t + V_{t+1} - V_t$, $A_t = \delta_t + \lambda A_{t+1}$, with returns
#   $G_t = A_t + V_t$.
# - `losses.clipped_policy_loss` moves the policy, but not far in one go: with
#   $\rho_t = \pi(y_t) / \pi_{old}(y_t)$ it is
#   $\max\big(-A_t \rho_t,\; -A_t\, \mathrm{clip}(\rho_t, 1 - \epsilon, 1 + \epsilon)\big)$.
# - `losses.clipped_value_loss` fits the value model to $G_t$.
# - The gradient of the pretraining loss is added to the policy's before its one update.

# %%
PPO = PPOConfig(
    episodes=size(5_120, 32),
    rollout_batch=size(128, 16),
    minibatch=size(32, 8),
    prompt_length=PROMPT,
    response_length=RESPONSE,
    kl_coef=0.15,
    learning_rate=2e-4,
    value_learning_rate=5e-4,
    warmup_iterations=size(4, 1),
    ema_decay=0.9,
    ptx_ratio=1,
    log_every=size(2, 1),
    eval_every=size(8, 2),
)
prompts = world.prompts(size(4_000, 48), offset=len(demonstrations) + 4_000)
prompt_rows = encoding.encode_prompts(prompts, tokenizer, prompt_length=PROMPT)


def measure(step, state):
    """While it trains: what the judge says of it, and what it has forgotten."""
    params = state.policy.ema
    return {
        "gold": grades(validation, answers(params, validation)).mean(),
        "pretrain_loss": held_out_loss(lm, params, held_out_text, mesh=MESH),
    }


# %%
def reinforce(name, ptx_coef):
    """PPO from the SFT model; the returned state holds the policy, its average and the values."""
    config = dataclasses.replace(PPO, ptx_coef=ptx_coef)
    ptx_batch = config.updates * config.minibatch * config.ptx_ratio
    return ppo.train(
        config,
        lm,
        scalar,
        sft_params,
        reward_params,
        loader.Batches(prompt_rows, config.rollout_batch, seed=SEED),
        ptx=loader.Batches({"tokens": text[:, :80]}, ptx_batch, seed=SEED) if ptx_coef else None,
        eos_id=tokenizer.eos_id,
        mesh=MESH,
        workdir=fresh(name),
        evaluate=measure,
    )


ppo_state = reinforce("ppo", ptx_coef=0.0)

# %%
ppo_ptx_state = reinforce("ppo_ptx", ptx_coef=1.0)
ppo_params, ppo_ptx_params = ppo_state.policy.ema, ppo_ptx_state.policy.ema

# %%
figure, axes = plt.subplots(1, 4, figsize=(14, 3))
titles = {
    "score": "reward model's score",
    "gold": "judge's grade (validation)",
    "kl": "KL to the SFT model, nats an answer",
    "pretrain_loss": "held-out pretraining loss",
}
for axis, (metric, title) in zip(axes, titles.items(), strict=True):
    for name in ("ppo", "ppo_ptx"):
        axis.plot(*curve(WORKDIR / name, metric), ".-", label=name)
    axis.set(title=title, xlabel="iteration")
axes[-1].axhline(held_out_loss(lm, sft_params, held_out_text, mesh=MESH), color="grey", ls=":")
axes[0].legend()
figure.tight_layout()

# %% [markdown]
# The reward model's score is what PPO climbs; the judge's grade is what is wanted. They part when
# the policy finds what the reward model likes and people do not, and the KL penalty is there to
# stop short of that. The last plot is the *alignment tax*: what the policy forgets of its
# pretraining (dotted: the SFT model), and how much of that the pretraining term saves.
#
# One answer of the policy, token by token, with the functions of the equations above:

# %%
prompt = encoding.encode_prompts(validation[:1], tokenizer, prompt_length=PROMPT)
rollout = generate(
    lm,
    ppo_ptx_params,
    jnp.asarray(prompt["tokens"]),
    jnp.asarray(prompt["mask"]),
    jax.random.split(jax.random.key(SEED), 1),
    max_new_tokens=RESPONSE,
    eos_id=tokenizer.eos_id,
)


# %%
@jax.jit
def explain(policy, reference, reward, value, rollout):
    """What PPO computes of a rollout, each float[B, RESPONSE]; 0 past the end."""
    tokens, mask, where, _ = rollout

    def log_probs_of(params):
        return response_scores(lm, params, tokens, mask, where, temperature=1.0).log_probs

    log_probs, ref_log_probs = log_probs_of(policy), log_probs_of(reference)
    scores = reward_model.sequence_scores(scalar, reward, tokens, mask)
    values = response_values(scalar.apply(value, tokens, mask=mask), prompt_length=PROMPT)
    values = jnp.where(where, values, 0.0)
    shaping = {"where": where, "kl_coef": PPO.kl_coef}
    rewards = kl_shaped_rewards(scores, log_probs, ref_log_probs, **shaping)
    advantages, returns = generalized_advantages(rewards, values, where=where)
    return log_probs, ref_log_probs, rewards, values, advantages, returns


# %%
value_params = ppo_ptx_state.value.params
columns = explain(ppo_ptx_params, sft_params, reward_params, value_params, rollout)
(answer,) = completions_of(rollout, tokenizer)
print(validation[0].text, answer.text, sep="")
table(
    ("token", "log π", "log π SFT", "reward", "value", "advantage", "return"),
    *zip(
        [tokenizer.decode([token]) or "(end)" for token in answer.tokens],
        *(column[0].tolist()[: len(answer.tokens)] for column in columns),
        strict=True,
    ),
)

# %% [markdown]
# ## Was it worth it?
#
# Prompts of contributors that no training row comes from, one sampled answer each, every model
# against the SFT model: the share of prompts on which the judge prefers its answer, ties half, with
# 95 % intervals. This is Figure 1 of the paper. The base model also gets its best chance, a prefix
# with two answered questions.

# %%
test = fitting(world.prompts(size(400, 16), split="test"))


def prompted_answers(params, rows):
    """The base model's, behind the few-shot prefix; an answer ends where its line does."""
    prompts = [world.prompted(row) for row in rows]
    budget = {"max_new_tokens": RESPONSE, "batch_size": size(128, 16)}
    raw = complete(lm, params, tokenizer, prompts, key=jax.random.key(SEED), mesh=MESH, **budget)
    lines = ((answer, answer.text.partition(world.stop)) for answer in raw)
    return [
        answer._replace(text=a, ended=bool(stop) or answer.ended) for answer, (a, stop, _) in lines
    ]


models = {"gpt": gpt, "sft": sft_params, "ppo": ppo_params, "ppo_ptx": ppo_ptx_params}
given = {name: answers(params, test, draw=3 + i) for i, (name, params) in enumerate(models.items())}
given = {"gpt": given["gpt"], "gpt_prompted": prompted_answers(gpt, test), **given}
test_grades = {name: grades(test, those) for name, those in given.items()}
baseline = grades(test, answers(sft_params, test, draw=9))

# %%
win_rates = {
    name: win_rate(preferences_from_scores(those, baseline))._asdict()
    for name, those in test_grades.items()
}
write_win_rates(WORKDIR / "win_rates.png", win_rates)
Image(WORKDIR / "win_rates.png", width=640)

# %% [markdown]
# The SFT model is compared with a second sample of its own, so it stands at one half. And the tax,
# in numbers: the loss on held-out pretraining text, and the accuracy on few-shot questions in the
# corpus's own form.

# %%
questions = [Question(t.prompt, t.answer, t.choices) for t in world.tasks(size(256, 16))]
table(
    ("model", "pretraining loss", "few-shot accuracy", "judge's grade"),
    *(
        (
            name,
            held_out_loss(lm, params, held_out_text, mesh=MESH),
            task_accuracy(lm, params, tokenizer, questions, mesh=MESH).mean,
            test_grades[name].mean(),
        )
        for name, params in models.items()
    ),
)

# %%
side_by_side(test, **models)

# %% [markdown]
# ## Where to go from here
#
# - `python experiments/quickstart.py --workdir=runs/quickstart` runs all of this with the two SFT
#   models of the paper and the choice of the SFT epoch by reward, and writes a full report.
# - Each stage is a script too (`experiments/`), with presets for real data and for the sizes of the
#   paper (`configs/`); `--mesh` spreads a stage over many devices.
# - Things to try here: `kl_coef=0` (what does the policy find that the judge does not like?),
#   fewer rankings, a noisier labeler (`simulated_labelers(..., noise=3.0)`), no pretraining mix in
#   SFT.
