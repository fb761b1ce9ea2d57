"""Tables and picture of the barriers between all pairs of a run's networks, from `graph.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from fastar.report.figures import figure_of
from fastar.report.landscape.plane_picture import loss_name
from fastar.report.results import new_table, shown, task_name

FEW = 14
"""Networks up to which the cells have their values written in them."""
HIGHLIGHTS = {"star": ("#D55E00", "-"), "mean": ("#0072B2", "--")}
"""Okabe-Ito colours and dashes of the frames around rows."""
SHARES = (
    ("regular", "pairs of regular models"),
    ("star", "star and regular models"),
    ("mean", "mean and regular models"),
    ("stars", "regular models that are stars"),
)


def graph_tables(found: Mapping[str, Any]) -> list[Table]:
    """Shares of barriers below each eps, and the hubs beside each other, on the train split."""
    return [_shares_table(found), _hubs_table(found)]


def _shares_table(found: Mapping[str, Any]) -> Table:
    below = found["below"]["train"]
    title = f"{task_name(found)}: share of train barriers below eps"
    table = new_table(title, "", *(f"{eps:g}" for eps in below["eps"]))
    for key, name in SHARES:
        table.add_row(name, *(shown(share, 2) for share in below[key]))
    return table


def _hubs_table(found: Mapping[str, Any]) -> Table:
    kinds = [kind for kind in ("heldouts", "sources") if found["hubs"]["mean"]["train"][kind]["barrier"]["n"]]
    columns = (f"{figure}\nto {kind}" for kind in kinds for figure in ("barrier", "largest loss"))
    table = new_table("hubs: paths to all others here, train", "hub", "loss", *columns)
    for hub, of in found["hubs"].items():
        name = hub if hub == of["network"] else f"{hub}, {of['network']}"
        figures = (of["train"][kind][key] for kind in kinds for key in ("barrier", "largest_loss"))
        table.add_row(name, shown(of["train"]["loss"]), *map(shown, figures))
    return table


def graph_lines(found: Mapping[str, Any]) -> list[str]:
    """Lines on which networks these are, and on what the figures mean."""
    counts = {kind: sum(name.startswith(kind) for name in found["names"]) for kind in ("source", "heldout")}
    return [
        f"{counts['source']} of {found['sources']} sources and {counts['heldout']} of {found['heldout']} heldouts "
        "(--models)",
        "regular models that are stars: those whose barriers to all other regular models here are below eps.",
        "a barrier is measured from the line between the ends' losses: where a hub's own loss is high, it is low.",
    ]


def graph_picture(found: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: heat maps of barriers and of largest losses on the train split, the rows of star and mean framed."""
    side = max(4.2, 0.28 * len(found["names"]) + 1.4)
    with figure_of(path, (2 * side + 1.2, side + 0.5)) as figure:
        for panel, key in zip(figure.subplots(1, 2), ("barrier", "largest_loss"), strict=True):
            draw_graph(panel, found, "train", key)
        title = f"{task_name(found)}: matched pairs of networks; star of {found['sources']} sources"
        figure.suptitle(title, fontsize=11)


def draw_graph(panel: Any, found: Mapping[str, Any], split: str, key: str) -> None:
    """Draw a matrix of a split, `barrier` or `largest_loss`, on matplotlib's Axes, with a colour bar."""
    from matplotlib.patches import Rectangle

    names, matrix = found["names"], found["splits"][split][key]
    count, largest = len(names), max(value for row in matrix for value in row if value is not None)
    cells = [[float("nan") if value is None else value for value in row] for row in matrix]
    drawn = panel.imshow(cells, cmap="viridis_r", vmin=0, vmax=largest or 1)
    panel.figure.colorbar(drawn, ax=panel, shrink=0.8).set_label(f"{key.replace('_', ' ')}, {loss_name(found)}")
    for y, row in enumerate(matrix):
        for x, value in enumerate(row):
            if count <= FEW and value is not None:
                colour = "white" if value > 0.5 * largest else "black"
                panel.text(x, y, f"{value:.2g}", ha="center", va="center", fontsize=7, color=colour)
    for kind in ("source", "heldout"):
        end = sum(name.startswith(("source", kind)) for name in names) - 0.5
        panel.plot([end, end], [-0.5, count - 0.5], color="white", linewidth=1.5)
        panel.plot([-0.5, count - 0.5], [end, end], color="white", linewidth=1.5)
    for name, (colour, dashes) in HIGHLIGHTS.items():
        frame = Rectangle((-0.45, names.index(name) - 0.44), count - 0.1, 0.88, fill=False, linewidth=2.2, zorder=4)
        frame.set(edgecolor=colour, linestyle=dashes)
        panel.add_patch(frame)
    panel.set_xticks(range(count), names, rotation=90, fontsize=8)
    panel.set_yticks(range(count), names, fontsize=8)
    panel.set_title(f"{split}: {key.replace('_', ' ')}", fontsize=10)
