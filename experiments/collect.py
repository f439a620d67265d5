"""Samples K answers to every prompt and has simulated labelers rank them (comparison data).

    python experiments/collect.py --config=configs/collect.py:toyworld \\
        --config.policy=runs/sft/model --workdir=runs/collect

Writes WORKDIR/comparisons.jsonl, one K-wise ranking a line, and WORKDIR/labelers.json: how often
two labelers agree on a pair, and how often the gold judge agrees with a labeler, which no reward
model can beat. The labelers need a gold judge, so the prompts are those of the embedded world;
rankings of your own go straight to experiments/reward_model.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jax

from instruct_jax import cli
from instruct_jax.data.config import DataConfig
from instruct_jax.data.rows import Prompt, write_rows
from instruct_jax.data.sources import ToySource, open_source
from instruct_jax.data.tokenizer import Tokenizer
from instruct_jax.errors import ConfigError
from instruct_jax.evaluation.markup import percent
from instruct_jax.feedback.labelers import (
    accuracy,
    agreement,
    collect_rankings,
    simulated_labelers,
)
from instruct_jax.files import write_json
from instruct_jax.models.config import ComputeConfig, check_length
from instruct_jax.sampling.complete import Completion, complete
from instruct_jax.settings import Settings, never, setting
from instruct_jax.stages.inputs import data_acts, left_out, prompt_tokens
from instruct_jax.stages.trained import load_trained

# Beside what every run writes; --overwrite replaces these.
WRITES = ("comparisons.jsonl", "comparisons.jsonl.sha256", "labelers.json")


@dataclass(frozen=True)
class Config(Settings):
    """What is answered, and how it is ranked."""

    acts_if: ClassVar[Mapping[str, str]] = {
        **data_acts("prompts"),
        **dict.fromkeys(
            [
                "data.prompts",
                "data.valid",
                "data.test",
                "data.valid_fraction",
                "data.test_fraction",
                "data.toy_valid",
                "data.template",
                "data.limit",
                "data.on_bad_row",
            ],
            never("the training prompts of the embedded world are read, which its judge can grade"),
        ),
        "model.remat": never("nothing is trained"),
    }

    policy: str = setting("runs/sft/model", "model folder of the policy that answers")
    data: DataConfig = DataConfig()
    model: ComputeConfig = ComputeConfig()
    completions: int = setting(4, "answers to every prompt of the training split", low=2)
    prompt_length: int = setting(56, "of the longest prompt", low=1, unit="tokens")
    response_length: int = setting(24, "of the longest answer", low=1, unit="tokens")
    temperature: float = setting(1.0, "of sampling", above=0.0)
    batch_size: int = setting(128, "answers that are sampled together", low=1)
    labelers: int = setting(40, "simulated labelers, each with a taste of its own", low=1)
    seed: int = setting(0, "of all that is drawn", low=0, high=2**32 - 1)


def main(config: Config, run: cli.Run) -> Path:
    """Samples, ranks and returns the file of comparisons."""
    policy = load_trained(
        config.policy, kind="language", compute=config.model, field="config.policy"
    )
    longest = config.prompt_length + config.response_length
    check_length(policy.config, longest, field="config.prompt_length + response_length")
    source = open_source(config.data)
    if not isinstance(source, ToySource):
        raise ConfigError(
            "config.data.source must be 'toyworld': simulated labelers need its gold judge; "
            "rankings of yours go straight to experiments/reward_model.py"
        )
    prompts = read_prompts(config, run, source, policy.tokenizer)
    run.record_data(source.provenance(), source.licences(), source.counts())
    run.note(f"{len(prompts):,} prompts are answered {config.completions} times each")
    answers = complete(
        policy.model,
        policy.params,
        policy.tokenizer,
        [row.text for row in prompts for _ in range(config.completions)],
        key=jax.random.key(config.seed),
        max_new_tokens=config.response_length,
        prompt_length=config.prompt_length,
        batch_size=config.batch_size,
        temperature=config.temperature,
    )
    prompts, groups = ranked_groups(config, prompts, answers)
    texts = [[answer.text for answer in group] for group in groups]
    ended = [[answer.ended for answer in group] for group in groups]
    judge = source.world.judge
    labelers = simulated_labelers(judge, config.labelers, seed=config.seed)
    rankings, second = (
        collect_rankings(prompts, texts, labelers, seed=seed, ended=ended)
        for seed in (config.seed, config.seed + 1)
    )
    gold = [
        [judge(prompt, text, end).overall for text, end in zip(row, ends, strict=True)]
        for prompt, row, ends in zip(prompts, texts, ended, strict=True)
    ]
    agree, ceiling = agreement(rankings, second), accuracy(rankings, gold)
    report = {
        "prompts": len(rankings),
        "completions": config.completions,
        "labelers": config.labelers,
        "agreement": agree.rate,
        "agreement_standard_error": agree.standard_error,
        "ceiling": ceiling.rate,
        "ceiling_standard_error": ceiling.standard_error,
    }
    path = run.workdir / "comparisons.jsonl"
    write_rows(path, rankings)
    write_json(run.workdir / "labelers.json", report)
    for name, value, error in (
        ("two labelers agree", agree.rate, agree.standard_error),
        ("the gold judge agrees", ceiling.rate, ceiling.standard_error),
    ):
        run.say(f"{name + ' on':<25}{percent(value)} ± {percent(1.96 * error)} of pairs")
    run.say(f"comparisons: {path} ({len(rankings):,} prompts, {config.completions} answers each)")
    return path


def read_prompts(
    config: Config, run: cli.Run, source: ToySource, tokenizer: Tokenizer
) -> list[Prompt]:
    """The training prompts that are short enough. ConfigError where none is."""
    rows = source.prompts("train")
    counts = prompt_tokens(rows, tokenizer)
    prompts = [row for row, n in zip(rows, counts, strict=True) if n <= config.prompt_length]
    if not prompts:
        raise ConfigError(
            f"config.prompt_length={config.prompt_length}: each of the {len(rows):,} prompts is "
            f"longer; the longest has {counts.max(initial=0)} tokens"
        )
    if told := left_out(counts, len(prompts), limit=config.prompt_length):
        run.note(told)
    return prompts


def ranked_groups(
    config: Config, prompts: Sequence[Prompt], answers: Sequence[Completion]
) -> tuple[list[Prompt], list[list[Completion]]]:
    """The prompts with two answers and more that can be read, and these. ConfigError without any.

    What a labeler cannot read is not ranked; the K of its prompt is smaller.
    """
    k = config.completions
    groups = [
        [answer for answer in answers[i : i + k] if readable(answer.text)]
        for i in range(0, len(answers), k)
    ]
    both = [(row, group) for row, group in zip(prompts, groups, strict=True) if len(group) > 1]
    if not both:
        raise ConfigError(
            f"{config.policy}: no prompt has two answers that can be read; train it for longer"
        )
    return [row for row, _ in both], [group for _, group in both]


def readable(text: str) -> bool:
    """Some text, and no control characters (a young policy samples stray bytes)."""
    return bool(text.strip()) and all(c.isprintable() or c in "\n\t" for c in text)


if __name__ == "__main__":
    cli.run(main, Config, default="configs/collect.py", writes=WRITES, once=True)
