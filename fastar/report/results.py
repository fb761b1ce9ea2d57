"""Tables and pictures from results; computes nothing that is not in them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.box import ASCII2
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastar.errors import FastarError
from fastar.report.figures import figure_of, legend_below, plain
from fastar.runtime.progress import count_text, size_text
from fastar.runtime.standard_streams import plus_minus

# Okabe-Ito colours, which the colour-blind can tell apart; markers and dashes tell the curves apart in grey print.
STYLES = {
    "star_heldout": ("star to heldouts", "#D55E00", "-", "o"),
    "star_source": ("star to sources", "#009E73", "--", "s"),
    "regular_regular": ("regular to regular", "#0072B2", "-.", "^"),
    "path": ("path", "#D55E00", "-", "o"),
}
ROWS = (
    ("star_heldout", "star to heldouts"),
    ("star_source", "star to sources"),
    ("regular_regular", "regular to regular"),
    ("regular_regular_unmatched", "regular, unmatched"),
)


def check_results(results: Mapping[str, Any], where: Path) -> None:
    """Raise FastarError unless `results` (read from `where`) has all that the table and the picture show."""
    try:
        _ = [results[split][kind]["n"] for split in splits_of(results) for kind, _ in ROWS]
        _ = results_table(results), speed_lines(results), statistics_lines(results)
        curves = [path[f"train_{name}"] for path in results["paths"] for name in ("loss", *metrics_of(results))]
        whole = (
            bool(curves)
            and all(len(curve) == len(results["t"]) for curve in curves)
            and all(math.isfinite(value) for curve in (results["t"], *curves) for value in curve)
            and all(isinstance(path["kind"], str) for path in results["paths"])
        )
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        whole = False
    if not whole:
        raise FastarError(f"{where}: not the results of a run, or damaged; delete it and run `fastar train-star` again")


def splits_of(results: Mapping[str, Any]) -> list[str]:
    """The splits that were measured: train, validation where samples are kept for it, test where there are some."""
    return [split for split in ("train", "validation", "test") if split in results]


def metrics_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a run's regular models and star, by their names."""
    accuracy = {"accuracy": results["accuracy"]} if "accuracy" in results else {}
    return {**accuracy, **results.get("metrics", {})}


def task_name(results: Mapping[str, Any]) -> str:
    """The names of data and network, as titles have them: data given from Python have none."""
    names = [name for name in (results["dataset"], results["arch"]) if not name.startswith("python:")]
    return ", ".join(name.removeprefix("__main__:") for name in names)


def shown(value: Mapping[str, Any] | float | None, digits: int = 3) -> str:
    """A number, or mean and standard deviation, rounded for people."""
    if value is None or (isinstance(value, Mapping) and value["mean"] is None):
        return "-"
    if isinstance(value, Mapping):
        if value["std"] is None:
            return f"{value['mean']:.{digits}f}"
        return f"{value['mean']:.{digits}f} {plus_minus()} {value['std']:.{digits}f}"
    return f"{value:.{digits}f}"


def new_table(title: str, *columns: str, words: Sequence[int] = (0,)) -> Table:
    """A table without rows.

    Args:
        columns: their headers.
        words: those whose cells are words, at the left and folded where there is no space; the others are numbers.
    """
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        is_word = number in words
        table.add_column(column, justify="left" if is_word else "right", overflow="fold" if is_word else "ellipsis")
    return table


def results_table(results: Mapping[str, Any]) -> Table:
    """Losses, accuracies and barriers of a run on each split."""
    title = f"{task_name(results)}: star model of {count_text(results['sources'], 'source')}"
    regular = results["train"]["regular_loss"]
    splits = splits_of(results)
    table = new_table(title, "", "n", *splits)
    table.add_row("loss, regular", str(regular["n"]), *(shown(results[s]["regular_loss"]) for s in splits))
    table.add_row("loss, star", "1", *(shown(results[s]["star_loss"]) for s in splits))
    for name, found in metrics_of(results).items():
        table.add_row(f"{name}, regular", str(regular["n"]), *(shown(found[s]["regular"]) for s in splits))
        table.add_row(f"{name}, star", "1", *(shown(found[s]["star"]) for s in splits))
    table.add_section()
    for kind, name in ROWS:
        if results["train"][kind]["n"]:
            n = str(results["train"][kind]["n"])
            table.add_row(f"barrier, {name}", n, *(shown(results[s][kind]) for s in splits))
    star = "star_heldout" if results["train"]["star_heldout"]["n"] else "star_source"
    for key in ("largest_loss", "accuracy_barrier"):  # results of older versions have neither
        for kind in (star, "regular_regular"):
            n = results["train"].get(key, {}).get(kind, {"n": 0})["n"]
            if n:
                called = f"{key.replace('_', ' ')}, {dict(ROWS)[kind]}"
                table.add_row(called, str(n), *(shown(results[s][key][kind]) for s in splits))
    return table


