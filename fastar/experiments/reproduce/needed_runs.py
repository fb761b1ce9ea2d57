"""The runs that parts of tables and figures need, by their settings alone. Imports no torch: `--list` is instant."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastar.experiments.reproduce.shared_runs import SharedRuns
from fastar.experiments.sweeps.points import Point

Part = Mapping[str, Any]


def points_of_rows(runs: SharedRuns, part: Part, folder: Path) -> list[Point]:
    """A run for each row."""
    return [runs.point({**part, **row}) for row in part["rows"].values()]


def points_of_optimizers(runs: SharedRuns, part: Part, folder: Path) -> list[Point]:
    """The runs of two optimizers."""
    other = {**part, "set": [*part.get("set", ()), *part.get("other_set", ())]}
    return [runs.point(part), runs.point(other, config=part["other"])]


def sizes_point(runs: SharedRuns, part: Part) -> Point:
    """The run of the largest size; the others are parts of it."""
    most = max(part["values"])
    return runs.point(part, f"sources.heldout={most}", f"evaluation.regular_pairs=cross:{most}x{most}")


def _one_point(runs: SharedRuns, part: Part, folder: Path) -> list[Point]:
    return [runs.point(part)]


POINTS: dict[str, Callable[[SharedRuns, Part, Path], list[Point]]] = {
    "runs": points_of_rows,
    "sweep": SharedRuns.points,
    "fusion": SharedRuns.points,
    "sizes": lambda runs, part, folder: [sizes_point(runs, part)],
    "perturbed": _one_point,
    "distances": _one_point,
    "uncertainty": _one_point,
    "theory": lambda runs, part, folder: [],
    "optimizers": points_of_optimizers,
    "methods": _one_point,
}
"""The runs that a part of each kind needs (`kinds.KINDS`: what is made of them)."""
