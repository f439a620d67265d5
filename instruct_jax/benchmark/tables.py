"""What `experiments/benchmark.py` shows of its figures: Markdown tables, and pictures as PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from instruct_jax.evaluation.figure import INK, save_figure

PALETTE = ("#2f7fc1", "#d9621e", "#0b9a6d", "#b07fd8", "#868e96", "#b58900", "#c2255c", "#1098ad",
           "#5c940d")  # fmt: skip

Row = Mapping[str, Any]
_START_PARTS = ("imports", "setup", "tracing", "compiling", "step")


def phase_table(rows: Sequence[Row]) -> str:
    """One line a phase, of the JSON rows."""
    head = (
        "phase", "seconds", "compile s", "tokens/s", "sequences/s", "MFU", "MBU", "roofline",
        "occupancy", "real / padded tokens", "memory",
    )  # fmt: skip
    body = [
        (
            row["phase"],
            f"{row['seconds']:.3f}",
            f"{row['compile_seconds']:.1f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['sequences_per_second']:,.2f}",
            _percent(row["mfu"]),
            _percent(row["mbu"]),
            f"{row['roofline']:.2f}",
            "" if row["occupancy"] is None else _percent(row["occupancy"]),
            f"{row['real_tokens']:,} / {row['padded_tokens']:,}",
            "" if row["memory"] is None else f"{row['memory']['peak'] / 2**20:,.0f} MiB",
        )
        for row in rows
    ]
    return _markdown(head, body)


def peer_table(rows: Sequence[Row]) -> str:
    """One line a comparison, of the JSON rows."""
    head = ("phase", "peer", "unit", "ours / s", "peer / s", "ratio", "seconds a turn")
    body = [
        (
            row["phase"],
            row["peer"],
            row["unit"],
            f"{row['ours']:,.2f}",
            f"{row['theirs']:,.2f}",
            f"{row['ratio']:.2f}",
            f"{_middle(row['ours_seconds']):.2f} / {_middle(row['theirs_seconds']):.2f}",
        )
        for row in rows
    ]
    return _markdown(head, body)


def sweep_table(rows: Sequence[Row]) -> str:
    """One line a point of a sweep."""
    head = ("what grows", "value", "phase", "seconds", "tokens/s", "GFLOP", "MFU", "roofline")
    body = [
        (
            row["field"],
            str(row["value"]),
            row["phase"],
            f"{row['seconds']:.3f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['flops'] / 1e9:,.1f}",
            _percent(row["mfu"]),
            f"{row['roofline']:.2f}",
        )
        for row in rows
    ]
    return _markdown(head, body)


def startup_table(rows: Sequence[Row]) -> str:
    """One line a start, two a stage, of the JSON rows."""
    head = (
        "stage", "compilation cache", "seconds", "ratio", "imports", "data and models", "tracing",
        "compiling or reading", "step", "programs",
    )  # fmt: skip
    body = [
        (
            row["stage"],
            cache,
            f"{start['seconds']:.2f}",
            ratio,
            *(f"{start[part]:.2f}" for part in _START_PARTS),
            str(start["programs"]),
        )
        for row in rows
        for cache, start, ratio in (
            ("empty", row["first"], ""),
            ("full", row["second"], f"{row['ratio']:.2f}"),
        )
    ]
    return _markdown(head, body)


def write_roofline(
    path: Path, rows: Sequence[Row], *, flops: float, bandwidth: float, title: str
) -> None:
    """FLOP/s reached against FLOPs a byte, under the roof of this machine, as a PNG."""
    figure = Figure(figsize=(6.4, 4.2), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ridge = flops / bandwidth
    at = [row["flops"] / max(row["bytes"], 1.0) for row in rows]
    low, high = min([ridge, *at]) / 4, max([ridge, *at]) * 4
    axes.plot([low, ridge, high], [low * bandwidth, flops, flops], color=INK, linewidth=1.5)
    for i, (row, x) in enumerate(zip(rows, at, strict=True)):
        y = row["flops"] / row["seconds"]
        colour = PALETTE[i % len(PALETTE)]
        axes.scatter([x], [y], s=36, color=colour, zorder=3, label=row["phase"])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs a byte", color=INK)
    axes.set_ylabel("FLOP/s", color=INK)
    axes.set_title(title, color=INK, fontsize=10)
    _style(axes)
    save_figure(path, figure, transparent=True)


def write_sweeps(path: Path, rows: Sequence[Row]) -> None:
    """Tokens a second against what grows, one panel for each field; dashed: at the same MFU as the
    smallest, which is how the formulas say that cost grows.
    """
    fields = list(dict.fromkeys(row["field"] for row in rows))
    figure = Figure(figsize=(3.3 * len(fields), 3.2), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    for panel, field in enumerate(fields, start=1):
        axes = figure.add_subplot(1, len(fields), panel)
        mine = [row for row in rows if row["field"] == field]
        for i, phase in enumerate(dict.fromkeys(row["phase"] for row in mine)):
            points = [row for row in mine if row["phase"] == phase]
            colour, where = PALETTE[i % len(PALETTE)], range(len(points))
            axes.plot(where, [p["tokens_per_second"] for p in points], "o-", color=colour,
                      label=phase, markersize=4)  # fmt: skip
            first = points[0]
            rate = first["limit_seconds"] / first["seconds"]
            same = [p["tokens"] / p["limit_seconds"] * rate for p in points]
            axes.plot(where, same, "--", color=colour, linewidth=1, alpha=0.7)
            axes.set_xticks(list(where), [str(p["value"]) for p in points])
        axes.set_yscale("log")
        axes.set_xlabel(field, color=INK)
        if panel == 1:
            axes.set_ylabel("tokens / s", color=INK)
        _style(axes)
    save_figure(path, figure, transparent=True)


def _style(axes: Axes) -> None:
    axes.tick_params(colors=INK, which="both")
    axes.grid(color=INK, alpha=0.18, linewidth=0.8)
    axes.spines[:].set_visible(False)
    axes.legend(fontsize=7, labelcolor=INK, frameon=False)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