def results_text(results: Mapping[str, Any]) -> str:
    """The same as lines of text, without colours."""
    return table_text(results_table(results))


def table_text(table: Table) -> str:
    """A table as lines of text, without colours."""
    written = StringIO()
    if plus_minus().isascii():  # stdout cannot encode lines either
        table.box = ASCII2
    Console(file=written, width=100, color_system=None, legacy_windows=False).print(table)
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines())


def speed_lines(results: Mapping[str, Any]) -> list[str]:
    """Lines on what a run's time went into and its peak memory; none where the results do not know."""
    lines = []
    for kind, found in results.get("speed", {}).items():
        if found is not None:
            shares = sorted(found["shares"].items(), key=lambda item: -item[1])
            said = ", ".join(f"{name} {share:.0%}" for name, share in shares if share >= 0.005)
            limit = f", {found['limited']}" if "limited" in found else ""
            lines.append(f"{kind + ' training:':<18}{found['images_per_second']:,.0f} samples/s{limit} ({said})")
    if lines:
        lines.append(f"{'peak memory:':<18}{size_text(results['peak_bytes'])} ({results['device']})")
    return lines


def statistics_lines(results: Mapping[str, Any]) -> list[str]:
    """A line on the error of batch-norm statistics from a part of the data, where that was measured."""
    found = results.get("batch_norm_error")
    if found is None:
        return []
    return [
        f"batch-norm:       statistics from {found['batches']} batches; {found['against']} change a test loss of "
        f"{found['test_loss']:.4f} by {-found['error']:+.2g}"
    ]


def plan_table(plan: Mapping[str, Any]) -> Table:
    """Bytes that a run will take in each place, phase by phase."""
    phases = list(next(iter(plan["needed"].values())))
    table = new_table(f"{plan['title']}, on {plan['device']}", "", *phases)
    for place, limit in plan["limits"].items():
        items: dict[str, dict[str | None, str]] = {}
        for item in plan["items"]:
            if item["place"] == place and item["bytes"]:
                about = "" if item["exact"] else "~ "
                items.setdefault(item["what"], {})[item["phase"]] = about + size_text(item["bytes"])
        for what, sizes in items.items():
            table.add_row(f"{place}: {what}", *(sizes.get(phase, sizes.get(None, "")) for phase in phases))
        totals = [size_text(size) for size in plan["needed"][place].values()]
        table.add_row(Text(f"{place}, of {size_text(limit)}", style="bold"), *totals, end_section=True)
    return table


def plan_lines(plan: Mapping[str, Any]) -> list[str]:
    """Hours, notes, and what does not fit, as lines of text."""
    lines = []
    for work in plan["work"]:
        if work["seconds"] is not None:
            whole = _duration(work["times"] * work["seconds"])
            if plan["gpus"] > 1:
                shared = "one GPU" if work["rounds"] == work["times"] else f"{plan['gpus']} GPUs"
                whole += f" of a GPU, {_duration(work['rounds'] * work['seconds'])} on {shared}"
            lines.append(f"time: {work['times']:,} x {work['what']}, {work['seconds']:,.3g} s each: {whole}")
    known = "not known"
    if plan["seconds"] is not None:
        known = f"{_duration(plan['seconds'])} in all"
        if plan["gpus"] > 1:
            most = max(plan["work"], key=lambda work: work["rounds"] * work["seconds"])
            share = most["rounds"] * most["seconds"] / plan["seconds"]
            known += f" on {plan['gpus']} GPUs, {share:.0%} of it: {most['what']}"
    lines.append(f"time: {known} ({plan['rates']})")
    return [*lines, *plan["notes"], *(f"does not fit: {problem}" for problem in plan["problems"])]


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds / 60:,.1f} min"


