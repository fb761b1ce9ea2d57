"""The kinds of parts of tables and figures: the figures of their rows, from runs that are done where missing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastar.errors import FastarError
from fastar.evaluation import Segment
from fastar.evaluation.paths import barrier
from fastar.experiments.averages import uncertainty
from fastar.experiments.distances import distances
from fastar.experiments.finished_run import FinishedRun
from fastar.experiments.fusion import fuse
from fastar.experiments.measure import endpoint, evaluated, match_to, path_result, spread
from fastar.experiments.perturbed import perturbed_stars
from fastar.experiments.reproduce.beside import as_spread, figures_of, percent
from fastar.experiments.reproduce.needed_runs import Part, points_of_optimizers, points_of_rows, sizes_point
from fastar.experiments.reproduce.shared_runs import SharedRuns
from fastar.experiments.session import Session, measuring, threads
from fastar.experiments.theory import run_certificate, run_two_layer
from fastar.runs import RunFolder, write_json
from fastar.runs.model_files import Checkpoint

Rows = dict[str, dict[str, Any]]
"""Figures by the names of rows."""


@dataclass(frozen=True)
class Found:
    """What a part found: the figures of its rows, JSON files by row that its picture (`draw`) is made of, and why rows
    could not be run."""

    rows: Rows
    draw: str | None = None
    files: dict[str, Path] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def _runs(runs: SharedRuns, part: Part, folder: Path) -> Found:
    """The runs of rows that can be run: one may have data that another lacks."""
    rows, files, failed = {}, {}, {}
    for (name, _), point in zip(part["rows"].items(), points_of_rows(runs, part, folder), strict=True):
        try:
            rows[name] = figures_of(runs.results(point), part.get("split", "train"))
            files[name] = point.run.results
        except FastarError as error:
            failed[name] = str(error)
    if not rows:
        raise FastarError(next(iter(failed.values())))
    return Found(rows, part.get("draw"), files, failed)


def _sweep(runs: SharedRuns, part: Part, folder: Path) -> Found:
    found = runs.swept(part, folder)
    rows = {str(point["value"]): figures_of(point) for point in found["points"]}
    return Found(rows, "sweep", {"": folder / "sweep.json"})


def _fusion(runs: SharedRuns, part: Part, folder: Path) -> Found:
    rows: Rows = {}
    for point in runs.swept(part, folder)["points"]:
        stars, soups = [], []
        for place in point["folders"]:
            with runs.opened(RunFolder(folder / place)) as run:
                found = fuse(run)
                write_json(folder / place / "fusion.json", found)
            stars.append(found["predictors"]["star"]["accuracy"])
            soups.append(found["predictors"]["greedy soup"]["accuracy"])
        of = found["predictors"]  # the same for each star, but for it and the soup of sources matched to it
        one = {name: as_spread(of[key]["accuracy"]) for name, key in _PREDICTORS.items()}
        one |= {"regular_accuracy": found["single"]["accuracy"], "star_accuracy": spread(stars)}
        one |= {"soup_accuracy": spread(soups), "best_star_accuracy": as_spread(max(stars))}
        rows[str(point["value"])] = {
            **{key: percent(value) for key, value in one.items()},
            "SR": figures_of(point)["SR"],
        }
    return Found(rows)


_PREDICTORS = {"best_accuracy": "best source by test", "ensemble_accuracy": "ensemble"}


def _sizes(runs: SharedRuns, part: Part, folder: Path) -> Found:
    """Barriers to the first heldouts, and of pairs of the first sources and heldouts that were measured."""
    point, rows = sizes_point(runs, part), {}
    paths = runs.results(point)["paths"]
    regular = [path for path in paths if path["kind"] == "regular_regular"]
    firsts, seconds = (list(dict.fromkeys(path[end] for path in regular)) for end in ("first", "second"))
    for size in part["values"]:
        pairs = [p for p in regular if p["first"] in firsts[:size] and p["second"] in seconds[:size]]
        stars = [path for path in paths if path["kind"] == "star_heldout"][:size]
        row = {}
        for name, some in (("RR", pairs), ("SR", stars)):
            of = spread([barrier(path["t"], path["train_loss"]) for path in some])
            row[name] = of
            row |= {f"{name}_{end}": {"mean": of[end], "std": None, "n": of["n"]} for end in ("min", "max")}
        rows[str(size)] = row
    return Found(rows)


def _perturbed(runs: SharedRuns, part: Part, folder: Path) -> Found:
    point = runs.point(part)
    with runs.finished(point) as run:
        found = perturbed_stars(run, radii=part["values"])
        place = point.run.path / "perturb.json"
        write_json(place, found)
    rows = {}
    for at in found["points"]:
        of = at["train"]
        rows[f"{at['radius']:g}"] = {"star": of["star_loss"], "SR": of["barrier"], "RR": found["regular"]["train"]}
    return Found(rows, "perturbed", {"": place})


def _distances(runs: SharedRuns, part: Part, folder: Path) -> Found:
    rows = {}
    with runs.finished(runs.point(part)) as run:
        found = distances(run)
    for name, kind in _PAIRS.items():
        rows[name] = {way: found[kind][way]["distance"] for way in ("unmatched", "matched")}
        rows[name]["cosine"] = found[kind]["matched"]["cosine"]
    return Found(rows)


_PAIRS = {"regular to regular": "regular_regular", "star to heldouts": "star_heldout", "star to sources": "star_source"}


def _uncertainty(runs: SharedRuns, part: Part, folder: Path) -> Found:
    """Metrics of each family at its largest K."""
    point = runs.point(part)
    with runs.finished(point) as run:
        found = uncertainty(run, most=part["most"], repetitions=part["repetitions"])
        place = point.run.path / "uncertainty.json"
        write_json(place, found)
    rows = {}
    for family, of in found["families"].items():
        last = {
            key: {"mean": of[key]["mean"][-1], "std": of[key]["std"][-1], "n": of["repetitions"]} for key in _METRICS
        }
        rows[family] = {**last, "K": as_spread(of["k"][-1])}
    return Found(rows, "uncertainty", {"": place})


_METRICS = ("nll", "ece", "auroc", "auroc_20", "auroc_entropy", "auroc_20_entropy")


def _theory(runs: SharedRuns, part: Part, folder: Path) -> Found:
    given = {key: part[key] for key in ("most", "draws") if key in part}
    what = part["what"]
    if what == "certificate":
        found = run_certificate(**given, progress=runs.progress)
        shares, name = found["q"], "Q"
    else:
        found = run_two_layer(what, **given, progress=runs.progress)
        shares, name = found["share"], "share"
    place = folder / f"{what}.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(place, found)
    shown = range(len(found["eps"])) if what != "certificate" else (0, 11, 25, 49)
    rows = {
        str(width): {f"{name} {found['eps'][i]:.2g}": {"mean": row[i], "std": None, "n": found["draws"]} for i in shown}
        for width, row in zip(found["widths"], shares, strict=True)
    }
    return Found(rows, "theory", {"": place})


def _optimizers(runs: SharedRuns, part: Part, folder: Path) -> Found:
    """Barriers within the heldouts of two runs, and from the star of the first to both."""
    points = points_of_optimizers(runs, part, folder)
    with runs.finished(points[0]) as first, runs.finished(points[1]) as second:
        return _between_groups(first, second, part["count"], folder)


def _between_groups(first: FinishedRun, second: FinishedRun, count: int, folder: Path) -> Found:
    groups = {"sgd": first.heldouts[:count], "adam": second.heldouts[:count]}
    pairs = []
    for name, models in groups.items():
        named = [(f"{name} {index}", model) for index, model in enumerate(models)]
        pairs += [(f"{name} to {name}", one, other) for one, other in itertools.combinations(named, 2)]
        pairs += [(f"star to {name}", ("star", first.star), one) for one in named]
    return _paths(first.session, pairs, folder)


def _methods(runs: SharedRuns, part: Part, folder: Path) -> Found:
    """Barriers of the run's pairs and from its star, the ends matched in several ways."""
    rows, files = {}, {}
    with runs.finished(runs.point(part)) as run:
        ends = [(f"heldout {index}", model) for index, model in enumerate(run.heldouts)]
        named = [(f"source {index}", source) for index, source in enumerate(run.sources)]
        pairs = [("SR", ("star", run.star), one) for one in ends]
        pairs += [("RR", first, second) for first, second in zip(named, ends, strict=False)]  # as many as both have
        for method in part["values"]:
            matching = runs.settings(part, f"matching.method={method}").matching
            session = replace(run.session, settings=run.session.settings.model_copy(update={"matching": matching}))
            found = _paths(session, pairs, folder, f"{method}.json")
            rows[method] = {kind: figures["barrier"] for kind, figures in found.rows.items()}
            files[method] = found.files[""]
    return Found(rows, "methods", files)


