"""Exact assignments of a tree of groups: a parent's units, each a block of its children's units; for many sources."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastar.matching.assignment import Duals, Solver, is_bijection, solve_again, solve_assignment
from fastar.symmetry.batched_index import Rows, chosen, download

Floats = NDArray[np.float32]

Answers = tuple[NDArray[np.int64], ...]
"""An index for each group of a tree, the parent's first."""


def solve_tree(tables: Sequence[NDArray[np.float32]], *, solver: Solver = "auto") -> Answers:
    """The permutations of a tree that have the highest total score, exactly (to float32 rounding).

    Pairing block g with block g' is worth the parent's score of the pair, and for each child the best assignment
    between the units of the two blocks. Solving all a * a of these is most of the work, and needless: each has a bound
    that costs nothing, and a parent's assignment by bounds that uses only pairs whose worth is known is the best one.
    So pairs are solved as an assignment by bounds asks for them; near the optimum these are few more than a.

    Args:
        tables: the parent's scores [a, a], then each child's [a * b, a * b]; of a group alone, its own.

    >>> inside = np.kron(np.array([[0, 1], [1, 0]]), np.array([[1.0, 5.0], [2.0, 3.0]]))
    >>> [index.tolist() for index in solve_tree([np.zeros((2, 2)), inside])]
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


@dataclass(frozen=True)
class Solved:
    """The best assignments of a tree for one source.

    Args:
        answers: an index for each group.
        gain: what they add to the objective, as the scores say it; 0 where nothing moves.
        scale: the sum of the sizes of the terms of `gain`, for what its rounding may be.
        duals: of a group alone, for `solve_again`; None where there are none.
    """

    answers: Answers
    gain: float
    scale: float
    moves: bool
    duals: Duals | None = None


def solve_rows(
    scores: Sequence[Tensor],
    blank: Sequence[bool],
    rows: Rows,
    solver: Solver,
    pool: ThreadPoolExecutor | None,
    duals: Sequence[Duals | None] | None = None,
) -> list[Solved]:
    """The best assignments of a tree for each of `rows`.

    Where the best of each row of the scores are a permutation already they are the optimum, and only they leave the
    device: the rule once sources are aligned. All other scores are copied to the host together.

    Args:
        scores: S_g [N, size, size] of each group of the tree.
        blank: whether a group's S_g is 0 throughout, since it has no parameters.
        pool: threads that solve side by side.
        duals: of each of `rows`, if the tree is a group alone, those that nearly the same scores have ended with.
    """
    found: list[Solved | None] = [None] * len(rows)
    if len(rows) > 1 or scores[0].device.type != "cpu":
        found = _aligned(scores, blank, rows)
    left = [k for k, one in enumerate(found) if one is None]
    if left:
        some = rows if len(left) == len(rows) else chosen(rows.numbers[left], rows.count, device=scores[0].device)[0]
        tables = _tables(scores, some)

        def solve(k: int, tables: Sequence[Floats]) -> Solved:
            ended = None
            if len(tables) == 1:
                answer, ended = solve_again(tables[0], None if duals is None else duals[k], solver=solver)
                answers: Answers = (answer,)
            else:
                answers = solve_tree(tables, solver=solver)
            now = [np.diagonal(table) for table in tables]
            then = [table[np.arange(len(answer)), answer] for table, answer in zip(tables, answers, strict=True)]
            return _solved(answers, now, then, ended)

        solved = pool.map(solve, left, tables) if pool is not None and len(left) > 1 else map(solve, left, tables)
        for k, one in zip(left, solved, strict=True):
            found[k] = one
    return [one for one in found if one is not None]


def _tables(scores: Sequence[Tensor], rows: Rows) -> list[list[Floats]]:
    """On the host: each source's S_g of each group."""
    of_groups = [download(rows.of(score)) for score in scores]
    return [[table[k] for table in of_groups] for k in range(len(rows))]


def _solved(answers: Answers, now: Sequence[Floats], then: Sequence[Floats], duals: Duals | None = None) -> Solved:
    """`now`, `then`: [size] of each group, the scores of where its units are and of where they would be."""
    gain, scale, moves = 0.0, 0.0, False
    for answer, before, after in zip(answers, now, then, strict=True):
        moved = np.flatnonzero(answer != np.arange(len(answer)))
        if len(moved):
            a, b = before[moved].astype(np.float64), after[moved].astype(np.float64)
            gain, scale = gain + float((b - a).sum()), scale + float(np.abs(b).sum() + np.abs(a).sum())
            moves = True
    return Solved(answers, gain, scale, moves, duals)


def _aligned(scores: Sequence[Tensor], blank: Sequence[bool], rows: Rows) -> list[Solved | None]:
    """Each source's best of each row if they permute the tree, else None. One copy to the host."""
    parts = []
    for score in scores:
        some = rows.of(score)
        highest, where = some.max(2)
        # float32 holds every position of an axis exactly.
        parts += [where.float(), highest, some.diagonal(dim1=1, dim2=2)]
    columns = [part.shape[1] for part in parts]
    flat = np.split(download(torch.cat(parts, 1)), np.cumsum(columns)[:-1], 1)
    found: list[Solved | None] = []
    for k in range(len(rows)):
        best, top, now = ([part[k] for part in flat[kind::3]] for kind in range(3))
        finite = all(np.isfinite(values).all() for values in (*top, *now))
        answers = _together([index.astype(np.int64) for index in best], blank) if finite else None
        if answers is not None:
            # A blank group that follows its children scores 0, wherever that is.
            then = [t if np.array_equal(a, b) else np.zeros_like(t) for t, a, b in zip(top, answers, best, strict=True)]
        found.append(None if answers is None else _solved(answers, now, then))
    return found


def _together(best: Sequence[NDArray[np.int64]], blank: Sequence[bool]) -> Answers | None:
    """`best` [size] of each group of a tree if they permute it: bijections, and blocks move as the parent's units."""
    parent, *children = best
    if not children:
        return (parent,) if is_bijection(parent) else None
    blocks = [child.reshape(len(parent), -1) for child in children]
    sigmas = [block[:, 0] // block.shape[1] for block in blocks]
    sigma = sigmas[0] if blank[0] else parent
    for child, block, own in zip(children, blocks, sigmas, strict=True):
        if not (np.array_equal(own, sigma) and (block // block.shape[1] == own[:, None]).all() and is_bijection(child)):
            return None
    return (sigma, *children) if is_bijection(sigma) else None
