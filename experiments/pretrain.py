"""Pretrains a GPT on plain text (M0), with a tokenizer of its own or a given one.

    python experiments/pretrain.py --config=configs/pretrain.py:toyworld --workdir=runs/pretrain
    python experiments/sft.py --config=configs/sft.py:toyworld --config.init=runs/pretrain/model ...

Writes WORKDIR/model (a model folder), pretrain.jsonl (metrics), checkpoints and config.json; run
again, it resumes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax

from instruct_jax import cli
from instruct_jax.data.config import DataConfig
from instruct_jax.data.sources import open_source
from instruct_jax.data.tokenizer import load_tokenizer, train_bpe
from instruct_jax.evaluation.language import held_out_loss
from instruct_jax.models.config import check_length
from instruct_jax.models.transformer import language_model
from instruct_jax.settings import Settings, setting
from instruct_jax.stages import pretrain
from instruct_jax.stages.evaluations import (
    evaluate_with,
    keeping_best,
    users_evaluation,
    with_users,
)
from instruct_jax.stages.inputs import (
    check_batch,
    data_acts,
    held_out_loss_of,
    no_held_out,
    where_held_out,
)
from instruct_jax.stages.pretrain import PretrainConfig
from instruct_jax.stages.stage import ModelConfig
from instruct_jax.stages.text import held_out_text, training_text
from instruct_jax.stages.trained import TrainedModel, save_trained
from instruct_jax.training.mesh import check_batch_size, make_mesh
from instruct_jax.training.state import TrainState

# Beside what every run writes; --overwrite replaces these.
WRITES = ("pretrain.jsonl",)


@dataclass(frozen=True)
class Config(Settings):
    """A run from random weights; its tokenizer is trained on the rows, or given."""

    acts_if: ClassVar[Mapping[str, str]] = {
        **data_acts("documents", demonstrations="tokenizer=None"),
        "pretrain.eval_every": f"{where_held_out('documents')} or evaluate_with",
    }

    data: DataConfig = DataConfig()
    tokenizer: str | None = setting(
        None, "a tokenizer.json or folder; none trains a byte-level BPE"
    )
    vocab_size: int = setting(
        512, "of the BPE that is trained", low=257, unit="tokens", needs="tokenizer=None"
    )
    model: ModelConfig = ModelConfig()
    pretrain: PretrainConfig = PretrainConfig()
    evaluate_with: str | None = evaluate_with("pretrain.eval_every")


def main(config: Config, run: cli.Run) -> Path:
    """Trains and returns the model folder."""
    users = users_evaluation(config.evaluate_with)
    source, mesh = open_source(config.data, weighed=("documents",)), make_mesh(run.mesh)
    fit = config.pretrain
    check_batch_size(fit.batch_size, mesh, micro_batches=fit.micro_batches)
    if config.tokenizer is None:
        tokenizer = train_bpe(source.tokenizer_texts(), vocab_size=config.vocab_size)
    else:
        tokenizer = load_tokenizer(config.tokenizer)
    model_config = config.model.build(tokenizer)
    check_length(model_config, fit.length, field="config.pretrain.length")
    model = language_model(model_config)
    # All that can be wrong beside the text is found before the work of tokenising it.
    text = {"length": fit.length, "folder": config.data.token_folder(run.workdir)}
    rows, shares = training_text(source, tokenizer, **text)
    valid = held_out_text(config.data, source, tokenizer, **text)
    kind = f"rows of {fit.length} tokens"
    check_batch(len(rows), fit.batch_size, kind=kind, field="pretrain.batch_size")
    run.record_data(source.provenance(), source.licences(), source.counts())
    if not len(valid):
        run.note(no_held_out(kind))

    def judge(params: Any) -> dict[str, float]:
        """The loss of the rows that are held out, where there are any."""
        if not len(valid):
            return {}
        return {"valid_loss": held_out_loss(model, params, valid, mesh=mesh)}

    def evaluate(step: int, state: TrainState) -> dict[str, float]:
        """As metrics of a step."""
        return judge(state.params)

    start = model.init(jax.random.key(fit.seed))
    trained = TrainedModel("language", model_config, start, tokenizer, "pretrain")
    params = pretrain.train(
        fit,
        model,
        start,
        rows,
        shares=shares,
        mesh=mesh,
        workdir=run.workdir,
        evaluate=with_users(evaluate if len(valid) else None, users, trained, mesh),
        on_best=keeping_best(run.workdir, trained, run.say),
    )
    trained = trained._replace(params=params)
    notes = judge(params)
    folder = save_trained(run.workdir / "model", trained, notes=notes)
    run.say(f"model: {folder}{held_out_loss_of(notes, len(valid))}")
    return folder


if __name__ == "__main__":
    cli.run(main, Config, default="configs/pretrain.py", writes=WRITES, once=True)
