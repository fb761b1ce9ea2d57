"""All attempts at one chunk of sources, whatever starts and orders they differ in, and the best end of each source."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastar.matching.assignment import Solver
from fastar.matching.weight.descent import Descent, OrderOfSweep
from fastar.matching.weight.guess import align_backward
from fastar.matching.weight.polish import polish
from fastar.matching.weight.problem import Problem
from fastar.runtime.seeds import derive_seed


@dataclass(frozen=True)
class Attempts:
    """What to try: every order from every start, then kicks out of the best end.

    Args:
        orders: how many orders of families; the first sweeps backwards and forwards in turn, the others are random.
        kicks: of the best end (`polish`).
        max_sweeps: of each descent.
        seed: of orders and kicks.
    """

    orders: int
    kicks: int
    max_sweeps: int
    seed: int
    solver: Solver


@dataclass(frozen=True)
class Start:
    """Permutations to start from, an [n, size] index per group; `guess`: to be improved by `align_backward` first."""

    permutations: list[NDArray[np.int64]]
    guess: bool


@dataclass(frozen=True)
class Outcome:
    """The best end for one source; `first` is the objective that the first attempt began with."""

    permutations: list[NDArray[np.int64]]
    objective: float
    objective_weights: float
    first: float
    sweeps: int
    converged: bool
    kicks_kept: int


def best_ends(
    problem: Problem,
    data: Mapping[str, Tensor],
    starts: Sequence[Start],
    attempts: Attempts,
    pool: ThreadPoolExecutor | None,
) -> tuple[list[Outcome], int]:
    """The best end of each source of a chunk, and the number of assignments that were solved.

    Args:
        data: parameter name -> [n, ...] in memory order, not written to.
        pool: threads for the assignments of a chunk's sources.
    """
    best: list[Outcome] = []
    solves = 0
    descent: Descent | None = None
    for order, start in itertools.product(range(attempts.orders), starts):
        descent = None  # what it holds goes before the next takes as much
        descent = Descent(problem, data, start.permutations, attempts.solver, pool)
        first = [one.first for one in best] or descent.sources.objectives()[0].tolist()
        if start.guess:
            align_backward(descent)
        descent.run(_order(len(problem.families), attempts.seed, order), attempts.max_sweeps)
        ends = _outcomes(descent, first)
        best = [old if old.objective >= new.objective else new for old, new in zip(best or ends, ends, strict=True)]
        solves += descent.solves
    if attempts.kicks:
        indices = [np.stack(index) for index in zip(*(one.permutations for one in best), strict=True)]
        if descent is None or attempts.orders * len(starts) > 1:  # else it stands where it has ended
            descent = None
            descent = Descent(problem, data, indices, attempts.solver, pool)
        before = descent.solves
        kept = polish(descent, attempts.kicks, attempts.seed, attempts.max_sweeps)
        ends = _outcomes(descent, [one.first for one in best])
        best = [
            replace(end, sweeps=one.sweeps, kicks_kept=kicks) for one, end, kicks in zip(best, ends, kept, strict=True)
        ]
        solves += descent.solves - before
    return best, solves


def _outcomes(descent: Descent, first: Sequence[float]) -> list[Outcome]:
    """Where each source has ended; `first`: the objectives that they began with."""
    totals, weights = descent.sources.objectives()
    return [
        Outcome(
            permutations=[index[n].copy() for index in descent.permutations],
            objective=float(totals[n]),
            objective_weights=float(weights[n]),
            first=first[n],
            sweeps=int(descent.sweeps[n]),
            converged=not descent.unsolved[:, n].any(),
            kicks_kept=0,
        )
        for n in range(descent.count)
    ]


def _order(families: int, seed: int, attempt: int) -> OrderOfSweep:
    """Attempt 0 goes from the output to the input and back again; the others in a random order, anew for each sweep."""
    if attempt == 0:
        return lambda sweep: range(families) if sweep % 2 else range(families - 1, -1, -1)

    def shuffled(sweep: int) -> list[int]:
        random = np.random.default_rng(derive_seed(seed, "matching order", attempt, sweep))
        return [int(f) for f in random.permutation(families)]

    return shuffled
