"""Stage 1: supervised fine-tuning on demonstrations (M1), and the initialisation of the RL policy
(M3).

    L = - (1/N) sum over response tokens (the stop token included) of log p(y_t | x, y_<t)

Two recipes, one function (spec SFT-1..5):
  * M1, the SFT baseline and the sampler of comparison data: 16 epochs, residual dropout 0.2.
    Validation loss overfits after one epoch while the reward model's score keeps rising, so every
    epoch is kept and `select_epoch` takes the one whose sampled answers the reward model likes best
    (SFT-4).
  * M3, where PPO starts and the KL reference: 2 epochs with a tenth of every batch replaced by
    pretraining rows (SFT-5). The paper does not say a tenth of what; here it is of the batch's
    rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from instruct_jax.data.loader import Arrays, Batches, Mixture
from instruct_jax.data.shares import Shares
from instruct_jax.data.tokens import JoinedRows, TokenRows
from instruct_jax.errors import ConfigError
from instruct_jax.files import write_json
from instruct_jax.models.transformer import Model, language_model
from instruct_jax.settings import setting
from instruct_jax.stages.pretrain import language_loss, language_rows
from instruct_jax.stages.stage import FitConfig, OnBest, fit, steps_of, trained_form
from instruct_jax.training.state import TrainState


@dataclass(frozen=True)
class SFTConfig(FitConfig):
    """SFT-2: 16 epochs, 32 sequences a batch, no warm-up, cosine to 10 %, residual dropout 0.2."""

    epochs: float = 16
    batch_size: int = 32
    learning_rate: float = 9.65e-6
    residual_dropout: float = 0.2
    prompt_length: int = setting(1024, "tokens of the longest prompt", low=1, unit="tokens")
    response_length: int = setting(
        1024, "tokens of a response, its stop token included", low=1, unit="tokens"
    )
    loss_on_prompt: bool = setting(False, "whether prompts are targets too")
    all_turns: bool = setting(
        False,
        "whether all assistant turns of a dialogue are targets, or the last alone",
        needs="loss_on_prompt=False",
    )
    # The fast option, since a row of one demonstration is mostly padding, which the layers compute
    # all the same (the read-out never does).
    pack_length: int | None = setting(
        None,
        "tokens of a row of several demonstrations, which batch_size counts; none: one a row",
        low=2,
        unit="tokens",
    )
    # Every epoch is evaluated, whatever `eval_every` says.
    best_metric: str | None = setting(
        None,
        "figure of an evaluation, such as valid_loss, whose best step is kept beside the last",
        may_change=True,
    )
    pretrain_fraction: float = setting(
        0.0, "share of a batch's rows that is pretraining text (SFT-5)", low=0.0, below=1.0
    )

    def __post_init__(self) -> None:
        """ConfigError also where the share of pretraining text is no row, or the whole batch."""
        super().__post_init__()
        if self.pretrain_fraction and not 0 < self.mixed < self.batch_size:
            raise ConfigError(
                f"pretrain_fraction {self.pretrain_fraction:g} of batch_size {self.batch_size} is "
                f"{self.mixed} rows of text: expected 1 to {self.batch_size - 1}"
            )

    @property
    def mixed(self) -> int:
        """Rows of pretraining text in a batch."""
        return round(self.pretrain_fraction * self.batch_size)


def train(
    config: SFTConfig,
    model: Model,
    params: Any,
    demonstrations: Arrays,
    *,
    pretraining: np.ndarray | TokenRows | JoinedRows | None = None,
    shares: Shares | None = None,
    text_shares: Shares | None = None,
    mesh: Mesh,
    workdir: Path,
    evaluate: Callable[[int, TrainState], dict[str, float]] | None = None,
    on_best: OnBest | None = None,
    on_epoch: Callable[[int, Any], None] | None = None,
) -> Any:
    """Fine-tunes `params` on encoded demonstrations; returns the parameters after the last epoch.

    `demonstrations`: tokens int32[N, T], mask, loss_mask. `pretraining` int32[M, T] rows of the
    same length fill `config.pretrain_fraction` of every batch. `shares` and `text_shares` say of
    which source each row of either is, where sources have weights. `on_epoch(epoch, params)` sees
    the parameters after every epoch (SFT-4), `evaluate` then and every `config.eval_every` updates.
    Resumes from `workdir/checkpoints` when there is one.
    """
    rows = _targets(config, demonstrations)
    own = config.batch_size - config.mixed
    demonstrated = Batches(rows, own, seed=config.seed, shares=shares)
    batches: Batches | Mixture = demonstrated
    if config.mixed:
        assert pretraining is not None, "pretrain_fraction > 0 needs pretraining rows"
        text = language_rows(pretraining)
        if "segment_ids" in rows:
            text["segment_ids"] = np.broadcast_to(np.int32(1), pretraining.shape)
        extra = Batches(text, config.mixed, seed=config.seed + 1, shares=text_shares)
        batches = Mixture(demonstrated, extra)
    per_epoch = demonstrated.steps_per_epoch
    steps = steps_of(config.epochs, per_epoch, 1)

    def look(step: int, state: TrainState) -> dict[str, float]:
        """Called by the loop after update `step`, at the end of an epoch or between."""
        # Where no update was made so far there is no model to keep (R21).
        if on_epoch is not None and step % per_epoch == 0 and int(state.updates):
            on_epoch(step // per_epoch, state.params)
        return evaluate(step, state) if evaluate is not None else {}

    return fit(
        config,
        language_loss(
            trained_form(language_model, model, config), dropout=config.residual_dropout > 0
        ),
        params,
        batches,
        steps=steps,
        mesh=mesh,
        workdir=workdir,
        name="sft",
        evaluate=None if on_epoch is None and evaluate is None else look,
        epoch=per_epoch,
        on_best=on_best,
    )


def _targets(config: SFTConfig, demonstrations: Arrays) -> dict[str, Any]:
    """The rows, with the loss on every real token where the configuration wants it there."""
    rows = dict(demonstrations)
    if config.loss_on_prompt:
        rows["loss_mask"] = rows["mask"]
        if "segment_ids" in rows:  # what stands before a segment's first token is another row
            segments = np.asarray(rows["segment_ids"])
            rows["loss_mask"] = np.array(rows["mask"])
            rows["loss_mask"][:, 1:] &= segments[:, 1:] == segments[:, :-1]
    return rows


def select_epoch(scores: dict[int, float], *, losses: dict[int, float], path: Path) -> int:
    """SFT-4: the epoch whose validation answers have the best mean reward-model score.

    Writes the decision, with every epoch's score and validation loss beside it, to `path`.
    Validation loss takes no part: it overfits after one epoch while answers still improve. Equal
    scores go to the earlier.
    """
    best = max(sorted(scores), key=lambda epoch: scores[epoch])
    decision = {
        "selected_epoch": best,
        "by": "mean reward-model score of sampled validation responses",
        "epochs": {str(e): {"score": scores[e], "loss": losses.get(e)} for e in sorted(scores)},
    }
    write_json(path, decision)
    return best
