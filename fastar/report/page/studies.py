"""Sections of a page on what commands on finished runs have written into the folder."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from fastar.config import flatten
from fastar.errors import FastarError, refusal
from fastar.report import average_panels, distances_table, fusion_table, perturbed_stars
from fastar.report.page import landscapes
from fastar.report.page.charts import Curve, chart, heat_map, panels
from fastar.report.page.elements import Html, joined, lines, of_rich, table, tag
from fastar.report.shift.corruption_panels import corruption_tables
from fastar.report.shift.other_images import other_tables
from fastar.runtime.json_files import read_file, read_object

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
            found = read_object(path)
            return KNOWN[path.stem](found) if path.stem in KNOWN else _any(path, found)
    except FastarError as error:
        return tag("p", str(error), class_="warn")
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return tag("p", f"{path.name}: damaged, or not as fastar writes it; give its command again", class_="warn")


def _uncertainty(found: Mapping[str, Any]) -> Html:
    """The metrics over K, and the reliability and the risk of one repetition."""
    styles, families, figures, named = average_panels.STYLES, found["families"], [], dict[str, Curve]()
    for key, name in average_panels.PANELS:
        curves = []
        for family, of in families.items():
            every = zip(of["k"], of[key]["mean"], of[key]["std"], strict=True)
            known = [(k, mean, std or 0.0) for k, mean, std in every if mean is not None]
            if known:
                k, means, stds = zip(*known, strict=True)
                curves.append(Curve(family, k, means, styles[family], stds if any(stds) else ()))
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
    drawn = panels(figures, [*named.values(), reliability[0]])
    said = lines(average_panels.uncertainty_lines(found))
    more = [of_rich(one) for one in (*corruption_tables(found), *other_tables(found))]
    return joined([of_rich(average_panels.uncertainty_table(found)), said, drawn, *more])


def _fusion(found: Mapping[str, Any]) -> Html:
    return joined([of_rich(fusion_table.fusion_table(found)), lines(fusion_table.fusion_lines(found))])


def _perturb(found: Mapping[str, Any]) -> Html:
    """Losses and barriers over the radius, on the training data."""
    radii, curves = [point["radius"] for point in found["points"]], []
    for key, label, colour, dashes, marker in perturbed_stars.CURVES:
        spreads = [point["train"][key] for point in found["points"]]
        means, stds = [one["mean"] for one in spreads], [one["std"] or 0.0 for one in spreads]
        curves.append(Curve(label, radii, means, (colour, dashes, marker), stds))
    if "train" in found["regular"]:
        level = [found["regular"]["train"]["mean"]]
        curves.append(Curve("barrier, regular to regular", radii[:1], level, ("#000000", ":", "")))
    drawn = panels([chart("train loss", "radius, as a share of the star's norm", curves)], curves)
    said = lines(perturbed_stars.perturbed_lines(found))
    return joined([of_rich(perturbed_stars.perturbed_table(found)), said, drawn])


def _distances(found: Mapping[str, Any]) -> Html:
    """Distances of whole models, and the cosines of their parameter tensors, matched: means over pairs."""
    of_kinds = {name: [one for one in found["pairs"] if one["kind"] == kind] for kind, name in distances_table.ROWS}
    kinds = {name: pairs for name, pairs in of_kinds.items() if pairs}

    def cosine(pairs: Sequence[Mapping[str, Any]], layer: str) -> float | None:
        cosines = [one["layers"][layer]["matched"]["cosine"] for one in pairs]
        known = [one for one in cosines if one is not None]
        return fmean(known) if known else None

    names = list(found["pairs"][0]["layers"])
    values = [[cosine(pairs, layer) for pairs in kinds.values()] for layer in names]
    drawn = heat_map("mean cosine of each parameter tensor, matched", "tensor", names, list(kinds), values)
    return joined([of_rich(distances_table.distances_table(found)), drawn])


def _any(path: Path, found: Mapping[str, Any]) -> Html:
    """What a file holds that is not known here: the picture beside it, where there is one, and its single values."""
    picture, parts = path.with_suffix(".png"), []
    if picture.is_file():
        data = base64.b64encode(read_file(picture, PICTURE_AT_MOST)).decode()
        parts.append(tag("img", src=f"data:image/png;base64,{data}", alt=f"the picture of {path.name}"))
    rows = [(key, str(value)) for key, value in flatten(found).items() if not isinstance(value, list)]
    return joined([*parts, table(f"single values in {path.name}", ("", "value"), rows, words=True)])


KNOWN: dict[str, Callable[[Mapping[str, Any]], Html]] = {
    "uncertainty": _uncertainty,
    "fusion": _fusion,
    "perturb": _perturb,
    "distances": _distances,
    "plane": landscapes.plane,
    "curve": landscapes.curve,
    "graph": landscapes.graph,
    "sweep": landscapes.sweep,
}
"""Those that are shown in their own way, by the names of the files."""
