"""Table and picture of a sweep, from `sweep.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from fastar.report.figures import figure_of, legend_below, plain
from fastar.report.results import STYLES, new_table, shown, task_name

BARRIERS = ("star_source", "star_heldout", "regular_regular")
NAMES = {"sources": "number of sources", "t": "distribution of t", "mu": "weight of the star's own loss (mu)"}
OVER = "regular_regular", "star_heldout"
"""Kinds of barriers of the right panel: x, y."""
STAR_STYLE = {"label": "star", "color": "#CC79A7", "linestyle": "-", "marker": "D"}
REGULAR_STYLE = {"label": "regular models", "color": "black", "linestyle": ":", "marker": "v"}
LARGEST_STYLE = {"label": "largest loss, star to heldouts", "color": "#E69F00", "linestyle": "--", "marker": "P"}
# Values are drawn on a logarithmic axis from this quotient of the largest and the smallest on.
DECADE = 8.0


def sweep_table(found: Mapping[str, Any]) -> Table:
    """A row for each point: losses and barriers on the train set, the accuracy of the star on the last split."""
    accuracy, tested = _metric(found), _splits(found)[-1]
    columns = ["stars", "loss, regular", "loss, star", *(f"barrier, {STYLES[kind][0]}" for kind in BARRIERS)]
    columns += ["largest loss, star to heldouts", *([f"{tested} {accuracy}, star"] if accuracy else [])]
    table = new_table(f"{task_name(found)}: sweep of {found['kind']}, train set", found["kind"], *columns, words=())
    for point in found["points"]:
        train = point["train"]
        table.add_row(
            str(point["value"]),
            str(len(point["seeds"])),
            *(shown(train[key]) for key in ("regular_loss", "star_loss", *BARRIERS)),
            shown(train["largest_loss"]["star_heldout"]),
            *([shown(point[tested]["metrics"][accuracy]["star"])] if accuracy else []),
        )
    return table


def sweep_lines(found: Mapping[str, Any]) -> list[str]:
    """The fits of train barriers, or why there is none."""
    fits = found["fits"]["train"]
    line, lines = fits["line"], []
    if line["reason"] is None:
        sign, r2 = "+" if line["intercept"] >= 0 else "-", "" if line["r2"] is None else f", R2 {line['r2']:.2f}"
        over = f"star to heldouts = {line['slope']:.3f} x regular to regular {sign} {abs(line['intercept']):.3f}"
        lines.append(f"line: {over}{r2}, slope {_between(line['slope_interval'])}")
    else:
        lines.append(f"line of star to heldouts over regular to regular: none ({line['reason']})")
    power = fits.get("power_law")
    if power is not None and power["reason"] is None:
        law = f"star to heldouts = {power['a']:.3f} n^-{power['b']:.2f} + {power['c']:.3f}"
        lines.append(f"power law: {law}, b {_between(power['b_interval'])}, c {_between(power['c_interval'])}")
    elif power is not None:
        lines.append(f"power law of the number of sources: none ({power['reason']})")
    return lines


def sweep_picture(found: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: barriers over the values, and beside them the barriers from the star over those between regular
    models, where these differ; else the star's loss and accuracy over the values, as a bad star has low barriers."""
    scatter = found["fits"]["train"]["line"]["reason"] is None
    count = 2 if scatter or not _metric(found) else 3
    with figure_of(path, (4.6 * count, 4.4)) as figure:
        figure.get_layout_engine().set(wspace=0.06)
        panels = figure.subplots(1, count)
        _draw_barriers(panels[0], found)
        if scatter:
            _draw_scatter(panels[1], found)
        else:
            _draw_star(panels[1], panels[2] if count == 3 else None, found)
        legend_below(figure, *panels[: 1 if scatter else 2])
        meanings = "bars, filled band: one standard deviation; hatched: 95 % of the fit"
        title = f"{task_name(found)}: sweep of {found['kind']} ({meanings})"
        figure.suptitle(title, fontsize=11)


