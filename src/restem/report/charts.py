"""Charts as inline SVG, drawn here: a line chart and a dot chart with interval bars, and a histogram.

Each chart brings its table: the numbers that it draws, n included. Colours are CSS classes c0, c1, ... of the template, so that
charts follow light and dark; every series also has a shape of its own, for print and for eyes that do not tell hues apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from restem.report.text import clean, cut, interval, is_measured

WIDTH = 420
NARROW = 320
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 42
COLOURS = 6


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A drawn chart with all that the page puts around it, or its table alone."""

    title: str
    note: str
    """Units, n, and what the bars mean."""
    svg: Markup = field(default_factory=Markup)
    """Empty = too much for a chart: the table alone."""
    legend: Sequence[tuple[int, str, Markup]] = ()
    """Colour, name, and a small drawing of the series' mark."""
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: a metric ({"value", "low", "high", "n"}) or None at each place."""

    name: str
    points: Sequence[Mapping[str, Any] | None]


def line_chart(
    title: str, note: str, *, x: str, y: str, places: Sequence[str], series: Sequence[Series], percent: bool = True
) -> Figure:
    """Values over iterations or intervals; the vertical bars are the intervals. The y axis begins at 0."""
    drawn = [s for s in series if any(is_measured(_metric(p)) for p in s.points)]
    highest = max((p["high"] for s in drawn for p in s.points if p and is_measured(_metric(p))), default=1.0)
    axis = _Axis(height=270, highest=highest, percent=percent)
    step = (WIDTH - LEFT - RIGHT) / max(1, len(places))
    centres = [LEFT + step * (i + 0.5) for i in range(len(places))]
    parts = [axis.grid(), axis.titles(x, y), *_ticks(places, centres, axis.bottom)]
    for number, one in enumerate(drawn):
        shift = (number - (len(drawn) - 1) / 2) * min(9.0, 0.6 * step / max(1, len(drawn)))
        found = [(c + shift, p) for c, p in zip(centres, one.points, strict=True) if p and is_measured(_metric(p))]
        path = " ".join(f"{cx:.1f},{axis.y(p['value']):.1f}" for cx, p in found)
        parts.append(Markup('<polyline class="line c{}" points="{}"/>').format(number % COLOURS, path))
        for cx, p in found:
            parts += [_whisker(number, cx, axis.y(p["low"]), axis.y(p["high"])), _mark(number, cx, axis.y(p["value"]))]
    return Figure(
        title=title,
        note=note,
        svg=_svg(title, axis.width, axis.height, parts),
        legend=_legend([s.name + (_sizes(s) if percent else "") for s in drawn]),
        header=[x, *(s.name for s in drawn)],
        rows=[[place, *(_cell(s.points[i], percent) for s in drawn)] for i, place in enumerate(places)],
    )


def histogram(title: str, note: str, *, x: str, y: str, counts: Mapping[str, int], highest: int, colour: int = 0) -> Figure:
    """Counts as bars from 0; `highest` lets neighbouring histograms share an axis."""
    axis = _Axis(height=200, highest=max(1, highest), percent=False, width=NARROW)
    step = (NARROW - LEFT - RIGHT) / max(1, len(counts))
    centres = [LEFT + step * (i + 0.5) for i in range(len(counts))]
    every = math.ceil(len(counts) / 16)
    parts = [axis.grid(), axis.titles(x, y)]
    parts += _ticks([name if i % every == 0 else "" for i, name in enumerate(counts)], centres, axis.bottom)
    for centre, count in zip(centres, counts.values(), strict=True):
        top, width = axis.y(count), step * 0.72
        rect = Markup('<rect class="bar c{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="2"/>')
        parts.append(rect.format(colour % COLOURS, centre - width / 2, top, width, max(0.0, axis.bottom - top)))
        if count and len(counts) <= 16:
            parts.append(Markup('<text class="value" x="{:.1f}" y="{:.1f}">{}</text>').format(centre, top - 4, count))
    rows = [[name, str(count)] for name, count in counts.items()]
    return Figure(title=title, note=note, svg=_svg(title, axis.width, axis.height, parts), header=[x, y], rows=rows)


def dot_chart(title: str, note: str, *, y: str, groups: Sequence[str], series: Sequence[Series]) -> Figure:
    """Shares from 0 to 100% along the width, one row a group: names of any length stay readable on a phone."""
    row, gap, top = 14, 24, 8
    height = top + len(groups) * (gap + row * len(series)) + BOTTOM
    width, bottom = WIDTH - 16 - RIGHT, height - BOTTOM

    def place(value: float) -> float:
        return 16 + width * min(1.0, max(0.0, value))

    parts = []
    for share in (0, 25, 50, 75, 100):
        at = place(share / 100)
        parts.append(Markup('<line class="grid" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>').format(at, top, bottom))
        anchor = "end" if share == 100 else "middle"
        tick = Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="{}">{}%</text>')
        parts.append(tick.format(at, bottom + 15, anchor, share))
    parts.append(Markup('<text class="axis" x="{}" y="{}">{}</text>').format(WIDTH / 2, height - 6, clean(y)))
    at = top
    for i, group in enumerate(groups):
        parts.append(Markup('<text class="group" x="16" y="{}">{}</text>').format(at + 16, clean(cut(group, 60))))
        at += gap
        for number, one in enumerate(series):
            p, middle = one.points[i], at + row / 2 - 2
            if p and is_measured(_metric(p)):
                bar = Markup('<line class="whisker c{}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>')
                parts.append(bar.format(number % COLOURS, place(p["low"]), place(p["high"]), middle, middle))
                parts.append(_mark(number, place(p["value"]), middle))
            at += row
    return Figure(
        title=title,
        note=note,
        svg=_svg(title, WIDTH, height, parts),
        legend=_legend([s.name for s in series]),
        header=[],
        rows=[],
    )


@dataclass(frozen=True)
class _Axis:
    """The vertical axis, from 0 to a round number at or above the highest value."""

    height: int
    highest: float
    percent: bool
    width: int = WIDTH
    ticks: list[float] = field(init=False)

    def __post_init__(self) -> None:
        rough = max(self.highest, 1e-9) / 4
        power = 10 ** math.floor(math.log10(rough))
        step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= rough * (1 - 1e-9))
        if not self.percent and float(self.highest).is_integer():
            step = max(1.0, math.ceil(step))
        count = max(1, math.ceil(self.highest / step - 1e-9))  # all zero: one tick above it
        object.__setattr__(self, "ticks", [step * i for i in range(count + 1)])

    @property
    def bottom(self) -> int:
        return self.height - BOTTOM

    def y(self, value: float) -> float:
        return self.bottom - (self.bottom - TOP - 6) * value / self.ticks[-1]

    def grid(self) -> Markup:
        line = Markup(
            '<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
            '<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>'
        )
        scale, unit = (100, "%") if self.percent else (1, "")
        return Markup("").join(
            line.format(
                LEFT, self.width - RIGHT, self.y(tick), self.y(tick), LEFT - 6, self.y(tick) + 4, f"{scale * tick:.4g}{unit}"
            )
            for tick in self.ticks
        )

    def titles(self, x: str, y: str) -> Markup:
        middle = (self.bottom + TOP) / 2
        return Markup(
            '<text class="axis" x="{}" y="{}">{}</text><text class="axis" x="12" y="{}" transform="rotate(-90 12 {})">{}</text>'
        ).format((LEFT + self.width - RIGHT) / 2, self.height - 6, clean(x), middle, middle, clean(y))


def _svg(title: str, width: int, height: float, parts: Sequence[Markup]) -> Markup:
    head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(width, height, clean(title))
    return head + Markup("").join(parts) + Markup("</svg>")


def _ticks(names: Sequence[str], centres: Sequence[float], bottom: float) -> list[Markup]:
    text = Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>')
    return [text.format(centre, bottom + 16, clean(cut(name, 24))) for name, centre in zip(names, centres, strict=True)]


def _whisker(number: int, x: float, low: float, high: float) -> Markup:
    line = Markup('<line class="whisker c{0}" x1="{1:.1f}" x2="{1:.1f}" y1="{2:.1f}" y2="{3:.1f}"/>')
    return line.format(number % COLOURS, x, low, high)


def _mark(number: int, x: float, y: float) -> Markup:
    """Circle, square, diamond, triangle: one shape a series."""
    shapes = ("M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0", "M-4 -4h8v8h-8z", "M0 -5.5L5.5 0L0 5.5L-5.5 0z", "M0 -5L5 4H-5z")
    path = Markup('<path class="mark c{}" transform="translate({:.1f} {:.1f})" d="{}"/>')
    return path.format(number % COLOURS, x, y, shapes[number % len(shapes)])


def _legend(names: Sequence[str]) -> list[tuple[int, str, Markup]]:
    drawing = Markup('<svg viewBox="0 0 14 14" class="key" aria-hidden="true">{}</svg>')
    return [(i % COLOURS, name, drawing.format(_mark(i, 7, 7))) for i, name in enumerate(names)]


def _sizes(series: Series) -> str:
    """ " (n 96)", or the smallest and largest n."""
    sizes = sorted({point["n"] for point in series.points if point})
    return f" (n {sizes[0]})" if len(sizes) == 1 else f" (n {sizes[0]} to {sizes[-1]})"


def _cell(point: Mapping[str, Any] | None, percent: bool) -> str:
    if not point or not is_measured(_metric(point)):
        return "-"
    return interval(_metric(point)) if percent else f"{point['value']:.4g}, n = {point['n']}"


def _metric(point: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return dict(point) if point else None
