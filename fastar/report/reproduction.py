"""Tables, Markdown and pictures of reproduced tables and figures, from `ID.json`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from fastar.report.average_panels import uncertainty_picture
from fastar.report.figures import figure_of, legend_below, plain
from fastar.report.perturbed_stars import perturbed_picture
from fastar.report.results import STYLES, new_table, shown
from fastar.report.sweep_panels import sweep_picture
from fastar.report.theory import theory_picture
from fastar.runtime.progress import count_text

LABELS = {
    "regular": "loss, regular",
    "star": "loss, star",
    "RR": "barrier, regular to regular",
    "SR": "barrier, star to heldouts",
    "SS": "barrier, star to sources",
    "RR_min": "smallest, regular to regular",
    "RR_max": "largest, regular to regular",
    "SR_min": "smallest, star to heldouts",
    "SR_max": "largest, star to heldouts",
    "largest": "largest loss, star to heldouts",
    "regular_accuracy": "accuracy %, regular",
    "star_accuracy": "accuracy %, star",
    "best_accuracy": "accuracy %, best source by test",
    "ensemble_accuracy": "accuracy %, ensemble",
    "soup_accuracy": "accuracy %, greedy soup",
    "best_star_accuracy": "accuracy %, best star",
    "unmatched": "distance",
    "matched": "distance, permuted",
}
OURS, PAPER = "#D55E00", "#0072B2"
DRAWN = {
    "sweep": sweep_picture,
    "uncertainty": uncertainty_picture,
    "perturbed": perturbed_picture,
    "theory": theory_picture,
}
"""Pictures of parts that are drawn as the command of their kind draws them."""


def list_table(entries: Iterable[Mapping[str, Any]], scale: str) -> Table:
    """A row for each table and figure: what it shows, what it trains, whether it is done."""
    table = new_table(f"tables and figures at --scale {scale}", "id", "shows", "networks", "trains", "", words=range(5))
    for one in entries:
        trains = f"{one['regular']:,} + {count_text(one['stars'], 'star')}" if one["regular"] else "-"
        table.add_row(one["id"], one["title"], ", ".join(one["networks"]), trains, "done" if one["done"] else "")
    return table


def reproduction_tables(found: Mapping[str, Any]) -> list[Table]:
    """A table for each part: a row for each figure of each row, ours beside the paper's."""
    tables = []
    for part in found["parts"]:
        name = "" if part["name"] is None else f", {part['name']}"
        title = f"{found['id']}: {found['title']}{name}"
        table = new_table(title, "", "figure", "ours", "n", "paper", "z", words=(0, 1))
        for cells in _lines_of(part):
            table.add_row(*cells)
        tables.append(table)
    return tables


