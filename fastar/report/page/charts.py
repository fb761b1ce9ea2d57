"""Curves and heat maps as SVG, their values as data for the page's script and as a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fastar.report.page.elements import Html, folded, script_data, table, tag

WIDTH, HEIGHT, LEFT, TOP, ACROSS, DOWN = 440, 300, 52, 12, 378, 246
"""Of a chart, in units of its SVG: its size, and where the curves are in it."""
DASHES = {"-": None, "--": "7 4", "-.": "8 3 2 3", ":": "2 3"}
MARKERS = {
    "o": "M{:.1f} {:.1f}m-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0",
    "s": "M{:.1f} {:.1f}m-2.7-2.7h5.4v5.4h-5.4z",
    "^": "M{:.1f} {:.1f}m0-3.6l3.4 6h-6.8z",
    "v": "M{:.1f} {:.1f}m0 3.6l3.4-6h-6.8z",
}
MOST_MARKED = 40
"""Points of a curve that are marked; more would hide it."""
CIVIDIS = ((0, 32, 77), (66, 78, 108), (124, 123, 120), (187, 173, 108), (255, 234, 70))
"""Colours from low to high that differ in lightness too."""


@dataclass(frozen=True)
class Curve:
    """A curve of a chart; one of a single point is a level line.

    Args:
        style: colour, dashes and marker, as matplotlib has them.
        spread: half the width of the band around it, point by point, which keeps within `bounds`.
        each: names and values of the single curves that it is the mean of, at the same x.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: tuple[str, Any, str]
    spread: Sequence[float] = ()
    bounds: tuple[float, float] = (-math.inf, math.inf)
    each: Sequence[tuple[str, Sequence[float]]] = ()

    def edges(self) -> list[list[float]]:
        """The lower and the upper edge of its band."""
        low, high = self.bounds
        pairs = list(zip(self.y, self.spread or [0.0] * len(self.y), strict=True))
        return [[max(y - s, low) for y, s in pairs], [min(y + s, high) for y, s in pairs]]

    @property
    def stroke(self) -> dict[str, str | None]:
        """Attributes of its line. Black is the page's text colour, so that it is seen on dark ground too."""
        colour, dashes, _ = self.style
        array = DASHES[dashes] if isinstance(dashes, str) else " ".join(f"{2.2 * one:g}" for one in dashes[1])
        return {"stroke": "currentColor" if colour == "#000000" else colour, "stroke_dasharray": array}

    def drawn(self, frame: Frame) -> Iterable[Html]:
        """Its single curves, its band, its line and its markers, each later one above the others."""
        colour = self.stroke["stroke"]
        points = list(map(frame.at, self.x, self.y))
        if self.each:
            faint = "".join(_line(map(frame.at, self.x, values)) for _, values in self.each)
            yield tag("path", d=faint, class_="faint", stroke=colour)
        if self.spread and len(points) > 1:
            low, high = (list(map(frame.at, self.x, edge)) for edge in self.edges())
            yield tag("path", d=_line([*low, *reversed(high)]) + "z", class_="band", fill=colour)
        ends = points if len(points) > 1 else [(LEFT, points[0][1]), (LEFT + ACROSS, points[0][1])]
        yield tag("path", d=_line(ends), class_="line", **self.stroke)
        if self.style[2] in MARKERS and 1 < len(points) <= MOST_MARKED:
            yield tag("path", d="".join(MARKERS[self.style[2]].format(*point) for point in points), fill=colour)


