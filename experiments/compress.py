"""Makes smaller variants of a trained model and reports what each costs and saves.

    python experiments/compress.py --config=configs/compress.py:toyworld \\
        --config.model=runs/ppo_ptx/model --config.reward_model=runs/reward_model/model \\
        --workdir=runs/compress

Variants: int8, int8_activations, int4, nf4, fp8, int8_cache (models/quantization.py); prune:S, a
share S of the weights zeroed (models/pruning.py); distill:samples and distill:logits, a student of
fewer layers (stages/distill.py). int8_cache rounds the keys and values of decoding alone: its size
and its perplexity are the original's.

Writes WORKDIR/compression.json, everything, the pruning of each layer included; WORKDIR/
compression.md, the table; WORKDIR/distill_*/model, the students. Every variant answers the same
prompts with the same keys, so a change is a mean of paired differences. Cosine is that of a
position's logits with the original's, on the held-out documents that perplexity is of.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import numpy as np

from instruct_jax import cli
from instruct_jax.data.config import DataConfig
from instruct_jax.data.rows import Prompt
from instruct_jax.data.sources import Source, ToySource, open_source
from instruct_jax.errors import ConfigError
from instruct_jax.evaluation.compression import (
    ORIGINAL,
    Exam,
    compression_table,
    measure,
    summary,
)
from instruct_jax.files import write_json, write_text
from instruct_jax.models.compression import NAMES, Variant, as_it_is, compress, is_variant
from instruct_jax.models.config import ComputeConfig, check_length
from instruct_jax.models.transformer import Model
from instruct_jax.sampling.complete import Completion, complete
from instruct_jax.settings import Settings, never, setting
from instruct_jax.stages.distill import DistillConfig, Targets, teach
from instruct_jax.stages.inputs import data_acts
from instruct_jax.stages.reward_model import score_answers
from instruct_jax.stages.text import text_rows
from instruct_jax.stages.trained import TrainedModel, load_trained
from instruct_jax.training.mesh import make_mesh

STUDENTS: dict[str, Targets] = {"distill:samples": "samples", "distill:logits": "logits"}


# Beside what every run writes; --overwrite replaces these.
WRITES = ("compression.json", "compression.md", "distill_*/", "distill_*/distill.jsonl")


@dataclass(frozen=True)
class Config(Settings):
    """What is made smaller, how, and what it is measured on."""

    acts_if: ClassVar[Mapping[str, str]] = {
        **data_acts("prompts", "documents"),
        "compute.remat": "students",
        "distill": "students",
        "distill.eval_every": never("a student is measured when it is done"),
        "distill.best_metric": never("a student is measured when it is done"),
        "distill.best_mode": never("a student is measured when it is done"),
    }

    model: str = setting("runs/ppo_ptx/model", "model folder of the original, a language model")
    reward_model: str | None = setting(None, "folder of the scalar model that scores answers")
    compute: ComputeConfig = ComputeConfig()
    variants: tuple[str, ...] = setting(
        ("int8",),
        "what is made: int8, int8_activations, int4, nf4, fp8, int8_cache, prune:SHARE,"
        " distill:samples, distill:logits",
    )
    data: DataConfig = DataConfig()
    prompts: int = setting(400, "prompts that every variant answers", low=1)
    document_length: int = setting(96, "tokens of a row of held-out text", low=2, unit="tokens")
    prompt_length: int = setting(56, "tokens of the longest prompt", low=1, unit="tokens")
    response_length: int = setting(24, "tokens that an answer may have", low=1, unit="tokens")
    temperature: float = setting(1.0, "temperature of sampling; 0 is greedy", low=0.0)
    batch_size: int = setting(128, "answers that are sampled together", low=1)
    seed: int = setting(0, "seed of the answers", low=0, high=2**32 - 1)
    distill_prompts: int = setting(
        4_000, "training prompts that a student's teacher answers", low=1, needs="students"
    )
    distill: DistillConfig = DistillConfig()

    def __post_init__(self) -> None:
        """ConfigError for a variant that there is not."""
        super().__post_init__()
        for name in self.variants:
            if name not in STUDENTS and not is_variant(name):
                known = ", ".join((*NAMES, *STUDENTS))
                raise ConfigError(f"variants: {name!r} is none of {known}")

    @property
    def students(self) -> tuple[str, ...]:
        """The variants that are trained."""
        return tuple(name for name in self.variants if name in STUDENTS)


def main(config: Config, run: cli.Run) -> dict[str, Any]:
    """Measures the original and all variants; returns what compression.json holds."""
    original, reward = load_models(config)
    source = open_source(config.data)
    run.record_data(source.provenance(), source.licences(), source.counts())
    kept = {"length": config.document_length, "folder": config.data.token_folder(run.workdir)}
    documents = text_rows(source, "valid", original.tokenizer, **kept)[:]
    prompts = _fitting(config, original, source, "test", limit=config.prompts)

    def answer(model: Model, params: Any, rows: Sequence[Prompt]) -> list[Completion]:
        return _answers(config, original, model, params, rows)

    graders = _graders(config, original, reward, source, prompts)
    exam = Exam(prompts, documents, answer, graders, warm_up=config.batch_size)
    plain = as_it_is(original.model, original.params)
    before = measure(plain, plain, exam)
    results = {ORIGINAL: summary(before, before)}
    for name in config.variants:
        if name in STUDENTS:
            variant = _student(config, run, STUDENTS[name], original, source)
        else:
            variant = compress(original.model, original.params, name)
        results[name] = summary(measure(variant, plain, exam), before)
    report = {
        "model": config.model,
        "prompts": len(prompts),
        "held_out_tokens": int(documents.size),
        "variants": results,
    }
    write_json(run.workdir / "compression.json", report)
    text = compression_table(results)
    write_text(run.workdir / "compression.md", text)
    print(text)
    return report


def load_models(config: Config) -> tuple[TrainedModel, TrainedModel | None]:
    """The original and the reward model. Raises ConfigError where a length does not fit them."""
    original = load_trained(
        config.model, kind="language", compute=config.compute, field="config.model"
    )
    check_length(original.config, config.document_length, field="config.document_length")
    longest = config.prompt_length + config.response_length
    field = "config.prompt_length + response_length"
    check_length(original.config, longest, field=field)
    if config.reward_model is None:
        return original, None
    reward = load_trained(
        config.reward_model, kind="scalar", compute=config.compute, field="config.reward_model"
    )
    check_length(reward.config, longest, field=f"{field}, of config.reward_model")
    return original, reward


def _student(
    config: Config, run: cli.Run, targets: Targets, teacher: TrainedModel, source: Source
) -> Variant:
    """A student of the teacher's answers to training prompts, in WORKDIR/distill_TARGETS."""
    prompts = _fitting(config, teacher, source, "train", limit=config.distill_prompts)
    student = teach(
        config.distill,
        targets,
        teacher,
        prompts,
        _answers(config, teacher, teacher.model, teacher.params, prompts, draw=1),
        prompt_length=config.prompt_length,
        response_length=config.response_length,
        mesh=make_mesh(run.mesh),
        workdir=run.workdir / f"distill_{targets}",
    )
    trained, layers = student.model, student.model.config.num_layers
    return as_it_is(trained.model, trained.params, layers=layers, answers=student.answers)


