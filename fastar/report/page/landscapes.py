"""Sections of a page on planes, curves and graphs of a run's networks, and on sweeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastar.report.landscape import curve_picture
from fastar.report.page.charts import Curve, chart, heat_map, panels
from fastar.report.page.elements import Html, joined, table
from fastar.report.results import ROWS, STYLES, shown, splits_of

CURVES = {name: (label, (colour, dash, mark)) for name, (label, colour, dash, mark) in curve_picture.CURVES.items()}


def plane(found: Mapping[str, Any]) -> Html:
    """The loss over the plane, with the three networks, on each split."""
    splits, (x, y) = splits_of(found["splits"]), (found[axis] for axis in "xy")
    marks = {one["name"]: (_index(y[::-1], one["y"]), _index(x, one["x"])) for one in found["networks"]}
    rows, columns = ([f"{round(one, 6) + 0.0:.3g}" for one in axis] for axis in (y[::-1], x))
    drawn = [
        heat_map(f"{split} loss", "y, x: L2 distance", rows, columns, found["splits"][split]["loss"][::-1], marks)
        for split in splits
    ]
    of = [
        [one["name"], *(shown(v, 2) for v in (one["x"], one["y"])), *(shown(one[s]["loss"]) for s in splits)]
        for one in found["networks"]
    ]
    return joined(
        [table("networks in the plane", ("", "x", "y", *(f"{split} loss" for split in splits)), of), panels(drawn)]
    )


def _index(values: Sequence[float], value: float) -> float:
    """The place of a value among equispaced ones."""
    return (value - values[0]) / (values[1] - values[0])


def curve(found: Mapping[str, Any]) -> Html:
    """Losses and metrics along each curve."""
    curves, ends = found["curves"], f"{found['first']} to {found['second']}"
    splits, figures = splits_of(curves["straight"]), ("largest_loss", "barrier", "mean_loss")
    rows = [[CURVES[name][0], *(shown(of[s][key]) for s in splits for key in figures)] for name, of in curves.items()]
    header = ("", *(f"{split} {key.replace('_', ' ')}" for split in splits for key in figures))
    drawn, lines = [], list[Curve]()
    for key in (key for key, value in curves["straight"][splits[0]].items() if isinstance(value, list)):
        for split in splits:
            lines = [Curve(CURVES[name][0], found["t"], of[split][key], CURVES[name][1]) for name, of in curves.items()]
            drawn.append(chart(f"{split} {key}", f"t   (0: {found['first']}, 1: {found['second']})", lines))
    return joined([table(f"curves from {ends}", header, rows), panels(drawn, lines)])


def graph(found: Mapping[str, Any]) -> Html:
    """Barriers and largest losses of all pairs, and the paths from each hub to the others."""
    names, figures, splits = found["names"], ("barrier", "largest_loss"), splits_of(found["splits"])
    drawn = [
        heat_map(f"{split} {key.replace('_', ' ')}", "", names, names, found["splits"][split][key])
        for split in splits
        for key in figures
    ]
    kinds = [kind for kind in ("heldouts", "sources") if found["hubs"]["mean"]["train"][kind]["barrier"]["n"]]
    header = ("", "network", "loss", *(f"{key.replace('_', ' ')} to {kind}" for kind in kinds for key in figures))
    rows = []
    for hub, of in found["hubs"].items():
        train = of["train"]
        rows.append(
            [hub, of["network"], shown(train["loss"]), *(shown(train[kind][key]) for kind in kinds for key in figures)]
        )
    return joined([table("hubs: paths to all others here, train", header, rows), panels(drawn)])


def sweep(found: Mapping[str, Any]) -> Html:
    """Losses and barriers of each value; curves over it, where it is a number."""
    kinds, points = dict(ROWS[:3]), found["points"]
    header = (found["kind"], "stars", "loss, regular", "loss, star", *(f"barrier, {name}" for name in kinds.values()))
    keys = "regular_loss", "star_loss", *kinds
    rows = [[str(p["value"]), str(len(p["seeds"])), *(shown(p["train"][key]) for key in keys)] for p in points]
    numbers, curves = all(isinstance(point["value"], int | float) for point in points), []
    for kind, name in kinds.items():
        own = [(point["value"], point["train"][kind]) for point in points if point["train"][kind]["n"]]
        if own and numbers:
            values, spreads = zip(*own, strict=True)
            means, stds = ([one[key] or 0.0 for one in spreads] for key in ("mean", "std"))
            curves.append(Curve(name, values, means, (STYLES[kind][1], STYLES[kind][2], STYLES[kind][3]), stds))
    drawn = [chart("train loss barrier", found["kind"], curves)] if curves else []
    return joined([table(f"sweep of {found['kind']}, train", header, rows), panels(drawn, curves)])
