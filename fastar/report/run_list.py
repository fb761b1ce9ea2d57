"""Run folders at a glance, read from their files alone: `fastar runs`. Imports no torch."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from fastar.errors import FastarError
from fastar.runs import CHECKPOINT, RunFolder, is_held, run_folders_below

GIVEN = (("source", "folder"), ("heldout", "heldout_folder"))
"""Kinds of models, and the settings that give them."""
AFTER = ("swag", "student")
"""Kinds of models that commands on finished runs train."""


@dataclass(frozen=True)
class RunOverview:
    """The state of a run."""

    run: str
    """Its folder."""
    state: str
    """running, stopped, finished or damaged."""
    where: str
    """The model in training and its epoch, and how many more are; or what is missing or damaged. Empty where it is
    finished."""
    age: float
    """Seconds since something was written."""
    sources: str
    """Number there, of number asked for."""
    heldout: str
    loss: float | None
    """Of the last epoch that the log knows."""
    barrier: float | None
    """Mean train barrier from the star to the heldouts, or to the sources where there are none."""
    star_accuracy: float | None
    """On the test set."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Other metrics of the star, on the test set; where there is none, on the training set."""


def runs_below(folder: Path) -> list[RunOverview]:
    """All run folders in `folder`, and itself if it is one; the one written to last comes first.

    Raises:
        FastarError: no such folder.
    """
    if not folder.is_dir():
        raise FastarError(f"{folder}: no such folder; give the one that holds your run folders")
    return sorted((_told(path) for path in run_folders_below(folder)), key=lambda run: run.age)


def _told(folder: Path) -> RunOverview:
    """The run in `folder`, or what is damaged of it: the others are told all the same."""
    try:
        return overview(folder)
    except (FastarError, OSError) as error:
        where = " ".join(str(error).removeprefix(f"{folder}{os.sep}").split())
        age = max(time.time() - _written(folder), 0.0)
        return RunOverview(str(folder), "damaged", where, age, "-", "-", None, None, None)


def overview(folder: Path) -> RunOverview:
    """The state of the run in `folder`.

    Raises:
        FastarError: its settings, results or log are damaged.
    """
    run = RunFolder(folder)
    settings = _settings(run)
    sources, heldout = settings["sources"], settings["sources"].get("heldout", 0)
    there = Counter(kind for _, kind, _ in run.models())
    given = {kind for kind, key in GIVEN if sources.get(key) is not None}
    running = is_held(folder) or bool(run.processes.others())
    results = _results(run, running=running)
    finished = (
        results.get("sources") == sources.get("number")
        and results.get("heldout") == heldout
        and run.star.is_file()
        and ("heldout" in given or there["heldout"] >= heldout)
    )
    last, loss = _newest(run)
    held = sum(is_held(path) for path, _, _ in run.trainings()) if running else 0
    others = f" and {held - 1} more" if held > 1 else ""
    written = max(_written(path) for path in (run.log.path, run.results, run.config, run.star))
    return RunOverview(
        run=str(folder),
        state="running" if running else "finished" if finished else "stopped",
        where="" if finished and not running else f"{_where(run, settings, last, there, running=running)}{others}",
        age=max(time.time() - written, 0.0),
        sources="given" if "source" in given else f"{there['source']}/{sources.get('number')}",
        heldout="given" if "heldout" in given else f"{there['heldout']}/{heldout}",
        loss=loss,
        barrier=_barrier(results),
        star_accuracy=_number(results, "accuracy", "test", "star"),
        metrics=_metrics(results),
    )


def _newest(run: RunFolder) -> tuple[dict[str, Any] | None, float | None]:
    """The last epoch in the log, and the last loss of a source, heldout or star; None: there is none."""
    last, loss = None, None
    for entry in run.log.newest_first():
        if last is None and "epoch" in entry and "model" in entry:
            last = entry
        if loss is None and isinstance(entry.get("loss"), float) and entry.get("kind") not in AFTER:
            loss = entry["loss"]
        if last is not None and loss is not None:
            break
    return last, loss


def _settings(run: RunFolder) -> dict[str, Any]:
    """The settings of a run, those that are looked at here of the right types; older versions may not know all."""
    settings = run.saved_settings()
    for section in ("sources", "train", "star"):
        if not isinstance(settings.setdefault(section, {}), Mapping):
            raise FastarError(f"{run.config}: {section} is no section of settings; restore it")
    for section, key in (("sources", "number"), ("sources", "heldout"), ("train", "epochs"), ("star", "epochs")):
        value = settings[section].get(key)
        if value is not None and type(value) is not int:
            raise FastarError(f"{run.config}: {section}.{key}={value!r} is no number; restore it")
    return settings


