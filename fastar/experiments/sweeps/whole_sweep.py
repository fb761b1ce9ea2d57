"""A sweep: its points one after the other in one folder, and `sweep.json`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fastar.config import Settings, changes
from fastar.config.strict_yaml import read_yaml
from fastar.errors import FastarError, refusal
from fastar.experiments.sweeps.points import Point, overrides_of, points_of, take_over, trainings
from fastar.experiments.whole_run import check_whole, train_star
from fastar.runs import delete, hold, remove_if_empty, write_atomically, write_json
from fastar.runs.claims import JOBS, PROCESSES, Processes
from fastar.runs.folder import FREE_KEYS
from fastar.runs.lock import NAME as LOCK
from fastar.runs.lock import InUse
from fastar.runtime.json_files import read_file
from fastar.runtime.progress import SILENT, Progress

if TYPE_CHECKING:
    from fastar.experiments.user_task import Given


def sweep(
    settings: Settings,
    kind: str,
    values: Sequence[Any],
    out: Path,
    progress: Progress = SILENT,
    *,
    seeds: int = 1,
    given: Given | None = None,
    others: Sequence[Point] = (),
) -> dict[str, Any]:
    """Train and measure a star for each value of a setting, in run folders below `out`; what of them is the same is
    trained once. Points that are finished stay, and those of earlier values are in the results too.

    Args:
        settings: of all points, but for the setting that is swept.
        kind: sources, width, depth, t, mu, or a setting by its dotted key.
        values: of it.
        seeds: stars of each point (`star.seed`).
        given: parts of the task that the settings do not name.
        others: runs elsewhere, whose models are taken where they are the same.

    Returns:
        The content of `sweep.json` (`sweep_results`).

    Raises:
        FastarError: bad input, before anything is trained, or a folder that holds something else; what was finished
            stays, and the same call goes on from there.
    """
    points_of(settings, kind, values, out, seeds)  # what is wrong with them is said first
    known = _recorded(out, settings, kind)
    every = [*known["values"], *(value for value in values if value not in known["values"])]
    if all(isinstance(value, int | float) for value in every):
        every.sort()
    most = max(seeds, known["seeds"])
    points = points_of(settings, kind, every, out, most)
    asked = points_of(settings, kind, [value for value in every if value in values], out, seeds)
    wanted = {point.run.path for point in asked}
    chosen = [point for point in points if point.run.path in wanted or point.run.results.is_file()]
    _check(chosen, given)
    with refusal(f"{out}: cannot be used as the folder of a sweep", "choose another (--out)"):
        out.mkdir(parents=True, exist_ok=True)
    processes = Processes(out)
    with ExitStack() as seat:
        with hold(out, progress.line, wait=True):
            seat.enter_context(processes.joined())
            at_work = processes.others()
            known = _recorded(out, settings, kind, bool(at_work))  # again: another process may have added to them
            if (every, most) != (known["values"], known["seeds"]):
                for other in at_work:
                    raise InUse(f"{out}: in use by another fastar ({other}) with other values; wait for it")
            content = {"kind": kind, "values": every, "seeds": most, "settings": settings.model_dump(mode="json")}
            write_atomically(out / "sweep.yaml", yaml.safe_dump(content, sort_keys=False).encode())
        found = _trained(chosen, [*points, *others], progress, given, processes)
        with hold(out, progress.line, wait=True):
            from fastar.experiments.sweeps.sweep_results import sweep_results  # imports torch

            results = sweep_results(kind, chosen, found, out)
            write_json(out / "sweep.json", results)
            if not processes.others():
                for path in processes.locks():  # of killed ones
                    delete(path)
                    remove_if_empty(path.parent)
    return results


def _trained(
    points: Sequence[Point], known: Sequence[Point], progress: Progress, given: Given | None, processes: Processes
) -> list[dict[str, Any]]:
    """The results of points: those that another process works on are left to the end, or to it."""
    found, left = dict[Path, dict[str, Any]](), list(points)
    while left:
        if processes.others():  # together, so that what points share is trained once
            for point in left:
                _train_regular(point, known, progress, given)
        free = [point for point in left if not point.run.processes.others()]
        point = (free or left)[0]  # where there are others at all of them, it shares their models, and waits
        progress.line(f"sweep: {point.run.path.name} ({len(found) + 1} of {len(points)})")
        take_over(point, known, progress)
        found[point.run.path] = train_star(point.settings, point.run.path, progress, given=given)
        left.remove(point)
    return [found[point.run.path] for point in points]


def _train_regular(point: Point, known: Sequence[Point], progress: Progress, given: Given | None) -> None:
    """Train the sources and heldouts that a point lacks."""
    numbers = point.settings.sources.trained()
    if all(point.run.finished(kind, index) for kind, number in numbers.items() for index in range(number)):
        return
    from fastar.experiments.star_domain import train_sources  # imports torch

    take_over(point, known, progress)
    train_sources(point.settings, point.run.path, progress, kinds=list(numbers), given=given)


def plan_sweep(
    settings: Settings,
    kind: str,
    values: Sequence[Any],
    out: Path,
    speed: float | None = None,
    progress: Progress = SILENT,
    *,
    seeds: int = 1,
) -> dict[str, Any]:
    """The plan (`plan_run`) of the point with the largest value, the last of those that are no numbers; and
    `trainings`: the regular models and the stars of all points, what they share counted once."""
    from fastar.experiments.plan import plan_run

    points = points_of(settings, kind, values, out, seeds)
    numbers = all(isinstance(point.value, int | float) for point in points)
    largest = max(points, key=lambda point: point.value) if numbers else points[-1]
    regular, stars = trainings(points)
    plan = plan_run(largest.settings, largest.run.path, speed, progress)
    return {**plan, "point": largest.run.path.name, "trainings": {"regular": regular, "star": stars}}


def _recorded(out: Path, settings: Settings, kind: str, at_work: bool = False) -> dict[str, Any]:
    """The values and the number of seeds of the sweep in the folder; none in a new one.

    Args:
        at_work: other processes are at work on it: it counts before they have begun a point.

    Raises:
        FastarError: it holds another sweep, or something else.
    """
    path, new = out / "sweep.yaml", {"values": [], "seeds": 1}
    with refusal(f"{out}: cannot be used as the folder of a sweep", "choose another (--out)"):
        there = (
            sorted(one.name for one in out.iterdir() if one.name not in (JOBS, LOCK, PROCESSES)) if out.exists() else []
        )
        if not path.is_file():
            foreign = [name for name in there if not name.endswith(".tmp")]
            if foreign:
                raise FastarError(f"{out}: holds {foreign[0]} but no sweep.yaml: no sweep; choose another (--out)")
            return new
        try:
            found = read_yaml(read_file(path).decode())
            was, old = (found["kind"], found["values"], found["seeds"]), found["settings"]
            whole = isinstance(was[1], list) and isinstance(was[2], int) and isinstance(old, dict)
        except (FastarError, UnicodeDecodeError, LookupError, TypeError):
            whole = False
        if not whole:
            raise FastarError(f"{path}: damaged; restore it, or delete it and {out / 'points'}")
        if not at_work and not any((out / "points").glob("*/config.yaml")):
            return new  # nothing of it was finished: it may become any sweep
    swept = overrides_of(settings, kind, 0)
    differ = {"kind": (was[0], kind)} if was[0] != kind else changes(old, settings.model_dump(mode="json"))
    for key, (before, now) in differ.items():
        grown = key == "sources.heldout" and before <= now
        if not key.startswith(FREE_KEYS) and key not in swept and not grown:
            raise FastarError(
                f"{out}: holds another sweep ({key} was {before!r}, now {now!r}); choose another folder (--out) or the "
                "same settings"
            )
    return {"values": was[1], "seeds": was[2]}


def _check(points: Sequence[Point], given: Given | None) -> None:
    """Raise FastarError if one of the points cannot be run, before the first of them is; as far as it is cheap."""
    for point in points:
        check_whole(point.settings, point.run)
    unfinished = [point for point in points if not point.run.results.is_file()]
    if unfinished:
        from fastar.experiments.star_domain import prepare_session  # only now torch and all that is slow to import

        for point in unfinished:
            prepare_session(point.settings, point.run.path, given=given)