def _splits(found: Mapping[str, Any]) -> list[str]:
    return list(found["fits"])


def _metric(found: Mapping[str, Any]) -> str | None:
    """The first metric that is there."""
    return next(iter(found["points"][0]["train"].get("metrics", {})), None)


def _between(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"95 % in [{interval[0]:.3f}, {interval[1]:.3f}]"


def _positions(panel: Any, found: Mapping[str, Any]) -> list[float]:
    """The places of the points on the axis of values, which is named; logarithmic where they span a decade."""
    values = [point["value"] for point in found["points"]]
    panel.set_xlabel(NAMES.get(found["kind"], found["kind"]))
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    positions = [float(value) for value in values] if numbers else [float(i) for i in range(len(values))]
    if numbers and min(positions) > 0 and max(positions) >= DECADE * min(positions):
        panel.set_xscale("log")
    panel.set_xticks(positions, [f"{value:g}" if numbers else str(value) for value in values])
    panel.minorticks_off()
    if not numbers:
        panel.set_xlim(-0.5, len(values) - 0.5)
    return positions


def _bars(panel: Any, x: Sequence[float], spreads: Sequence[Mapping[str, Any]], shift: float, **style: Any) -> None:
    """Means where there are some, and bars of one standard deviation, `shift` points to the right: none hides another.
    A bar that would end below 0 ends there."""
    from matplotlib.transforms import ScaledTranslation

    there = [(at, one["mean"], one["std"] or 0.0) for at, one in zip(x, spreads, strict=True) if one["n"]]
    if there:
        at, mean, std = zip(*there, strict=True)
        below = [min(m, d) for m, d in zip(mean, std, strict=True)]
        moved = panel.transData + ScaledTranslation(shift / 72, 0, panel.figure.dpi_scale_trans)
        panel.errorbar(at, mean, yerr=[below, std], capsize=3, markersize=5, transform=moved, **style)
        panel.update_datalim(
            [(a, end) for a, m, b, d in zip(at, mean, below, std, strict=True) for end in (m - b, m + d)]
        )
        panel.autoscale_view()  # which what is moved does not do


def _draw_barriers(panel: Any, found: Mapping[str, Any]) -> None:
    """Means, and bars (regular models: a band) of one standard deviation over pairs."""
    x = _positions(panel, found)
    for shift, kind in zip((-3, 3, 0), BARRIERS, strict=True):
        label, colour, dashes, marker = STYLES[kind]
        spreads = [point["train"][kind] for point in found["points"]]
        style = {"color": colour, "linestyle": dashes, "marker": marker, "label": label}
        if kind != "regular_regular":
            _bars(panel, x, spreads, shift, **style)
        elif all(one["n"] for one in spreads):
            mean, std = [one["mean"] for one in spreads], [one["std"] or 0.0 for one in spreads]
            panel.plot(x, mean, markersize=5, **style)
            low, high = ([max(m + s * d, 0.0) for m, d in zip(mean, std, strict=True)] for s in (-1, 1))
            panel.fill_between(x, low, high, color=colour, alpha=0.14, linewidth=0)
    power = found["fits"]["train"].get("power_law", {"reason": "another sweep"})
    if power["reason"] is None:
        n = [x[0] * (x[-1] / x[0]) ** (i / 100) for i in range(101)]
        law = [power["a"] * one ** -power["b"] + power["c"] for one in n]
        label = f"power law {power['a']:.2f} n^-{power['b']:.2f} + {power['c']:.2f}"
        panel.plot(n, law, color="black", linestyle=":", linewidth=1.5, label=label)
        _draw_band(panel, power)
    panel.set_ylabel("train loss barrier")
    panel.set_ylim(bottom=0)
    plain(panel)


def _draw_scatter(panel: Any, found: Mapping[str, Any]) -> None:
    """The star's barriers to heldouts over those between regular models, with 95 % intervals; the line through them,
    and the diagonal. Both axes are logarithmic where the barriers span a decade."""
    fit, (x, y) = found["fits"]["train"]["line"], OVER
    points = [point for point in found["points"] if point["train"][x]["n"] and point["train"][y]["n"]]
    means = [[point["train"][key]["mean"] for point in points] for key in OVER]
    log = min(map(min, means)) > 0 and max(means[0]) >= DECADE * min(means[0])
    _, colour, _, marker = STYLES[y]
    ends = []
    for point, at, height in zip(points, *means, strict=True):
        across, up = (point["train"][key]["interval"] or [point["train"][key]["mean"]] * 2 for key in OVER)
        panel.plot(across, [height, height], color=colour, linewidth=0.8, alpha=0.7)
        panel.plot([at, at], up, color=colour, linewidth=0.8, alpha=0.7)
        panel.plot([at], [height], color=colour, marker=marker, markersize=6)
        above = height > fit["intercept"] + fit["slope"] * at
        place = {"xytext": (-5, 5), "ha": "right"} if above else {"xytext": (6, -12), "ha": "left"}
        panel.annotate(str(point["value"]), (at, height), textcoords="offset points", fontsize=9, **place)
        ends.append((across[1], up[1]))
    most, top = (1.1 * max(column) for column in zip(*ends, strict=True))
    least, bottom = (0.6 * min(column) if log else 0.0 for column in means)
    line = [least + (most - least) * (i / 1000) ** 3 for i in range(1001)]  # denser where a logarithmic axis is wide
    straight = [(at, height) for at in line if (height := fit["intercept"] + fit["slope"] * at) > 0]
    panel.plot(*zip(*straight, strict=True), color="black", linewidth=1.2)
    panel.plot(line, line, color="grey", linestyle="--", linewidth=1)
    _draw_band(panel, fit)
    if log:
        panel.set_xscale("log")
        panel.set_yscale("log")
    panel.set_xlim(least, most)
    panel.set_ylim(bottom, top)
    panel.set_xlabel("train loss barrier, regular to regular")
    panel.set_ylabel("train loss barrier, star to heldouts")
    panel.set_title(f"line of slope {fit['slope']:.2f}; bars: 95 %; dashed: equal", fontsize=10)
    plain(panel)


def _draw_band(panel: Any, fit: Mapping[str, Any]) -> None:
    """The 95 % band of a fit, hatched: other bands are filled. Files of older versions have none."""
    if fit.get("band") is not None:
        x, low, high = zip(*fit["band"], strict=True)
        panel.fill_between(x, low, high, facecolor="none", edgecolor="black", alpha=0.3, hatch="////", linewidth=0)


def _draw_star(losses: Any, accuracies: Any | None, found: Mapping[str, Any]) -> None:
    """Losses and accuracies of the star and of regular models, and the largest loss on the paths to heldouts: where the
    star is bad, its barriers are low."""
    tested, accuracy = _splits(found)[-1], _metric(found)
    points = found["points"]
    x = _positions(losses, found)
    for shift, style, key in ((-3, STAR_STYLE, "star_loss"), (3, REGULAR_STYLE, "regular_loss")):
        _bars(losses, x, [point["train"][key] for point in points], shift, **style)
    _bars(losses, x, [point["train"]["largest_loss"]["star_heldout"] for point in points], 0, **LARGEST_STYLE)
    losses.set_ylabel("train loss")
    losses.set_ylim(bottom=0)
    plain(losses)
    if accuracies is not None:
        _positions(accuracies, found)
        for shift, style, key in ((-3, STAR_STYLE, "star"), (3, REGULAR_STYLE, "regular")):
            _bars(accuracies, x, [point[tested]["metrics"][accuracy][key] for point in points], shift, **style)
        accuracies.set_ylabel(f"{tested} {accuracy}")
        plain(accuracies)
