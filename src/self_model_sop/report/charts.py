"""Charts as inline SVG: lines over steps, points with intervals, bars. Colours are the page's own, so that they follow dark mode and print."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

from .words import Text, both

Point = tuple[float, float]


class Series(NamedTuple):
    """A line: its name, points, and its colour (the number of a `--c1`... variable)."""

    name: Text | str
    points: Sequence[Point]
    colour: int = 1
    dots: bool = False


class Spot(NamedTuple):
    """A value with its interval, in a row of its own."""

    name: str
    value: float
    low: float | None
    high: float | None
    shown: str
    colour: int = 1


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that cover a range."""
    if not math.isfinite(low) or not math.isfinite(high):
        return []
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
    start = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(start, math.floor(high / step + 1e-9) + 1)]


def _label(value: float) -> str:
    if value and abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:g}".replace("-", "−")


def lines(series: Sequence[Series], *, x: Text, y: Text, marks: Sequence[tuple[float, Text | str]] = (), height: int = 240, percent: bool = False) -> str:
    """Lines over a common x axis. `marks` are vertical rules with a name (phases); every point tells its values on hover."""
    points = [p for s in series for p in s.points if math.isfinite(p[1])]
    if not points:
        return ""
    width, left, right, top, bottom = 540, 44, 12, 20, 38
    x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
    y0, y1 = min(p[1] for p in points), max(p[1] for p in points)
    x1, pad = (x1 if x1 > x0 else x0 + 1), (y1 - y0) * 0.06 or abs(y1) * 0.1 or 1
    y0, y1 = y0 - pad, y1 + pad

    def at(px: float, py: float) -> tuple[float, float]:
        return left + (px - x0) / (x1 - x0) * (width - left - right), top + (y1 - py) / (y1 - y0) * (height - top - bottom)

    body = []
    for v in ticks(y0, y1):
        py = at(x0, v)[1]
        body.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{py:.1f}" y2="{py:.1f}"/>')
        body.append(f'<text class="tick" x="{left - 8}" y="{py + 4:.1f}" text-anchor="end">{f"{100 * v:g} %" if percent else _label(v)}</text>')
    for v in ticks(x0, x1, 6):
        body.append(f'<text class="tick" x="{at(v, y0)[0]:.1f}" y="{height - bottom + 18}" text-anchor="middle">{_label(v)}</text>')
    for position, name in marks:
        px = at(position, y0)[0]
        body.append(f'<line class="mark" x1="{px:.1f}" x2="{px:.1f}" y1="{top}" y2="{height - bottom}"/>')
        body.append(f'<text class="tick" x="{px + 5:.1f}" y="{top + 10}">{_both(name)}</text>')
    for s in series:
        inside = [at(*p) for p in s.points if math.isfinite(p[1])]
        body.append(f'<polyline class="line c{s.colour}" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in inside)}"/>')
        for (a, b), (px, py) in zip(inside, [p for p in s.points if math.isfinite(p[1])], strict=True):
            shown = f"{100 * py:.1f} %" if percent else f"{py:.3f}"
            radius = 4 if s.dots or len(inside) < 3 else 2.2
            body.append(f'<circle class="dot c{s.colour}" cx="{a:.1f}" cy="{b:.1f}" r="{radius}" data-tip="{_plain(s.name)} · {px:g} · {shown}"/>')
    body.append(f'<text class="axis" x="{width - right}" y="{height - 4}" text-anchor="end">{_both(x)}</text><text class="axis" x="2" y="10">{_both(y)}</text>')
    legend = "".join(f'<span><i class="key c{s.colour}"></i>{both(s.name)}</span>' for s in series) if len(series) > 1 else ""
    return f'<figure class="chart"><svg viewBox="0 0 {width} {height}" role="img" aria-label="{_plain(y)}">{"".join(body)}</svg>' + (
        f'<figcaption class="legend">{legend}</figcaption></figure>' if legend else "</figure>"
    )


def spots(rows: Sequence[Spot], *, zero: float | None = None, unit: str = "") -> str:
    """One row per value: a dot on a line that spans its interval; `zero` draws the value to compare with."""
    if not rows:
        return ""
    ends = [v for r in rows for v in (r.value, r.low, r.high) if v is not None] + ([zero] if zero is not None else [])
    low, high = min(ends), max(ends)
    pad = (high - low) * 0.08 or abs(high) * 0.1 or 1
    low, high = low - pad, high + pad
    width, left, right, row = 420, 92, 66, 30
    height = row * len(rows) + 26

    def at(v: float) -> float:
        return left + (v - low) / (high - low) * (width - left - right)

    body = []
    for v in ticks(low, high, 3):
        body.append(f'<line class="grid" x1="{at(v):.1f}" x2="{at(v):.1f}" y1="4" y2="{height - 22}"/>')
        body.append(f'<text class="tick" x="{at(v):.1f}" y="{height - 6}" text-anchor="middle">{_label(v)}{unit}</text>')
    if zero is not None:
        body.append(f'<line class="zero" x1="{at(zero):.1f}" x2="{at(zero):.1f}" y1="4" y2="{height - 22}"/>')
    for i, r in enumerate(rows):
        y = 4 + row * i + row / 2
        body.append(f'<text class="name" x="{left - 12}" y="{y + 4:.1f}" text-anchor="end">{escape(_short(r.name))}</text>')
        if r.low is not None and r.high is not None:
            body.append(f'<line class="whisker c{r.colour}" x1="{at(r.low):.1f}" x2="{at(r.high):.1f}" y1="{y}" y2="{y}"/>')
        interval = f" · {r.low:.3f} – {r.high:.3f}" if r.low is not None and r.high is not None else ""
        body.append(f'<circle class="spot c{r.colour}" cx="{at(r.value):.1f}" cy="{y}" r="5.5" data-tip="{escape(r.name)} · {escape(r.shown)}{interval}"/>')
        body.append(f'<text class="value" x="{width - right + 12}" y="{y + 4:.1f}">{escape(r.shown)}</text>')
    return f'<figure class="chart"><svg viewBox="0 0 {width} {height}" role="img">{"".join(body)}</svg></figure>'


def _short(name: str, most: int = 13) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def bars(rows: Sequence[tuple[Text | str, float, Text | str]]) -> str:
    """Horizontal bars as HTML: name, length, what is written behind it."""
    most = max((v for _, v, _ in rows), default=0.0) or 1.0

    def one(name: Text | str, value: float, shown: Text | str) -> str:
        return f'<div class="bar"><span>{both(name)}</span><i style="width:{max(0.4, 100 * value / most):.1f}%"></i><b>{both(shown)}</b></div>'

    return f'<div class="bars">{"".join(one(*r) for r in rows)}</div>'


def _both(text: Text | str) -> str:
    """Inside SVG a language is a tspan."""
    if isinstance(text, str) or text.en == text.zh:
        return escape(text if isinstance(text, str) else text.en)
    return f'<tspan class="en">{escape(text.en)}</tspan><tspan class="zh">{escape(text.zh)}</tspan>'


def _plain(text: Text | str) -> str:
    return escape(text if isinstance(text, str) else text.en)


def thinned(points: Sequence[Point], most: int = 400) -> list[Point]:
    """At most so many points: means over equal stretches, the first and the last as they are."""
    if len(points) <= most:
        return list(points)
    return [points[0], *_means(points[1:-1], most - 2), points[-1]]


def _means(points: Sequence[Point], number: int) -> Iterator[Point]:
    for i in range(number):
        part = points[i * len(points) // number : (i + 1) * len(points) // number]
        yield sum(p[0] for p in part) / len(part), sum(p[1] for p in part) / len(part)