Named = tuple[str, Checkpoint]


def _paths(
    session: Session, pairs: Sequence[tuple[str, Named, Named]], folder: Path, name: str = "paths.json"
) -> Found:
    """The barriers of pairs, by their kind: the second network of each is matched to the first."""
    segments = []
    with threads(session), measuring("paths"):
        for kind, (first, one), (second, other) in pairs:
            (matched,) = match_to(session, one, [other]) if session.settings.matching.method != "none" else (None,)
            segments.append(Segment(kind, endpoint(session, first, one), endpoint(session, second, other, matched)))
        measured, _ = evaluated(session, segments)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [path_result(path) for path in measured]
    write_json(folder / name, {"t": measured[0].t, "paths": paths})
    kinds = dict.fromkeys(kind for kind, _, _ in pairs)
    rows = {
        kind: {"barrier": spread([path.barrier("train") for path in measured if path.kind == kind])} for kind in kinds
    }
    return Found(rows, "groups", {"": folder / name})


KINDS: dict[str, Callable[[SharedRuns, Part, Path], Found]] = {
    "runs": _runs,
    "sweep": _sweep,
    "fusion": _fusion,
    "sizes": _sizes,
    "perturbed": _perturbed,
    "distances": _distances,
    "uncertainty": _uncertainty,
    "theory": _theory,
    "optimizers": _optimizers,
    "methods": _methods,
}
"""The figures of a part of each kind; what it writes lies in a folder of its own."""
