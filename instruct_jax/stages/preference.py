"""Direct preference training: a policy from comparisons, without a reward model or sampling.

One prompt with its K ranked completions is one element of the batch, as in the reward model (RM-2):
one tree whose branches they are, all pairs in one gradient step, every prompt of equal weight. With
pi the policy's log-probs of whole responses and ref the reference's:

    loss(x) = (1/|S|) sum_{(w,l) in S} f(pi_w, pi_l, ref_w, ref_l),  S = pairs without ties

for f in `losses/preference.py`, `losses/reference_free.py` or the family of
`losses/preference_family.py`: DPO, cDPO, robust DPO, IPO, hinge, EXO, DiscoPOP, NCA, SPPO, APO,
under a divergence of choice; ORPO, SimPO, CPO; DPO with an SFT term.
KTO sees single completions: those that were judged alone have their label; of ranked ones those
that beat more of their prompt's completions than they lose to are desirable, those that lose to
more are not, the rest take no part; its reference point comes
from completions of other prompts, one drawn for each prompt, of which it is one more branch (under
the policy's dropout, where there is any).

The published recipes train on one pair a prompt, which is K = 2 here. The reference's log-probs are
constants: "precomputed" scores all rows once before training and lets go of the reference; "live"
scores every batch when it is met, which costs a forward a step and keeps the reference in memory,
but starts at once on large data.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from instruct_jax.data.loader import Arrays
from instruct_jax.data.shares import Shares
from instruct_jax.data.trees import TreeBatches, completion_sizes
from instruct_jax.losses import (
    cpo_loss,
    dpo_sft_loss,
    implicit_rewards,
    kto_loss,
    kto_reference_kl,
    masked_mean,
    orpo_loss,
    robust_dpo_loss,
    simpo_loss,
    sum_and_count,
)
from instruct_jax.losses.preference_family import Form
from instruct_jax.losses.preference_family import preference_loss as family_loss
from instruct_jax.models.transformer import Model, language_model
from instruct_jax.settings import setting
from instruct_jax.stages.preference_rows import (
    ResponseScorer,
    branch_log_probs,
    with_mismatched,
)
from instruct_jax.stages.rankings import by_prompt, refuse_labels, tree_batches
from instruct_jax.stages.stage import FitConfig, OnBest, check_warmup, fit, steps_of, trained_form
from instruct_jax.training import hosts
from instruct_jax.training.state import LossFn, TrainState

REFERENCE_FREE = ("orpo", "simpo", "cpo")
# Those of the family in losses/preference_family.py that have another name there.
FORMS: dict[str, Form] = {"dpo": "logistic", "ipo": "square"}
# These two read log-probs as means over tokens.
MEANS = ("orpo", "simpo")


@dataclass(frozen=True)
class PreferenceConfig(FitConfig):
    """DPO as in Rafailov et al. 2023, appendix B: beta 0.1, batch 64, 1e-6 after 150 warm-up
    updates and then constant (Adam here, RMSprop there).
    """

    loss: Literal[
        "dpo", "robust_dpo", "ipo", "hinge", "exo", "discopop", "nca", "sppo", "apo_zero",
        "apo_down", "kto", "orpo", "simpo", "cpo", "dpo_sft",
    ] = setting("dpo", "what is minimised; all are in losses/preference*.py")  # fmt: skip
    beta: float = setting(
        0.1,
        "how strong the pull to the reference is; of orpo it scales the logged margin",
        above=0.0,
    )
    label_smoothing: float = setting(
        0.0, "share of pairs believed to be the wrong way round; of exo, 0 is its paper's 1e-3",
        low=0.0, below=0.5, needs="loss=dpo|exo|cpo",
    )  # fmt: skip
    divergence: Literal["reverse_kl", "forward_kl", "js"] = setting(
        "reverse_kl", "what holds the policy to the reference",
        needs="loss=dpo|ipo|hinge|exo|discopop|nca|sppo|apo_zero|apo_down",
    )  # fmt: skip
    flip_rate: float = setting(
        0.1, "share of pairs known to be the wrong way round", low=0.0, below=0.5,
        needs="loss=robust_dpo",
    )  # fmt: skip
    margin: float = setting(
        1.0, "gamma, the margin asked of the chosen", low=0.0, needs="loss=simpo"
    )
    sft_weight: float = setting(
        1.0,
        "how much the chosen's own loss counts beside the pair's",
        low=0.0,
        needs="loss=dpo_sft|cpo",
    )
    odds_weight: float = setting(
        0.1,
        "lambda, how much the pair's loss counts beside the chosen's own",
        low=0.0,
        needs="loss=orpo",
    )
    desirable_weight: float = setting(
        1.0, "how much the better half counts", low=0.0, needs="loss=kto"
    )
    undesirable_weight: float = setting(
        1.0, "how much the worse half counts", low=0.0, needs="loss=kto"
    )
    reference: Literal["precomputed", "live"] = setting(
        "precomputed",
        "when the reference reads the rows: all at first, or each batch when it is met",
        needs="loss=dpo|robust_dpo|ipo|hinge|exo|discopop|nca|sppo|apo_zero|apo_down|kto|dpo_sft",
    )
    epochs: float = 1.0
    batch_size: int = 64
    learning_rate: float = 1e-6
    warmup: int = 150
    final_fraction: float = 1.0
    completions: int = setting(2, "ranked answers of a prompt, at most", low=2)
    prompt_length: int = setting(512, "tokens of the longest prompt", low=1, unit="tokens")
    response_length: int = setting(
        512, "tokens of a response, its stop token included", low=1, unit="tokens"
    )

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads the reference's log-probs."""
        return self.loss not in REFERENCE_FREE


