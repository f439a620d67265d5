"""Compares models: held-out loss, reward, answers; in the embedded world gold grades and win rates.

    python experiments/evaluate.py --config=configs/evaluate.py:toyworld --workdir=runs/evaluate \\
        --config.models="('gpt=runs/pretrain/model', 'sft=runs/sft/model', 'ppo=runs/ppo/model')"

Writes WORKDIR/evaluation.json and WORKDIR/samples.jsonl (every prompt with every model's answer).
Prompts are of contributors that no training row comes from (EVAL-1); each model answers each prompt
once, at temperature 1; the baseline answers a second time, to be compared with.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from instruct_jax import cli
from instruct_jax.data.rows import Prompt
from instruct_jax.data.sources import DataConfig, ToySource, open_source
from instruct_jax.data.toyworld import ToyWorld
from instruct_jax.errors import ConfigError
from instruct_jax.evaluation.intervals import bootstrap_mean
from instruct_jax.evaluation.language import Question, held_out_loss, task_accuracy
from instruct_jax.evaluation.win_rate import preferences_from_scores, win_rate
from instruct_jax.models.config import ComputeConfig, check_length
from instruct_jax.sampling.complete import Completion, complete
from instruct_jax.settings import NEVER
from instruct_jax.stages.reward_model import score_answers
from instruct_jax.stages.stage import TrainedModel, load_trained
from instruct_jax.stages.text import text_rows

# Beside what every run writes; --overwrite replaces these.
WRITES = ("evaluation.json", "samples.jsonl")


@dataclass(frozen=True)
class Config:
    """`models` are "name=folder"; those in `prompted` are also tried with a few-shot prefix: the
    one whose answers to `prefix_prompts` validation prompts the reward model likes best (SFT-7).
    """

    acts_if: ClassVar[Mapping[str, str]] = {"model.remat": NEVER}  # nothing is trained

    models: tuple[str, ...] = ("sft=runs/sft/model",)
    baseline: str = "sft"
    prompted: tuple[str, ...] = ()
    reward_model: str | None = None
    data: DataConfig = DataConfig()
    model: ComputeConfig = ComputeConfig()
    prompts: int = 512
    prefix_prompts: int = 64
    tasks: int = 256
    document_length: int = 96
    prompt_length: int = 56
    response_length: int = 24
    temperature: float = 1.0
    batch_size: int = 128
    seed: int = 0


def main(config: Config, run: cli.Run) -> dict[str, Any]:
    """Evaluates all models; returns what evaluation.json holds."""
    models = {}
    for entry in config.models:
        name, _, folder = entry.partition("=")
        models[name] = load_trained(folder, kind="language", compute=config.model)
        check_length(models[name].config, config.document_length, field="config.document_length")
        _check_answers(config, models[name], name)
    if config.baseline not in models:
        raise ConfigError(f"baseline {config.baseline!r} is none of the models {sorted(models)}")
    reward = None
    if config.reward_model:
        reward = load_trained(config.reward_model, kind="scalar", compute=config.model)
        _check_answers(config, reward, "config.reward_model")
    source = open_source(config.data)
    world = source.world if isinstance(source, ToySource) else None
    tokenizer = models[config.baseline].tokenizer
    prompts = [
        row
        for row in source.prompts("test")
        if len(tokenizer.encode(row.text)) <= config.prompt_length
    ][: config.prompts]
    kept = {"length": config.document_length, "folder": config.data.token_folder(run.workdir)}
    documents = text_rows(source, "valid", tokenizer, **kept)[:]
    run.record_data(source.provenance(), source.licences())

    answers = {"baseline": _answers(config, models[config.baseline], prompts, draw=0)}
    results: dict[str, dict[str, Any]] = {}
    for draw, (name, trained) in enumerate(models.items(), start=1):
        answers[name] = _answers(config, trained, prompts, draw=draw)
        results[name] = {"pretrain_loss": held_out_loss(trained.model, trained.params, documents)}
        if world is not None:
            results[name]["task_accuracy"] = _task_accuracy(config, trained, world)
    for name in config.prompted:
        if world is None:
            raise ConfigError("prompted models need the embedded world's few-shot prefix")
        choice = _choose_prefix(config, models[name], reward, world)
        answers[f"{name}_prompted"] = _prompted_answers(
            config, models[name], prompts, world, prefix=choice["chosen"]
        )
        results[f"{name}_prompted"] = {"prefix": choice}
    for name, result in results.items():
        result |= _describe(answers[name], tokenizer)
        if reward is not None:
            result["reward"] = _rewards(config, reward, prompts, answers[name])
        if world is not None:
            result |= _gold(world, prompts, answers[name], answers["baseline"])
    _write_samples(run.workdir / "samples.jsonl", prompts, answers, world)
    report = {
        "baseline": config.baseline,
        "prompts": len(prompts),
        "held_out_tokens": int(documents.size),
        "models": results,
    }
    (run.workdir / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def _check_answers(config: Config, trained: TrainedModel, name: str) -> None:
    longest = config.prompt_length + config.response_length
    check_length(
        trained.config, longest, field=f"config.prompt_length + response_length, of {name}"
    )


def _answers(
    config: Config, trained: TrainedModel, prompts: Sequence[Prompt], *, draw: int
) -> list[Completion]:
    return complete(
        trained.model,
        trained.params,
        trained.tokenizer,
        [row.text for row in prompts],
        key=jax.random.fold_in(jax.random.key(config.seed), draw),
        max_new_tokens=config.response_length,
        prompt_length=config.prompt_length,
        batch_size=config.batch_size,
        temperature=config.temperature,
    )


def _choose_prefix(
    config: Config, trained: TrainedModel, reward: TrainedModel | None, world: ToyWorld
) -> dict[str, Any]:
    """The candidate whose answers have the best mean reward; the first without a reward model."""
    candidates = world.few_shot_prefixes()
    scores: list[float] = []
    if reward is not None:
        prompts = world.prompts(config.prefix_prompts, split="valid")
        for i in range(len(candidates)):
            answers = _prompted_answers(config, trained, prompts, world, prefix=i)
            scores.append(_rewards(config, reward, prompts, answers)["mean"])
    chosen = int(np.argmax(scores)) if scores else 0
    return {"chosen": chosen, "text": candidates[chosen], "rewards": scores}


def _prompted_answers(
    config: Config,
    trained: TrainedModel,
    prompts: Sequence[Prompt],
    world: ToyWorld,
    *,
    prefix: int,
) -> list[Completion]:
    """The base model behind a few-shot prefix; an answer ends at the stop string (SFT-7)."""
    raw = complete(
        trained.model,
        trained.params,
        trained.tokenizer,
        [world.prompted(row, prefix=prefix) for row in prompts],
        key=jax.random.key(config.seed + 1),
        max_new_tokens=config.response_length,
        batch_size=config.batch_size,
        temperature=config.temperature,
    )
    return [
        answer._replace(
            text=answer.text.partition(world.stop)[0],
            ended=answer.ended or world.stop in answer.text,
        )
        for answer in raw
    ]


def _task_accuracy(config: Config, trained: TrainedModel, world: ToyWorld) -> dict[str, float]:
    questions = [
        Question(task.prompt, task.answer, task.choices) for task in world.tasks(config.tasks)
    ]
    accuracy = task_accuracy(trained.model, trained.params, trained.tokenizer, questions)
    return accuracy._asdict()


def _describe(answers: Sequence[Completion], tokenizer: Any) -> dict[str, float]:
    return {
        "response_length": float(np.mean([len(answer.tokens) for answer in answers])),
        "eos_rate": float(np.mean([answer.ended for answer in answers])),
    }


def _rewards(
    config: Config,
    reward: TrainedModel,
    prompts: Sequence[Prompt],
    answers: Sequence[Completion],
) -> dict[str, float]:
    scores = score_answers(
        reward,
        [row.text for row in prompts],
        [answer.text for answer in answers],
        prompt_length=config.prompt_length,
        response_length=config.response_length,
    )
    return bootstrap_mean(scores)._asdict()


def _gold(
    world: ToyWorld,
    prompts: Sequence[Prompt],
    answers: Sequence[Completion],
    baseline: Sequence[Completion],
) -> dict[str, Any]:
    """Gold grades, the shares of the judge's flags, and the win rate against the baseline."""
    judged, against = (
        [
            world.judge(row, answer.text, answer.ended)
            for row, answer in zip(prompts, a, strict=True)
        ]
        for a in (answers, baseline)
    )
    names = ("helpful", "honest", "harmless", "overall")
    gold = {
        name: bootstrap_mean([getattr(grade, name) for grade in judged])._asdict() for name in names
    }
    flags = {
        name: float(np.mean([grade.flags[name] for grade in judged])) for name in judged[0].flags
    }
    preferences = preferences_from_scores(
        [grade.overall for grade in judged], [grade.overall for grade in against]
    )
    return {"gold": gold, "flags": flags, "win_rate": win_rate(preferences)._asdict()}


def _write_samples(
    path: Path,
    prompts: Sequence[Prompt],
    answers: dict[str, list[Completion]],
    world: ToyWorld | None,
) -> None:
    with path.open("w") as file:
        for i, prompt in enumerate(prompts):
            row: dict[str, Any] = {"prompt": prompt.text}
            if "family" in prompt.meta:
                row |= {name: prompt.meta[name] for name in ("family", "kind", "use_case")}
            for name, given in answers.items():
                row[name] = {"text": given[i].text, "ended": given[i].ended}
                if world is not None:
                    row[name]["gold"] = world.judge(prompt, given[i].text, given[i].ended).overall
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    cli.run(main, Config, default="configs/evaluate.py", writes=WRITES)
