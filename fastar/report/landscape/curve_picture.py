"""Table and picture of curves between two networks, from `curve.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from fastar.report.figures import figure_of, legend_below, plain
from fastar.report.landscape.plane_picture import loss_name
from fastar.report.results import new_table, shown, splits_of, task_name

CURVES = {
    "straight": ("straight, matched", "#0072B2", "-.", "^"),
    "star": ("through the star", "#D55E00", "-", "o"),
    "chain": ("through a bend of its own", "#009E73", "--", "s"),
    "bezier": ("Bezier curve of its own", "#CC79A7", ":", "v"),
}
"""Label, Okabe-Ito colour, dashes, marker."""


def curve_table(found: Mapping[str, Any]) -> Table:
    """A row for each curve: its largest loss, barrier and mean loss on each split."""
    title = f"{task_name(found)}: curves from {found['first']} to {found['second']}"
    splits = splits_of(found["curves"]["straight"])
    columns = (f"{split}\n{figure}" for split in splits for figure in ("largest loss", "barrier", "mean loss"))
    table = new_table(title, "curve", *columns)
    for name, of in found["curves"].items():
        figures = (of[split][key] for split in splits for key in ("largest_loss", "barrier", "mean_loss"))
        table.add_row(CURVES[name][0], *map(shown, figures))
    return table


def curve_picture(found: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: the loss along each curve, a panel for each split."""
    splits = splits_of(found["curves"]["straight"])
    with figure_of(path, (1.0 + 4.3 * len(splits), 4.2)) as figure:
        panels = figure.subplots(1, len(splits), squeeze=False)[0]
        for panel, split in zip(panels, splits, strict=True):
            draw_curves(panel, found, split)
        legend_below(figure, panels[0], ncols=2 * len(splits))
        figure.suptitle(f"{task_name(found)}: curves from {found['first']} to {found['second']}", fontsize=11)


def draw_curves(panel: Any, found: Mapping[str, Any], split: str) -> None:
    """Draw the loss of a split along each curve on matplotlib's Axes."""
    for name, of in found["curves"].items():
        label, colour, dashes, marker = CURVES[name]
        style = {"color": colour, "linestyle": dashes, "marker": marker, "markersize": 4, "linewidth": 1.8}
        panel.plot(found["t"], of[split]["loss"], **style, label=label)
    panel.set_xlabel(f"t   (0: {found['first']}, 1: {found['second']})")
    panel.set_ylabel(f"{split} loss, {loss_name(found)}")
    if found["loss"] == "cross_entropy":
        panel.set_ylim(bottom=0)
    plain(panel)
