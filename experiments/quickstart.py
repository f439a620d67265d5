"""The whole of InstructGPT on the embedded world, in minutes, from nothing.

    python experiments/quickstart.py --workdir=runs/quickstart

Pretrains a small GPT, fine-tunes it on demonstrations (M1) and for RL (M3), collects rankings from
simulated labelers, trains the reward model, picks the SFT epoch by its score, runs PPO and PPO-ptx,
and judges all of them on prompts of contributors that training never saw. Ends with the table, and
WORKDIR/report.html and report.json. Every part is the script of its name with the preset of its
name in configs/; run again, it goes on where it stopped.
"""

import dataclasses
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import collect
import evaluate
import jax
import ppo
import pretrain
import reward_model
import select_sft
import sft

from instruct_jax import cli
from instruct_jax.evaluation.report import summary_table, write_report
from instruct_jax.files import read_lines, read_object, write_json
from instruct_jax.settings import Settings, setting

MODELS = {"gpt": "pretrain", "sft": "select_sft", "ppo": "ppo", "ppo_ptx": "ppo_ptx"}
PARTS = (
    "pretrain", "sft", "rlhf_init", "collect", "reward_model", "select_sft", "ppo", "ppo_ptx",
    "evaluate",
)  # fmt: skip
# What each part is done with.
RESULTS = {"collect": "comparisons.jsonl", "evaluate": "evaluation.json"}
# Beside what every run writes; --overwrite replaces these, the parts as runs of their own.
WRITES = (
    "timings.json", "timings.tmp", "report.json", "report.html", "figure1.png",
    *(f"{part}/" for part in PARTS),
)  # fmt: skip


@dataclass(frozen=True)
class Config(Settings):
    """The size of every part, and its seed."""

    preset: Literal["toyworld", "debug"] = setting(
        "toyworld", "size in the configs of all stages: minutes, or seconds for debug"
    )
    seed: int = setting(0, "of every part", low=0, high=2**32 - 1)


def main(config: Config, run: cli.Run) -> Path:
    """Runs all parts and returns the report."""
    pipeline = Pipeline(config, run)
    part = pipeline.part
    gpt = part("pretrain", pretrain)
    sft_epochs = part("sft", sft, init=gpt, keep_epochs=True)
    rlhf_init = part("rlhf_init", sft, preset="_rlhf_init", config_file="sft", init=gpt)
    comparisons = part("collect", collect, policy=sft_epochs)
    reward = part("reward_model", reward_model, init=sft_epochs, comparisons=comparisons)
    part("select_sft", select_sft, epochs=run.workdir / "sft" / "epochs", reward_model=reward)
    policies = {"init": rlhf_init, "reward_model": reward}
    part("ppo", ppo, **policies)
    part("ppo_ptx", ppo, preset="_ptx", config_file="ppo", **policies)
    models = tuple(f"{name}={run.workdir / part}/model" for name, part in MODELS.items())
    part("evaluate", evaluate, models=models, prompted=("gpt",), reward_model=reward)
    report = build_report(config, run.workdir, pipeline.timings)
    page = write_report(run.workdir, report)
    print(f"\n{summary_table(report)}\n\nreport: {page}")
    return page


class Pipeline:
    """Runs the parts in order; a finished part is not run again, and its time is kept.

    One whose result is gone is run again, which gives the same result.
    """

    def __init__(self, config: Config, run: cli.Run) -> None:
        self.config, self.run = config, run
        self._path = run.workdir / "timings.json"
        self.timings: dict[str, float] = _timings(self._path)

    def part(
        self,
        name: str,
        script: Any,
        *,
        preset: str = "",
        config_file: str | None = None,
        **changes: Any,
    ) -> Path:
        """The result of `script.main` in WORKDIR/name: a model folder or a file of rows.

        The configuration is that of `configs/FILE.py:PRESET`, with the run's seed and `changes`.
        """
        workdir = self.run.workdir / name
        spec = f"configs/{config_file or name}.py:{self.config.preset}{preset}"
        config = seeded(cli.resolve(script.Config, cli.load_config(spec), {}), self.config.seed)
        if "comparisons" in changes:
            files = (str(changes.pop("comparisons")),)
            config = dataclasses.replace(
                config, data=dataclasses.replace(config.data, comparisons=files)
            )
        changes = {k: str(v) if isinstance(v, Path) else v for k, v in changes.items()}
        config = dataclasses.replace(config, **changes)
        done = workdir / RESULTS.get(name, "model")
        if name in self.timings and (done.is_file() or (done / "model.json").is_file()):
            print(f"== {name}: done before")
            return done
        print(f"== {name}", flush=True)
        began = time.monotonic()
        record = cli.describe(config, spec, self.run.mesh, [], writes=script.WRITES)
        with cli.open_workdir(workdir, config, record):
            script.main(config, cli.Run(workdir, self.run.mesh))
        self.timings[name] = round(time.monotonic() - began, 1)
        write_json(self._path, self.timings)
        return done


