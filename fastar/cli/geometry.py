"""Commands on the loss between networks of a finished run: planes, graphs, curves."""

from __future__ import annotations

from typing import Annotated

import typer

from fastar.cli.after import Finished, _opened, _show
from fastar.cli.options import Given, Option, takes

Names = Annotated[list[str] | None, typer.Argument(metavar="[A B C]", help="star, mean, source:0, heldout:1.")]


@takes("points", "margin", "split", "json", "quiet", points=Option(int, "N", "Points along each axis.", default=21))
def plane(given: Given, folder: Finished, names: Names = None) -> None:
    """Measure the loss over the plane through three networks of a run, by default star heldout:0 heldout:1.

    B and C are permuted to match A; A lies at (0, 0), B on the x axis. Written into the run folder: plane.json,
    plane.png.

    Example:

        fastar plane runs/digits-mlp-seed0 star heldout:0 heldout:1
    """
    from fastar.experiments.landscape.loss_plane import CORNERS, loss_plane
    from fastar.report.plane_picture import plane_lines, plane_picture, plane_table
    from fastar.runs import write_json

    run = _opened(given, folder)
    found = loss_plane(run, names or CORNERS, points=given["points"], margin=given["margin"], split=given["split"])
    places = [folder / name for name in ("plane.json", "plane.png")]
    write_json(places[0], found)
    plane_picture(found, places[1])
    _show(given, found, plane_table(found), plane_lines(found), places)
