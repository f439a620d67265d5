"""The report of a run: one HTML page, one JSON file, one picture, one table for the terminal.

A report is a plain dict. Every key but `title` may be absent, and its section is left out:

    title            str
    summary          str, one paragraph under the title
    win_rate_vs_sft  {model: {mean, low, high, [wins, ties, losses], [seeds: [float, ...]]}}, in
                     the order of the figure; `seeds` are the means of single runs
    gold             {model: {criterion: {mean, low, high}}}; criteria helpful, honest, harmless
                     in 0..1 and overall in 1..7
    flags            {model: {flag: share}}, the binary metadata of EVAL-3
    reward_model     {accuracy, length_only, labelers: {mean, low, high}, log_loss, ece, pairs,
                     prompts, calibration: [{low, high, pairs, predicted, observed}], by_sources,
                     by_dataset: {name: {mean, low, high}}, length_correlation_within,
                     mean_better, mean_worse, mean_demonstration}; only `accuracy` is required;
                     `labelers` is the gold judge on the same labels, the ceiling
    pretrain_loss    {model: nats per token on held-out pretraining text}
    tasks            {task: {model: {mean, low, high}}}, few-shot accuracy
    kl               {run: nats per response to the reference}; from `curves` when absent
    curves           {run: [row, ...]}, the rows of a stage's metrics file; runs whose rows have a
                     `kl` are drawn as reinforcement learning, the others as supervised stages
    selection        [{epoch, valid_loss, score, [chosen]}], SFT-4
    samples          [{prompt, [family, kind, use_case], model: {text, ended, [gold]}, ...}]
    timings          {phase: seconds}
    environment      {name: value}
    config           nested dict
    notes            [str, ...], what the figures do and do not show

Models are named gpt, gpt_prompted, sft, ppo, ppo_ptx or anything else. Intervals are 95 %.
`report.json` holds the same dict with `rm_accuracy`, the interval of the reward model, and `kl`
filled in; a number that is not finite is null.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from instruct_jax.evaluation.figure import write_win_rates
from instruct_jax.evaluation.markup import grade, label_of, number, percent
from instruct_jax.evaluation.page import page
from instruct_jax.files import write_json, write_text

Report = Mapping[str, Any]

KEYS = (
    "title",
    "summary",
    "win_rate_vs_sft",
    "gold",
    "flags",
    "reward_model",
    "pretrain_loss",
    "tasks",
    "kl",
    "curves",
    "selection",
    "samples",
    "timings",
    "environment",
    "config",
    "notes",
)
_INTERVAL = ("mean", "low", "high")
_LAST_ROWS = 10  # of a curve, whose mean is its final KL


def write_report(directory: str | Path, report: Report) -> Path:
    """Writes report.html, report.json and, given win rates, figure1.png; the path of the page.

    Files are replaced whole. Raises ValueError for a report that is not of the form above.
    """
    report = complete_report(report)
    folder = Path(directory)
    write_json(folder / "report.json", report)
    if "win_rate_vs_sft" in report:
        write_win_rates(folder / "figure1.png", report["win_rate_vs_sft"])
    write_text(folder / "report.html", page(report))
    return folder / "report.html"


def complete_report(report: Report) -> dict[str, Any]:
    """The report as report.json holds it: checked, plain, with `kl` and `rm_accuracy` filled in."""
    _check(report)
    plain = _plain(report)
    ends = {name: _final_kl(rows) for name, rows in plain.get("curves", {}).items()}
    if measured := {name: kl for name, kl in ends.items() if kl is not None}:
        plain["kl"] = measured | plain.get("kl", {})
    if accuracy := plain.get("reward_model", {}).get("accuracy"):
        plain["rm_accuracy"] = accuracy
    return plain


def summary_table(report: Report) -> str:
    """The figures of a report as a table of plain text, for the terminal."""
    report = complete_report(report)
    models = model_names(report)
    columns: list[tuple[str, dict[str, str]]] = []
    if rates := report.get("win_rate_vs_sft"):
        columns.append(("win rate vs SFT", {m: _interval(rates[m]) for m in rates}))
    gold = report.get("gold", {})
    for criterion in dict.fromkeys(name for scores in gold.values() for name in scores):
        cells = {
            m: grade(criterion, s[criterion]["mean"]) for m, s in gold.items() if criterion in s
        }
        columns.append((criterion, cells))
    if losses := report.get("pretrain_loss"):
        columns.append(("pretrain loss", {m: number(loss, 4) for m, loss in losses.items()}))
    for task, scores in report.get("tasks", {}).items():
        columns.append((task, {m: percent(s["mean"]) for m, s in scores.items()}))
    if kl := report.get("kl"):
        columns.append(("KL", {m: number(value) for m, value in kl.items()}))
    rows = [["", *(title for title, _ in columns)]]
    rows += [[label_of(m), *(cells.get(m, "") for _, cells in columns)] for m in models]
    lines = _aligned(rows) if columns and models else []
    if reward := report.get("reward_model"):
        parts = [f"reward model {_interval(reward['accuracy'])} of validation pairs"]
        parts += [
            f"{text} {percent(reward[key]['mean'])}"
            for key, text in (("length_only", "length only"), ("labelers", "labelers' ceiling"))
            if key in reward
        ]
        lines += ["", ", ".join(parts)]
    if timings := report.get("timings"):
        lines.append(f"total time {sum(timings.values()) / 60:.1f} min")
    return "\n".join(lines)


def evaluation_table(evaluation: Mapping[str, Any]) -> str:
    """What experiments/evaluate.py writes, as a table of plain text; no column without a figure."""
    models = evaluation["models"]

    def one(key: str, show: Callable[[Any], str]) -> dict[str, str]:
        return {name: show(row[key]) for name, row in models.items() if key in row}

    columns = {
        f"win rate vs {evaluation['baseline']}": one("win_rate", _interval),
        "gold grade": one("gold", lambda gold: number(gold["overall"]["mean"])),
        "reward": one("reward", lambda r: f"{r['mean']:.2f} [{r['low']:.2f}, {r['high']:.2f}]"),
        "held-out text loss": one("pretrain_loss", lambda loss: number(loss, 4)),
        "few-shot accuracy": one("task_accuracy", lambda task: percent(task["mean"])),
        "tokens of an answer": one("response_length", number),
        "answers that end": one("eos_rate", percent),
    }
    columns = {title: cells for title, cells in columns.items() if cells}
    rows = [["", *columns]]
    rows += [[name, *(cells.get(name, "") for cells in columns.values())] for name in models]
    return "\n".join(_aligned(rows))


def model_names(report: Report) -> list[str]:
    """All models that a report measures, in the order they first appear."""
    mappings = [report.get(key, {}) for key in ("win_rate_vs_sft", "gold", "pretrain_loss")]
    mappings += list(report.get("tasks", {}).values())
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _check(report: Report) -> None:
    if not isinstance(report.get("title"), str):
        raise ValueError("a report needs a title")
    if unknown := sorted(set(report) - {*KEYS, "rm_accuracy"}):
        raise ValueError(
            f"a report has no key {', '.join(unknown)}; it has {', '.join(sorted(KEYS))}"
        )
    intervals: dict[str, Any] = {}
    for model, rate in report.get("win_rate_vs_sft", {}).items():
        intervals[f"win_rate_vs_sft.{model}"] = rate
    for key in ("gold", "tasks"):
        for outer, group in report.get(key, {}).items():
            intervals |= {f"{key}.{outer}.{inner}": value for inner, value in group.items()}
    reward = report.get("reward_model", {})
    for key in ("accuracy", "length_only", "labelers"):
        if key in reward or (key == "accuracy" and reward):
            intervals[f"reward_model.{key}"] = reward.get(key)
    for path, value in intervals.items():
        if not isinstance(value, Mapping) or not set(_INTERVAL) <= set(value):
            raise ValueError(f"{path} must have {', '.join(_INTERVAL)}, got {value!r}")


def _plain(value: Any) -> Any:
    """JSON's own types: NumPy and JAX scalars become numbers, tuples lists, NaN null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Path):
        return str(value)
    array = np.asarray(value)
    if array.dtype == object:
        return str(value)
    item = array.tolist()
    if isinstance(item, list):
        return _plain(item)
    return None if isinstance(item, float) and not math.isfinite(item) else item


def _final_kl(rows: list[dict[str, Any]]) -> float | None:
    values = [row["kl"] for row in rows if row.get("kl") is not None][-_LAST_ROWS:]
    return sum(values) / len(values) if values else None


def _interval(value: Mapping[str, float]) -> str:
    low, high = (percent(value[end]).removesuffix(" %") for end in ("low", "high"))
    return f"{percent(value['mean'])} [{low}, {high}]"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
