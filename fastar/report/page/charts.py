"""Curves and heat maps as SVG, their values as data for the page's script and as a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

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
MOST_LETTERS = 30
"""Letters of a name beside a heat map, the last ones."""
CIVIDIS = ((0, 32, 77), (66, 78, 108), (124, 123, 120), (187, 173, 108), (255, 234, 70))
"""Colours from low to high that differ in lightness too."""


class Curve(NamedTuple):
    """A curve of a chart: name, points, and colour, dashes and marker as matplotlib has them; half the width of the
    band around it; names and values of the single curves that it is the mean of. One of a single point is level."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: tuple[str, Any, str]
    spread: Sequence[float] = ()
    each: Sequence[tuple[str, Sequence[float]]] = ()

    @property
    def stroke(self) -> dict[str, str | None]:
        """Attributes of its line. Black is the page's text colour, so that it is seen on dark ground too."""
        colour, dashes, _ = self.style
        array = DASHES[dashes] if isinstance(dashes, str) else " ".join(f"{2.2 * one:g}" for one in dashes[1])
        return {"stroke": "currentColor" if colour == "#000000" else colour, "stroke_dasharray": array}

    @property
    def edges(self) -> list[list[float]]:
        """The lower and the upper edge of its band."""
        return [[y + sign * s for y, s in zip(self.y, self.spread, strict=True)] for sign in (-1, 1) if self.spread]


