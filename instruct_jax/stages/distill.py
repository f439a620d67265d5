"""Distillation: a policy's answers, or its whole distributions, taught to a model of fewer layers.

The student starts as every n-th layer of the teacher, with its tables and norms (Sanh et al. 2019),
and learns on the teacher's own answers to training prompts:

    samples    - (1/N) sum_t log q(y_t)                   (Kim and Rush 2016, sequence level)
    logits     (1/N) sum_t KL(p(. | y_<t) || q(. | y_<t))  (Hinton et al. 2015; on p's samples)

N counts response tokens. The second sees all of p where the first sees one draw of it. Answers that
did not end are left out: they would teach not to end.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from instruct_jax.data.encoding import encode_demonstrations
from instruct_jax.data.loader import Arrays, Batches
from instruct_jax.data.rows import Demonstration, Prompt
from instruct_jax.errors import ConfigError
from instruct_jax.losses import sum_and_count
from instruct_jax.models.transformer import Model, TransformerConfig, language_model
from instruct_jax.sampling.complete import Completion
from instruct_jax.sampling.scores import divergence
from instruct_jax.settings import setting
from instruct_jax.stages.pretrain import language_loss
from instruct_jax.stages.stage import FitConfig, OnBest, fit, steps_of, trained_form
from instruct_jax.stages.trained import TrainedModel, save_trained
from instruct_jax.training.state import LossFn, TrainState

Targets = Literal["samples", "logits"]


@dataclass(frozen=True)
class DistillConfig(FitConfig):
    """A student's; no paper of ours has one."""

    epochs: float = 4.0
    batch_size: int = 64
    learning_rate: float = 5e-4
    layers: int | None = setting(None, "layers of the student; none: half of its teacher's", low=1)


def shortened(
    config: TransformerConfig, params: Any, layers: int | None = None
) -> tuple[TransformerConfig, Any]:
    """The model of `layers` evenly spaced layers, first and last among them. Raises ConfigError."""
    wanted = max(1, config.num_layers // 2) if layers is None else layers
    if not 1 <= wanted <= config.num_layers:
        raise ConfigError(f"a student has 1 to {config.num_layers} layers of its teacher: {wanted}")
    kept = np.linspace(0, config.num_layers - 1, wanted).round().astype(int)
    student = {**params, "layers": jax.tree.map(lambda w: w[kept], params["layers"])}
    pattern = "".join("l" if config.local_layers[layer] else "g" for layer in kept)
    return dataclasses.replace(config, num_layers=wanted, attention_pattern=pattern), student


def logits_loss(student: Model, teacher: Model, *, dropout: bool = False) -> LossFn:
    """The second loss above on rows of `language_loss`; the teacher's parameters are under
    "teacher" among the student's. The logits of both are made for a few targets at a time, and
    again for their gradient. Dropout is of the student alone.
    """

    def loss(
        params: Any, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        tokens, mask, targets = batch["tokens"], batch["mask"], batch["loss_mask"][:, 1:]
        drawn = key if dropout else None
        own = student.hidden(params, tokens, mask=mask, dropout_key=drawn)[:, :-1]
        taught = teacher.hidden(params["teacher"], tokens, mask=mask)[:, :-1]
        losses = divergence(student, params, own, teacher, params["teacher"], taught, where=targets)
        return *sum_and_count(losses, where=targets), {}

    return loss


def train(
    config: DistillConfig,
    targets: Targets,
    student: Model,
    params: Any,
    teacher: Model,
    teacher_params: Any,
    answers: Arrays,
    *,
    mesh: Mesh,
    workdir: Path,
    evaluate: Callable[[int, TrainState], dict[str, float]] | None = None,
    on_best: OnBest | None = None,
) -> Any:
    """Trains the student on encoded answers of the teacher (tokens int32[N, T], mask, loss_mask);
    returns its parameters. Resumes from `workdir/checkpoints` when there is one.
    """
    batches = Batches(answers, config.batch_size, seed=config.seed)
    student = trained_form(language_model, student, config)
    dropout = config.residual_dropout > 0
    return fit(
        config,
        language_loss(student, dropout=dropout)
        if targets == "samples"
        else logits_loss(student, teacher, dropout=dropout),
        params,
        batches,
        frozen={} if targets == "samples" else {"teacher": teacher_params},
        steps=steps_of(config.epochs, batches.steps_per_epoch, 1),
        mesh=mesh,
        workdir=workdir,
        name="distill",
        evaluate=evaluate,
        on_best=on_best,
    )


class Student(NamedTuple):
    """A student as its folder holds it, and how many answers it has learnt from."""

    model: TrainedModel
    answers: int


def teach(
    config: DistillConfig,
    targets: Targets,
    teacher: TrainedModel,
    prompts: Sequence[Prompt],
    answers: Sequence[Completion],
    *,
    prompt_length: int,
    response_length: int,
    mesh: Mesh,
    workdir: Path,
) -> Student:
    """A student of the teacher's own answers to these prompts, kept in WORKDIR/model.

    Raises ConfigError where less than a batch of them ended.
    """
    rows = [
        Demonstration(prompt.text, answer.text)
        for prompt, answer in zip(prompts, answers, strict=True)
        if answer.ended
    ]
    if len(rows) < config.batch_size:
        raise ConfigError(
            f"distill:{targets}: {len(rows)} of {len(prompts)} answers ended, less than one batch "
            f"of {config.batch_size}; raise config.distill_prompts or response_length"
        )
    encoded = encode_demonstrations(
        rows, teacher.tokenizer, prompt_length=prompt_length, response_length=response_length
    )
    shape, start = shortened(teacher.config, teacher.params, config.layers)
    params = train(
        config,
        targets,
        language_model(shape),
        start,
        teacher.model,
        teacher.params,
        encoded,
        mesh=mesh,
        workdir=workdir,
    )
    student = teacher._replace(config=shape, params=jax.device_get(params), stage="distill")
    save_trained(workdir / "model", student)
    return Student(student, len(rows))
