"""The table of distances between a run's models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from fastar.report.results import new_table, shown, task_name

ROWS = (
    ("regular_regular", "regular to regular"),
    ("star_heldout", "star to heldouts"),
    ("star_source", "star to sources"),
    ("mean_star", "mean of sources to star"),
    ("mean_heldout", "mean of sources to heldouts"),
    ("mean_source", "mean of sources to sources"),
)


def distances_table(found: Mapping[str, Any]) -> Table:
    """Distances and cosines of each kind of pair, without and with permutation, and norms."""
    table = new_table(f"{task_name(found)}: L2 distances of parameters", "", "n", "unmatched", "matched")
    for key, digits in (("distance", 2), ("cosine", 3)):
        for kind, name in ROWS:
            n = found[kind]["matched"][key]["n"]
            if n:
                ways = (shown(found[kind][way][key], digits) for way in ("unmatched", "matched"))
                table.add_row(f"{key}, {name}", str(n), *ways)
        table.add_section()
    norms = found["norms"]
    for key, name in (("source", "sources"), ("heldout", "heldouts")):
        if norms[key]["n"]:
            table.add_row(f"norm, {name}", str(norms[key]["n"]), shown(norms[key], 2))
    table.add_row("norm, star", "1", shown(norms["star"], 2))
    table.add_row("norm, mean of sources", "1", shown(norms["mean"], 2))
    return table
