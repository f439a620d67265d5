"""How the run got there: the curves of every stage, from the rows of their metrics files."""

from collections.abc import Mapping, Sequence
from typing import Any

from instruct_jax.evaluation.charts import Series, line_chart
from instruct_jax.evaluation.markup import figure, label_of, number, style_of, table, thin, wrap

Row = Mapping[str, Any]
Runs = Mapping[str, Sequence[Row]]

# Metrics of reinforcement learning, where the runs have them, and what they are called.
REINFORCEMENT = {
    "score": "Reward-model score",
    "gold": "Gold grade",
    "kl": "KL to the reference (nats)",
    "valid_pretrain_loss": "Held-out pretraining loss",
    "response_length": "Response length (tokens)",
    "eos_rate": "Share of responses that end",
    "entropy": "Entropy (nats per token)",
    "explained_variance": "Explained variance, value model",
    "clip_fraction": "Clipped share of the ratio",
}
TABLE_ROWS = 12


def reinforcement(report: Mapping[str, Any]) -> str:
    """Reward against KL, then every metric by iteration, the runs beside each other."""
    runs = {name: rows for name, rows in report.get("curves", {}).items() if _has(rows, "kl")}
    if not runs:
        return ""
    frontier = line_chart(
        [_series(runs, name, "kl", "score") for name in runs],
        title="Reward-model score against KL",
        x_label="KL to the reference (nats per response)",
        smooth=True,
        scatter=True,
    )
    body = ""
    if frontier:
        body = figure(
            wrap("wide", frontier),
            "What the policy gains for how far it moves: a point for each iteration, and the"
            " running mean.",
            _numbers(runs, ["step", "kl", "score"]),
        )
    metrics = [m for m in REINFORCEMENT if any(_has(rows, m) for rows in runs.values())]
    charts = [
        line_chart(
            [_series(runs, name, "step", metric) for name in runs if _has(runs[name], metric)],
            title=REINFORCEMENT[metric],
            x_label="iteration",
            smooth=True,
        )
        for metric in metrics
    ]
    return body + figure(
        wrap("grid2", "".join(charts)),
        "By iteration; the faint line is what was logged.",
        _numbers(runs, ["step", *metrics]),
    )


def supervised(report: Mapping[str, Any]) -> str:
    """Loss and accuracy of the other stages, and the choice among the epochs of SFT."""
    curves = report.get("curves", {})
    stages = {name: rows for name, rows in curves.items() if not _has(rows, "kl")}
    families = {
        "loss": {"loss": "training", "valid_loss": "held-out", "valid_pretrain_loss": "held-out"},
        "accuracy": {"accuracy": "training", "valid_accuracy": "held-out"},
    }
    charts, metrics = [], []
    for name, rows in stages.items():
        for family, words in families.items():
            present = {metric: word for metric, word in words.items() if _has(rows, metric)}
            series = [
                Series(word, f"s{i}", *_columns(rows, "step", metric))
                for i, (metric, word) in enumerate(present.items())
            ]
            title = f"{label_of(name)}: {family}"
            charts.append(line_chart(series, title=title, x_label="step", smooth=True))
            metrics += [metric for metric in present if metric not in metrics]
    body = ""
    if any(charts):
        body = figure(
            wrap("grid2", "".join(charts)),
            "Loss in nats (a token; for the reward model a pair) and accuracy by step.",
            _numbers(stages, ["step", *metrics]),
        )
    return body + _selection(report.get("selection", []))


def _selection(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    titles = {"valid_loss": "Validation loss", "score": "Reward-model score of samples"}
    charts = [
        line_chart(
            [Series(title, f"s{i}", *_columns(rows, "epoch", metric))],
            title=f"SFT: {title[0].lower()}{title[1:]}",
            x_label="epoch",
        )
        for i, (metric, title) in enumerate(titles.items())
    ]
    cells = [
        (
            str(row["epoch"]),
            number(row.get("valid_loss"), 4),
            number(row.get("score")),
            "chosen" if row.get("chosen") else "",
        )
        for row in rows
    ]
    return figure(
        wrap("grid2", "".join(charts)),
        "The choice among the epochs of SFT: by reward-model score, not by validation loss.",
        table(["epoch", "validation loss", "score", ""], cells),
    )


def _series(runs: Runs, name: str, x: str, y: str) -> Series:
    return Series(label_of(name), style_of(name, runs), *_columns(runs[name], x, y))


def _columns(rows: Sequence[Row], *names: str) -> list[list[float]]:
    """The values of the rows that have all of `names`."""
    kept = [row for row in rows if all(row.get(name) is not None for name in names)]
    return [[row[name] for row in kept] for name in names]


def _has(rows: Sequence[Row], metric: str) -> bool:
    return any(row.get(metric) is not None for row in rows)


def _numbers(runs: Runs, columns: Sequence[str]) -> str:
    """A dozen rows of each run; what an evaluation logged apart is joined to its step."""
    cells = []
    for name, rows in runs.items():
        steps: dict[int, dict[str, Any]] = {}
        for row in rows:
            steps.setdefault(row["step"], {}).update(row)
        own = [column for column in columns if _has(rows, column)]
        # Where there are evaluations, the rows with one: their numbers are the rarer ones.
        full = [row for row in steps.values() if all(row.get(c) is not None for c in own)]
        for row in thin(full if len(full) > 1 else [*steps.values()], TABLE_ROWS):
            values = [number(row.get(column)) for column in columns[1:]]
            cells.append([label_of(name), f"{row['step']:,}", *values])
    return table(["run", *(column.replace("_", " ") for column in columns)], cells)
