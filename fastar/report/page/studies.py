"""Sections of a page on what commands on finished runs, and sweeps, have written into the folder."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from fastar.config import flatten
from fastar.errors import FastarError, refusal
from fastar.report import average_panels, distances_table, perturbed_stars
from fastar.report.landscape.curve_picture import CURVES
from fastar.report.page.charts import Curve, chart, heat_map, panels
from fastar.report.page.elements import Html, joined, lines, of_rich, table, tag
from fastar.report.results import ROWS, STYLES, splits_of
from fastar.report.study_forms import FORMS
from fastar.runtime.json_files import read_file, read_object, unsealed

OTHER = ("results.json", "lock.json", "wandb.json")
"""JSON files of a run folder that no such command writes."""
PICTURE_AT_MOST = 4 * 2**20
"""Bytes of a picture that is put into the page."""


def studies(folder: Path) -> dict[str, Html]:
    """A section for each JSON file, in the order of their names; of one that is not as its command writes it, a line
    that says so."""
    paths = [path for path in sorted(folder.glob("*.json")) if path.name not in OTHER and path.is_file()]
    return {path.stem: _study(path) for path in paths}


def _study(path: Path) -> Html:
    try:
        with refusal(f"{path.name}: cannot be read", "make it readable"):
            found, _ = unsealed(read_object(path))
            return _known(path.stem, found) if path.stem in FORMS else _any(path, found)
    except FastarError as error:
        return tag("p", str(error), class_="warn")
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return tag("p", f"{path.name}: damaged, or not as fastar writes it; give its command again", class_="warn")


def _any(path: Path, found: Mapping[str, Any]) -> Html:
    """What a file holds that is not known here: the picture beside it, where there is one, and its single values."""
    picture, parts = path.with_suffix(".png"), []
    if picture.is_file():
        data = base64.b64encode(read_file(picture, PICTURE_AT_MOST)).decode()
        parts.append(tag("img", src=f"data:image/png;base64,{data}", alt=f"the picture of {path.name}"))
    rows = [(key, str(value)) for key, value in flatten(found).items() if not isinstance(value, list)]
    return joined([*parts, table(f"single values in {path.name}", ("", "value"), rows, words=True)])


def _known(name: str, found: Mapping[str, Any]) -> Html:
    """The tables and lines that the command prints, and charts."""
    tables, said = map(of_rich, FORMS[name].tables(found)), lines(FORMS[name].lines(found))
    return joined([*tables, said, *([CHARTS[name](found)] if name in CHARTS else [])])


def _means(
    name: str, x: Sequence[float], spreads: Sequence[Mapping[str, Any]], style: tuple[str, Any, str]
) -> list[Curve]:
    """The curve of means with its band, of the spreads that are of something; none, where none is."""
    every = zip(x, spreads, strict=True)
    known = [(at, one["mean"], one["std"] or 0.0) for at, one in every if one["mean"] is not None]
    if not known:
        return []
    there, means, stds = zip(*known, strict=True)
    return [Curve(name, there, means, style, stds if any(stds) else ())]


def _uncertainty(found: Mapping[str, Any]) -> Html:
    """The metrics over K, and the reliability and the risk of one repetition."""
    styles, families, figures, named = average_panels.STYLES, found["families"], [], dict[str, Curve]()
    for key, name in average_panels.PANELS:
        curves = []
        for family, of in families.items():
            spreads = [{"mean": m, "std": s} for m, s in zip(of[key]["mean"], of[key]["std"], strict=True)]
            curves += _means(family, of["k"], spreads, styles[family])
        if curves:
            limits = average_panels.shown_range(families, key)
            figures.append(chart(name, "networks in the average, K", curves, limits=limits))
            named |= {curve.name: curve for curve in curves}
    reliability, risk = [Curve("calibrated", (0, 1), (0, 1), ("#999999", "-", ""))], []
    for family, of in found["reliability"].items():
        there, curve = [i for i, n in enumerate(of["count"]) if n >= average_panels.FEW], found["risk"][family]
        if there:
            confidence, accuracy = ([of[axis][i] for i in there] for axis in ("confidence", "accuracy"))
            reliability.append(Curve(family, confidence, accuracy, styles[family]))
        risk.append(Curve(family, curve["coverage"], curve["risk"], styles[family]))
    figures.append(chart(f"accuracy of bins of at least {average_panels.FEW} samples", "confidence", reliability))
    figures.append(chart("share of wrong answers", "share that is answered, most confident first", risk))
    return panels(figures, [*named.values(), reliability[0]])


def _perturb(found: Mapping[str, Any]) -> Html:
    """Losses and barriers over the radius, on the training data."""
    radii, curves = [point["radius"] for point in found["points"]], list[Curve]()
    for key, label, colour, dashes, marker in perturbed_stars.CURVES:
        spreads = [point["train"][key] for point in found["points"]]
        curves += _means(label, radii, spreads, (colour, dashes, marker))
    if "train" in found["regular"]:
        level = [found["regular"]["train"]["mean"]]
        curves.append(Curve("barrier, regular to regular", radii[:1], level, ("#000000", ":", "")))
    return panels([chart("train loss", "radius, as a share of the star's norm", curves)], curves)


def _distances(found: Mapping[str, Any]) -> Html:
    """The cosines of parameter tensors, matched: means over pairs."""
    of_kinds = {name: [one for one in found["pairs"] if one["kind"] == kind] for kind, name in distances_table.ROWS}
    kinds = {name: pairs for name, pairs in of_kinds.items() if pairs}

    def cosine(pairs: Sequence[Mapping[str, Any]], layer: str) -> float | None:
        cosines = [one["layers"][layer]["matched"]["cosine"] for one in pairs]
        known = [one for one in cosines if one is not None]
        return fmean(known) if known else None

    names = list(found["pairs"][0]["layers"])
    values = [[cosine(pairs, layer) for pairs in kinds.values()] for layer in names]
    return heat_map("mean cosine of each parameter tensor, matched", "tensor", names, list(kinds), values)


def _plane(found: Mapping[str, Any]) -> Html:
    """The loss over the plane, with the three networks, on each split."""
    x, y = found["x"], found["y"][::-1]
    marks = {one["name"]: (_index(y, one["y"]), _index(x, one["x"])) for one in found["networks"]}
    rows, columns = ([f"{round(one, 6) + 0.0:.3g}" for one in axis] for axis in (y, x))
    return panels(
        heat_map(f"{split} loss", "y, x: L2 distance", rows, columns, found["splits"][split]["loss"][::-1], marks)
        for split in splits_of(found["splits"])
    )


def _index(values: Sequence[float], value: float) -> float:
    """The place of a value among equispaced ones."""
    return (value - values[0]) / (values[1] - values[0])


def _curve(found: Mapping[str, Any]) -> Html:
    """Losses and metrics along each curve."""
    curves, drawn, last = found["curves"], [], list[Curve]()
    splits = splits_of(curves["straight"])
    for key in (key for key, value in curves["straight"][splits[0]].items() if isinstance(value, list)):
        for split in splits:
            last = [Curve(CURVES[name][0], found["t"], of[split][key], CURVES[name][1:]) for name, of in curves.items()]
            drawn.append(chart(f"{split} {key}", f"t   (0: {found['first']}, 1: {found['second']})", last))
    return panels(drawn, last)


def _graph(found: Mapping[str, Any]) -> Html:
    """Barriers and largest losses of all pairs."""
    names = found["names"]
    return panels(
        heat_map(f"{split} {key.replace('_', ' ')}", "", names, names, found["splits"][split][key])
        for split in splits_of(found["splits"])
        for key in ("barrier", "largest_loss")
    )


def _sweep(found: Mapping[str, Any]) -> Html:
    """Barriers over the values, where these are numbers."""
    points, curves = found["points"], list[Curve]()
    values = [point["value"] for point in points]
    if all(isinstance(value, int | float) for value in values):
        for kind, name in ROWS[:3]:
            spreads = [point["train"][kind] for point in points]
            curves += _means(name, values, spreads, STYLES[kind][1:])
    return panels([chart("train loss barrier", found["kind"], curves)] if curves else [], curves)


CHARTS: dict[str, Callable[[Mapping[str, Any]], Html]] = {
    "uncertainty": _uncertainty,
    "perturb": _perturb,
    "distances": _distances,
    "plane": _plane,
    "curve": _curve,
    "graph": _graph,
    "sweep": _sweep,
}
"""Those that have charts, by the names of the files."""
