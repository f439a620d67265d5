"""Draws the logged metrics of runs over each other, as a PNG.

    python experiments/plot.py runs/ppo runs/ppo_ptx --to=curves.png
    python experiments/plot.py runs/sft --metrics=loss,grad_norm --to=sft.png

Reads WORKDIR/*.jsonl. Without --metrics: those of the first run that tell most about it.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from instruct_jax.errors import ConfigError, RunError
from instruct_jax.evaluation.figure import save_figure
from instruct_jax.files import read_lines, user_path

# In the order of interest; a run has some of them.
TELLING = (
    "score", "kl", "eos_rate", "response_length", "valid_pretrain_loss", "entropy",
    "explained_variance", "clip_fraction", "grad_cosine", "loss", "valid_loss", "accuracy",
    "valid_accuracy", "grad_norm",
)  # fmt: skip
COLOURS = ("#d9621e", "#0b9a6d", "#2f7fc1", "#b07fd8", "#868e96", "#b58900")
MOST = 6

Curve = tuple[list[int], list[float]]


def main(argv: Sequence[str] | None = None) -> None:
    """Draws; a mistake is one line and exit code 2."""
    flags = _parse(argv)
    try:
        runs = {str(run): read_curves(run) for run in flags.runs}
        first = next(iter(runs.values()))
        wanted = flags.metrics.split(",") if flags.metrics else _telling(first)
        unknown = [name for name in wanted if not any(name in run for run in runs.values())]
        if unknown:
            raise ConfigError(
                f"no run has logged {', '.join(unknown)}; there are {', '.join(sorted(first))}"
            )
        draw(runs, wanted, flags.to)
    except RunError as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        sys.exit(error.exit_code)
    except (OSError, ValueError) as error:  # of --to: no such folder, or no name of a picture
        print(f"error: --to={flags.to}: {error}", file=sys.stderr)
        sys.exit(ConfigError.exit_code)
    print(flags.to)


def read_curves(workdir: Path) -> dict[str, Curve]:
    """{metric: (steps, values)} of all lines in WORKDIR/*.jsonl that have a step."""
    curves: dict[str, Curve] = {}
    for path in sorted(workdir.glob("*.jsonl")):
        for row in read_lines(path):
            if type(row.get("step")) is not int:
                continue
            for name, value in row.items():
                number = isinstance(value, int | float) and not isinstance(value, bool)
                if name in ("step", "time") or not number:
                    continue
                steps, values = curves.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(float(value))
    if not curves:
        raise ConfigError(f"{workdir}: no *.jsonl with steps here; give a run's workdir")
    return curves


def draw(runs: Mapping[str, Mapping[str, Curve]], metrics: Sequence[str], path: Path) -> None:
    """One panel a metric, one line a run."""
    columns = min(3, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    figure = Figure(figsize=(3.6 * columns, 2.5 * rows + 0.4), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)  # no display is ever asked for
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel, metric in zip(panels, metrics, strict=False):
        for colour, (name, curves) in zip(COLOURS * len(runs), runs.items(), strict=False):
            if metric in curves:
                steps, values = curves[metric]
                mark = "o" if len(steps) < 8 else None
                panel.plot(steps, values, color=colour, label=name, marker=mark, markersize=3)
        panel.set_title(metric.replace("_", " "), fontsize=10, loc="left")
        panel.tick_params(labelsize=8)
        panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels:
        panel.set_axis_off()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if len(runs) > 1:
        figure.legend(handles, labels, loc="outside upper left", ncols=4, fontsize=9, frameon=False)
    save_figure(path, figure)


def _telling(curves: Mapping[str, Curve]) -> list[str]:
    return [name for name in TELLING if name in curves][:MOST]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=user_path, nargs="+", metavar="WORKDIR")
    parser.add_argument("--metrics", help="names, with commas between")
    parser.add_argument("--to", type=user_path, default=Path("curves.png"), help="the PNG to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
