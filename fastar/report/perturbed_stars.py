"""Table and picture of perturbed stars, from `perturb.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from fastar.report.figures import figure_of, legend_below, plain
from fastar.report.results import new_table, shown, task_name

CURVES = (
    ("largest_loss", "largest loss on the path", "#0072B2", "--", "s"),
    ("barrier", "barrier to heldouts", "#D55E00", "-", "o"),
    ("star_loss", "loss of the perturbed star", "#009E73", "-.", "^"),
)
"""Metric, label, Okabe-Ito colour, dashes, marker."""


def perturbed_table(found: Mapping[str, Any]) -> Table:
    """A row for each radius: train loss of the star, barriers and largest losses on the paths to heldouts."""
    title = f"{task_name(found)}: star of {found['sources']} sources, perturbed ({found['draws']} draws)"
    columns = ("of its norm", "length", "n", "star's loss", "barrier to heldouts", "largest loss on the path")
    table = new_table(title, *columns, words=())
    for point in found["points"]:
        train = point["train"]
        table.add_row(
            f"{point['radius']:g}",
            f"{point['length']:.2f}",
            str(train["barrier"]["n"]),
            *(shown(train[key]) for key in ("star_loss", "barrier", "largest_loss")),
        )
    return table


def perturbed_lines(found: Mapping[str, Any]) -> list[str]:
    """The run's own barrier between regular models, and what a falling barrier means."""
    lines = [
        "A barrier is measured from the line between the ends' losses: where the star's own loss is high, it is low."
    ]
    if "train" in found["regular"]:
        lines.insert(0, f"barrier, regular to regular: {shown(found['regular']['train'])}")
    return lines


def perturbed_picture(found: Mapping[str, Any], path: Path) -> None:
    """Write a PNG of train losses and barriers over the radius, with the regular models' barrier."""
    with figure_of(path, (6.4, 4.6)) as figure:
        panel = figure.subplots()
        draw_perturbed(panel, found)
        plain(panel)
        legend_below(figure, panel, ncols=2)
        figure.suptitle(f"{task_name(found)}: star of {found['sources']} sources, perturbed", fontsize=11)


def draw_perturbed(panel: Any, found: Mapping[str, Any]) -> None:
    """Draw train losses and barriers over the radius, with the regular models' barrier."""
    radii = [point["radius"] for point in found["points"]]
    for key, label, colour, dashes, marker in CURVES:
        spreads = [point["train"][key] for point in found["points"]]
        mean, std = [one["mean"] for one in spreads], [one["std"] or 0.0 for one in spreads]
        style = {"color": colour, "linestyle": dashes, "marker": marker, "markersize": 5, "capsize": 3}
        panel.errorbar(radii, mean, yerr=std, label=label, **style)
    if "train" in found["regular"]:
        regular = found["regular"]["train"]
        label = "barrier, regular to regular"
        panel.axhline(regular["mean"], color="black", linestyle=":", linewidth=1.5, label=label)
    panel.set_xlabel("radius of the perturbation, as a share of the star's norm")
    panel.set_ylabel("train loss")
    panel.set_ylim(bottom=0)
