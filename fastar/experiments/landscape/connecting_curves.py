"""Curves between two networks: straight, through the star, and trained for this pair (Garipov et al., 2018)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from fastar.errors import FastarError
from fastar.evaluation import Endpoint
from fastar.evaluation.paths import barrier
from fastar.experiments.families import point
from fastar.experiments.finished_run import FinishedRun
from fastar.experiments.landscape.bends import STEPS, bend_file, trained_bend
from fastar.experiments.landscape.named_networks import NamedNetworks, values_of
from fastar.experiments.session import measuring, threads

PAIR = ("heldout:0", "heldout:1")


def connecting_curves(run: FinishedRun, names: Sequence[str] = PAIR, *, epochs: int | None = None) -> dict[str, Any]:
    """Losses along curves between two networks A and B, each at as many points as two of the run's paths have.

    Args:
        names: A and B: star, mean, source:0, heldout:1.
        epochs: of the trained bends; None: as many as the star's.

    Returns:
        t: 0 at A, 1 at B; curves: straight (A to B, which is permuted to match A), star (A to the star to B, both
        permuted to match it; left out where one of them is the star), chain and bezier (A to B as in `straight`, with
        one trained bend): split -> `largest_loss`, `barrier`, `mean_loss` over t, and the loss and metrics at each t;
        bends: the files of the trained bends, in the run folder.

    Raises:
        FastarError: other than two names of two networks, epochs below 1, or a loss that is not finite.
    """
    session = run.session
    if len(names) != 2 or names[0] == names[1]:
        raise FastarError(f"a curve joins two networks, not {' '.join(names)}: name two, such as {' '.join(PAIR)}")
    if epochs is not None and epochs < 1:
        raise FastarError(f"epochs={epochs}: give at least 1")
    networks = NamedNetworks(run)
    with threads(session), measuring("curves"):
        first = networks.row(names[0])
        ends = [first, networks.row(names[1], networks.matched(names[0], names[1:])[0])]
        curves: dict[str, Callable[[float], Tensor]] = {"straight": partial(point, first, ends[1])}
        if "star" not in names:
            around = [networks.row(name, one) for name, one in zip(names, networks.matched("star", names), strict=True)]
            curves["star"] = partial(_chain, around, networks.row("star"))
        bends = {kind: trained_bend(run, names, ends, kind, epochs=epochs) for kind in STEPS}
        curves |= {"chain": partial(_chain, ends, bends["chain"]), "bezier": partial(_bezier, ends, bends["bezier"])}
        ts = np.linspace(0, 1, 2 * session.settings.evaluation.points - 1).tolist()
        points = [
            Endpoint(f"the point t={t:g} of the curve {name}", partial(curve, t))
            for name, curve in curves.items()
            for t in ts
        ]
        values = values_of(session, points)
    return {
        **run.described(),
        "loss": session.loss.name,
        "first": names[0],
        "second": names[1],
        "epochs": epochs or session.settings.star_epochs,
        "t": ts,
        "curves": {
            name: {
                split: _figures(ts, {key: value[k * len(ts) : (k + 1) * len(ts)] for key, value in of.items()})
                for split, of in values.items()
            }
            for k, name in enumerate(curves)
        },
        "bends": {kind: str(bend_file(run, names, kind).relative_to(session.run.path)) for kind in STEPS},
    }


def _chain(ends: Sequence[Tensor], bend: Tensor, t: float) -> Tensor:
    """The point of the polygonal chain through a bend, which it passes at t = 1/2."""
    return point(ends[0], bend, 2 * t) if t <= 0.5 else point(bend, ends[1], 2 * t - 1)


def _bezier(ends: Sequence[Tensor], bend: Tensor, t: float) -> Tensor:
    """The point (1 - t)^2 A + 2 t (1 - t) bend + t^2 B."""
    return point(point(ends[0], bend, t), point(bend, ends[1], t), t)


def _figures(t: Sequence[float], values: dict[str, list[float]]) -> dict[str, Any]:
    loss = values["loss"]
    mean = sum((a + b) / 2 for a, b in itertools.pairwise(loss)) / (len(loss) - 1)
    return {"largest_loss": max(loss), "barrier": barrier(t, loss), "mean_loss": mean, **values}
