"""Picture and lines of a plane through three networks, from `plane.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from fastar.report.figures import figure_of
from fastar.report.results import new_table, shown, splits_of, task_name

FEW = 6
"""Levels that are enough."""
ROUND = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7))
"""Digits of levels, the coarsest first."""
MARKERS = ("^", "o", "s")


def plane_table(found: Mapping[str, Any]) -> Table:
    """The three networks: where they lie, and their losses there."""
    splits = splits_of(found["splits"])
    columns = ("x", "y", *(f"{split} loss" for split in splits))
    table = new_table(f"{task_name(found)}: the plane through three networks", "network", *columns)
    for one in found["networks"]:
        place = (shown(one[key], 2) for key in ("x", "y"))
        table.add_row(one["name"], *place, *(shown(one[split]["loss"]) for split in splits))
    return table


def plane_lines(found: Mapping[str, Any]) -> list[str]:
    """A line on each split: the losses that the grid spans, and where the least one is."""
    lines = []
    for split in splits_of(found["splits"]):
        loss = found["splits"][split]["loss"]
        least, x, y = min((value, x, y) for y, row in enumerate(loss) for x, value in enumerate(row))
        lines.append(
            f"{split} loss on the grid: {least:.3g} at ({found['x'][x]:.2f}, {found['y'][y]:.2f}) to "
            f"{max(max(row) for row in loss):.3g}"
        )
    return lines


def plane_picture(found: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: the loss over the plane, a panel for each split, with the networks and the segments between them."""
    splits = splits_of(found["splits"])
    wide, high = (max(found[axis]) - min(found[axis]) for axis in ("x", "y"))
    with figure_of(path, (5.2 * len(splits), 1.3 + 3.5 * min(max(high / wide, 0.5), 1.5))) as figure:
        panels = figure.subplots(1, len(splits), squeeze=False)[0]
        for panel, split in zip(panels, splits, strict=True):
            draw_plane(panel, found, split)
        figure.suptitle(f"{task_name(found)}: the plane through {', '.join(one['name'] for one in found['networks'])}")


def draw_plane(panel: Any, found: Mapping[str, Any], split: str) -> None:
    """Draw the loss of a split over the plane on matplotlib's Axes, with a colour bar."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.patheffects import withStroke

    loss = found["splits"][split]["loss"]
    levels = loss_levels([value for row in loss for value in row])
    norm = (LogNorm if levels[0] > 0 else Normalize)(levels[0], levels[-1])
    style = {"levels": levels, "norm": norm}
    filled = panel.contourf(found["x"], found["y"], loss, **style, cmap="viridis_r", extend="both")
    lines = panel.contour(found["x"], found["y"], loss, **style, colors="black", linewidths=0.5, alpha=0.6)
    for text in panel.clabel(lines, levels=levels[1::3], fmt="%.3g", fontsize=8, colors="black"):
        text.set_alpha(1)
        text.set_path_effects([withStroke(linewidth=2, foreground="white")])
    bar = panel.figure.colorbar(filled, ax=panel, ticks=levels, format="%.3g")
    bar.ax.minorticks_off()
    bar.set_label(f"{split} loss, {loss_name(found)}")
    corners = found["networks"]
    xs, ys = ([one[axis] for one in (*corners, corners[0])] for axis in ("x", "y"))
    panel.plot(
        xs, ys, color="white", linewidth=1.6, linestyle="--", path_effects=[withStroke(linewidth=3, foreground="black")]
    )
    middle = sum(ys[:3]) / 3
    for one, marker in zip(corners, MARKERS, strict=True):
        style = {"marker": "*", "markersize": 16} if one["name"] == "star" else {"marker": marker, "markersize": 8}
        panel.plot(one["x"], one["y"], color="white", markeredgecolor="black", zorder=5, **style)
        panel.annotate(
            f"{one['name']}\n{one[split]['loss']:.2g}",
            (one["x"], one["y"]),
            xytext=(0, 10 if one["y"] > middle else -10),
            textcoords="offset points",
            ha="center",
            va="bottom" if one["y"] > middle else "top",
            fontsize=9,
            path_effects=[withStroke(linewidth=3, foreground="white")],
            zorder=6,
        )
    panel.set_aspect("equal")
    panel.set_xlabel("L2 distance of parameters")
    panel.set_ylabel("L2 distance of parameters")
    panel.set_title(split, fontsize=10)


def loss_levels(values: Sequence[float]) -> list[float]:
    """Levels of contours between the least and the largest value: round numbers, log-spaced, where all are positive and
    far enough apart; else equispaced."""
    low, high = min(values), max(values)
    if low > 0:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digits in ROUND:
            levels = [float(f"{digit}e{decade}") for decade in decades for digit in digits]
            inside = [level for level in levels if low < level < high]
            if len(inside) >= FEW:
                return inside
    wide = (high - low) or abs(low) or 1.0
    return [low + wide * i / FEW for i in range(FEW + 1)]


def loss_name(found: Mapping[str, Any]) -> str:
    """The loss with its unit, where it has one that is known."""
    return {"cross_entropy": "nats (cross-entropy)"}.get(found["loss"], str(found["loss"]))
