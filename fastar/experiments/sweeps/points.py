"""The points of a sweep: runs that differ in one setting, and what of them is the same. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastar.config import Settings, flatten, nested, validate
from fastar.config.recipes import merge
from fastar.config.strict_yaml import read_yaml, shortened
from fastar.errors import FastarError
from fastar.runs import RunFolder, write_atomically
from fastar.runs.folder import FREE_KEYS
from fastar.runs.lock import check_held
from fastar.runtime.progress import Progress

KINDS = {"sources": "sources.number", "width": "model.width", "depth": "model.depth", "t": "star.t", "mu": "star.mu"}
"""Short names of settings that are swept."""
# Settings that no model depends on. What `device` may change, such as `train.precision=auto`, models depend on.
_FREE = tuple(key for key in FREE_KEYS if key != "device")
# Numbers that YAML 1.1 takes for text.
_POWER_OF_TEN = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?[eE][+-]?[0-9]+")


@dataclass(frozen=True)
class Point:
    """One star of a sweep: the value of the setting that is swept, and a run."""

    value: Any
    overrides: dict[str, Any]
    settings: Settings
    run: RunFolder

    @property
    def regular_recipe(self) -> dict[str, Any]:
        """All settings that its regular models depend on."""
        apart = (*_FREE, "sources.", "star.", "matching.")
        return {key: value for key, value in self._flat.items() if not key.startswith(apart)}

    @property
    def star_recipe(self) -> dict[str, Any]:
        """All settings that its star depends on."""
        return {k: value for k, value in self._flat.items() if not k.startswith(_FREE) and k != "sources.heldout"}

    @property
    def _flat(self) -> dict[str, Any]:
        return flatten(self.settings.model_dump(mode="json"))


def read_values(text: str) -> list[Any]:
    """The values of `2,5,10` or `uniform,beta`, as YAML reads them.

    Raises:
        FastarError: none, or not values joined by commas.
    """
    try:
        values: list[Any] = read_yaml(f"[{text}]")
    except FastarError as error:
        raise FastarError(f"{shortened(text)!r}: write values joined by commas, such as 2,5,10 ({error})") from error
    if not values:
        raise FastarError("no values: write some joined by commas, such as 2,5,10")
    return [float(one) if isinstance(one, str) and _POWER_OF_TEN.fullmatch(one) else one for one in values]


def overrides_of(base: Settings, kind: str, value: Any) -> dict[str, Any]:
    """The settings by which a point differs from `base`. The depth of networks that have it in their name is that."""
    arch = base.model.arch
    if kind == "depth" and ":" not in arch and re.search(r"\d", arch):
        return {"model.arch": re.sub(r"\d+", str(value), arch, count=1)}
    return {KINDS.get(kind, kind): value}


def points_of(base: Settings, kind: str, values: Sequence[Any], folder: Path, seeds: int) -> list[Point]:
    """The points of a sweep, in the order of `values`, for each of them so many stars.

    Raises:
        FastarError: a value that the setting does not take, one given twice, or a setting that there is not.
    """
    if seeds < 1:
        raise FastarError(f"--seeds {seeds}: give the number of stars of each point, 1 or more")
    if seeds > 1 and kind in ("star.seed", "seed"):
        raise FastarError(f"--seeds {seeds}: the sweep is one of {kind} itself; leave --seeds out")
    points: dict[str, Point] = {}
    for value in values:
        overrides = overrides_of(base, kind, value)
        name = f"{kind}={re.sub(r'[^A-Za-z0-9.+-]+', '_', str(value))}"
        if name in points:
            raise FastarError(f"{kind}: {value} is given twice, or named as another value; leave one out")
        for seed in range(seeds):
            own = overrides | ({"star.seed": base.star.seed + seed} if seed else {})
            content = merge(base.model_dump(mode="json"), nested(own))
            place = folder / "points" / (f"{name},seed={base.star.seed + seed}" if seed else name)
            point = Point(value, own, validate(content, f"sweep of {kind}"), RunFolder(place))
            if any(point.settings == other.settings for other in points.values()):
                raise FastarError(f"{kind}: {value} is another spelling of a value before it; leave one out")
            points[place.name] = point
    return list(points.values())


def trainings(points: Sequence[Point]) -> tuple[int, int]:
    """The regular models and the stars that points need, those that several share counted once."""
    regular, stars = dict[tuple[str, str], int](), set()
    for point in points:
        stars.add(repr(point.star_recipe))
        for kind, number in point.settings.sources.trained().items():
            of = repr(point.regular_recipe), kind
            regular[of] = max(number, regular.get(of, 0))
    return sum(regular.values()), len(stars)


def take_over(point: Point, others: Sequence[Point], progress: Progress) -> None:
    """Put models that the point lacks, and that were trained for others, into its run folder: regular models of the
    same recipe, and the star where it is the same too; and the lines of their epochs into its log. By hard links, or
    copies where there are none.

    Raises:
        FastarError: the folder is another run's, in use, or cannot be written.
    """
    found = _models_to_take(point, others)
    if found:
        with point.run.open(point.settings, progress), ExitStack() as claims:
            ours = [one for one in found if claims.enter_context(point.run.claim(*one[1:]))]
            for run in {other.path: other for other, _, _ in ours}.values():
                of_run = [(kind, index) for other, kind, index in ours if other.path == run.path]
                taken = [model for model in of_run if not point.run.finished(*model)]
                point.run.log.take([kind if kind == "star" else f"{kind} {index}" for kind, index in taken], run.log)
                for kind, index in taken:
                    if kind == "star":
                        _link(run.permutations, point.run.permutations)
                    _link(run.model(kind, index), point.run.model(kind, index))


def _models_to_take(point: Point, others: Sequence[Point]) -> list[tuple[RunFolder, str, int]]:
    """Models that the point lacks: a run that has each, its kind and number; the star last."""
    recipe, star, numbers = point.regular_recipe, point.star_recipe, point.settings.sources.trained()
    others = [other for other in others if other is not point]
    found = dict[tuple[str, int], RunFolder]()
    for other in others:
        if other.regular_recipe == recipe:
            for _, kind, index in other.run.models():
                if index < numbers.get(kind, 0) and not point.run.finished(kind, index):
                    found.setdefault((kind, index), other.run)
    same = [other.run for other in others if other.star_recipe == star and other.run.finished("star", 0)]
    if same and not point.run.finished("star", 0):
        found["star", 0] = same[0]
    return [(run, kind, index) for (kind, index), run in found.items()]


def _link(source: Path, target: Path) -> None:
    """Give a finished file, which is never written to again, a second name; copy it where that cannot be."""
    check_held(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without links, or one that is full: then the copy says so
        write_atomically(target, source.read_bytes())
