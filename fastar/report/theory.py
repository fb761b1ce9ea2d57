"""Tables and pictures of the paper's theory: the certificate, and the shares of star models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from fastar.report.figures import figure_of, plain

SHOWN = (0, 11, 25, 49)
"""The tolerances in the table, of the certificate's 50."""
MARKERS = ("o", "s", "^", "D")


def theory_tables(result: Mapping[str, Any]) -> list[Table]:
    """Tables of the result of `run_certificate` or `run_two_layer`, a row for each width."""
    return [_q_table(result)] if result["kind"] == "certificate" else [_share_table(result), _star_table(result)]


def _q_table(result: Mapping[str, Any]) -> Table:
    table = Table(title=f"Q(m, eps): share of {result['draws']} networks phi")
    _add_columns(table, "m", *(f"eps {result['eps'][column]:.3f}" for column in SHOWN))
    for width, row in zip(result["widths"], result["q"], strict=True):
        table.add_row(str(width), *(f"{row[column]:.2f}" for column in SHOWN))
    return table


def _share_table(result: Mapping[str, Any]) -> Table:
    table = Table(title=f"share of star models among {result['draws']} two-layer networks, {_name(result)}")
    columns = [title for eps in result["eps"] for title in (f"eps {eps:g}", "paper")]
    _add_columns(table, "m", *columns, "unmatched")
    for width, ours, paper, raw in zip(*(result[k] for k in ("widths", "share", "paper", "unmatched")), strict=True):
        theirs = [""] * len(ours) if paper is None else [f"{share:.2f}" for share in paper]
        pairs = [cell for one, other in zip(ours, theirs, strict=True) for cell in (f"{one:.2f}", other)]
        table.add_row(str(width), *pairs, " ".join(f"{share:.2f}" for share in raw))
    return table


def _star_table(result: Mapping[str, Any]) -> Table:
    table = Table(title="largest barriers: of a star by Algorithm 1, and of the networks")
    sources, heldout = f"star to {result['draws']} sources", f"star to {result['heldout']} heldouts"
    _add_columns(table, "m", "loss, networks", "loss, star", sources, heldout, "median network", "best network")
    for width, loss, star, worst in zip(*(result[k] for k in ("widths", "loss", "star", "worst")), strict=True):
        numbers = (loss, star["loss"], star["sources"], star["heldout"], median(worst), min(worst))
        table.add_row(str(width), *(f"{number:.1e}" for number in numbers))
    return table


def _add_columns(table: Table, *titles: str) -> None:
    for title in titles:
        table.add_column(title, justify="right")


def theory_lines(result: Mapping[str, Any]) -> list[str]:
    """Lines on how the table is to be read."""
    if result["kind"] != "certificate":
        return [
            f"a star model is below eps to each of the {result['draws'] - 1} others; unmatched: the same eps in turn",
            "the paper does not give its means, optimiser and steps, on which all entries hang",
        ]
    what = "barrier" if result["of"] == "barrier" else "squared gap"
    spiked = " and the spiked theta" if result["adversarial"] else ""
    lines = [
        f"{what} at most eps to each of {result['draws']} thetas drawn{spiked}; permutation: {result['permutation']}"
    ]
    if result["permutation"] == "exact":
        lines.append("exact: no permutation has a smaller gap, so Q is an upper bound")
    if result["adversarial"]:
        lines.append(
            "lemma 2 of the paper is worded for all theta; with the spiked one Q is 0 for large m, so it is false"
        )
    else:
        lines.append(
            "Q is of those drawn and falls with their number; it says nothing of all theta (see --adversarial)"
        )
    return [*lines, "the paper's figure 5 has no numbers to compare with"]


def theory_picture(result: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: of the certificate a heat map over widths and tolerances; of two-layer networks a curve over widths
    for each tolerance, the paper's thin and dashed.

    Raises:
        FastarError: it is not called .png, or cannot be written.
    """
    with figure_of(path, (6.4, 4.2)) as figure:
        (_heat_map if result["kind"] == "certificate" else _curves)(figure, result)


def _heat_map(figure: Any, result: Mapping[str, Any]) -> None:
    panel = figure.subplots()
    widths, eps = result["widths"], result["eps"]
    columns = list(zip(*result["q"], strict=True))  # [eps][width]
    drawn = panel.pcolormesh(range(len(widths)), eps, columns, shading="nearest", cmap="viridis", vmin=0, vmax=1)
    panel.set_xticks(range(len(widths)), widths)
    panel.invert_yaxis()
    panel.set_xlabel("m")
    panel.set_ylabel("eps")
    spiked = " and a spiked one" if result["adversarial"] else ""
    bar = figure.colorbar(drawn, ax=panel)
    bar.set_label(f"share of {result['draws']} phi within eps of {result['draws']} theta{spiked}", fontsize=9)
    what = "barrier" if result["of"] == "barrier" else "squared gap"
    panel.set_title(f"Q(m, eps): {what}, permutation: {result['permutation']}", fontsize=11)


def _curves(figure: Any, result: Mapping[str, Any]) -> None:
    from matplotlib import colormaps

    panel = figure.subplots()
    widths = result["widths"]
    for column, (eps, marker) in enumerate(zip(result["eps"], MARKERS, strict=True)):
        colour = colormaps["viridis"](0.9 * column / (len(MARKERS) - 1))
        ours = [row[column] for row in result["share"]]
        panel.plot(widths, ours, color=colour, marker=marker, markersize=6, linewidth=1.8, label=f"eps {eps:g}")
        there = [(width, row[column]) for width, row in zip(widths, result["paper"], strict=True) if row is not None]
        panel.plot(*zip(*there, strict=True), color=colour, marker=marker, markersize=3, linewidth=0.9, linestyle="--")
    panel.plot([], [], color="grey", linewidth=0.9, linestyle="--", label="the paper's")
    panel.set_xscale("log", base=2)
    panel.set_xticks(widths, widths)
    panel.set_xlabel("m, hidden units")
    panel.set_ylabel("share of star models")
    panel.set_ylim(-0.03, 1.03)
    plain(panel)
    panel.set_title(f"two-layer networks, {_name(result)}: of {result['draws']} trained", fontsize=11)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)


def _name(result: Mapping[str, Any]) -> str:
    return "ELU" if result["kind"] == "elu" else "linear"