def _lines_of(part: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for row, figures in part["rows"].items():
        named = row
        for figure, of in figures.items():
            paper = "" if of["paper"] is None else shown(of["paper"])
            z = "" if of["z"] is None else f"{of['z']:+.1f}"
            yield named, LABELS.get(figure, figure), shown(of["ours"]), str(of["ours"]["n"]), paper, z
            named = ""


def reproduction_lines(found: Mapping[str, Any]) -> list[str]:
    """Lines on rows that could not be run, on the expected order and whether it holds, and on how the figures are to be
    read."""
    lines = []
    for part in found["parts"]:
        lines += [f"not run{_of(part)}: {row}: {why}" for row, why in part["failed"].items()]
        for rule in dict.fromkeys(one["rule"] for one in part["order"]):
            lines.append(f"order{_of(part)}: {rule}: {_held([one for one in part['order'] if one['rule'] == rule])}")
    if found["scale"] != "full":
        lines.append(
            f"--scale {found['scale']}: other networks, fewer images or epochs than the paper's: compare orders, not "
            "numbers."
        )
    return lines


def _of(part: Mapping[str, Any]) -> str:
    return "" if part["name"] is None else f" ({part['name']})"


def _held(cases: list[Mapping[str, Any]]) -> str:
    known = [one for one in cases if one["holds"] is not None]
    if not known:
        return "not measured"
    against = [one for one in known if not one["holds"]]
    if not against:
        return "yes" if len(known) == 1 else f"yes, in all {len(known)} rows"
    shown_cases = "; ".join(
        f"{'' if one['row'] is None else one['row'] + ': '}{one['left']:.3f} against {one['right']:.3f}"
        for one in against
    )
    return f"no, in {len(against)} of {len(known)}: {shown_cases}"


def markdown(found: Mapping[str, Any], command: str) -> str:
    """The same as Markdown, with the command that made it, and its time."""
    lines = [f"# {found['id']}: {found['title']}", "", f"`{command}`, {found['seconds']:,.0f} s.", ""]
    for part in found["parts"]:
        if part["name"] is not None:
            lines += [f"## {part['name']}", ""]
        z = any(of["z"] is not None for figures in part["rows"].values() for of in figures.values())
        titles = ["", "figure", "ours", "n", "paper", *(["z"] if z else [])]
        lines += [_row(titles), _row(["---"] * len(titles))]
        lines += [_row(cells[: len(titles)]) for cells in _lines_of(part)]
        lines.append("")
    lines += [f"- {line}" for line in reproduction_lines(found)]
    if found["parts"]:
        lines += ["", *(f"![{found['title']}]({name})" for name in picture_names(found))]
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def picture_names(found: Mapping[str, Any]) -> list[str]:
    """The pictures' file names: one for each part."""
    return [f"{found['id']}{'' if part['name'] is None else '-' + part['name']}.png" for part in found["parts"]]


def reproduction_pictures(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write a picture for each part: its own kind's, or ours beside the paper's."""
    places = [folder / name for name in picture_names(found)]
    for part, place in zip(found["parts"], places, strict=True):
        title = f"{found['id']}: {found['title']}{_of(part)}"
        contents = {row: json.loads((folder / file).read_text()) for row, file in part["files"].items()}
        if part["draw"] in DRAWN:
            DRAWN[part["draw"]](contents[""], place)
        elif part["draw"] in ("paths", "groups", "methods"):
            _paths_picture(part, contents, title, place)
        else:
            _beside_picture(part, title, place)
    return places


def _beside_picture(part: Mapping[str, Any], title: str, place: Path) -> None:
    """Figures with their spreads, ours above the paper's."""
    both = [
        (row, figure, of)
        for figure in dict.fromkeys(name for figures in part["rows"].values() for name in figures)
        for row, figures in part["rows"].items()
        if figure in figures and (of := figures[figure])["ours"]["mean"] is not None
    ]
    panels = list(dict.fromkeys(figure for _, figure, _ in both))
    rows = list(part["rows"])
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    with figure_of(place, (1.5 + 3.2 * columns, 0.8 + lines * (0.9 + 0.34 * len(rows)))) as picture:
        axes = picture.subplots(lines, columns, squeeze=False, sharey=True).ravel()
        for panel in axes[len(panels) :]:
            panel.set_visible(False)
        for panel, figure in zip(axes, panels, strict=False):
            for side, colour, marker, shift in (("ours", OURS, "o", -0.15), ("paper", PAPER, "s", 0.15)):
                known = [(rows.index(row), of[side]) for row, name, of in both if name == figure and of[side]]
                panel.errorbar(
                    [one["mean"] for _, one in known],
                    [at + shift for at, _ in known],
                    xerr=[one["std"] or 0 for _, one in known],
                    **{"fmt": marker, "color": colour, "markersize": 5, "capsize": 2, "label": side},
                    markerfacecolor=colour if side == "ours" else "white",
                )
            panel.set_title(LABELS.get(figure, figure), fontsize=9)
            panel.set_yticks(range(len(rows)), rows, fontsize=8)
            panel.set_ylim(len(rows) - 0.5, -0.5)
            plain(panel)
        legend_below(picture, axes[0], ncols=2)
        picture.suptitle(title, fontsize=10)


STYLE = (*(STYLES[kind][1:] for kind in ("star_heldout", "star_source", "regular_regular")), ("#CC79A7", ":", "v"))


def _paths_picture(part: Mapping[str, Any], contents: Mapping[str, Any], title: str, place: Path) -> None:
    """Loss and accuracy on the train and the test set along each kind of path, a row of panels for each network; the
    paper's train losses as thin dashes."""
    first = next(iter(contents.values()))["paths"][0]
    keys = [key for split in ("train", "test") for key in (f"{split}_loss", f"{split}_accuracy") if key in first]
    with figure_of(place, (3.0 * len(keys), 0.9 + 2.4 * len(contents))) as picture:
        axes = picture.subplots(len(contents), len(keys), squeeze=False)
        for row, (name, content) in enumerate(contents.items()):
            kinds = [
                kind for kind in dict.fromkeys(path["kind"] for path in content["paths"]) if "unmatched" not in kind
            ]
            for panel, key in zip(axes[row], keys, strict=True):
                for kind, (colour, dashes, marker) in zip(kinds, STYLE, strict=False):
                    curves = [path[key] for path in content["paths"] if path["kind"] == kind]
                    mean = [sum(at) / len(at) for at in zip(*curves, strict=True)]
                    label = f"{LABELS.get(kind, kind).removeprefix('barrier, ').replace('_', ' to ')} (n={len(curves)})"
                    panel.plot(content["t"], mean, dashes, color=colour, marker=marker, markersize=3, label=label)
                    theirs = part["curves"].get(name, {}).get(kind) if key == "train_loss" else None
                    if theirs is not None:
                        t = [i / (len(theirs) - 1) for i in range(len(theirs))]
                        panel.plot(t, theirs, ":", color=colour, linewidth=1.0, alpha=0.8)
                panel.set_ylabel(key.replace("_", " "), fontsize=8)
                panel.set_xlabel("t", fontsize=8)
                if key.endswith("loss"):
                    panel.set_ylim(bottom=0)
                plain(panel)
            axes[row][0].set_title(name, loc="left", fontsize=9)
        legend_below(picture, axes[0][0], ncols=2, fontsize=8)
        picture.suptitle(f"{title}; thin dots: the paper's" if part["curves"] else title, fontsize=10)
