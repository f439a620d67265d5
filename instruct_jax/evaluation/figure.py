"""The picture for the README: the paper's Figure 1 for a run of ours, as a PNG."""

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from instruct_jax.evaluation.markup import label_of
from instruct_jax.files import write_bytes

# Readable on white and on the dark page of a code host: mid-tones on a transparent ground.
COLOURS = {
    "gpt": "#868e96",
    "gpt_prompted": "#b07fd8",
    "sft": "#2f7fc1",
    "ppo": "#d9621e",
    "ppo_ptx": "#0b9a6d",
}
INK = "#808890"


def save_figure(path: str | Path, figure: Figure, **options: Any) -> None:
    """The picture as a file, as all files are written; `options` of `Figure.savefig`."""
    picture = BytesIO()
    figure.savefig(picture, **options)
    write_bytes(Path(path), picture.getvalue())


def write_win_rates(path: str | Path, win_rates: Mapping[str, Mapping[str, Any]]) -> None:
    """Win rates with 95 % intervals, one column a model, single runs as small dots."""
    figure = Figure(figsize=(6.4, 3.9), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)  # no display is ever asked for
    axes = figure.add_subplot()
    axes.axhline(0.5, color=INK, linewidth=1, linestyle=(0, (4, 4)), zorder=1)
    for i, (name, rate) in enumerate(win_rates.items()):
        colour = COLOURS.get(name, "#b58900")
        axes.bar(i, rate["mean"], width=0.62, color=colour, alpha=0.30, linewidth=0, zorder=2)
        seeds = rate.get("seeds") or []
        axes.scatter([i + 0.16] * len(seeds), seeds, s=12, color=colour, alpha=0.6, zorder=3)
        axes.vlines(i, rate["low"], rate["high"], color=colour, linewidth=2.5, zorder=4)
        axes.scatter([i], [rate["mean"]], s=46, color=colour, zorder=5)
        top = max(rate["high"], rate["mean"], *seeds)
        if 0.43 < top < 0.5:
            top = 0.5  # the label would lie on the dashed line: put it above
        axes.annotate(
            f"{100 * rate['mean']:.0f} %",
            (i, top),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            color=INK,
            fontsize=10.5,
            fontweight="bold",
        )
    axes.set_xticks(range(len(win_rates)), [label_of(name) for name in win_rates], fontsize=10.5)
    axes.set_ylim(0, max(0.8, *(rate["high"] + 0.1 for rate in win_rates.values())))
    axes.set_yticks([0, 0.25, 0.5, 0.75], ["0", "25 %", "50 %", "75 %"])
    axes.set_ylabel("Win rate against SFT", color=INK, fontsize=10.5)
    axes.tick_params(colors=INK, length=0)
    axes.grid(axis="y", color=INK, alpha=0.18, linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    save_figure(path, figure, transparent=True)
