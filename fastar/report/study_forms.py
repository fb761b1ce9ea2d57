"""What is printed and drawn of each JSON file that a command on finished runs or a sweep writes, by the file's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from fastar.report.average_panels import reliability_picture, uncertainty_lines, uncertainty_picture, uncertainty_table
from fastar.report.distances_table import distances_table
from fastar.report.fusion_table import fusion_lines, fusion_table
from fastar.report.landscape.curve_picture import curve_picture, curve_table
from fastar.report.landscape.graph_picture import graph_lines, graph_picture, graph_tables
from fastar.report.landscape.plane_picture import plane_lines, plane_picture, plane_table
from fastar.report.perturbed_stars import perturbed_lines, perturbed_picture, perturbed_table
from fastar.report.shifted_images import corruption_picture, corruption_tables, other_tables
from fastar.report.sweep_panels import sweep_lines, sweep_picture, sweep_table

Found = Mapping[str, Any]
"""The content of the JSON file."""


class Forms(NamedTuple):
    """The forms of results: tables, lines under them, and pictures, by the names of their files."""

    tables: Callable[[Found], Sequence[Table]]
    lines: Callable[[Found], Sequence[str]] = lambda found: []
    pictures: Mapping[str, Callable[[Found, Path], None]] = {}

    def draw(self, found: Found, folder: Path) -> list[Path]:
        """Write the pictures; that of corruptions where there are some. The files that were written."""
        places = []
        for name, picture in self.pictures.items():
            if name != "corruptions" or name in found:
                places.append(folder / f"{name}.png")
                picture(found, places[-1])
        return places


FORMS = {
    "uncertainty": Forms(
        lambda found: [uncertainty_table(found), *corruption_tables(found), *other_tables(found)],
        uncertainty_lines,
        {"uncertainty": uncertainty_picture, "reliability": reliability_picture, "corruptions": corruption_picture},
    ),
    "perturb": Forms(lambda found: [perturbed_table(found)], perturbed_lines, {"perturb": perturbed_picture}),
    "distances": Forms(lambda found: [distances_table(found)]),
    "fusion": Forms(lambda found: [fusion_table(found)], fusion_lines),
    "plane": Forms(lambda found: [plane_table(found)], plane_lines, {"plane": plane_picture}),
    "curve": Forms(lambda found: [curve_table(found)], pictures={"curve": curve_picture}),
    "graph": Forms(graph_tables, graph_lines, {"graph": graph_picture}),
    "sweep": Forms(lambda found: [sweep_table(found)], sweep_lines, {"sweep": sweep_picture}),
}
