"""The page of a run: everything that its folder holds so far; and of a folder of runs, their list."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from urllib.parse import quote

from fastar.config.compare import default_values, flatten
from fastar.config.renamed import renewed
from fastar.errors import FastarError
from fastar.report import results as tables
from fastar.report.page.charts import Curve, chart, panels
from fastar.report.page.elements import Html, document, folded, joined, lines, of_rich, table, tag
from fastar.report.page.studies import studies
from fastar.report.run_list import overview, overview_table, runs_below
from fastar.runs import RunFolder, read_metadata, stored_digest, write_atomically
from fastar.runtime.progress import count_text

MOST_SINGLE = 5000
"""Points of single curves of a kind that are in a chart; where there are more, the mean and its band are."""
TRAINED = {
    "star": ("star", ("#D55E00", "-", "")),
    "source": ("sources", ("#009E73", "--", "")),
    "heldout": ("heldouts", ("#0072B2", "-.", "")),
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
    run = RunFolder(folder)
    head, sections = _of_run(run, say) if run.config.is_file() else ([], _of_runs(folder))
    write_atomically(path, document(folder.resolve().name, head, sections))
    return path


def _of_runs(folder: Path) -> dict[str, Html]:
    """What commands have written about all runs in a folder, and the list of them with their pages."""
    found = runs_below(folder)
    if not found:
        raise FastarError(f"{folder}: no run folder, and none in it; give the folder of a run")
    listed = overview_table(found, folder)
    listed.title, listed.columns = "runs", [one for one in listed.columns if one.header != "age"]  # it would not stay
    pages = [page for run in found if (page := Path(run.run) / "report.html").is_file()]
    names = [page.relative_to(folder).as_posix() for page in pages]
    links = [tag("li", tag("a", name, href=quote(name, errors="surrogateescape"))) for name in names]
    return {**studies(folder), "runs": joined([of_rich(listed), *([tag("ul", *links)] if links else [])])}


def _of_run(run: RunFolder, say: Callable[[str], None]) -> tuple[list[Html], dict[str, Html]]:
    """What the page of a run begins with, and its sections."""
    settings, problems, results = run.saved_settings(), list[str](), dict[str, Any]()
    try:
        found = overview(run.path)
        stands = f"{found.state} at {found.where}" if found.where else found.state
        if run.results.exists():
            results = run.read_results(problems.append)
            tables.check_results(results, run.results)
        else:
            stands += time.strftime(" (%Y-%m-%d %H:%M UTC)", time.gmtime())
            problems.append(f"{run.path}: {stands}: nothing is measured yet; what there is so far follows")
    except FastarError as error:
        stands, results = "damaged", {}
        problems.append(str(error))
    for line in problems:
        say(line)
    flat = flatten(renewed(settings, told=False))
    head = [tag("p", text, class_="lead") for text in _summary(flat, results, stands)]
    head += [tag("p", line, class_="warn") for line in problems]
    sections = {}
    if results:
        note = "Mean ± one standard deviation over n models or paths."
        sections["results"] = joined([of_rich(tables.results_table(results)), tag("p", note, class_="note")])
        sections["paths"] = _paths(results)
    sections |= studies(run.path)
    sections |= {"training": _training(run.log.read(), results), "recipe": _recipe(flat)}
    return head, {**sections, "provenance": _provenance(run, results)}


def _summary(settings: Mapping[str, Any], results: Mapping[str, Any], stands: str) -> list[str]:
    """What the run is, and its main result, in a sentence each."""
    named = {"dataset": settings.get("dataset.own_name") or settings.get("dataset.name")}
    task = tables.task_name(
        results or {key: str(v) for key, v in (*named.items(), ("arch", settings.get("model.arch")))}
    )
    what = f"a star model of {settings.get('sources.number')} sources, seed {settings.get('seed')}; {stands}."
    said = [": ".join(filter(None, (task, what)))]  # a task that was given from Python has no name
    if results:
        train = results["train"]
        far = "heldouts" if train["star_heldout"]["n"] else "sources"
        star, regular = (tables.shown(train[key]) for key in (f"star_{far[:-1]}", "regular_regular"))
        said.append(f"Train barrier from the star to its {far}: {star}; between regular models: {regular}.")
    return said


def _paths(results: Mapping[str, Any]) -> Html:
    """A chart of each metric on each split along the paths, in the styles of barrier.png."""
    metrics, paths = ["loss", *tables.metrics_of(results)], results["paths"]
    keys = [f"{split}_{name}" for name in metrics for split in tables.splits_of(results)]
    charts, curves = [], list[Curve]()
    for key in (key for key in keys if key in paths[0]):
        curves = []
        for kind, (name, *style) in tables.STYLES.items():
            each = {f"{path['first']} to {path['second']}": path[key] for path in paths if path["kind"] == kind}
            if each:
                curves.append(_mean(name, results["t"], each, (style[0], style[1], style[2])))
        charts.append(chart(key.replace("_", " "), "t   (0: star or first model, 1: other model)", curves))
    note = "Bands: one standard deviation. Thin lines: single paths. Unmatched pairs are in the table alone."
    return joined([panels(charts, curves), tag("p", note, class_="note")])


def _mean(name: str, x: Sequence[float], each: Mapping[str, Sequence[float]], style: tuple[str, Any, str]) -> Curve:
    """The mean of curves, its band of one standard deviation and, where they are several and not too many, they."""
    columns = list(zip(*each.values(), strict=True))
    stds = [stdev(column) for column in columns] if len(each) > 1 else []
    single = list(each.items()) if 1 < len(each) <= MOST_SINGLE / len(x) else []
    return Curve(f"{name} (n={len(each)})", x, [fmean(column) for column in columns], style, stds, single)


def _training(log: Iterable[Mapping[str, Any]], results: Mapping[str, Any]) -> Html:
    """Losses over epochs, units that matching moved, what the time went into, and memory."""
    known: dict[str, dict[str, dict[int, Mapping[str, Any]]]] = {kind: {} for kind in TRAINED}
    for entry in log:
        if entry.get("kind") in TRAINED and "epoch" in entry:
            known[entry["kind"]].setdefault(entry["model"], {})[entry["epoch"]] = entry
    curves, charts = [], []
    for kind, (name, style) in TRAINED.items():
        models = {name: [entry["loss"] for _, entry in sorted(of.items())] for name, of in known[kind].items()}
        most = max(map(len, models.values()), default=0)
        whole = {name: losses for name, losses in models.items() if len(losses) == most}  # one may be in training
        if whole:
            curves.append(_mean(name, range(1, most + 1), whole, style))
    if curves:
        charts.append(chart("training loss", "epoch", curves, log=True))
    star = sorted(known["star"].get("star", {}).items())
    moved = {
        n + 1: one["figures"]["matching_changed"] for n, one in star if "matching_changed" in one.get("figures", {})
    }
    if moved:
        curve = Curve("star", list(moved), list(moved.values()), TRAINED["star"][1])
        charts.append(chart("share of units that matching moved", "epoch", [curve]))
    said = [*tables.speed_lines(results), *tables.statistics_lines(results)]
    return joined([panels(charts, curves), lines(said if charts else ["No epoch is in the log yet."])])


def _recipe(settings: Mapping[str, Any]) -> Html:
    """The settings that differ from their defaults, and all of them, folded."""
    defaults = default_values()

    def said(value: object) -> str:
        return value if isinstance(value, str) else json.dumps(value)

    rows = [(key, said(value), said(defaults.get(key, ""))) for key, value in settings.items()]
    other = [row for row in rows if row[1] != row[2]]
    whole = table("config.yaml", ("", "here", "default"), rows, words=True)
    differ = table("settings that differ from their defaults", ("", "here", "default"), other, words=True)
    return joined([differ, folded(f"all {len(rows)} settings", whole, class_="print")])


def _provenance(run: RunFolder, results: Mapping[str, Any]) -> Html:
    """Where results and models come from: device, versions, seeds, digests."""
    facts = {key: results.get(key) for key in ("device", "seed")} | results.get("versions", {})
    facts |= {"digest of what was measured": results.get("measured")}
    if results:
        facts["written"] = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(run.results.stat().st_mtime))
    known = [(key, str(value)) for key, value in facts.items() if value is not None]
    rows, header = [], ("", "seed", "epochs", "train loss", "test loss", "device", "commit", "digest of its tensors")
    for path in [*(path for path, _, _ in run.models()), *([run.star] if run.star.is_file() else [])]:
        name = str(path.relative_to(run.path))
        try:
            of, digest = read_metadata(path, own=True), stored_digest(path, own=True)[:16]
            numbers = (tables.shown(of.get(key)) for key in ("train_loss", "test_loss"))
            rows.append([name, str(of["seed"]), str(of["epochs"]), *numbers, of["device"], of["commit"], digest])
        except (FastarError, LookupError):
            rows.append([name, "damaged: see `fastar verify`", *[""] * 6])
    models = folded(count_text(len(rows), "model"), table("models of the run", header, rows), class_="print")
    return joined([*([table("results", ("", "value"), known, words=True)] if known else []), models])
