"""The loss over the plane through three networks, the second and third matched to the first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from fastar.errors import FastarError
from fastar.evaluation import Endpoint
from fastar.experiments.finished_run import FinishedRun
from fastar.experiments.landscape.named_networks import NamedNetworks, values_of
from fastar.experiments.session import measuring, threads

CORNERS = ("star", "heldout:0", "heldout:1")
# A height over the first side below this part of the triangle's size is rounding.
FLAT = 1e-5


def loss_plane(
    run: FinishedRun,
    names: Sequence[str] = CORNERS,
    *,
    points: int = 21,
    margin: float = 0.2,
    split: str | None = None,
) -> dict[str, Any]:
    """Losses and metrics on a grid over the plane through three networks A, B and C.

    Coordinates are L2 distances in the space of parameters: A lies at (0, 0), B on the x axis, C above it (by
    Gram-Schmidt, as in the code of Garipov et al., 2018). Batch-norm statistics are re-estimated at every point.

    Args:
        names: A, B, C: star, mean, source:0, heldout:1. B and C are permuted to match A, where the run matches.
        points: of the grid along each axis.
        margin: around the three networks, as a share of their extent along each axis.
        split: the one to measure on; None: all.

    Returns:
        x, y: the grid's coordinates; splits: split -> "loss" or a metric -> values [y][x]; networks: name, x, y and
        their values at their coordinates.

    Raises:
        FastarError: not three names of networks, networks on one line (as two that are the same), a grid of fewer than
            two points a side, a split that the run does not have.
    """
    session = run.session
    if len(names) != 3:
        raise FastarError(f"a plane goes through three networks, not {len(names)}: name three, as {' '.join(CORNERS)}")
    if points < 2 or not 0 <= margin < math.inf:
        raise FastarError(f"points={points}, margin={margin:g}: give at least 2 points and no negative margin")
    if split is not None and split not in session.data.names():
        raise FastarError(f"split={split}: this run has {', '.join(session.data.names())}")
    networks = NamedNetworks(run)
    with threads(session), measuring("a plane"):
        permutations = [None, *networks.matched(names[0], names[1:])]
        rows = [networks.row(*one).to(session.device) for one in zip(names, permutations, strict=True)]
        places = _coordinates(rows, names)
        axes = [_axis([place[k] for place in places], points, margin) for k in (0, 1)]
        at = [(x, y) for y in axes[1] for x in axes[0]]
        ends = [
            Endpoint(f"the point ({x:.3g}, {y:.3g})", partial(_point, rows, places, x, y)) for x, y in [*places, *at]
        ]
        values = values_of(session, ends, None if split is None else [split])
    return {
        **run.described(),
        "loss": session.loss.name,
        "margin": margin,
        "networks": [
            {
                "name": name,
                "x": place[0],
                "y": place[1],
                **{one: {key: value[k] for key, value in of.items()} for one, of in values.items()},
            }
            for k, (name, place) in enumerate(zip(names, places, strict=True))
        ],
        "x": axes[0],
        "y": axes[1],
        "splits": {
            one: {
                key: [value[3 + i : 3 + i + points] for i in range(0, points**2, points)] for key, value in of.items()
            }
            for one, of in values.items()
        },
    }


def _coordinates(rows: Sequence[Tensor], names: Sequence[str]) -> list[tuple[float, float]]:
    """The coordinates of three rows [P] in their plane."""
    to_b, to_c = (one.double() - rows[0].double() for one in rows[1:])
    side, other = float(to_b.norm()), float(to_c.norm())
    along = float(to_b @ to_c) / side if side else 0.0
    height = float((to_c - to_b * (along / side)).norm()) if side else 0.0
    if height <= FLAT * max(side, other):
        raise FastarError(
            f"{', '.join(names)}: lie on one line once they are matched, as two equal ones do; name three networks "
            "that differ"
        )
    return [(0.0, 0.0), (side, 0.0), (along, height)]


def _axis(places: Sequence[float], points: int, margin: float) -> list[float]:
    """The grid's coordinates along an axis on which the networks lie at `places`."""
    low, high = min(places), max(places)
    step = (1 + 2 * margin) * (high - low) / (points - 1)
    return [low - margin * (high - low) + i * step for i in range(points)]


def _point(rows: Sequence[Tensor], places: Sequence[tuple[float, float]], x: float, y: float) -> Tensor:
    """The row [P] at a place in the plane: weights of the three that are exactly 0 and 1 at each of them."""
    (_, (side, _), (along, height)) = places
    to_c = y / height
    to_b = (x - to_c * along) / side
    weights = (1 - to_b - to_c, to_b, to_c)
    of_a, of_b, of_c = (one.double() * weight for one, weight in zip(rows, weights, strict=True))
    return (of_a + of_b + of_c).float()