class Frame(NamedTuple):
    """The ranges of a chart; of a logarithmic one, `y` holds powers of ten."""

    x: tuple[float, float]
    y: tuple[float, float]
    log: bool

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The place of a point in the chart."""
        if self.log:
            y = math.log10(y) if y > 0 else self.y[0] - 1
        right, up = (x - self.x[0]) / (self.x[1] - self.x[0]), (y - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + ACROSS * right, TOP + DOWN * (1 - up)

    def line(self, x: Iterable[float], y: Iterable[float]) -> str:
        return "M" + "L".join(f"{right:.1f} {down:.1f}" for right, down in map(self.at, x, y))


def chart(
    title: str, x_name: str, curves: Sequence[Curve], *, limits: tuple[float, float] | None = None, log: bool = False
) -> Html:
    """A figure of curves; `title` says what is upwards.

    Args:
        limits: of what is shown; None: all is, bands within 0 where all is above, and accuracies within 1.
        log: the vertical axis is logarithmic, where all is above 0 and the values are far apart.
    """
    own = [value for c in curves for one in (c.y, *(y for _, y in c.each)) for value in one]
    log = log and 0 < 30 * min(own) <= max(own)
    if limits is None:
        low, high = (f([*own, *(v for c in curves for edge in c.edges for v in edge)]) for f in (min, max))
        low, high = max(low, 0.0) if min(own) >= 0 else low, min(high, 1.0) if "accuracy" in title else high
        limits = (math.log10(min(own)), math.log10(high)) if log else (low, high)
        margin = 0.04 * (limits[1] - limits[0]) or 0.05
        limits = (limits[0] if limits[0] == 0 else limits[0] - margin, limits[1] + margin)
    xs = sorted({x for c in curves for x in c.x})
    frame = Frame((xs[0], xs[-1]) if len(xs) > 1 else (xs[0] - 0.5, xs[0] + 0.5), limits, log)
    name = tag("text", x_name, x=LEFT + ACROSS / 2, y=HEIGHT - 6)
    x_name = x_name.split("   ")[0]
    data = {
        "box": [LEFT, TOP, ACROSS, DOWN],
        **frame._asdict(),
        "name": x_name,
        "curves": [{"name": c.name, "x": c.x, "y": c.y, "spread": c.spread} for c in curves],
        "each": [{"name": name, "x": c.x, "y": values} for c in curves for name, values in c.each],
    }
    said = {(c.name, x): f"{y:.4g}" for c in curves for x, y in zip(c.x, c.y, strict=True)}
    said |= {(c.name, x): f"{y:.4g} ± {s:.2g}" for c in curves for x, y, s in zip(c.x, c.y, c.spread, strict=False)}
    rows = [[f"{x:.4g}", *(said.get((c.name, x), "") for c in curves)] for x in xs]
    values = table(title, [x_name, *(c.name for c in curves)], rows)
    outside = [f"{c.name} {c.y[-1]:.3g}" for c in curves if not TOP <= frame.at(c.x[-1], c.y[-1])[1] <= TOP + DOWN]
    title += f" (outside: {', '.join(outside)})" if outside else ""
    return _figure(title, (WIDTH, HEIGHT), [*_axes(frame), _drawn(frame, curves), name], data, values)


def _axes(frame: Frame) -> Iterable[Html]:
    """Faint lines at round numbers, and these."""
    for x in ticks(*frame.x):
        place = frame.at(x, 1.0)[0]
        yield tag("path", d=f"M{place:.1f} {TOP}v{DOWN}", class_="grid")
        yield tag("text", f"{x:g}", x=f"{place:.1f}", y=TOP + DOWN + 15)
    for y in ticks(*frame.y, whole=frame.log):
        value = 10**y if frame.log else y
        place = frame.at(frame.x[0], value)[1]
        yield tag("path", d=f"M{LEFT} {place:.1f}h{ACROSS}", class_="grid")
        yield tag("text", f"{value:g}", x=LEFT - 5, y=f"{place + 4:.1f}", class_="end")


def _drawn(frame: Frame, curves: Sequence[Curve]) -> Html:
    """Single curves, bands, lines and markers; the first curve is on top, and what is outside is cut off."""
    parts = []
    for c in curves:
        colour = c.stroke["stroke"]
        if c.each:
            parts.append(tag("path", d="".join(frame.line(c.x, y) for _, y in c.each), class_="faint", stroke=colour))
        if c.spread and len(c.x) > 1:
            low, high = c.edges
            around = frame.line([*c.x, *reversed(c.x)], [*low, *reversed(high)])
            parts.append(tag("path", d=f"{around}z", class_="band", fill=colour))
    for c in reversed(curves):
        x, y = (c.x, c.y) if len(c.x) > 1 else (frame.x, (c.y[0], c.y[0]))
        parts.append(tag("path", d=frame.line(x, y), class_="line", **c.stroke))
        if c.style[2] in MARKERS and 1 < len(c.x) <= MOST_MARKED:
            marks = "".join(MARKERS[c.style[2]].format(*point) for point in map(frame.at, c.x, c.y))
            parts.append(tag("path", d=marks, fill=c.stroke["stroke"]))
    return tag("svg", *parts, x=LEFT, y=TOP, width=ACROSS, height=DOWN, viewBox=f"{LEFT} {TOP} {ACROSS} {DOWN}")


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
    title: str,
    corner: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    marks: Mapping[str, tuple[float, float]] | None = None,
) -> Html:
    """A figure of a matrix, light where it is high; None, no value, is a stroke.

    Args:
        corner: what rows and columns are.
        marks: names that are written at a row and a column, which may be between two.
    """
    known = [value for row in values for value in row if value is not None] or [0.0]
    low, high = min(known), max(known)
    scale, by = (math.log, ", by logarithm") if 0 < 20 * low < high else (float, "")
    wide, tall = max(7.0, min(40.0, 400 / len(columns))), max(7.0, min(26.0, 400 / len(rows)))
    left, top = (12 + size * min(max(map(len, names)), MOST_LETTERS) for names, size in ((rows, 6.2), (columns, 4.5)))
    below, cells = top + tall * len(rows) + 12, []
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            place, across = f"M{left + j * wide:.1f} {top + i * tall:.1f}", f"{wide:.1f}"
            if value is None:
                cells.append(tag("path", d=f"{place}l{across} {tall:.1f}", class_="grid"))
            else:
                colour = colour_of(scale(value), scale(low), scale(high))
                cells.append(tag("path", d=f"{place}h{across}v{tall:.1f}h-{across}z", fill=colour))
    parts = [tag("g", *cells, class_="cells")]
    for i in range(0, len(rows), math.ceil(11 / tall)):
        y = top + (i + 0.5) * tall + 4
        parts.append(tag("text", rows[i][-MOST_LETTERS:], x=f"{left - 4:.1f}", y=f"{y:.1f}", class_="end"))
    for j in range(0, len(columns), math.ceil(13 / wide)):
        place = f"translate({left + (j + 0.6) * wide:.1f} {top - 4:.1f}) rotate(-45)"
        parts.append(tag("text", columns[j][-MOST_LETTERS:], transform=place, class_="start"))
    for name, (up, right) in (marks or {}).items():
        x, y = left + (right + 0.5) * wide - 4, top + (up + 0.5) * tall + 4
        parts.append(tag("text", f"× {name}", x=f"{x:.1f}", y=f"{y:.1f}", class_="mark"))
    for n in range(31):
        parts.append(tag("path", d=f"M{left + 4 * n:.1f} {below:.1f}h4.5v10h-4.5z", fill=colour_of(n, 0, 30)))
    parts.append(tag("text", f"{low:.4g}", x=left - 4, y=below + 9, class_="end"))
    parts.append(tag("text", f"{high:.4g}{by}", x=left + 130, y=below + 9, class_="start"))
    data = {"cells": [left, top, wide, tall], "rows": rows, "columns": columns, "values": values}
    said = [[row, *("" if v is None else f"{v:.4g}" for v in own)] for row, own in zip(rows, values, strict=True)]
    size = left + max(wide * len(columns) + top, 190), below + 16
    return _figure(title, size, parts, data, table(title, [corner, *columns], said))


def colour_of(value: float, low: float, high: float) -> str:
    """The colour of a value between two, as #rrggbb."""
    place = (len(CIVIDIS) - 1) * ((value - low) / (high - low) if high > low else 0.5)
    n = min(int(place), len(CIVIDIS) - 2)
    mixed = (round(a + (place - n) * (b - a)) for a, b in zip(CIVIDIS[n], CIVIDIS[n + 1], strict=True))
    return "#" + "".join(f"{one:02x}" for one in mixed)


def _figure(title: str, size: tuple[float, float], parts: Iterable[Html], data: dict[str, Any], values: Html) -> Html:
    """A figure whose values the page's script says under the pointer, and that has them as a table."""
    box = {"viewBox": f"0 0 {size[0]:.0f} {size[1]:.0f}", "width": f"{size[0]:.0f}"}
    cursor = tag("path", d="", class_="cursor")
    svg = tag("svg", tag("title", title), *parts, cursor, **box, role="img", tabindex=0)
    under = tag("output", aria_live="polite")
    return tag("figure", tag("figcaption", title), svg, under, script_data(data), folded("values", values))
