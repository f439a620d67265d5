"""Compares models: held-out loss, reward, answers; in the embedded world gold grades and win rates.

    python experiments/evaluate.py --config=configs/evaluate.py:toyworld --workdir=runs/evaluate \\
        --config.models="('gpt=runs/pretrain/model', 'sft=runs/sft/model', 'ppo=runs/ppo/model')"

Writes WORKDIR/evaluation.json and WORKDIR/samples.jsonl (every prompt with every model's answer).
Prompts are of contributors that no training row comes from (EVAL-1); each model answers each prompt
once, at temperature 1; the baseline answers a second time, to be compared with.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from instruct_jax import cli
from instruct_jax.data.config import DataConfig
from instruct_jax.data.rows import Prompt, plain_text
from instruct_jax.data.sources import Source, ToySource, open_source
from instruct_jax.data.tokenizer import Tokenizer
from instruct_jax.data.toyworld import ToyWorld
from instruct_jax.errors import ConfigError
from instruct_jax.evaluation.intervals import bootstrap_mean
from instruct_jax.evaluation.language import Question, held_out_loss, task_accuracy
from instruct_jax.evaluation.report import evaluation_table
from instruct_jax.evaluation.win_rate import preferences_from_scores, win_rate
from instruct_jax.files import write_json, write_lines
from instruct_jax.models.config import ComputeConfig, check_length
from instruct_jax.sampling.complete import Completion, complete
from instruct_jax.settings import Settings, never, setting
from instruct_jax.stages.inputs import (
    check_held_out,
    data_acts,
    left_out,
    measured,
    prompt_tokens,
)
from instruct_jax.stages.reward_model import score_answers
from instruct_jax.stages.text import held_out_text, names_text
from instruct_jax.stages.trained import TrainedModel, check_model, load_trained

# With less prompts than these a share has an interval of more than 14 points to each side.
FEW = 50
# Beside what every run writes; --overwrite replaces these.
WRITES = ("evaluation.json", "samples.jsonl")


@dataclass(frozen=True)
class Config(Settings):
    """What is compared, and on what."""

    acts_if: ClassVar[Mapping[str, str]] = {
        **data_acts("prompts", "documents"),
        "model.remat": never("nothing is trained"),
    }

    models: tuple[str, ...] = setting(
        ("sft=runs/sft/model",), "what is compared, each as NAME=FOLDER of a language model"
    )
    baseline: str = setting("sft", "the name that the others are compared with")
    prompted: tuple[str, ...] = setting(
        (),
        "names also tried behind a few-shot prefix, the one whose answers the reward model likes "
        "best (SFT-7)",
        needs="data.source=toyworld",
    )
    reward_model: str | None = setting(None, "model folder of a reward model that scores answers")
    data: DataConfig = DataConfig()
    model: ComputeConfig = ComputeConfig()
    prompts: int = setting(512, "held-out prompts that are answered, at most", low=1)
    prefix_prompts: int = setting(
        64, "prompts on which a few-shot prefix is chosen", low=1, needs="prompted"
    )
    tasks: int = setting(256, "few-shot questions", low=1, needs="data.source=toyworld")
    document_length: int = setting(96, "of a row of held-out text", low=2, unit="tokens")
    prompt_length: int = setting(56, "of the longest prompt", low=1, unit="tokens")
    response_length: int = setting(24, "of the longest answer", low=1, unit="tokens")
    temperature: float = setting(1.0, "of sampling; 0 takes the likeliest token", low=0.0)
    batch_size: int = setting(128, "answers that are sampled together", low=1)
    seed: int = setting(0, "of all that is drawn", low=0, high=2**32 - 1)
    measure_lengths: bool = setting(
        False, "whether prompt_length is cut to what the held-out prompts need"
    )

    def __post_init__(self) -> None:
        """ConfigError also for a model without name or folder, and for a name that is none."""
        super().__post_init__()
        names = [entry.partition("=")[0] for entry in self.models]
        for entry, name in zip(self.models, names, strict=True):
            if not name or not entry.partition("=")[2]:
                raise ConfigError(f"models: {entry!r} is not NAME=FOLDER")
            if names.count(name) > 1:
                raise ConfigError(f"models: two are called {name!r}")
        if self.baseline not in names:
            raise ConfigError(f"baseline {self.baseline!r} is none of the models {sorted(names)}")
        for name in self.prompted:
            if name not in names:
                raise ConfigError(f"prompted: {name!r} is none of the models {sorted(names)}")


def main(config: Config, run: cli.Run) -> dict[str, Any]:
    """Evaluates all models; returns what evaluation.json holds."""
    folders = dict(entry.split("=", 1) for entry in config.models)
    for folder in folders.values():
        check_model(folder, field="config.models")
    models = {}
    for name, folder in folders.items():
        models[name] = load_trained(
            folder, kind="language", compute=config.model, field="config.models"
        )
        if names_text(config.data, "test"):
            field = "config.document_length"
            check_length(models[name].config, config.document_length, field=field)
    reward = None
    if config.reward_model:
        reward = load_trained(
            config.reward_model, kind="scalar", compute=config.model, field="config.reward_model"
        )
    readers = {**models, "the reward model": reward} if reward else models
    longest = config.prompt_length + config.response_length
    for name, trained in readers.items():
        if not config.measure_lengths:
            field = f"config.prompt_length + response_length, of {name}"
            check_length(trained.config, longest, field=field)
    template, named = template_of(models)
    source = open_source(config.data, template=template, model=named)
    for folder in folders.values():
        check_held_out(config.data, source.provenance(), folder)
    world = source.world if isinstance(source, ToySource) else None
    tokenizer = models[config.baseline].tokenizer
    config, prompts = read_prompts(config, run, source, list(readers.values()))
    kept = {"length": config.document_length, "folder": config.data.token_folder(run.workdir)}
    documents = held_out_text(config.data, source, tokenizer, split="test", **kept)
    run.record_data(source.provenance(), source.licences(), source.counts())
    if not len(documents):
        run.note("no documents are held out: there is no loss of text to compare")

    run.note(f"{len(prompts):,} prompts are answered by each of {', '.join(models)}")
    answers = {"baseline": _answers(config, models[config.baseline], prompts, draw=0)}
    results: dict[str, dict[str, Any]] = {}
    for draw, (name, trained) in enumerate(models.items(), start=1):
        answers[name] = _answers(config, trained, prompts, draw=draw)
        results[name] = {}
        # Of another tokenizer's tokens a loss would say nothing.
        if len(documents) and trained.tokenizer.fingerprint == tokenizer.fingerprint:
            loss = held_out_loss(trained.model, trained.params, documents)
            results[name]["pretrain_loss"] = loss
        if world is not None:
            results[name]["task_accuracy"] = _task_accuracy(config, trained, world)
    for name in config.prompted if world is not None else ():
        choice = _choose_prefix(config, models[name], reward, world)
        answers[f"{name}_prompted"] = _prompted_answers(
            config, models[name], prompts, world, prefix=choice["chosen"]
        )
        results[f"{name}_prompted"] = {"prefix": choice}
    for name, result in results.items():
        result |= _describe(answers[name], tokenizer)
        if reward is not None:
            result["reward"] = _rewards(config, reward, tokenizer, prompts, answers[name])
        if world is not None:
            result |= _gold(world, prompts, answers[name], answers["baseline"])
    _write_samples(run.workdir / "samples.jsonl", prompts, answers, world)
    report = {
        "baseline": config.baseline,
        "prompts": len(prompts),
        "held_out_tokens": int(documents.size),
        "models": results,
    }
    write_json(run.workdir / "evaluation.json", report)
    run.say(f"{evaluation_table(report)}\n")
    run.say(f"figures: {run.workdir / 'evaluation.json'} (of {len(prompts):,} held-out prompts)")
    run.say(f"every answer: {run.workdir / 'samples.jsonl'}")
    return report


def template_of(models: Mapping[str, TrainedModel]) -> tuple[str | None, str]:
    """The template that prompts are put into, and the model that says so. ConfigError for two."""
    found = {trained.template: name for name, trained in models.items() if trained.template}
    if len(found) > 1:
        said = ", ".join(f"{name} with {template!r}" for template, name in found.items())
        raise ConfigError(f"config.models: {said}: answers to prompts of two forms compare nothing")
    return next(iter(found.items()), (None, ""))


def read_prompts(
    config: Config, run: cli.Run, source: Source, models: Sequence[TrainedModel]
) -> tuple[Config, list[Prompt]]:
    """The held-out prompts that every model can read, and the configuration with the lengths
    measured on them where it is to be so. Raises ConfigError where there is none.
    """
    rows = source.prompts("test")
    if not rows:
        raise ConfigError(
            "no prompts are held out for evaluation: raise config.data.test_fraction, or name "
            "files of their own, config.data.test.prompts"
        )
    tokenizers = {trained.tokenizer.fingerprint: trained.tokenizer for trained in models}
    counts = [prompt_tokens(rows, tokenizer) for tokenizer in tokenizers.values()]
    lengths, shortest = np.max(counts, axis=0), np.min(counts, axis=0)
    if config.measure_lengths:
        limit = min(trained.config.max_length for trained in models)
        response = min(config.response_length, limit // 2)
        room = min(config.prompt_length, limit - response)
        config = dataclasses.replace(config, prompt_length=room, response_length=response)
        form = {"limit": limit, "group": "config"}
        config, words = measured(config, lengths, np.array([response]), **form)
        run.note(words)
    fits = (lengths <= config.prompt_length) & (shortest > 0)
    fitting = [row for row, fit in zip(rows, fits, strict=True) if fit]
    told = left_out(lengths, len(fitting), limit=config.prompt_length)
    if not fitting:
        raise ConfigError(f"{told}: raise it, or start from --config=configs/evaluate.py:files")
    if told:
        run.note(told)
    count = min(len(fitting), config.prompts)
    if count < min(FEW, config.prompts):
        run.note(
            f"only {count} prompts are held out, too few to tell models apart: train with a "
            "larger config.data.test_fraction, and give it here too, or name files of their own, "
            "config.data.test.prompts"
        )
    return config, fitting[:count]


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
            scores.append(_rewards(config, reward, trained.tokenizer, prompts, answers)["mean"])
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
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    answers: Sequence[Completion],
) -> dict[str, float]:
    scores = score_answers(
        reward,
        tokenizer,
        [row.text for row in prompts],
        answers,
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
    rows = []
    for i, prompt in enumerate(prompts):
        row: dict[str, Any] = {"prompt": plain_text(prompt.text)}
        if "family" in prompt.meta:
            row |= {name: prompt.meta[name] for name in ("family", "kind", "use_case")}
        for name, given in answers.items():
            row[name] = {"text": given[i].text, "ended": given[i].ended}
            if world is not None:
                row[name]["gold"] = world.judge(prompt, given[i].text, given[i].ended).overall
        rows.append(row)
    write_lines(path, rows)


if __name__ == "__main__":
    cli.run(main, Config, default="configs/evaluate.py", writes=WRITES)