class Scores(NamedTuple):
    """Log-probs of the completions of B prompts, summed over tokens; float32[B, K]."""

    policy: jax.Array
    reference: jax.Array | None
    lengths: jax.Array  # tokens, the stop token included


def ranked_scores(
    config: PreferenceConfig, scores: Scores, ranks: jax.Array, where: jax.Array
) -> tuple[Scores, jax.Array, jax.Array, jax.Array | None]:
    """Scores, ranks and presence of the completions that are ranked, and for KTO its reference
    point float32[], of the last ones, which are not (`with_mismatched`).
    """
    if config.loss != "kto":
        return scores, ranks, where, None
    assert scores.reference is not None, "kto reads the reference"
    kl = kto_reference_kl(scores.policy[:, -1], scores.reference[:, -1])
    ranked = Scores(*(x[:, :-1] for x in (scores.policy, scores.reference, scores.lengths)))
    return ranked, ranks[:, :-1], where[:, :-1], kl


def pair_losses(
    config: PreferenceConfig, scores: Scores, ranks: jax.Array, where: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The loss of every ordered pair, float32[B, K, K], and which entries are pairs.

    Entry [b, i, j] is of completion i chosen over completion j.
    """
    values = scores.policy
    if config.loss in MEANS:
        values = values / jnp.maximum(scores.lengths, 1.0)
    shape = (*ranks.shape, ranks.shape[1])

    def first(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x[:, :, None], shape).reshape(-1)

    def second(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x[:, None, :], shape).reshape(-1)

    chosen, rejected = first(values), second(values)
    pairs = ordered_pairs(ranks, where)
    beta = {"beta": config.beta, "where": pairs.reshape(-1)}
    smoothed = beta | {"label_smoothing": config.label_smoothing}
    if config.loss == "orpo":
        losses = orpo_loss(chosen, rejected, weight=config.odds_weight, where=beta["where"])
    elif config.loss == "simpo":
        losses = simpo_loss(chosen, rejected, gamma=config.margin, **beta)
    elif config.loss == "cpo":
        losses = cpo_loss(chosen, rejected, nll_weight=config.sft_weight, **smoothed)
    else:
        assert scores.reference is not None, f"{config.loss} reads the reference"
        four = chosen, rejected, first(scores.reference), second(scores.reference)
        if config.loss == "robust_dpo":
            losses = robust_dpo_loss(*four, flip_rate=config.flip_rate, **beta)
        elif config.loss == "dpo_sft":
            lengths = first(scores.lengths)
            losses = dpo_sft_loss(*four, lengths, sft_weight=config.sft_weight, **beta)
        else:
            form = FORMS.get(config.loss, config.loss)
            smoothing = {"label_smoothing": config.label_smoothing or None}
            losses = family_loss(
                *four, form=form, divergence=config.divergence, **beta, **smoothing
            )
    return losses.reshape(shape), pairs


def ordered_pairs(ranks: jax.Array, where: jax.Array) -> jax.Array:
    """bool[B, K, K]: both are there, and the first is ranked above the second (0 is best)."""
    both = where[:, :, None] & where[:, None, :]
    return both & (ranks[:, :, None] < ranks[:, None, :])


def thumbs(
    ranks: jax.Array, where: jax.Array, labels: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """bool[B, K] which completions are desirable for KTO, and which have a label at all: those of
    `labels` int32[B, K] (1, -1; 0 is none) where there are any, else what their ranks say.
    """
    if labels is not None:
        return labels > 0, where & (labels != 0)
    above = ordered_pairs(ranks, where)
    balance = above.sum(2) - above.sum(1)
    return balance > 0, where & (balance != 0)


def prompt_losses(
    config: PreferenceConfig,
    scores: Scores,
    ranks: jax.Array,
    where: jax.Array,
    kl: jax.Array | None = None,
    labels: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One loss a prompt float32[B], the mean over its pairs (or labelled completions), and bool[B],
    whether it has any. `kl` float32[] is KTO's reference point, `labels` are as in `thumbs`.
    """
    if config.loss == "kto":
        assert scores.reference is not None, "kto reads the reference"
        assert kl is not None, "kto needs its reference point"
        desirable, labelled = thumbs(ranks, where, labels)
        losses = kto_loss(
            scores.policy.reshape(-1),
            scores.reference.reshape(-1),
            desirable.reshape(-1),
            kl,
            where=labelled.reshape(-1),
            beta=config.beta,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
        ).reshape(ranks.shape)
        return masked_mean(losses, where=labelled, axis=1), labelled.any(1)
    losses, pairs = pair_losses(config, scores, ranks, where)
    losses, pairs = (x.reshape(len(ranks), -1) for x in (losses, pairs))
    return masked_mean(losses, where=pairs, axis=1), pairs.any(1)


def preference_metrics(
    config: PreferenceConfig,
    scores: Scores,
    ranks: jax.Array,
    where: jax.Array,
    labels: jax.Array | None = None,
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Sums and counts over pairs: accuracy and margin of the implicit reward, and its two sides.
    With `labels` over completions: the implicit reward of those approved of, and of the others.

    The implicit reward is beta times the log-ratio to the reference (Rafailov et al. 2023, eq. 5);
    without a reference the log-prob alone, a mean over tokens where the loss reads means. The
    log-prob of the chosen is logged because these losses are free to lower it.
    """
    values = scores.policy
    if config.loss in MEANS:
        values = values / jnp.maximum(scores.lengths, 1.0)
    reference = jnp.zeros_like(values) if scores.reference is None else scores.reference
    rewards = implicit_rewards(
        values.reshape(-1),
        reference.reshape(-1),
        beta=config.beta,
        divergence=config.divergence,
    )
    rewards = rewards.reshape(ranks.shape)
    if labels is not None:
        desirable, labelled = thumbs(ranks, where, labels)
        return {
            "reward_desirable": sum_and_count(rewards, where=labelled & desirable),
            "reward_undesirable": sum_and_count(rewards, where=labelled & ~desirable),
        }
    pairs = ordered_pairs(ranks, where)
    margins = rewards[:, :, None] - rewards[:, None, :]
    of_first = jnp.broadcast_to(rewards[:, :, None], pairs.shape)
    chosen_log_probs = jnp.broadcast_to(scores.policy[:, :, None], pairs.shape)
    return {
        "accuracy": sum_and_count((margins > 0).astype(jnp.float32), where=pairs),
        "margin": sum_and_count(margins, where=pairs),
        "reward_chosen": sum_and_count(of_first, where=pairs),
        "reward_rejected": sum_and_count(of_first.swapaxes(1, 2), where=pairs),
        "log_prob_chosen": sum_and_count(chosen_log_probs, where=pairs),
    }


def preference_loss(config: PreferenceConfig, model: Model) -> LossFn:
    """The loss of a batch of `pack_trees`: tokens int32[R, W] ..., ranks int32[B, K], `where` and,
    for most losses, `reference` float32[B, K]; for KTO with one completion more, the mismatched.

    A sum over prompts that have a pair, and their number. KTO's reference point is of the
    micro-batch.
    """
    dropout = config.residual_dropout > 0

    def loss(
        params: Any, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        log_probs, lengths = branch_log_probs(model, params, batch, key=key if dropout else None)
        scores = Scores(log_probs, batch.get("reference"), lengths)
        scores, ranks, where, kl = ranked_scores(config, scores, batch["ranks"], batch["where"])
        labels = batch["labels"][:, :-1] if "labels" in batch else None  # of the mismatched, none
        losses, counted = prompt_losses(config, scores, ranks, where, kl, labels)
        total, count = sum_and_count(losses, where=counted)
        metrics = preference_metrics(config, scores, ranks, where, labels)
        if kl is not None:
            metrics["kto_reference_kl"] = (kl, jnp.float32(1.0))
        return total, count, metrics

    return loss


def read_by(config: PreferenceConfig, comparisons: Arrays) -> dict[str, Any]:
    """What the loss reads of encoded comparisons: for KTO a mismatched completion more.

    ConfigError for labelled completions and another loss: it would learn nothing from them.
    """
    if config.loss == "kto":
        return with_mismatched(comparisons, seed=config.seed)
    refuse_labels(comparisons, f"config.preference.loss={config.loss}")
    return dict(comparisons)


class LiveReference(NamedTuple):
    """`batches`, each with its reference log-probs, computed when it is met."""

    batches: TreeBatches
    score: ResponseScorer

    @property
    def batch_size(self) -> int:
        """Prompts a batch."""
        return self.batches.batch_size

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """The batch of `step`."""
        batch = self.batches(step)
        return batch | {"reference": hosts.fetch(self.score(batch))}


def train(
    config: PreferenceConfig,
    model: Model,
    params: Any,
    comparisons: Arrays,
    *,
    reference: Any = None,
    shares: Shares | None = None,
    mesh: Mesh,
    workdir: Path,
    evaluate: Callable[[int, TrainState], dict[str, float]] | None = None,
    on_best: OnBest | None = None,
) -> Any:
    """Trains `params` on encoded comparisons (see `encode_comparisons`); returns the parameters.

    `reference` is the frozen policy, `params` itself by default; `shares` of which source each row
    is, where sources have weights. Resumes from
    `workdir/checkpoints` when there is one; precomputed reference scores are computed again.
    """
    comparisons = read_by(config, comparisons)
    steps = steps_of(config.epochs, len(comparisons["tokens"]), config.batch_size)
    check_warmup(config, steps=steps)  # before the reference reads all rows
    batches_of = partial(tree_batches, config, pad_id=model.config.pad_id, mesh=mesh)
    score = None
    if config.needs_reference:
        frozen = params if reference is None else reference
        score = ResponseScorer(model, frozen, mesh, micro_batches=config.micro_batches)
    if score is not None and config.reference == "precomputed":
        comparisons = comparisons | {"reference": by_prompt(batches_of(comparisons), score)}
        score = None
    batches = batches_of(comparisons, steps=steps, shares=shares)
    return fit(
        config,
        preference_loss(config, trained_form(language_model, model, config)),
        params,
        batches if score is None else LiveReference(batches, score),
        steps=steps,
        mesh=mesh,
        workdir=workdir,
        name="preference",
        evaluate=evaluate,
        on_best=on_best,
    )


def judge_preferences(
    config: PreferenceConfig,
    model: Model,
    params: Any,
    reference: Any,
    comparisons: Arrays,
    *,
    mesh: Mesh,
) -> dict[str, float]:
    """The loss and the metrics of `params` on held-out comparisons, with `reference` as frozen
    policy; means over prompts and over pairs.
    """
    comparisons = read_by(config, comparisons)
    batches = tree_batches(config, comparisons, pad_id=model.config.pad_id, mesh=mesh)

    def score(params: Any) -> jax.Array:
        scorer = ResponseScorer(model, params, mesh, micro_batches=config.micro_batches)
        return jnp.asarray(by_prompt(batches, scorer))

    scores = Scores(
        policy=score(params),
        reference=score(reference) if config.needs_reference else None,
        lengths=jnp.asarray(completion_sizes(comparisons), jnp.float32),
    )
    ranked = jnp.asarray(comparisons["ranks"]), jnp.asarray(comparisons["where"])
    labels = jnp.asarray(comparisons["labels"][:, :-1]) if "labels" in comparisons else None
    scores, ranks, where, kl = ranked_scores(config, scores, *ranked)
    losses, counted = prompt_losses(config, scores, ranks, where, kl, labels)
    sums = {"loss": sum_and_count(losses, where=counted)}
    sums |= preference_metrics(config, scores, ranks, where, labels)
    return {name: float(total / jnp.maximum(count, 1.0)) for name, (total, count) in sums.items()}
