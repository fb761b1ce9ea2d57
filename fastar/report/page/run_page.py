"""The page of a run: everything its folder holds, however much that is; and of a folder of runs, their list."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fastar.config.compare import default_values, flatten
from fastar.config.renamed import renewed
from fastar.errors import FastarError
from fastar.report.page.charts import Curve, chart, panels
from fastar.report.page.elements import Html, document, folded, joined, of_rich, table, tag
from fastar.report.page.studies import studies
from fastar.report.results import (
    STYLES,
    check_results,
    results_table,
    shown,
    speed_lines,
    splits_of,
    statistics_lines,
    task_name,
)
from fastar.report.run_list import overview, overview_table, runs_below
from fastar.runs import RunFolder, read_metadata, stored_digest, write_atomically
from fastar.runtime.progress import count_text

MOST_SINGLE = 30_000
"""Points of single curves that are drawn and said; of more, means and bands alone."""
TRAINED = {
    "star": ("star", "#D55E00", "-", ""),
    "source": ("sources", "#009E73", "--", ""),
    "heldout": ("heldouts", "#0072B2", "-.", ""),
}


def write_page(folder: Path, path: Path | None = None, say: Callable[[str], None] = lambda line: None) -> Path:
    """Write the page of a run folder, or of a folder of runs, to `path` (default: report.html in it), atomically.

    Args:
        say: is told what is missing or damaged; the page says it too.

    Returns:
        The file that was written.

    Raises:
        FastarError: no run in the folder, settings that cannot be read, or a file that cannot be written.
    """
    path = folder / "report.html" if path is None else path
    if path.suffix.lower() not in (".html", ".htm"):
        raise FastarError(f"{path}: the page is written as .html; name it so")
    name = folder.resolve().name
    if RunFolder(folder).config.is_file():
        head, sections = _of_run(RunFolder(folder), say)
    else:
        head, sections = [], _of_runs(folder)
    write_atomically(path, document(name, head, sections))
    return path


def _of_runs(folder: Path) -> dict[str, Html]:
    """The list of the runs in a folder, and what commands have written about all of them."""
    found = runs_below(folder)
    if not found:
        raise FastarError(f"{folder}: no run folder (no config.yaml), and none in it; give the folder of a run")
    pages = [Path(run.run) / "report.html" for run in found]
    links = [tag("li", tag("a", str(one), href=str(one))) for one in (p.relative_to(folder) for p in pages if p.is_file())]
    return {**studies(folder), "runs": joined([of_rich(overview_table(found, folder)), tag("ul", *links)])}


def _of_run(run: RunFolder, say: Callable[[str], None]) -> tuple[list[Html], dict[str, Html]]:
    """What the page of a run begins with, and its sections."""
    settings, problems, results = run.saved_settings(), list[str](), dict[str, Any]()
    try:
        state = overview(run.path)
        stands = f"{state.state} at {state.where}" if state.where else state.state
        if run.results.exists():
            found = run.read_results(problems.append)
            check_results(found, run.results)
            results = found
        else:
            problems.append(f"not finished ({stands}): nothing has been measured yet; what there is so far follows")
    except FastarError as error:
        stands = "damaged"
        problems.append(str(error))
    for line in problems:
        say(line if line.startswith(str(run.path)) else f"{run.path}: {line}")
    head = [tag("p", text, class_="lead") for text in _summary(settings, results, stands)]
    head += [tag("p", line, class_="warn") for line in problems]
    sections = {}
    if results:
        note = "Mean ± one standard deviation over n models or paths. A barrier is measured from the line between the ends."
        sections["results"] = joined([of_rich(results_table(results)), tag("p", note, class_="note")])
        sections["paths"] = _paths(results)
    sections |= studies(run.path)
    sections |= {"training": _training(run.log.read(), results), "recipe": _recipe(settings)}
    sections["provenance"] = _provenance(run, results)
    return head, sections


def _summary(settings: Mapping[str, Any], results: Mapping[str, Any], stands: str) -> Iterator[str]:
    """What the run is, and its main result, in a sentence each."""
    named = {"dataset": "?", "arch": "?"}
    for key, section, name in (("dataset", "dataset", "name"), ("arch", "model", "arch")):
        if isinstance(settings.get(section), Mapping):
            named[key] = str(settings[section].get("own_name") or settings[section].get(name))
    sources = settings.get("sources")
    number = sources.get("number") if isinstance(sources, Mapping) else None
    of = count_text(number, "source") if isinstance(number, int) else "sources"
    yield f"{task_name(results or named)}: star model of {of}, seed {settings.get('seed', 0)}, {stands}."
    if results:
        train = results["train"]
        far = "heldouts" if train["star_heldout"]["n"] else "sources"
        star, regular = shown(train[f"star_{far[:-1]}"]), shown(train["regular_regular"])
        yield f"Train barrier from the star to its {far}: {star}; between regular models: {regular}."


def _paths(results: Mapping[str, Any]) -> Html:
    """A chart of each metric on each split along the paths, as barrier.png has the first two."""
    keys = [key for key, value in results["paths"][0].items() if isinstance(value, list) and key != "t"]
    splits = splits_of(results)
    keys.sort(key=lambda key: (key.split("_", 1)[1] != "loss", key.split("_", 1)[1], splits.index(key.split("_", 1)[0])))
    single = len(keys) * len(results["paths"]) * len(results["t"]) <= MOST_SINGLE
    charts, curves = [], list[Curve]()
    for key in keys:
        curves = []
        for kind, style in STYLES.items():
            paths = [path for path in results["paths"] if path["kind"] == kind]
            if paths:
                each = [(f"{path['first']} to {path['second']}", path[key]) for path in paths]
                curves.append(_mean(f"{style[0]} (n={len(paths)})", results["t"], each, style[1:], single, accuracy="accuracy" in key))
        charts.append(chart(key.replace("_", " "), "t   (0: star or first model, 1: other model)", curves))
    note = "Bands: one standard deviation." + (" Thin lines: single paths." if single else "") + " Unmatched pairs are in the table alone."
    return joined([panels(charts, curves), tag("p", note, class_="note")])


def _mean(
    name: str,
    x: Sequence[float],
    each: Sequence[tuple[str, Sequence[float]]],
    style: tuple[str, Any, str],
    single: bool,
    *,
    accuracy: bool = False,
) -> Curve:
    """The mean of curves, its band of one standard deviation and, where they are wanted and several, the curves."""
    columns = list(zip(*(values for _, values in each), strict=True))
    stds = [stdev(column) for column in columns] if len(each) > 1 else []
    low = 0.0 if all(value >= 0 for column in columns for value in column) else -math.inf
    bounds = (low, 1.0 if accuracy else math.inf)
    return Curve(name, x, list(map(fmean, columns)), style, stds, bounds, each if single and len(each) > 1 else ())


def _training(log: Iterable[Mapping[str, Any]], results: Mapping[str, Any]) -> Html:
    """Losses over epochs, units that matching moved, and what the time went into."""
    of: dict[str, dict[str, dict[int, Mapping[str, Any]]]] = {}
    for entry in log:
        if isinstance(entry.get("epoch"), int) and isinstance(entry.get("loss"), float):
            of.setdefault(entry["kind"], {}).setdefault(entry["model"], {})[entry["epoch"]] = entry
    curves, charts = [], []
    for kind, style in TRAINED.items():
        epochs = min(map(len, of[kind].values())) if kind in of else 0
        if epochs:
            each = [(name, [e["loss"] for _, e in sorted(one.items())][:epochs]) for name, one in of[kind].items()]
            single = len(each) * epochs <= MOST_SINGLE
            curves.append(_mean(f"{style[0]} (n={len(each)})", range(1, epochs + 1), each, style[1:], single))
    if curves:
        charts.append(chart("training loss", "epoch", curves, log=True))
    moved = {
        epoch + 1: entry["figures"]["matching_changed"]
        for epoch, entry in sorted(of.get("star", {}).get("star", {}).items())
        if "matching_changed" in (entry.get("figures") or {})
    }
    if moved:
        style = TRAINED["star"][1:]
        charts.append(chart("share of units that matching moved", "epoch", [Curve("star", list(moved), list(moved.values()), style)]))
    parts = [panels(charts, curves)] if charts else [tag("p", "No epoch is in the log yet.")]
    speed = {kind: found for kind, found in (results.get("speed") or {}).items() if found}
    names = dict.fromkeys(name for found in speed.values() for name in found["shares"])
    if speed:
        rows = [[name, *(_bar(found["shares"].get(name)) for found in speed.values())] for name in names]
        parts.append(table("what the time of training went into", ("", *speed), rows))
    parts += [tag("p", line) for line in (*speed_lines(results), *statistics_lines(results))] if results else []
    return joined(parts)


def _bar(share: float | None) -> Html:
    """A share as text and as a bar."""
    if share is None:
        return Html("")
    return joined([f"{share:.1%}", tag("span", class_="bar", style=f"width:{6 * share:.2f}rem")])


def _recipe(settings: Mapping[str, Any]) -> Html:
    """The settings that differ from their defaults, and all of them, folded."""
    flat, defaults = flatten(renewed(settings, told=False)), default_values()
    other = [(key, _yaml(value), _yaml(defaults.get(key, ""))) for key, value in flat.items() if value != defaults.get(key, "")]
    rows = [(key, _yaml(value)) for key, value in flat.items()]
    return joined(
        [
            table("settings that differ from their defaults", ("", "here", "default"), other),
            folded(f"all {len(rows)} settings", table("config.yaml", ("", "value"), rows), class_="print"),
        ]
    )


def _yaml(value: object) -> str:
    return {True: "true", False: "false", None: "null"}.get(value, str(value)) if value is None or isinstance(value, bool) else str(value)


def _provenance(run: RunFolder, results: Mapping[str, Any]) -> Html:
    """Where results and models come from: device, versions, seeds, digests."""
    facts = {key: results[key] for key in ("device", "seed") if key in results}
    if run.results.exists() and results:
        facts["measured"] = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(run.results.stat().st_mtime))
    facts |= results.get("versions", {})
    for key, value in (("digest of what was measured", results.get("measured")), ("matchings.safetensors", (results.get("matchings") or {}).get("digest"))):
        facts |= {key: value} if value else {}
    rows, header = [], ("", "seed", "epochs", "train loss", "test loss", "device", "commit", "digest of its tensors")
    for path in [*(path for path, _, _ in run.models()), *([run.star] if run.star.is_file() else [])]:
        name = str(path.relative_to(run.path))
        try:
            known = read_metadata(path, own=True)
            numbers = (shown(known.get(key)) for key in ("train_loss", "test_loss"))
            digest = stored_digest(path, own=True)[:16]
            rows.append([name, str(known["seed"]), str(known["epochs"]), *numbers, known["device"], known["commit"], digest])
        except (FastarError, LookupError):
            rows.append([name, "damaged: see `fastar verify`", *[""] * 6])
    parts = [table("results.json", ("", "value"), [(key, str(value)) for key, value in facts.items()])] if facts else []
    models = folded(count_text(len(rows), "model"), table("models of the run", header, rows), class_="print")
    return joined([*parts, models if rows else tag("p", "No model is finished yet.")])
