"""The figures of a sweep, from the results of its runs: means, intervals over networks, and fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from fastar.evaluation.fits import line, no_line, power_law
from fastar.evaluation.paths import accuracy_barrier, accuracy_name, barrier
from fastar.evaluation.resampling import RESAMPLES, Networks, interval, resampled_means
from fastar.experiments.measure import spread
from fastar.experiments.sweeps.points import Point
from fastar.runs import versions
from fastar.runtime.seeds import derive_seed

STAR_KINDS = ("star_heldout", "star_source")
KINDS = ("regular_regular", *STAR_KINDS)
SPLITS = ("train", "validation", "test")
Results = Mapping[str, Any]
Values = dict[tuple[str, ...], list[tuple[float, Networks]]]
"""Values of a point by their place in it, each with the networks that it is of."""
Means = dict[tuple[str, ...], np.ndarray]
"""Resampled means of them."""


def sweep_results(kind: str, points: Sequence[Point], results: Sequence[Results], folder: Path) -> dict[str, Any]:
    """The content of `sweep.json`.

    Args:
        points: stars of the same value follow each other.
        results: of each of them.
        folder: of the sweep.

    Returns:
        dataset, arch, kind, seed, versions, resamples; points, each with value, overrides, sources, heldout, seeds,
        folders, and for each split star_loss, regular_loss, the barriers of `KINDS` (matched, where the run matches),
        their largest_loss and accuracy_barrier, and metrics (name -> star, regular): mean, std, min, max, n and
        interval; for each split the fits: line of star_heldout over regular_regular, and power_law of star_heldout over
        the number of sources.
    """
    found, means = [], []
    for _, pairs in groupby(zip(points, results, strict=True), key=lambda pair: repr(pair[0].value)):
        stars = list(pairs)
        point, resampled = _point([star for star, _ in stars], [result for _, result in stars], folder)
        found.append(point)
        means.append(resampled)
    first = results[0]
    splits = [split for split in SPLITS if split in first]
    fits = {split: _fits(kind, split, found, means) for split in splits}
    if all(point.regular_recipe == points[0].regular_recipe for point in points):
        for of_split in fits.values():
            of_split["line"] = no_line("the points share their regular models")
    return {
        "dataset": first["dataset"],
        "arch": first["arch"],
        "kind": kind,
        "points": found,
        "fits": fits,
        "resamples": RESAMPLES,
        "seed": points[0].settings.seed,
        "versions": versions(),
    }


def _point(points: Sequence[Point], results: Sequence[Results], folder: Path) -> tuple[dict[str, Any], Means]:
    """A point of one or several stars, and the resampled means of its barriers."""
    first, seed = points[0], derive_seed(points[0].settings.seed, "sweep", repr(points[0].regular_recipe))
    found: dict[str, Any] = {
        "value": first.value,
        "overrides": first.overrides,
        "sources": first.settings.sources.number,
        "heldout": first.settings.sources.heldout,
        "seeds": [point.settings.star.seed for point in points],
        "folders": [point.run.path.relative_to(folder).as_posix() for point in points],
    }
    means: Means = {}
    for split in (split for split in SPLITS if split in results[0]):
        for place, values in _values(points, results, split).items():
            *sections, name = place
            at = found.setdefault(split, {})
            for section in sections:
                at = at.setdefault(section, {})
            numbers = [value for value, _ in values]
            resampled = resampled_means(numbers, [networks for _, networks in values], seed)
            at[name] = {**spread(numbers), "interval": interval(resampled) if len(numbers) > 1 else None}
            means |= {(split, *place): resampled}
    return found, means


def _values(points: Sequence[Point], results: Sequence[Results], split: str) -> Values:
    """All values of a point on a split; those of regular models from its first star's run: they are the same in all."""
    names = [key.removeprefix(f"{split}_") for key in results[0]["paths"][0] if key.startswith(f"{split}_")]
    accuracy = accuracy_name(names)
    sections = (), ("largest_loss",), *([("accuracy_barrier",)] if accuracy else [])
    found: Values = {(*section, kind): [] for section in sections for kind in KINDS}

    def add(kind: str, path: Mapping[str, Any], networks: Networks) -> None:
        """Add the barriers of a path."""
        t, loss = path["t"], path[f"{split}_loss"]
        found[(kind,)].append((barrier(t, loss), networks))
        found["largest_loss", kind].append((max(loss), networks))
        if accuracy:
            found["accuracy_barrier", kind].append((accuracy_barrier(t, path[f"{split}_{accuracy}"]), networks))

    measured = "regular_regular" if points[0].settings.ends_matched else "regular_regular_unmatched"
    pairs = [path for path in results[0]["paths"] if path["kind"] == measured]
    crossed = all([part for part, _ in _regular(path)] == ["source", "heldout"] for path in pairs)
    for path in pairs:
        add("regular_regular", path, _regular(path) if crossed else _pooled(path))
    for point, result in zip(points, results, strict=True):
        paths, star = [path for path in result["paths"] if path["kind"] in STAR_KINDS], ("star", point.run.path.name)
        for path in paths:
            add(path["kind"], path, [star, *_regular(path)])
        for name in names:
            of_regular, of_star = _places(name)
            found.setdefault(of_regular, [(path[f"{split}_{name}"][-1], _pooled(path)) for path in paths])
            found.setdefault(of_star, []).append((paths[0][f"{split}_{name}"][0], [star]))
    return found


def _regular(path: Mapping[str, Any]) -> Networks:
    """The regular models at the ends of a path: ("source", "3")."""
    names = [path[end].partition(" ") for end in ("first", "second") if path[end] != "star"]
    return [(part, number) for part, _, number in names]


def _pooled(path: Mapping[str, Any]) -> Networks:
    """The same, drawn from sources and heldouts together: one is as good as the other."""
    return [("regular", f"{part} {number}") for part, number in _regular(path)]


def _places(metric: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The places of a metric of the regular models and of the star."""
    if metric == "loss":
        return ("regular_loss",), ("star_loss",)
    return ("metrics", metric, "regular"), ("metrics", metric, "star")


def _fits(kind: str, split: str, points: Sequence[Mapping[str, Any]], means: Sequence[Means]) -> dict[str, Any]:
    """The line, and of sources the power law, through the means of the points that have both barriers."""
    keys = "regular_regular", "star_heldout"
    there = [i for i, point in enumerate(points) if all(point[split][key]["n"] for key in keys)]
    regular, star = ([points[i][split][key]["mean"] for i in there] for key in keys)
    again = [(means[i][split, keys[0]], means[i][split, keys[1]]) for i in there]
    found = {"line": line(regular, star, again)}
    if kind in ("sources", "sources.number"):
        found["power_law"] = power_law([points[i]["sources"] for i in there], star, [one for _, one in again])
    return found
