"""Charts for the report: strings of HTML with inline SVG, no script and nothing to load.

The SVG holds the geometry only, in a 0..100 square stretched to the width of the page with strokes
that do not scale, and all text is HTML beside it. So a chart is as readable on a phone as on a
screen, and its colours follow the page's light or dark style through the class of each series.
"""

import math
from collections.abc import Callable, Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

from instruct_jax.evaluation.markup import number, percent, thin

MAX_POINTS = 240  # drawn per line
FEW_POINTS = 20  # up to here each point is marked and nothing is smoothed

Point = tuple[float, float]


class Mark(NamedTuple):
    """One row of an interval chart; `dots` are single runs, `note` replaces the interval's text."""

    label: str
    style: str
    mean: float
    low: float
    high: float
    dots: tuple[float, ...] = ()
    note: str | None = None


class Series(NamedTuple):
    """One line: points where x or y is not finite are left out."""

    label: str
    style: str
    x: Sequence[float]
    y: Sequence[float]

    def points(self) -> list[Point]:
        """The points that can be drawn."""
        pairs = zip(self.x, self.y, strict=True)
        return [(x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]


def interval_chart(
    marks: Sequence[Mark],
    *,
    label: str,
    span: tuple[float, float] | None = None,
    reference: float | None = None,
    as_percent: bool = True,
    steps: int = 4,
) -> str:
    """Means with whiskers, one row each, over a common axis; `reference` is a dashed upright."""
    text = percent if as_percent else number
    values = [v for m in marks for v in (m.mean, m.low, m.high, *m.dots) if math.isfinite(v)]
    values += [] if reference is None else [reference]
    ticks = nice_ticks(*(span or (min(values), max(values))), count=steps)
    place = _scale(ticks[0], ticks[-1])
    under = f'<path class="grid" d="{"".join(f"M{place(t)} 0V10" for t in ticks)}"/>'
    if reference is not None:
        under += f'<path class="ref" d="M{place(reference)} 0V10"/>'
    rows = []
    for mark in marks:
        shapes = "".join(f'<path class="seed" d="M{place(d)} 5h.01"/>' for d in mark.dots)
        shapes += f'<path class="whisker" d="M{place(mark.low)} 5H{place(mark.high)}"/>'
        shapes += f'<path class="dot" d="M{place(mark.mean)} 5h.01"/>'
        note = mark.note
        if note is None and mark.low < mark.high:
            note = f"{text(mark.low)}–{text(mark.high)}".replace(" %", "")
        small = f" <small>{escape(note)}</small>" if note else ""
        rows.append(
            f'<div class="row {mark.style}"><span class="label">{escape(mark.label)}</span>'
            '<svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
            f'{under}{shapes}</svg><span class="value"><b>{text(mark.mean)}</b>{small}</span></div>'
        )
    axis = _ticks(ticks, place, "left", as_percent=as_percent)
    return (
        f'<div class="intervals" role="img" aria-label="{escape(label)}">{"".join(rows)}'
        f'<div class="row"><span></span><div class="ticks">{axis}</div><span></span></div></div>'
    )


def bar_chart(bars: Sequence[tuple[str, float, str]], *, label: str) -> str:
    """Horizontal bars from zero: (name, length, text at the end)."""
    longest = max((length for _, length, _ in bars), default=0.0) or 1.0
    rows = [
        f'<div class="row"><span class="label">{escape(name)}</span>'
        '<svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="bar" d="M0 5H{100 * length / longest:.2f}"/></svg>'
        f'<span class="value">{escape(text)}</span></div>'
        for name, length, text in bars
    ]
    return f'<div class="intervals" role="img" aria-label="{escape(label)}">{"".join(rows)}</div>'


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    smooth: bool = False,
    scatter: bool = False,
    diagonal: bool = False,
    span: tuple[float, float] | None = None,
) -> str:
    """Lines over common axes; nothing when there is no point.

    `smooth` draws a running mean over the faint raw line, or over faint raw points with `scatter`;
    lines of few points are marked instead. `diagonal` is the line y = x; with `span` both axes
    cover exactly that range.
    """
    drawn = [(s, thin(s.points(), MAX_POINTS)) for s in series]
    everything = [point for _, points in drawn for point in points]
    if not everything:
        return ""
    xs, ys = zip(*everything, strict=True)
    x_range, y_range = span or _range(xs), span or _range(ys, margin=0.04)
    x_ticks, y_ticks = _inner_ticks(x_range, count=4), _inner_ticks(y_range, count=5)
    place_x, place_y = _scale(*x_range), _scale(*y_range)
    grid = "".join(f"M0 {100 - float(place_y(t)):.2f}H100" for t in y_ticks)
    shapes = f'<path class="grid" d="{grid}"/>'
    if diagonal:
        shapes += '<path class="ref" d="M0 100L100 0"/>'
    for one, points in drawn:
        at = [(float(place_x(x)), 100 - float(place_y(y))) for x, y in points]
        if smooth and len(at) > FEW_POINTS:
            raw, kind = (_dots(at), "spray") if scatter else (_path(at), "raw")
            shapes += f'<path class="{kind} {one.style}" d="{raw}"/>'
            at = _running_mean(at, len(at) // 20)
        shapes += f'<path class="line {one.style}" d="{_path(at)}"/>'
        if len(at) <= FEW_POINTS:
            shapes += f'<path class="dot {one.style}" d="{_dots(at)}"/>'
    return (
        f'<div class="plot" role="img" aria-label="{escape(title)}">'
        f'<div class="head"><b>{escape(title)}</b>{_legend(series)}</div>'
        f'<div class="yt">{_ticks(y_ticks, place_y, "bottom")}</div>'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">{shapes}</svg>'
        f'<div class="xt">{_ticks(x_ticks, place_x, "left")}</div>'
        f'<div class="xl">{escape(x_label)}</div></div>'
    )


def nice_ticks(low: float, high: float, *, count: int = 4) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about `count` steps apart."""
    if not high > low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9)) * power
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _inner_ticks(span: tuple[float, float], *, count: int) -> list[float]:
    """Round numbers within the range."""
    low, high = span
    slack = 1e-9 * (high - low)
    return [t for t in nice_ticks(low, high, count=count) if low - slack <= t <= high + slack]


def _range(values: Sequence[float], *, margin: float = 0.0) -> tuple[float, float]:
    low, high = min(values), max(values)
    spare = margin * (high - low) if high > low else (abs(low) or 1) / 2
    return low - spare, high + spare


def _scale(low: float, high: float) -> Callable[[float], str]:
    """From [low, high] to the text of a coordinate in 0..100."""
    width = (high - low) or 1.0
    return lambda value: f"{100 * min(1.0, max(0.0, (value - low) / width)):.2f}"


def _ticks(
    ticks: Sequence[float],
    place: Callable[[float], str],
    side: str,
    *,
    as_percent: bool = False,
) -> str:
    step = min((b - a for a, b in pairwise(ticks)), default=1.0)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if abs(round(step, decimals) - step) > 1e-9 * step:  # steps of 0.25
        decimals += 1
    texts = [f"{100 * t:.0f} %" if as_percent else f"{t:,.{decimals}f}" for t in ticks]
    return "".join(
        f'<i style="{side}:{place(t)}%">{text}</i>' for t, text in zip(ticks, texts, strict=True)
    )


def _legend(series: Sequence[Series]) -> str:
    if len(series) < 2:
        return ""
    keys = "".join(f'<i class="key {s.style}">{escape(s.label)}</i>' for s in series)
    return f'<span class="legend">{keys}</span>'


def _path(points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in points)


def _dots(points: Sequence[Point]) -> str:
    # A line of no length with round ends is a circle that does not stretch with the picture.
    return "".join(f"M{x:.2f} {y:.2f}h.01" for x, y in points)


def _running_mean(points: Sequence[Point], radius: int) -> list[Point]:
    """Means of both coordinates over the neighbours within `radius`, fewer at the ends."""
    out = []
    for i in range(len(points)):
        window = points[max(0, i - radius) : i + radius + 1]
        out.append(
            (sum(x for x, _ in window) / len(window), sum(y for _, y in window) / len(window))
        )
    return out
