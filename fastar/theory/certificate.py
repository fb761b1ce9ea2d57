"""The certificate without data: how many networks phi have a low barrier to all of N networks theta (paper, figure 5).

A two-layer linear network of one input and one output is theta = (theta_1, theta_2), vectors of R^m on the unit sphere
with theta_1 . theta_2 = C: each computes C x. The path from phi to the permuted pi(theta) stays at C x where the *gap*

    | phi_1 . pi(theta_2) + pi(theta_1) . phi_2 - 2 C |

is 0, and at t its output is off by t (1 - t) gap x.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fastar.matching.assignment import solve_assignment
from fastar.runtime.progress import SILENT, Progress

Floats = NDArray[np.float64]
Permutation = Literal["sort", "matching", "exact"]
PERMUTATIONS: tuple[str, ...] = get_args(Permutation)

C = 0.5
BARRIER = 32.0
"""The largest barrier on a path is gap^2 / 32: t^2 (1 - t)^2 is at most 1/16, the loss is half the squared error, and
the inputs have a mean square of 1."""


def draw(number: int, width: int, generator: np.random.Generator) -> Floats:
    """Networks drawn uniformly from the solutions: [number, 2, width], each with |theta_i| = 1, theta_1 . theta_2 = C.

    Args:
        width: at least 2, since theta_2 needs a direction orthogonal to theta_1.
    """
    first = _normalised(generator.standard_normal((number, width)))
    other = generator.standard_normal((number, width))
    for _ in range(2):  # what the first projection leaves over by rounding, the second takes away
        other = _normalised(other - (other * first).sum(axis=1, keepdims=True) * first)
    return np.stack([first, C * first + np.sqrt(1 - C**2) * other], axis=1)


def _normalised(vectors: Floats) -> Floats:
    lengths: Floats = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / lengths


def spiked(width: int) -> Floats:
    """The solution [2, width] of one and two entries, which no permutation brings near to a typical one: lemma 2 of
    the paper, worded for all theta, is false.

    >>> spiked(3).round(3).tolist()
    [[1.0, 0.0, 0.0], [0.5, 0.866, 0.0]]
    """
    theta = np.zeros((2, width))
    theta[0, 0] = 1.0
    theta[1, :2] = C, np.sqrt(1 - C**2)
    return theta


def gaps(phi: Floats, theta: Floats, permutation: Permutation, progress: Progress = SILENT) -> Floats:
    """The gap of each pair: [P, T] for networks phi [P, 2, m] and theta [T, 2, m].

    Args:
        permutation: "sort" gives theta_1 the order of phi_1, as the paper's proof does. "matching" has the largest
            phi_1 . pi(theta_1) + phi_2 . pi(theta_2), as everywhere else. "exact" is the smallest gap of any
            permutation, or less: 0 where 2 C lies between the least and the largest sum that a permutation gives.
    """
    if permutation == "sort":
        phi, theta = _sorted(phi), _sorted(theta)
        return np.abs(phi[:, 0] @ theta[:, 1].T + phi[:, 1] @ theta[:, 0].T - 2 * C)
    gap = _exact_gap if permutation == "exact" else _matched_gap
    found = np.empty((len(phi), len(theta)))
    with progress.task(f"width {phi.shape[2]}", found.size, "pairs") as advance:
        for row, one in zip(found, phi, strict=True):
            row[:] = [gap(one, other) for other in theta]
            advance(len(row))
    return found


def _sorted(networks: Floats) -> Floats:
    order = networks[:, :1].argsort(axis=2)
    ordered: Floats = np.take_along_axis(networks, order, axis=2)
    return ordered


def _matched_gap(phi: Floats, theta: Floats) -> float:
    permuted = theta[:, solve_assignment(phi.T @ theta, solver="scipy")]
    return abs(float((phi * permuted[::-1]).sum()) - 2 * C)


def _exact_gap(phi: Floats, theta: Floats) -> float:
    table = phi.T @ theta[::-1]  # the sum is linear in the permutation, so its extremes are two assignments
    rows = np.arange(len(table))
    largest = table[rows, solve_assignment(table, solver="scipy")].sum()
    least = table[rows, solve_assignment(-table, solver="scipy")].sum()
    return max(0.0, float(least) - 2 * C, 2 * C - float(largest))


def share_within(worst: Floats, eps: Floats) -> Floats:
    """Q: for each tolerance of `eps`, the share of networks phi whose largest squared gap (`worst`, or its barrier) to
    any theta that was drawn is no larger."""
    within: Floats = (worst[:, None] <= eps).mean(axis=0)
    return within
