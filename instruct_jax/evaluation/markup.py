"""The small parts the report is made of: names, numbers, tables and figures as strings of HTML."""

import math
from collections.abc import Iterable, Sequence
from html import escape

LABELS = {
    "gpt": "GPT",
    "gpt_prompted": "GPT prompted",
    "sft": "SFT",
    "rlhf_init": "RLHF init",
    "ppo": "PPO",
    "ppo_ptx": "PPO-ptx",
    "pretrain": "Pretraining",
    "reward_model": "Reward model",
    "collect": "Comparisons",
    "select_sft": "SFT selection",
    "evaluate": "Evaluation",
    "baseline": "Baseline",
}
STYLES = ("gpt", "gpt_prompted", "sft", "ppo", "ppo_ptx")


def label_of(name: str) -> str:
    """What a model or a run is called on the page."""
    return LABELS.get(name, name)


def style_of(name: str, names: Iterable[str] = ()) -> str:
    """The CSS class that colours a model: its own, or one by its place among `names`."""
    if name in STYLES:
        return name.replace("_", "-")
    others = [other for other in names if other not in STYLES]
    return f"s{others.index(name) % 6}" if name in others else "s4"


def number(value: float | None, digits: int = 3) -> str:
    """`value` to `digits` significant digits, a dash for what is missing."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e5:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def percent(value: float | None, digits: int = 1) -> str:
    """0.715 -> "71.5 %"."""
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f} %"


def grade(criterion: str, value: float | None) -> str:
    """A mean of the gold judge: `overall` is on a scale of 1 to 7, the others are shares."""
    return number(value) if criterion == "overall" else percent(value, 0)


def duration(seconds: float) -> str:
    """75 -> "1 min 15 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def figure(chart: str, caption: str, numbers: str) -> str:
    """A chart, what it shows, and its numbers as a table that can be opened."""
    return (
        f"<figure>{chart}<figcaption>{escape(caption)}</figcaption>"
        f"<details><summary>The numbers</summary>{numbers}</details></figure>"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is text, the others are numbers. Cells are escaped."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head) if any(head) else ""
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table>{top and f"<tr>{top}</tr>"}{body}</table></div>'


def wrap(name: str, body: str) -> str:
    """`body` in a division of class `name`; nothing for an empty body."""
    return f'<div class="{name}">{body}</div>' if body else ""


def thin(points: Sequence, count: int) -> list:
    """At most `count` of `points`, evenly spaced, the first and the last among them."""
    if len(points) <= count:
        return list(points)
    return [points[round(i * (len(points) - 1) / (count - 1))] for i in range(count)]