def _written(path: Path) -> float:
    """The time of a file's last change, in seconds since 1970; 0: it is not there, or not any more."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _where(
    run: RunFolder,
    settings: Mapping[str, Any],
    last: Mapping[str, Any] | None,
    there: Mapping[str, int],
    *,
    running: bool,
) -> str:
    """The model in training: a running one's by the last epoch in the log, a stopped one's by its last checkpoint."""
    epochs = settings["train"].get("epochs")
    star_epochs = settings["star"].get("epochs") or epochs
    wholes = {"star": star_epochs, "student": star_epochs, "swag": None}
    if running and last is not None:
        whole = wholes.get(str(last.get("kind")), epochs)
        if last["epoch"] + 1 != whole:
            return f"{last['model']}, epoch {last['epoch'] + 2}{_of(whole)}"
    saved = [
        (_written(path), kind, number, int(found[1]), int(found[2]))
        for folder, kind, number in run.trainings()
        for path in folder.glob("epoch-*")
        if (found := CHECKPOINT.fullmatch(path.name))
    ]
    if saved:
        _, kind, number, done, steps = max(saved)
        name = f"{kind} {number}" if kind in ("source", "heldout") else kind
        whole = wholes.get(kind, epochs)
        step = f", step {steps + 1}" if steps else ""
        epoch = min(done + 1, whole or done + 1)
        return f"{name}, epoch {epoch}{step}{_of(whole)}"
    asked = settings["sources"]
    for (kind, folder), wanted in zip(GIVEN, ("number", "heldout"), strict=True):
        if asked.get(folder) is None and there[kind] < (asked.get(wanted) or 0):
            return f"{kind} {there[kind]}"
    return "star" if not run.star.is_file() else "results"


def _of(whole: int | None) -> str:
    """The epochs of the whole training, where they are known."""
    return "" if whole is None else f" of {whole}"


def _results(run: RunFolder, *, running: bool) -> dict[str, Any]:
    try:
        return run.read_results() if run.results.exists() else {}
    except FastarError:
        if running:  # they are measured anew
            return {}
        raise


def _number(results: Mapping[str, Any], *keys: str) -> float | None:
    found: Any = results
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None


def _metrics(results: Mapping[str, Any]) -> dict[str, float]:
    named = results.get("metrics")
    split = "test" if "test" in results else "train"
    values = {name: _number(results, "metrics", name, split, "star") for name in named or ()}
    return {name: value for name, value in values.items() if value is not None}


def _barrier(results: Mapping[str, Any]) -> float | None:
    found = _number(results, "train", "star_heldout", "mean")
    return found if found is not None else _number(results, "train", "star_source", "mean")


def overview_table(runs: Sequence[RunOverview], below: Path) -> Table:
    """One row per run, named from the folder `below` on; models are sources and heldouts."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("run", overflow="fold", min_width=8)
    table.add_column("state", min_width=9)
    # The first metric of each.
    metrics = list(dict.fromkeys(name for run in runs for name in [*_metrics_of(run)][:1])) or ["accuracy"]
    shown = [_numbers(run, metrics) for run in runs]
    for n, name in enumerate(("age", "models", "loss", "barrier", *metrics)):
        # Names give way where there is no space: a number that is cut looks like another one.
        widest = max(len(text) for text in (name, *(row[n] for row in shown)))
        table.add_column(name, justify="right", no_wrap=True, min_width=widest)
    for run, numbers in zip(runs, shown, strict=True):
        name = os.path.relpath(run.run, below)
        joined = {"running": " in ", "damaged": ": "}.get(run.state, " at ")
        state = f"{run.state}{joined}{run.where}" if run.where else run.state
        table.add_row(run.run if name == "." else name, state, *numbers)
    return table


def _metrics_of(run: RunOverview) -> dict[str, float]:
    return {**({} if run.star_accuracy is None else {"accuracy": run.star_accuracy}), **run.metrics}


def _numbers(run: RunOverview, metrics: Sequence[str]) -> list[str]:
    found = map(_metrics_of(run).get, metrics)
    numbers = ("-" if value is None else _short(value) for value in (run.loss, run.barrier, *found))
    return [duration(run.age), "-" if run.state == "damaged" else f"{run.sources} + {run.heldout}", *numbers]


def _short(value: float) -> str:
    """A number of few digits, of a training that diverges too.

    >>> _short(0.25), _short(123.4), _short(2.5e28)
    ('0.250', '123.400', '2.5e+28')
    """
    return f"{value:.3f}" if abs(value) < 1e4 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds in the largest unit that fits.

    >>> duration(59), duration(60), duration(7300), duration(200000)
    ('59 s', '1 min', '2 h', '2 d')
    """
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{seconds:.0f} s"
