"""Run folders at a glance, read from their files alone: `fastar runs`. Imports no torch."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from fastar.errors import FastarError
from fastar.lock import is_held
from fastar.runs import IN_TRAINING, RunFolder

_CHECKPOINT = re.compile(r"epoch-(\d+)-step-(\d+)\.safetensors")


@dataclass(frozen=True)
class RunOverview:
    """Where a run stands."""

    run: str
    """Its folder."""
    state: str
    """running, stopped or finished."""
    where: str
    """The model in training and its epoch, or what is missing; empty where it is finished."""
    age: float
    """Seconds since something was written."""
    sources: str
    """How many there are, of how many."""
    heldout: str
    loss: float | None
    """Of the last epoch that the log knows."""
    barrier: float | None
    """Mean train barrier from the star to the heldouts, or to the sources where there are none."""
    star_accuracy: float | None
    """On the test set."""


def runs_below(folder: Path) -> list[RunOverview]:
    """All run folders in `folder`, and itself if it is one; the one written to last comes first.

    Raises:
        FastarError: no such folder.
    """
    if not folder.is_dir():
        raise FastarError(f"{folder}: no such folder; give the one that holds your run folders")
    return sorted((overview(path) for path in _run_folders(folder)), key=lambda run: run.age)


def _run_folders(folder: Path) -> Iterator[Path]:
    for place, inner, files in os.walk(folder):
        if "config.yaml" in files and _is_run(Path(place)):
            yield Path(place)
            inner.clear()  # a run holds no runs


def _is_run(folder: Path) -> bool:
    """Other programs call their files config.yaml too."""
    try:
        saved = RunFolder(folder).saved_settings()
    except FastarError:
        return False
    return isinstance(saved.get("sources"), Mapping) and isinstance(saved.get("train"), Mapping)


def overview(folder: Path) -> RunOverview:
    """Where the run in `folder` stands."""
    run = RunFolder(folder)
    settings = run.saved_settings()
    sources, heldout = settings["sources"], settings["sources"].get("heldout", 0)
    there = {kind: len(list((folder / name).glob("*.safetensors"))) for kind, name in _FOLDERS.items()}
    given = sources.get("folder") is not None
    results = _results(run)
    finished = (
        results.get("sources") == sources.get("number")
        and results.get("heldout") == heldout
        and run.star.is_file()
        and there["heldout"] >= heldout
    )
    running = is_held(folder)
    log = run.read_log()
    written = [path.stat().st_mtime for path in (run.log_file, run.results, run.config, run.star) if path.is_file()]
    losses = [entry["loss"] for entry in log if isinstance(entry.get("loss"), float)]
    return RunOverview(
        run=str(folder),
        state="running" if running else "finished" if finished else "stopped",
        where="" if finished and not running else _where(run, settings, log, there, running=running),
        age=max(time.time() - max(written), 0.0),
        sources="given" if given else f"{there['source']}/{sources.get('number')}",
        heldout=f"{there['heldout']}/{heldout}",
        loss=losses[-1] if losses else None,
        barrier=_barrier(results),
        star_accuracy=_number(results, "accuracy", "test", "star"),
    )


_FOLDERS = {"source": "sources", "heldout": "heldout"}


def _where(
    run: RunFolder,
    settings: Mapping[str, Any],
    log: Sequence[Mapping[str, Any]],
    there: Mapping[str, int],
    *,
    running: bool,
) -> str:
    """The model in training: a running one's by the log, a stopped one's by its last checkpoint."""
    epochs = settings["train"].get("epochs")
    star_epochs = settings.get("star", {}).get("epochs") or epochs
    last = next((entry for entry in reversed(log) if "epoch" in entry and "model" in entry), None)
    if running and last is not None:
        whole = star_epochs if last.get("kind") == "star" else epochs
        if last["epoch"] + 1 != whole:
            return f"{last['model']}, epoch {last['epoch'] + 2} of {whole}"
    saved = sorted(run.path.glob(f"{IN_TRAINING}/*/epoch-*.safetensors"), key=lambda path: path.stat().st_mtime)
    found = _CHECKPOINT.fullmatch(saved[-1].name) if saved else None
    if found:
        kind, _, number = saved[-1].parent.name.rpartition("-")
        name = "star" if kind == "star" else f"{kind} {int(number)}"
        whole = star_epochs if kind == "star" else epochs
        step = f", step {int(found[2]) + 1}" if int(found[2]) else ""
        epoch = min(int(found[1]) + 1, whole)
        return f"{name}, epoch {epoch}{step} of {whole}"
    asked = settings["sources"]
    for kind, wanted in (("source", asked.get("number")), ("heldout", asked.get("heldout"))):
        given = kind == "source" and asked.get("folder") is not None
        if not given and there[kind] < (wanted or 0):
            return f"{kind} {there[kind]}"
    return "star" if not run.star.is_file() else "results"


def _results(run: RunFolder) -> dict[str, Any]:
    try:
        return run.read_results()
    except FastarError:
        return {}


def _number(results: Mapping[str, Any], *keys: str) -> float | None:
    place: Any = results
    for key in keys:
        place = place.get(key) if isinstance(place, Mapping) else None
    return float(place) if isinstance(place, int | float) else None


def _barrier(results: Mapping[str, Any]) -> float | None:
    found = _number(results, "train", "star_heldout", "mean")
    return found if found is not None else _number(results, "train", "star_source", "mean")


def overview_table(runs: Sequence[RunOverview], below: Path) -> Table:
    """One row per run, named from the folder `below` on; models are sources and heldouts."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("run", overflow="fold", min_width=8)
    table.add_column("state", min_width=9)
    shown = [_figures(run) for run in runs]
    for n, name in enumerate(("age", "models", "loss", "barrier", "accuracy")):
        # Names give way where there is no room: a figure that is cut looks like another one.
        widest = max(len(text) for text in (name, *(row[n] for row in shown)))
        table.add_column(name, justify="right", no_wrap=True, min_width=widest)
    for run, figures in zip(runs, shown, strict=True):
        name = os.path.relpath(run.run, below)
        state = f"{run.state} {'in' if run.state == 'running' else 'at'} {run.where}" if run.where else run.state
        table.add_row(run.run if name == "." else name, state, *figures)
    return table


def _figures(run: RunOverview) -> list[str]:
    numbers = ("-" if value is None else _figure(value) for value in (run.loss, run.barrier, run.star_accuracy))
    return [duration(run.age), f"{run.sources} + {run.heldout}", *numbers]


def _figure(value: float) -> str:
    """Of a training that diverges too.

    >>> _figure(0.25), _figure(123.4), _figure(2.5e28)
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
