"""What was measured, section by section: preferences, reward model, alignment tax, time.

Each function takes the report (`report.py` has its form) and returns the HTML of its section, or
nothing when the report has nothing for it. Everything that comes from data is escaped.
"""

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from instruct_jax.evaluation.charts import Mark, Series, bar_chart, interval_chart, line_chart
from instruct_jax.evaluation.markup import (
    duration,
    figure,
    grade,
    label_of,
    number,
    percent,
    style_of,
    table,
    wrap,
)

Report = Mapping[str, Any]

CRITERIA = {"helpful": "Helpful", "honest": "Honest", "harmless": "Harmless"}
MEASURES = {"accuracy": "Reward model", "length_only": "Length only", "labelers": "Ceiling"}


def preferences(report: Report) -> str:
    """Figure 1: win rates against SFT."""
    rates = report.get("win_rate_vs_sft", {})
    if not rates:
        return ""
    marks = [mark_of(name, rate, rates) for name, rate in rates.items()]
    top = max(0.75, *(rate["high"] for rate in rates.values()))
    chart = interval_chart(marks, span=(0, top), reference=0.5, label="Win rates against SFT")
    caption = (
        "Figure 1. How often the judge prefers a model's answer to that of SFT, ties counted half;"
        " prompts of contributors unseen in training. SFT itself is a second, independent sample."
    )
    if any(rate.get("seeds") for rate in rates.values()):
        caption += " Small dots are single runs."
    counts = [k for k in ("wins", "ties", "losses") if all(k in r for r in rates.values())]
    rows = [
        [label_of(name), *interval_cells(rate), *(f"{rate[k]:,}" for k in counts)]
        for name, rate in rates.items()
    ]
    return figure(chart, caption, table(["model", "win rate", "low", "high", *counts], rows))


def criteria(report: Report) -> str:
    """Helpful, honest and harmless apart, and what the judge noted."""
    gold = report.get("gold", {})
    names = list(dict.fromkeys(name for scores in gold.values() for name in scores))
    if not names:
        return ""
    charts = [
        panel(
            title,
            interval_chart(
                [mark_of(m, s[name], gold) for m, s in gold.items() if name in s],
                span=(0, 1),
                steps=2,
                label=title,
            ),
        )
        for name, title in CRITERIA.items()
        if name in names
    ]
    rows = [
        [label_of(m), *(_graded(name, scores.get(name)) for name in names)]
        for m, scores in gold.items()
    ]
    body = figure(
        wrap("grid3", "".join(charts)),
        "Mean grades of the gold judge, each criterion apart: they need not agree.",
        table(["model", *names], rows),
    )
    return body + _flags(report.get("flags", {}))


def _flags(flags: Mapping[str, Mapping[str, float]]) -> str:
    if not flags:
        return ""
    columns = list(dict.fromkeys(flag for shares in flags.values() for flag in shares))
    rows = [
        [column.replace("_", " "), *(percent(shares.get(column), 0) for shares in flags.values())]
        for column in columns
    ]
    inside = table(["share of answers", *(label_of(m) for m in flags)], rows)
    return f"<details><summary>What the judge noted of the answers</summary>{inside}</details>"


def reward_model(report: Report) -> str:
    """Accuracy beside the length-only baseline and the ceiling; calibration; groups."""
    reward = report.get("reward_model")
    if not reward:
        return ""
    styles = {"accuracy": "s2", "length_only": "s5", "labelers": "s0"}
    marks = [
        Mark(text, styles[key], *(reward[key][end] for end in ("mean", "low", "high")))
        for key, text in MEASURES.items()
        if key in reward
    ]
    span = (min(0.5, *(m.low for m in marks)), max(0.8, *(m.high for m in marks)))
    chart = interval_chart(marks, span=span, reference=0.5, label="Accuracy")
    counts = f", {reward['pairs']:,} pairs" if "pairs" in reward else ""
    counts += f" of {reward['prompts']:,} prompts" if "prompts" in reward else ""
    caption = f"Share of the validation pairs put in the labelers' order{counts}."
    if "length_only" in reward:
        caption += " Length only: the best that the lengths of the answers can do."
    if "labelers" in reward:
        caption += " Ceiling: the gold judge on the same noisy labels."
    rows = [[m.label, percent(m.mean), percent(m.low), percent(m.high)] for m in marks]
    body = figure(chart, caption, table(["", "accuracy", "low", "high"], rows))
    groups = _facts(reward) + _groups(reward)
    return body + wrap("grid2", _calibration(reward) + wrap("stack", groups))


