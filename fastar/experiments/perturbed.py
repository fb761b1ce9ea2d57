"""Stars perturbed at random: how far around the star models are still star models (paper, table 10)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastar.errors import FastarError
from fastar.evaluation import PathLosses, Segment
from fastar.experiments.families import beside
from fastar.experiments.finished_run import FinishedRun
from fastar.experiments.measure import endpoint, evaluated, match_to, permuted_row, spread, spreads_of
from fastar.experiments.session import measuring, threads
from fastar.runs.model_files import Checkpoint
from fastar.runtime.seeds import derive_seed

RADII = (0.1, 0.2, 0.4, 0.8)
"""Radii as shares of the star's norm; the paper's largest, 16, is about 0.8 of it."""


def perturbed_stars(
    run: FinishedRun, *, radii: Sequence[float] = RADII, draws: int = 3, by_filter: bool = False
) -> dict[str, Any]:
    """Losses of perturbed stars, and barriers from them to the heldouts, which are matched anew to each.

    Args:
        radii: lengths of the steps, as shares of the star's norm. The star itself is measured too, as radius 0.
        draws: directions for each radius.
        by_filter: steps by each filter's own norm (`beside`).

    Returns:
        points: for each radius the share, the length, and on every split the spread of the star's loss, of barriers and
        of the largest losses on paths; `regular`: the run's own barriers between regular models, to compare with.

    Raises:
        FastarError: no heldouts, a radius that is not positive, or a loss that is not finite.
    """
    session = run.session
    radii = list(dict.fromkeys(radii))
    if draws < 1 or not radii or not all(0 < one < math.inf for one in radii):
        raise FastarError(f"radii {', '.join(f'{one:g}' for one in radii)}, {draws} draws: give positive ones")
    if not run.heldouts:
        raise FastarError(f"{session.run.path}: has no heldouts that barriers could be measured to")
    wanted = [(0.0, 0), *((radius, draw) for radius in radii for draw in range(draws))]
    names = [f"heldout {index}" for index in range(len(run.heldouts))]
    layout, star = session.network.layout, permuted_row(session, run.star)
    segments: list[Segment] = []
    with threads(session), measuring("perturbed stars"):
        with session.progress.task("matching", total=len(wanted), unit="stars") as advance:
            for radius, draw in wanted:
                seed = derive_seed(session.settings.seed, "perturbed", draw)
                row = beside(star, layout, seed, radius, by_filter=by_filter) if radius else star
                centre = Checkpoint({**run.star.state, **layout.unflatten(row)})
                matched: Sequence[Any] = [None] * len(names)
                if session.settings.ends_matched:
                    matched = match_to(session, centre, run.heldouts)
                end = endpoint(session, f"star + {radius:g} of its norm, draw {draw}", centre)
                for name, heldout, permutation in zip(names, run.heldouts, matched, strict=True):
                    segments.append(Segment("path", end, endpoint(session, name, heldout, permutation)))
                advance(1)
        measured, _ = evaluated(session, segments)
    norm = float(star.double().norm())
    each, points = len(names), []
    for radius in (0.0, *radii):
        chosen = [i for i, (own, _) in enumerate(wanted) if own == radius]
        paths = [path for i in chosen for path in measured[i * each : (i + 1) * each]]
        points.append({"radius": radius, "length": radius * norm, **_splits(paths, each)})
    results = session.run.read_results() if session.run.results.is_file() else {}
    return {
        **run.described(),
        "heldouts": each,
        "draws": draws,
        "by_filter": by_filter,
        "norm": norm,
        "points": points,
        "regular": {split: results[split]["regular_regular"] for split in measured[0].loss if split in results},
    }


def _splits(paths: Sequence[PathLosses], each: int) -> dict[str, Any]:
    """The figures of one radius on each split: losses over its stars, barriers and largest losses over its paths."""
    return {
        split: {
            "star_loss": spread([path.loss[split][0] for path in paths[::each]]),
            **spreads_of(paths, split),
        }
        for split in paths[0].loss
    }