def barriers_table(paths: Sequence[Mapping[str, Any]]) -> Table:
    """One row per path: barrier on each split, the train losses at its ends and the largest, and the accuracy barrier.
    What all names start and end with is said once."""
    shared = {f" {second.parent}/*{second.suffix}" for second in (Path(path["second"]) for path in paths)}
    where = shared.pop() if len(shared) == 1 else ""
    splits = [split for split in ("train", "validation", "test") if f"{split}_barrier" in paths[0]]
    accuracy = "train_accuracy_barrier" in paths[0]
    columns = (*splits, "loss at\nt=0", "at\nt=1", "largest\nloss", *(["accuracy\nbarrier"] if accuracy else []))
    table = new_table(f"Barriers from {paths[0]['first']} to{where}", "", *columns)
    for path in paths:
        table.add_row(
            Path(path["second"]).stem if where else path["second"],
            *(shown(path[f"{split}_barrier"], 4) for split in splits),
            shown(path["train_loss"][0], 4),
            shown(path["train_loss"][-1], 4),
            shown(max(path["train_loss"]), 4),
            *([shown(path["train_accuracy_barrier"], 4)] if accuracy else []),
        )
    return table


def many_table(result: Mapping[str, Any]) -> Table:
    """One row per checkpoint, or per pair: objective (also without 1-D parameters); L2 distance, before and after."""
    rows = result.get("files") or result["pairs"]
    names = [Path(row[key]) for row in rows for key in ("file", "first", "second") if key in row]
    folders = {path.parent for path in names}
    where = f" in {folders.pop()}/" if len(folders) == 1 else ""
    to = {"mean": "to their mean", "star": "to the centre", "pairwise": "to each other"}[result["to"]]
    columns = ("objective", "without 1-D", "distance before", "matched (L2)")
    table = new_table(f"Checkpoints{where}, matched {to}", "", *columns)
    for row in rows:
        shown_names = [Path(row[key]).stem if where else row[key] for key in ("file", "first", "second") if key in row]
        numbers = [f"{row[key]:.6g}" for key in ("objective", "objective_weights", "distance_start", "distance")]
        table.add_row(" ← ".join(shown_names), *numbers)
    return table


def barrier_picture(results: Mapping[str, Any], path: Path) -> None:
    """Write a PNG of the train loss and the first metric along the paths: mean and a band of one standard deviation.

    Args:
        results: what `results.json` holds.
        path: the file to write, atomically.

    Raises:
        FastarError: it is not called .png, or cannot be written.
    """
    with figure_of(path, (9.5, 4.0)) as figure:
        curves = [key for key, value in results["paths"][0].items() if isinstance(value, list)]
        name = next((key for key in curves if key.startswith("train_") and key != "train_loss"), None)
        keys = ["train_loss", *([] if name is None else [name])]
        panels = figure.subplots(1, len(keys), squeeze=False)[0]
        for panel, key in zip(panels, keys, strict=True):
            draw_paths(panel, results, key)
        panels[0].set_ylim(bottom=0)
        legend_below(figure, panels[0])
        star = any(path["kind"].startswith("star") for path in results["paths"])
        title = task_name(results)
        figure.suptitle(f"{title}: {count_text(results['sources'], 'source')}" if star else title, fontsize=11)


def draw_paths(panel: Any, results: Mapping[str, Any], key: str) -> None:
    """Draw what `key` names (train_loss, test_accuracy) along each kind of path on matplotlib's Axes."""
    star = any(path["kind"].startswith("star") for path in results["paths"])
    for kind in STYLES:
        curves = [path[key] for path in results["paths"] if path["kind"] == kind]
        if curves:
            _draw(panel, results["t"], curves, kind, at_most=1.0 if key.endswith("accuracy") else math.inf)
    panel.set_xlabel("t   (0: star or first model, 1: other model)" if star else "t   (0: first model, 1: second)")
    panel.set_ylabel(key.replace("_", " "))
    plain(panel)


def _draw(panel: Any, t: Sequence[float], curves: Sequence[Sequence[float]], kind: str, *, at_most: float) -> None:
    """Draw the mean of curves over t, and a band of one standard deviation within 0 and `at_most`."""
    label, colour, dashes, marker = STYLES[kind]
    columns = list(zip(*curves, strict=True))
    mean = [fmean(column) for column in columns]
    band = [stdev(column) if len(column) > 1 else 0.0 for column in columns]
    low = [max(m - b, 0.0) for m, b in zip(mean, band, strict=True)]
    high = [min(m + b, at_most) for m, b in zip(mean, band, strict=True)]
    line = {"color": colour, "linestyle": dashes}
    panel.plot(t, mean, **line, marker=marker, markersize=4, linewidth=1.8, label=f"{label} (n={len(curves)})")
    panel.fill_between(t, low, high, color=colour, alpha=0.14, linewidth=0)
    if len(curves) > 1:  # edges, since overlapping bands cannot be told apart in grey print
        for edge in (low, high):
            panel.plot(t, edge, **line, linewidth=0.7, alpha=0.6)
