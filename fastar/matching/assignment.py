"""The linear assignment problem, solved by lapjv under guards, or by SciPy where lapjv is not installed."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastar.errors import FastarError

Solver = Literal["auto", "lapjv", "scipy"]

Duals = NDArray[np.float32]
"""Dual variables of an assignment's columns, [n]: costs (the best score of a row less a score) less these have the same
best assignment."""

# float32 rounding of one row, relative to the largest cost: answers this close to the bound, per row, are optimal.
_OPTIMALITY = 2.0**-22

# The identity is near the best assignment where it costs less than this, relative to a random one: of the tables of a
# ResNet-18 it costs 0.05 to 0.32 between two epochs, 0.9 and more in the beginning.
_NEAR = 0.4
# Duals that span more than so many times what the scores span are of others: they would eat the scores' digits.
_DUALS = 16
# Rounds of duals from the identity: each costs a pass over the table, of which lapjv makes dozens.
_ROUNDS = 8
# Units from which on these rounds take less than lapjv.
_LARGE = 200


@functools.cache
def _lapjv() -> Callable[..., Any] | None:
    try:
        from lapjv import lapjv
    except ImportError:
        return None
    solve: Callable[..., Any] = lapjv
    return solve


def solver_name(solver: Solver = "auto") -> str:
    """The solver that `solver` means here, with its version: "lapjv 1.3.29" or "scipy 1.17.1"."""
    package = "lapjv" if solver != "scipy" and _lapjv() is not None else "scipy"
    return f"{package} {importlib.metadata.version(package)}"


class ScoresNotFinite(FastarError):
    """Scores of an assignment that are NaN or infinite."""


def solve_assignment(score: Tensor | NDArray[Any], *, solver: Solver = "auto") -> NDArray[np.int64]:
    """The permutation with the highest total score: column `out[i]` for row i.

    lapjv aborts the process on rows that are not finite, is silently wrong on single ones, and works in float32.
    So scores are checked and freed of their offset, and its answer is checked to be a bijection and, through the dual
    variables, optimal; where it is not, SciPy solves the problem again. Safe to call from several threads.

    Args:
        score: [n, n]. Among totals that float32 cannot tell apart, any may be returned.
        solver: "auto" takes lapjv where it is installed.

    Raises:
        FastarError: not square, not finite, or lapjv asked for but not installed.

    >>> solve_assignment(np.array([[1.0, 5.0], [2.0, 3.0]])).tolist()
    [1, 0]
    """
    return solve_again(score, None, solver=solver)[0]


def solve_again(
    score: Tensor | NDArray[Any], duals: Duals | None, *, solver: Solver = "auto"
) -> tuple[NDArray[np.int64], Duals | None]:
    """`solve_assignment`, from the dual variables that an assignment of nearly the same scores has ended with; and
    those of this one, None where it needed none.

    Costs less the columns' duals have the same best assignment, and nearly every row its own cheapest column: lapjv
    is left with the few others (on the tables of a ResNet-18 between two epochs it took a third of the time).
    """
    table = score.detach().cpu().numpy() if isinstance(score, Tensor) else np.asarray(score)
    if table.ndim != 2 or table.shape[0] != table.shape[1]:
        raise FastarError(f"an assignment needs a square table of scores, this one has shape {list(table.shape)}")
    n = table.shape[0]
    if solver not in ("auto", "lapjv", "scipy"):
        raise FastarError(f"unknown assignment solver {solver!r}: choose one of auto, lapjv, scipy")
    if solver == "lapjv" and _lapjv() is None:
        raise FastarError("the assignment solver lapjv is not installed: pip install lapjv, or set the solver to scipy")
    if n == 0:
        return np.zeros(0, dtype=np.int64), None
    best = table.max(axis=1, keepdims=True)
    # A maximum is NaN or infinite if one of its row is; but for minus infinity.
    if not (np.isfinite(best).all() and np.isfinite(table.min())):
        row, column = np.argwhere(~np.isfinite(table))[0]
        raise ScoresNotFinite(
            f"score[{row}, {column}] of an assignment is {table[row, column]}: scores must be finite numbers"
        )
    if duals is not None and not np.ptp(duals) <= _DUALS * float(best.max() - table.min()):
        duals = None
    cost = _centred_cost(table, best, duals)
    favourites = cost.argmin(axis=1)
    # Everybody gets what suits them best: no assignment can do better. Common once networks are aligned.
    if is_bijection(favourites):
        return np.asarray(favourites, dtype=np.int64), duals
    if duals is None:
        favourites = cost.argmin(axis=0)
        if is_bijection(favourites):
            return np.asarray(np.argsort(favourites), dtype=np.int64), None
        duals, stays = _near_identity(cost)
        if stays:
            return np.arange(n), duals
        if duals is not None:
            cost = _centred_cost(table, best, duals)
    if solver != "scipy" and _lapjv() is not None:
        found = _guarded_lapjv(cost, duals)
        if found is not None:
            return found
        cost = _centred_cost(table, best, None)
    return _scipy(cost), duals


def _near_identity(cost: NDArray[Any]) -> tuple[Duals | None, bool]:
    """Columns' duals under which the identity is nearly the best assignment, and whether it is; None where it is far.

    Between the epochs of a star few units move. Duals v with v_j <= v_i + c_ij - c_ii for all i and j prove that none
    should; each round brings them nearer, as Bellman and Ford's shortest paths do.
    """
    if len(cost) < _LARGE:
        return None, False
    own = np.diagonal(cost).copy()
    if float(own.mean()) >= _NEAR * float(cost.mean()):
        return None, False
    duals = np.zeros(len(cost), dtype=cost.dtype)
    lengths = np.empty_like(cost)
    for _ in range(_ROUNDS):
        np.add(cost, (duals - own)[:, None], out=lengths)
        shorter = np.minimum(duals, lengths.min(axis=0))
        if np.array_equal(shorter, duals):
            return duals.astype(np.float32), True
        duals = shorter
    return duals.astype(np.float32), False


def is_bijection(index: NDArray[np.integer[Any]]) -> bool:
    """Tell whether `index` [n], of numbers below n, holds each of them."""
    return bool(np.bincount(index).max(initial=1) == 1)


def _scipy(cost: NDArray[Any]) -> NDArray[np.int64]:
    from scipy.optimize import linear_sum_assignment  # only here: it takes half a second, and lapjv solves most

    return np.asarray(linear_sum_assignment(cost)[1], dtype=np.int64)


def _centred_cost(table: NDArray[Any], best: NDArray[Any], duals: Duals | None) -> NDArray[Any]:
    """Costs to minimise, in the table's precision, each row shifted by its best so that large offsets cost no digits;
    less the columns' duals, and each row shifted once more. A new array.

    A shift of a whole row or column changes no assignment. The first subtraction is exact to the last digit of the
    difference.
    """
    floating = table if table.dtype in (np.float32, np.float64) else table.astype(np.float64)
    cost = np.ascontiguousarray(best - floating)
    if duals is not None:
        cost -= duals
        cost -= cost.min(axis=1, keepdims=True)
    return cost


def _guarded_lapjv(cost: NDArray[Any], duals: Duals | None) -> tuple[NDArray[np.int64], Duals] | None:
    """lapjv's answer if it is proven right, and its columns' duals on top of `duals`. `cost` is finite, each row's
    minimum is 0; it is overwritten."""
    solve = _lapjv()
    assert solve is not None
    columns_too = cost.min(axis=0, keepdims=True)  # columns that are expensive for everyone carry an offset as well
    cost -= columns_too
    largest = float(cost.max())
    if not 0 < largest < float("inf"):
        return None  # all equal, or differences that overflow
    cost /= largest
    small = cost.astype(np.float32, copy=False)
    rows, _, (_, _, v) = solve(small, force_doubles=False)
    answer = np.asarray(rows, dtype=np.int64)
    n = len(answer)
    if not is_bijection(answer):
        return None
    # Weak duality: given v, u_i = min_j (c_ij - v_j) is feasible, so sum(u) + sum(v) is below every assignment's cost.
    # In float32 a row's slack is off by its last digit, of which the bound allows four.
    of_columns = np.asarray(v, dtype=cost.dtype)
    cost -= of_columns
    gap = float((cost[np.arange(n), answer] - cost.min(axis=1)).sum(dtype=np.float64))
    if not gap <= n * _OPTIMALITY:
        return None
    own = of_columns.astype(np.float64) * largest + columns_too[0]
    return answer, (own if duals is None else duals + own).astype(np.float32)