@dataclass(frozen=True)
class Frame:
    """The ranges of a chart; of a logarithmic one, `y` holds powers of ten."""

    x: tuple[float, float]
    y: tuple[float, float]
    log: bool

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The place of a point in the chart."""
        y = math.log10(y) if self.log and y > 0 else self.y[0] - 1 if self.log else y
        right, up = (x - self.x[0]) / (self.x[1] - self.x[0]), (y - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + ACROSS * right, TOP + DOWN * (1 - up)

    def axes(self) -> Iterable[Html]:
        """Faint lines at round numbers, and these."""
        for x in ticks(*self.x):
            place = self.at(x, 1.0)[0]
            yield tag("path", d=f"M{place:.1f} {TOP}v{DOWN}", class_="grid")
            yield tag("text", f"{x:g}", x=f"{place:.1f}", y=TOP + DOWN + 15)
        for y in ticks(*self.y, whole=self.log):
            value = 10**y if self.log else y
            place = self.at(self.x[0], value)[1]
            yield tag("path", d=f"M{LEFT} {place:.1f}h{ACROSS}", class_="grid")
            yield tag("text", f"{value:g}", x=LEFT - 5, y=f"{place + 4:.1f}", class_="end")


def chart(
    title: str, x_name: str, curves: Sequence[Curve], *, limits: tuple[float, float] | None = None, log: bool = False
) -> Html:
    """A figure of curves; `title` says what is upwards.

    Args:
        limits: of what is shown; None: all is.
        log: the vertical axis is logarithmic.
    """
    own = [value for c in curves for one in (*c.edges(), *(y for _, y in c.each)) for value in one]
    log = log and all(value > 0 for c in curves for value in c.y)
    if log:
        own = [math.log10(value) for value in own if value > 0]
    low, high = limits or (min(own), max(own))
    margin = 0.04 * (high - low) or 0.05
    if limits is None:
        low, high = (0.0 if low == 0 and not log else low - margin), high + margin
    xs = sorted({x for c in curves for x in c.x})
    frame = Frame((xs[0], xs[-1]) if len(xs) > 1 else (xs[0] - 0.5, xs[0] + 0.5), (low, high), log)
    place = {"x": LEFT, "y": TOP, "width": ACROSS, "height": DOWN, "viewBox": f"{LEFT} {TOP} {ACROSS} {DOWN}"}
    inner = tag("svg", *(part for c in curves for part in c.drawn(frame)), **place)  # cuts off what is outside
    name = tag("text", x_name, x=LEFT + ACROSS / 2, y=HEIGHT - 6)
    x_name = x_name.split("   ")[0]
    data = {
        "box": [LEFT, TOP, ACROSS, DOWN],
        **vars(frame),
        "name": x_name,
        "curves": [{"name": c.name, "x": c.x, "y": c.y, "spread": c.spread} for c in curves],
        "each": [{"name": name, "x": c.x, "y": values} for c in curves for name, values in c.each],
    }
    found: dict[float, dict[str, str]] = {x: {} for x in xs}
    for c in curves:
        for x, y, s in zip(c.x, c.y, c.spread or [0.0] * len(c.x), strict=True):
            found[x][c.name] = f"{y:.4g} ± {s:.2g}" if s else f"{y:.4g}"
    rows = [[f"{x:.4g}", *(found[x].get(c.name, "") for c in curves)] for x in xs]
    values = table(title, [x_name, *(c.name for c in curves)], rows)
    return _figure(title, (WIDTH, HEIGHT), [*frame.axes(), inner, name], data, values)


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Round numbers between two, seven at most; `whole`: whole ones, where there are two.

    >>> ticks(0.0, 1.1)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    size = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(size))
    step = next(power * one for one in (1, 2, 5, 10) if power * one >= size)
    step = max(step, 1.0) if whole and high - low > 1 else step
    return [round(n * step, 12) + 0.0 for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def panels(charts: Iterable[Html], curves: Sequence[Curve] = ()) -> Html:
    """Figures side by side where there is space, and under them a legend of curves that all have."""
    items = []
    for c in curves:
        mark = MARKERS.get(c.style[2], "").format(17, 6)
        shown = tag("path", d="M0 6H34", class_="line", **c.stroke), tag("path", d=mark, fill=c.stroke["stroke"])
        items.append(tag("li", tag("svg", *shown, viewBox="0 0 34 12", width=34, aria_hidden="true"), c.name))
    return tag("div", tag("div", *charts, class_="panels"), tag("ul", *items, class_="legend"))


def heat_map(
    title: str, corner: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]]
) -> Html:
    """A figure of a matrix, light where it is high. None: no value.

    Args:
        corner: what rows and columns are.
    """
    known = [value for row in values for value in row if value is not None] or [0.0]
    low, high = min(known), max(known)
    wide, tall = max(7.0, min(40.0, 400 / len(columns))), max(7.0, min(26.0, 400 / len(rows)))
    left, top = (10 + size * min(max(map(len, names)), 24) for names, size in ((rows, 6.2), (columns, 4.6)))
    parts = []
    for i, row in enumerate(values):
        y = top + i * tall
        if i % math.ceil(11 / tall) == 0:
            parts.append(tag("text", rows[i][-24:], x=f"{left - 4:.1f}", y=f"{y + tall / 2 + 4:.1f}", class_="end"))
        for j, value in enumerate(row):
            if value is not None:
                place = {"x": f"{left + j * wide:.1f}", "y": f"{y:.1f}", "width": f"{wide:.1f}", "height": f"{tall:.1f}"}
                parts.append(tag("rect", **place, fill=colour_of(value, low, high)))
    for j in range(0, len(columns), math.ceil(13 / wide)):
        place = f"translate({left + (j + 0.6) * wide:.1f} {top - 4:.1f}) rotate(-45)"
        parts.append(tag("text", columns[j][-24:], transform=place, class_="start"))
    y = top + tall * len(rows) + 12
    for n in range(31):
        parts.append(tag("rect", x=left + 4 * n, y=y, width=4.5, height=10, fill=colour_of(n, 0, 30)))
    parts.append(tag("text", f"{low:.4g}", x=left - 4, y=y + 9, class_="end"))
    parts.append(tag("text", f"{high:.4g}", x=left + 130, y=y + 9, class_="start"))
    data = {"cells": [left, top, wide, tall], "rows": rows, "columns": columns, "values": values}
    cells = [[row, *("" if v is None else f"{v:.4g}" for v in own)] for row, own in zip(rows, values, strict=True)]
    size = left + max(wide * len(columns) + 60, 190), y + 16
    return _figure(title, size, parts, data, table(title, [corner, *columns], cells))


def colour_of(value: float, low: float, high: float) -> str:
    """The colour of a value between two, as #rrggbb."""
    place = (len(CIVIDIS) - 1) * ((value - low) / (high - low) if high > low else 0.5)
    n = min(int(place), len(CIVIDIS) - 2)
    mixed = (round(a + (place - n) * (b - a)) for a, b in zip(CIVIDIS[n], CIVIDIS[n + 1], strict=True))
    return "#" + "".join(f"{one:02x}" for one in mixed)


def _figure(title: str, size: tuple[float, float], parts: Iterable[Html], data: dict[str, Any], values: Html) -> Html:
    """A figure whose values the page's script says under the pointer, and that has them as a table."""
    cursor = tag("path", d="", class_="cursor")
    box = {"viewBox": f"0 0 {size[0]:.0f} {size[1]:.0f}", "width": f"{size[0]:.0f}"}
    svg = tag("svg", tag("title", title), *parts, cursor, **box, role="img", tabindex=0)
    under = tag("output", aria_live="polite")
    return tag("figure", tag("figcaption", title), svg, under, script_data(data), folded("values", values))


def _line(points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
