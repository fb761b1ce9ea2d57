"""The best assignment of a family: a parent's units, and inside each of them the units of its children's blocks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastar.matching.assignment import Solver, solve_assignment

Answers = tuple[NDArray[np.int64], ...]
"""An index for each group of a family, the parent's first."""

# Blocks of at most so many units are solved by trying all permutations of all pairs of blocks at once.
_TRIED = 4


def solve_family(tables: Sequence[NDArray[np.float32]], *, solver: Solver = "auto") -> Answers:
    """The permutations of a family that have the highest total score, exactly (to float32 rounding).

    Pairing block g with block g' is worth the parent's score of the pair, and for each child the best assignment
    between the units of the two blocks. Solving all a * a of these is most of the work, and needless: each has a bound
    that costs nothing, and a parent's assignment by bounds that uses only pairs whose worth is known is the best one.
    So pairs are solved as an assignment by bounds asks for them; near the optimum these are few more than a.

    Args:
        tables: the parent's scores [a, a], then each child's [a * b, a * b]; of a group alone, its own.

    >>> inside = np.kron(np.array([[0, 1], [1, 0]]), np.array([[1.0, 5.0], [2.0, 3.0]]))
    >>> [index.tolist() for index in solve_family([np.zeros((2, 2)), inside])]
    [[1, 0], [3, 2, 1, 0]]
    """
    parent, *rest = tables
    if not rest:
        return (solve_assignment(parent, solver=solver),)
    count = len(parent)
    children = [_Pairs(table, count, solver) for table in rest]
    total = parent.astype(np.float64)
    for child in children:
        total += child.worth
    while True:
        sigma = solve_assignment(total, solver=solver)
        unknown = [(g, int(sigma[g])) for g in range(count) if not all(c.known[g, sigma[g]] for c in children)]
        if not unknown:
            break
        for pair in unknown:
            total[pair] = parent[pair] + sum(child.solve(pair) for child in children)
    return (sigma, *(child.index(sigma) for child in children))


class _Pairs:
    """The pairs of blocks of one child: what each is worth, or at most."""

    def __init__(self, table: NDArray[np.float32], blocks: int, solver: Solver):
        size = len(table) // blocks
        self._solver = solver
        self._tables = table.reshape(blocks, size, blocks, size).transpose(0, 2, 1, 3)  # [g, g', d, d']
        rows, columns = self._tables.max(3).sum(2, dtype=np.float64), self._tables.max(2).sum(2, dtype=np.float64)
        self.worth = np.minimum(rows, columns)
        self.known = np.zeros((blocks, blocks), dtype=bool)
        self._inside = np.zeros((blocks, blocks, size), dtype=np.int64)
        if size <= _TRIED:
            self._try_all(size)

    def _try_all(self, size: int) -> None:
        permutations = np.array(list(itertools.permutations(range(size))), dtype=np.int64)
        scores = self._tables[:, :, np.arange(size), permutations].sum(3, dtype=np.float64)  # [g, g', permutation]
        best = scores.argmax(2)
        self.worth, self._inside = scores.max(2), permutations[best]
        self.known[:] = True

    def solve(self, pair: tuple[int, int]) -> float:
        if not self.known[pair]:
            table = self._tables[pair]
            inside = solve_assignment(table, solver=self._solver)
            self._inside[pair], self.known[pair] = inside, True
            self.worth[pair] = table[np.arange(len(inside)), inside].sum(dtype=np.float64)
        return float(self.worth[pair])

    def index(self, sigma: NDArray[np.int64]) -> NDArray[np.int64]:
        inside = self._inside[np.arange(len(sigma)), sigma]
        return (sigma[:, None] * inside.shape[1] + inside).reshape(-1)
