"""Tables and picture of averages on corrupted images, and of how well they tell other images from their own, from
`uncertainty.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from fastar.report.average_panels import STYLES
from fastar.report.figures import figure_of, legend_below, plain
from fastar.report.results import new_table, shown, task_name

TABLES = (("accuracy", "accuracy"), ("nll", "NLL"), ("ece", "ECE"), ("auroc", "AUROC"))
PANELS = (
    ("accuracy", "accuracy"),
    ("nll", "negative log likelihood, nats"),
    ("ece", "expected calibration error"),
    ("auroc", "AUROC of right against wrong, exact"),
)
SCORES = (("confidence", "1 - confidence"), ("entropy", "entropy"), ("mutual information", "mutual information"))
TOLD_BY = (("auroc", "AUROC"), ("aupr", "AUPR"), ("fpr_95", "FPR at 95 %"))


def corruption_tables(found: Mapping[str, Any]) -> list[Table]:
    """A table for each metric: families over severity, mean over kinds; none where images were not corrupted."""
    if "corruptions" not in found:
        return []
    of, tables = found["corruptions"], []
    for metric, name in TABLES:
        title = f"{task_name(found)}: {name} over severity, mean of {len(of['kinds'])} corruptions"
        table = new_table(title, "average of", "n", *("clean" if s == 0 else str(s) for s in of["severities"]))
        for family, one in of["families"].items():
            mean, std = (one["mean"][metric][key] for key in ("mean", "std"))
            cells = [shown({"mean": m, "std": s}) for m, s in zip(mean, std, strict=True)]
            table.add_row(family, str(one["repetitions"]), *cells)
        tables.append(table)
    return tables


def corruption_picture(found: Mapping[str, Any], path: Path) -> None:
    """Write a PNG of four metrics over severity: mean over kinds, and a standard deviation over repetitions."""
    of = found["corruptions"]
    with figure_of(path, (9.5, 7.0)) as figure:
        panels = figure.subplots(2, 2).ravel()
        for panel, (metric, name) in zip(panels, PANELS, strict=True):
            for number, (family, one) in enumerate(of["families"].items()):
                mean, std = (one["mean"][metric][key] for key in ("mean", "std"))
                aside = 0.04 * (number - len(of["families"]) / 2)  # bars beside each other
                some = [
                    (s + aside, m, d or 0.0)
                    for s, m, d in zip(of["severities"], mean, std, strict=True)
                    if m is not None
                ]
                if some:
                    colour, dashes, marker = STYLES[family]
                    style = {"color": colour, "linestyle": dashes, "marker": marker or ".", "linewidth": 1.7}
                    severities, means, stds = zip(*some, strict=True)
                    panel.errorbar(severities, means, yerr=stds, **style, markersize=5, capsize=2, label=family)
            panel.set_xlabel("severity of the corruption, 0: clean")
            panel.set_title(name, fontsize=10)
            panel.set_xticks(of["severities"])
            plain(panel)
        legend_below(figure, panels[0])
        title = f"{task_name(found)}: corrupted {found['split']} images, mean of {len(of['kinds'])} kinds"
        figure.suptitle(title, fontsize=11)


def other_tables(found: Mapping[str, Any]) -> list[Table]:
    """A table for each set of other images: AUROC, AUPR and FPR of three scores, other images being what is found."""
    tables = []
    for name, of in found.get("ood", {}).items():
        told = f"{of['samples']:,} images of {name} told from {found['samples']:,} {found['split']} images"
        columns = ("average of", "n", "by", *(name for _, name in TOLD_BY))
        table = new_table(f"{task_name(found)}: {told}", *columns, words=(0, 2))
        for family, one in of["families"].items():
            for score, said in SCORES:
                if score in one:
                    first = score == "confidence"
                    start = (family, str(one["repetitions"])) if first else ("", "")
                    table.add_row(*start, said, *(shown(one[score][metric]) for metric, _ in TOLD_BY))
        tables.append(table)
    return tables
