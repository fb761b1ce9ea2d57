"""Tables and pictures of predictive uncertainty, from `uncertainty.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from fastar.report.figures import figure_of, legend_below, plain
from fastar.report.results import new_table, shown, task_name
from fastar.runtime.standard_streams import plus_minus

# Okabe-Ito colours; markers and dashes tell the curves apart in grey print.
STYLES = {
    "star domain": ("#D55E00", "-", "o"),
    "ensemble": ("#0072B2", "--", "s"),
    "pairs": ("#009E73", "-.", "^"),
    "ball": ("#CC79A7", ":", "v"),
    "star": ("#000000", (0, (1, 1)), ""),
    "mean": ("#E69F00", (0, (5, 1)), ""),
    "source": ("#777777", (0, (3, 1, 1, 1)), ""),
    "swag": ("#56B4E9", "-", "D"),
    "swa": ("#56B4E9", (0, (3, 1)), ""),
    "ensemble at T": ("#0072B2", ":", ""),
    "star domain at T": ("#D55E00", ":", ""),
}
FEW = 5
"""Samples of a bin whose accuracy is worth showing."""
COLUMNS = (
    ("accuracy", "accuracy"),
    ("nll", "NLL"),
    ("brier", "Brier"),
    ("ece", "ECE"),
    ("gap", "gap"),
    ("auroc", "AUROC"),
    ("auroc_20", "of 20"),
)
PANELS = (
    ("nll", "negative log likelihood, nats"),
    ("auroc", "AUROC of right against wrong, exact"),
    ("ece", "expected calibration error"),
    ("auroc_20", "AUROC from 20 thresholds (the paper's code)"),
)


def uncertainty_table(found: Mapping[str, Any]) -> Table:
    """A row for each family at its largest K: mean and standard deviation over repetitions."""
    title = f"{task_name(found)}: predictions of {found['samples']:,} {found['split']} samples"
    cooled = "temperature" in next(iter(found["families"].values()))
    columns = [*COLUMNS, *([("nll_t", "NLL at T"), ("temperature", "T")] if cooled else [])]
    table = new_table(title, "average of", "K", "n", *(column for _, column in columns))
    for family, of in found["families"].items():
        table.add_row(
            family,
            str(of["k"][-1]),
            str(of["repetitions"]),
            *(
                shown({"mean": of[key]["mean"][-1], "std": of[key]["std"][-1]}) if key in of else ""
                for key, _ in columns
            ),
        )
    return table


def uncertainty_lines(found: Mapping[str, Any]) -> list[str]:
    """Lines on the columns, and on the star domain against its controls."""
    lines = [
        "AUROC: right against wrong by confidence. of 20: the same from 20 thresholds, as the paper's code has it; it "
        "follows confidence, not ranking.",
        f"gap: confidence minus accuracy. n: repetitions; after {plus_minus()} stands their standard deviation, of "
        "draws around one star: no standard error of the method.",
    ]
    families = found["families"]
    if "temperature" in next(iter(families.values())):
        lines.append("T: the temperature of the lowest NLL on the validation images; rows at T have all metrics at it.")
    else:
        lines.append(
            "no temperatures: the run keeps no validation images; train one with --validation 0.1 for calibrated rows."
        )
    accuracy = next(iter(families.values()))["accuracy"]["mean"][-1]
    noise = standard_error(accuracy, found["samples"])
    lines.append(
        f"{found['samples']:,} samples leave a standard error of {noise:.3f} in an accuracy of {accuracy:.3f}."
    )
    if "star domain" in families:
        for other in ("ensemble", "pairs"):
            if other in families:
                lines.append(f"star domain against {other}: " + _compared(families["star domain"], families[other]))
    return lines


def standard_error(accuracy: float, samples: int) -> float:
    """The standard error of an accuracy that so many samples leave."""
    return math.sqrt(accuracy * (1 - accuracy) / samples)


def _compared(ours: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    said = []
    for key, name, better in (("nll", "NLL", -1), ("brier", "Brier", -1), ("ece", "ECE", -1), ("auroc", "AUROC", 1)):
        a, b = ours[key]["mean"][-1], other[key]["mean"][-1]
        if a is None or b is None:
            continue
        noise = math.hypot(ours[key]["std"][-1] or 0.0, other[key]["std"][-1] or 0.0)
        word = "better" if better * (a - b) > 0 else "worse"
        said.append(f"{name} {word if abs(a - b) > noise else 'within noise'} ({a - b:+.3f})")
    return ", ".join(said)


def uncertainty_picture(found: Mapping[str, Any], path: Path) -> None:
    """Write a PNG of four metrics over K: mean, and a band of one standard deviation over repetitions. What is measured
    at a temperature stands in the table alone."""
    from matplotlib.ticker import MaxNLocator

    families = {name: of for name, of in found["families"].items() if not name.endswith(" at T")}
    with figure_of(path, (9.5, 7.0)) as figure:
        panels = figure.subplots(2, 2).ravel()
        for panel, (key, name) in zip(panels, PANELS, strict=True):
            low, high = shown_range(families, key)
            outside = []
            for family, of in families.items():
                value = of[key]["mean"][-1]
                if value is not None and not low <= value <= high:
                    outside.append(f"{family} {value:.2f}")
                draw_family(panel, family, of, key)
            panel.set_ylim(low, high)
            if outside:
                panel.text(
                    0.98, 0.97, f"outside: {', '.join(outside)}", transform=panel.transAxes, ha="right", va="top"
                )
            panel.set_xlabel("networks in the average, K")
            panel.set_title(name, fontsize=10)
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
            plain(panel)
        legend_below(figure, panels[0])
        figure.suptitle(f"{task_name(found)}: averages around a star of {found['sources']} sources", fontsize=11)


def shown_range(families: Mapping[str, Any], key: str) -> tuple[float, float]:
    """The values that a panel shows: of all families but one that is far from the others, with their bands."""
    ends = {name: (of[key]["mean"][0], of[key]["mean"][-1]) for name, of in families.items()}
    known = {name: both for name, both in ends.items() if None not in both}
    middle = median(value for both in known.values() for value in both) if known else 0.5
    far = 4 * median(abs(both[1] - middle) for both in known.values()) if known else 0.5
    near = [value for both in known.values() for value in both if abs(both[1] - middle) <= max(far, 0.02)]
    low, high = min(near, default=0.0), max(near, default=1.0)
    margin = 0.1 * (high - low) or 0.05
    return low - margin, high + margin


def draw_family(panel: Any, family: str, of: Mapping[str, Any], key: str) -> None:
    """Draw a metric of a family over K, with a band of one standard deviation; of one network, a level line."""
    colour, dashes, marker = STYLES[family]
    mean, std = of[key]["mean"], of[key]["std"]
    some = [(k, m, s or 0.0) for k, m, s in zip(of["k"], mean, std, strict=True) if m is not None]
    if not some:
        return
    style = {"color": colour, "linestyle": dashes, "linewidth": 1.8}
    if len(of["k"]) == 1:
        panel.axhline(some[0][1], **style, label=family)
        return
    k, means, stds = zip(*some, strict=True)
    panel.plot(k, means, **style, marker=marker, markersize=4, label=family)
    low, high = ([m + sign * s for m, s in zip(means, stds, strict=True)] for sign in (-1, 1))
    panel.fill_between(k, low, high, color=colour, alpha=0.12, linewidth=0)


def reliability_picture(found: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: accuracy over confidence with the number of samples in each bin, and risk over coverage."""
    with figure_of(path, (9.5, 4.6)) as figure:
        layout = figure.subplot_mosaic([["reliability", "risk"], ["counts", "risk"]], height_ratios=(3, 1))
        lines, counts, risk = layout["reliability"], layout["counts"], layout["risk"]
        lines.plot((0, 1), (0, 1), color="#999999", linewidth=1, label="calibrated")
        for number, (family, of) in enumerate(found["reliability"].items()):
            colour, dashes, marker = STYLES[family]
            there = [i for i, count in enumerate(of["count"]) if count >= FEW]
            style = {"color": colour, "linestyle": dashes, "marker": marker or ".", "markersize": 4, "linewidth": 1.6}
            lines.plot([of["confidence"][i] for i in there], [of["accuracy"][i] for i in there], **style, label=family)
            width = 1 / len(of["count"])
            places = [(i + 0.2 + 0.3 * number) * width for i in range(len(of["count"]))]
            counts.bar(places, of["count"], width=0.28 * width, color=colour, log=True)
            curve = found["risk"][family]
            risk.plot(curve["coverage"], curve["risk"], color=colour, linestyle=dashes, linewidth=1.6, label=family)
        lines.set_ylabel(f"accuracy of bins of at least {FEW}")
        lines.set_xticklabels([])
        lines.set_xlim(0, 1)
        counts.set_xlim(0, 1)
        counts.set_ylabel("samples")
        counts.set_xlabel("confidence")
        risk.set_xlabel("coverage: share that is answered, most confident first")
        risk.set_ylabel("risk: share of wrong answers")
        risk.set_ylim(bottom=0)
        for panel in layout.values():
            plain(panel)
        lines.legend(frameon=False, fontsize=9)
        figure.suptitle(f"{task_name(found)}: {found['split']} samples, one repetition at the largest K", fontsize=11)
