"""Commands on the loss between networks of a finished run: planes, graphs, curves."""

from __future__ import annotations

from typing import Annotated

import typer

from fastar.cli.after import Finished, opened, show_study
from fastar.cli.options import Given, Option, takes

Names = Annotated[list[str] | None, typer.Argument(metavar="[A B C]", help="star, mean, source:0, heldout:1.")]

Pair = Annotated[list[str] | None, typer.Argument(metavar="[A B]", help="star, mean, source:0, heldout:1.")]


@takes("points", "margin", "split", "json", "quiet", points=Option(int, "N", "Points along each axis.", default=21))
def plane(given: Given, folder: Finished, names: Names = None) -> None:
    """Measure the loss over the plane through three networks of a run, by default star heldout:0 heldout:1.

    B and C are permuted to match A; A lies at (0, 0), B on the x axis. Written into the run folder: plane.json,
    plane.png.

    Example:

        fastar plane runs/digits-mlp-seed0 star heldout:0 heldout:1
    """
    from fastar.experiments.landscape.loss_plane import CORNERS, loss_plane

    run = opened(given, folder)
    found = loss_plane(run, names or CORNERS, points=given["points"], margin=given["margin"], split=given["split"])
    show_study(given, folder, "plane", found)


@takes("epochs", "json", "quiet")
def curve(given: Given, folder: Finished, names: Pair = None) -> None:
    """Compare curves between two networks of a run: straight, through the star, and trained for this pair.

    By default between heldout:0 and heldout:1, B permuted to match A. Trained are the one bend of a polygonal chain and
    that of a quadratic Bezier curve. Written into the run folder: curve.json, curve.png, and the bends in
    curves/, to be used again.

    Example:

        fastar curve runs/digits-mlp-seed0 heldout:0 heldout:1
    """
    from fastar.experiments.landscape.connecting_curves import PAIR, connecting_curves

    found = connecting_curves(opened(given, folder), names or PAIR, epochs=given["epochs"])
    show_study(given, folder, "curve", found, more=[folder / bend for bend in found["bends"].values()])


@takes("models", "star_of_one", "json", "quiet")
def graph(given: Given, folder: Finished) -> None:
    """Measure the barriers between all pairs of sources, heldouts, the star and the mean of sources, and compare hubs.

    Hubs are the star, the mean, the medoid, the best source, and with --star-of-one a star of the first source alone,
    trained in RUN/star-of-one. Written into the run folder: graph.json, graph.png.

    Example:

        fastar graph runs/digits-mlp-seed0 --models 6
    """
    from fastar.experiments.landscape.barrier_graph import barrier_graph

    found = barrier_graph(opened(given, folder), models=given["models"], star_of_one=given["star_of_one"])
    show_study(given, folder, "graph", found)
