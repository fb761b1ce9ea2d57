"""The table of ways to fuse sources, from `fusion.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from fastar.report.average_panels import standard_error
from fastar.report.results import new_table, shown, task_name
from fastar.runtime.standard_streams import plus_minus


def fusion_table(found: Mapping[str, Any]) -> Table:
    """A row for each predictor: the networks that a prediction takes, accuracy, NLL, and accuracy above the star's."""
    mu = f", mu {found['mu']:g}" if found["mu"] else ""
    title = (
        f"{task_name(found)}: fusion of {found['sources']} sources{mu}, {found['samples']:,} {found['split']} samples"
    )
    table = new_table(title, "", "networks", "accuracy", "NLL", "accuracy above the star's")
    single = found["single"]
    table.add_row("one source", "1", shown(single["accuracy"], 4), shown(single["nll"], 4), "")
    for name, of in found["predictors"].items():
        above = "" if name == "star" else f"{of['above_star']:+.4f} {plus_minus()} {of['above_star_error']:.4f}"
        table.add_row(name, str(of["networks"]), shown(of["accuracy"], 4), shown(of.get("nll"), 4), above)
    return table


def fusion_lines(found: Mapping[str, Any]) -> list[str]:
    """Lines on the noise of the test samples, and on what was chosen on which."""
    accuracy = found["predictors"]["star"]["accuracy"]
    noise = standard_error(accuracy, found["samples"])
    return [
        f"noise of {found['samples']:,} samples: a standard error of {noise:.4f} in the star's accuracy; after "
        f"{plus_minus()} in the last column that of the difference on the same samples (bootstrap).",
        f"best source and soup are chosen on {found['chosen_on']} samples; best source by test on those it is tested "
        f"on, as in the paper. Sources in the soup: {len(found['in_soup'])}.",
    ]