def _facts(reward: Report) -> str:
    names = {
        "log_loss": "log-loss (nats)",
        "ece": "expected calibration error",
        "length_correlation_within": "correlation with length, within prompts",
        "mean_better": "mean score of the better answer",
        "mean_worse": "mean score of the worse answer",
        "mean_demonstration": "mean score of demonstrations",
    }
    rows = [[text, f"{reward[k]:.3f}"] for k, text in names.items() if reward.get(k) is not None]
    return panel("On the validation pairs", table(["", ""], rows)) if rows else ""


def _calibration(reward: Report) -> str:
    bins = [b for b in reward.get("calibration", []) if b["pairs"]]
    if not bins:
        return ""
    x, y = [b["predicted"] for b in bins], [b["observed"] for b in bins]
    chart = line_chart(
        [Series("Reward model", "s2", x, y)],
        title="Share that was preferred",
        x_label="predicted probability",
        diagonal=True,
        span=(0, 1),
    )
    rows = [
        (
            f"{b['low']:.1f}–{b['high']:.1f}",
            number(b["predicted"]),
            number(b["observed"]),
            f"{b['pairs']:,}",
        )
        for b in bins
    ]
    caption = (
        "Calibration: how often an answer given probability p is preferred. Each pair enters from"
        " both sides, so the curve is symmetric."
    )
    numbers = table(["bin", "predicted", "observed", "pairs"], rows)
    return figure(wrap("square", chart), caption, numbers)


def _groups(reward: Report) -> str:
    body = ""
    for key, title in (("by_dataset", "By data set"), ("by_sources", "By pair of sources")):
        groups = {name: value for name, value in reward.get(key, {}).items() if name.strip(" /")}
        if len(groups) > 1:
            rows = [[name, *interval_cells(value)] for name, value in groups.items()]
            body += panel(title, table(["", "accuracy", "low", "high"], rows))
    return body


def alignment_tax(report: Report) -> str:
    """Held-out pretraining loss and few-shot accuracy, before and after."""
    losses = {m: v for m, v in report.get("pretrain_loss", {}).items() if v is not None}
    charts, tables = [], []
    if losses:
        start = losses.get("gpt", min(losses.values()))
        marks = [
            Mark(label_of(m), style_of(m, losses), v, v, v, note=f"{v - start:+.3f}")
            for m, v in losses.items()
        ]
        chart = interval_chart(marks, reference=start, as_percent=False, label="Pretraining loss")
        charts.append(panel("Held-out pretraining loss (nats per token)", chart))
        rows = [[label_of(m), f"{v:.4f}", f"{v - start:+.4f}"] for m, v in losses.items()]
        tables.append(table(["model", "pretraining loss", "change"], rows))
    rows = []
    for task, scores in report.get("tasks", {}).items():
        marks = [mark_of(m, s, scores) for m, s in scores.items()]
        charts.append(panel(task, interval_chart(marks, label=task)))
        rows += [[task, label_of(m), *interval_cells(s)] for m, s in scores.items()]
    if rows:
        tables.append(table(["task", "model", "accuracy", "low", "high"], rows))
    if not charts:
        return ""
    caption = "Before and after alignment; the dashed line is the pretrained model's loss."
    return figure(wrap("grid2", "".join(charts)), caption, "".join(tables))


def timings(report: Report) -> str:
    """Wall time of each phase."""
    seconds = report.get("timings", {})
    if not seconds:
        return ""
    bars = [(label_of(name), value, duration(value)) for name, value in seconds.items()]
    rows = [[name, f"{value:,.1f}"] for name, value, _ in bars]
    rows.append(["total", f"{sum(seconds.values()):,.1f}"])
    chart = bar_chart(bars, label="Time of each phase")
    return figure(chart, "Wall time of each phase.", table(["phase", "seconds"], rows))


def mark_of(name: str, value: Mapping[str, Any], names: Iterable[str]) -> Mark:
    """The row of a model in an interval chart."""
    ends = (value["mean"], value["low"], value["high"])
    return Mark(label_of(name), style_of(name, names), *ends, tuple(value.get("seeds") or ()))


def interval_cells(value: Mapping[str, float]) -> list[str]:
    """Mean, low and high as the cells of a table."""
    return [percent(value[end]) for end in ("mean", "low", "high")]


def panel(title: str, body: str) -> str:
    """One of several charts or tables under a heading of its own."""
    return f"<div><h3>{escape(title)}</h3>{body}</div>"


def _graded(criterion: str, value: Mapping[str, float] | None) -> str:
    if value is None:
        return "–"
    mean, low, high = (grade(criterion, value[end]) for end in ("mean", "low", "high"))
    return f"{mean} [{low.removesuffix(' %')}, {high.removesuffix(' %')}]"