def _timings(path: Path) -> dict[str, float]:
    """Seconds by part; where they cannot be read every part is looked at again."""
    try:
        timings = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    kept = timings.items() if isinstance(timings, dict) else ()
    return {part: t for part, t in kept if part in PARTS and isinstance(t, int | float)}


def seeded(config: Any, seed: int) -> Any:
    """`config` with every field called `seed`, at any depth, set to `seed`."""
    changes = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "seed":
            changes["seed"] = seed
        elif dataclasses.is_dataclass(value):
            changes[field.name] = seeded(value, seed)
    return dataclasses.replace(config, **changes)


def build_report(config: Config, workdir: Path, timings: dict[str, float]) -> dict[str, Any]:
    """What the parts wrote, in the form of `evaluation.report`."""

    def read(path: str) -> Any:
        return read_object(workdir / path)

    models = read("evaluate/evaluation.json")["models"]
    reward, labelers = read("reward_model/accuracy.json"), read("collect/labelers.json")
    selection = read("select_sft/selection.json")
    error = 1.96 * labelers["ceiling_standard_error"]
    ceiling = labelers["ceiling"]
    order = ("gpt", "gpt_prompted", "sft", "ppo", "ppo_ptx")
    measured = {name: models[name] for name in order}
    samples = read_lines(workdir / "evaluate/samples.jsonl")
    return {
        "title": "InstructGPT on the embedded world",
        "summary": (
            f"A GPT pretrained for {timings['pretrain'] / 60:.1f} minutes, aligned in three stages "
            f"and judged by the world's own gold judge on {len(samples)} prompts of contributors "
            "that no training row comes from. Seed "
            f"{config.seed}."
        ),
        "win_rate_vs_sft": {name: model["win_rate"] for name, model in measured.items()},
        "gold": {name: model["gold"] for name, model in measured.items()},
        "flags": {name: model["flags"] for name, model in measured.items()},
        "reward_model": {
            **reward,
            "labelers": {"mean": ceiling, "low": ceiling - error, "high": ceiling + error},
        },
        "pretrain_loss": _present(models, "pretrain_loss"),
        "tasks": {"few-shot accuracy": _present(models, "task_accuracy")},
        "curves": {part: read_lines(workdir / part / file) for part, file in CURVES.items()},
        "selection": [
            {
                "epoch": int(epoch),
                "valid_loss": row["loss"],
                "score": row["score"],
                "chosen": int(epoch) == selection["selected_epoch"],
            }
            for epoch, row in selection["epochs"].items()
        ],
        "samples": samples[:24],
        "timings": timings,
        "environment": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        },
        "config": {name: read(f"{name}/config.json")["config"] for name in timings},
        "notes": [
            f"Two labelers agree on {labelers['agreement']:.1%} of the pairs they both order; the "
            f"gold judge agrees with a labeler on {ceiling:.1%}, the ceiling of a reward model.",
            "Win rates are of one sample a prompt against a sample of the SFT model, ties half; "
            "SFT itself is compared with a second sample of its own.",
            "The judge is a program that knows each prompt's hidden task; it is the truth of this "
            "world and of nothing beyond it.",
        ],
    }


CURVES = {
    "pretrain": "pretrain.jsonl", "sft": "sft.jsonl", "rlhf_init": "sft.jsonl",
    "reward_model": "reward_model.jsonl", "ppo": "ppo.jsonl", "ppo_ptx": "ppo.jsonl",
}  # fmt: skip


def _present(models: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: model[key] for name, model in models.items() if key in model}


if __name__ == "__main__":
    cli.run(main, Config, default="configs/quickstart.py:toyworld", writes=WRITES)