def _fitting(
    config: Config, trained: TrainedModel, source: Source, split: Any, *, limit: int
) -> list[Prompt]:
    """The first prompts of a split that fit `prompt_length`."""
    fitting = [
        row
        for row in source.prompts(split)
        if len(trained.tokenizer.encode(row.text)) <= config.prompt_length
    ]
    return fitting[:limit]


def _answers(
    config: Config,
    trained: TrainedModel,
    model: Model,
    params: Any,
    prompts: Sequence[Prompt],
    *,
    draw: int = 0,
) -> list[Completion]:
    return complete(
        model,
        params,
        trained.tokenizer,
        [row.text for row in prompts],
        key=jax.random.fold_in(jax.random.key(config.seed), draw),
        max_new_tokens=config.response_length,
        prompt_length=config.prompt_length,
        batch_size=config.batch_size,
        temperature=config.temperature,
    )


def _graders(
    config: Config,
    original: TrainedModel,
    reward: TrainedModel | None,
    source: Source,
    prompts: Sequence[Prompt],
) -> dict[str, Callable[[Sequence[Completion]], np.ndarray]]:
    """The reward model where one is given, and the judge of the embedded world in it."""
    graders: dict[str, Callable[[Sequence[Completion]], np.ndarray]] = {}
    if reward is not None:
        graders["reward"] = lambda answers: score_answers(
            reward,
            original.tokenizer,
            [row.text for row in prompts],
            answers,
            prompt_length=config.prompt_length,
            response_length=config.response_length,
        )
    if isinstance(source, ToySource):
        judge = source.world.judge
        graders["gold"] = lambda answers: np.array(
            [judge(row, a.text, a.ended).overall for row, a in zip(prompts, answers, strict=True)]
        )
    return graders


if __name__ == "__main__":
    cli.run(main, Config, default="configs/compress.py", writes=WRITES)
