"""Coordinate descent over permutation groups (git re-basin's weight matching) for a chunk of sources against one theta.

The objective of source n is <theta, pi(theta_n)> over all parameters. With every group but g held, it is linear in g's
permutation: sum_i S_g[i, perm[i]], where S_g[i, j] is the inner product of what unit i of theta and unit j of the
permuted source own. A tree of groups (a parent and its children, or a group alone) is one step.

What makes it fast: sources are never moved; S_g stays in memory and, when it is wanted again after other groups have
moved k of their n units, is corrected by products over those k units only; a group whose S_g did not change since it
was solved is not solved again. Whatever moves to and fro between two visits to a tree costs nothing. All sources of a
chunk are corrected and solved together, so that a GPU is given as many operations for all of them as for one; decisions
are the host's, from one or two small copies a visit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastar.matching.assignment import Duals, Solver
from fastar.matching.blocks import Answers, Solved, solve_rows
from fastar.matching.weight.permuted_sources import PermutedSources, those_that_move
from fastar.matching.weight.problem import Problem
from fastar.symmetry.batched_index import Rows, along, chosen

# Gains read off S_g are trusted when this far above float32 rounding of its sums, relative to the sizes of the terms;
# smaller ones are computed again from the parameters themselves.
_TRUSTED = 1e-4
# Rounding of a difference computed from the parameters, relative to the root of the sum of squares of its terms.
_ROUNDING = 4 * 2.0**-23

OrderOfSweep = Callable[[int], Sequence[int]]
Numbers = NDArray[np.int64]


class Descent:
    """One chunk of sources: their permutations so far, S_g of each group, and what is still to be solved.

    `answers` of several sources are an [m, size] index for each group of a tree.
    """

    def __init__(
        self,
        problem: Problem,
        sources: dict[str, Tensor],
        start: Sequence[NDArray[np.int64]],
        solver: Solver,
        pool: ThreadPoolExecutor | None,
    ):
        """`sources`: name -> [n, ...] in memory order, not written to. `start`: an [n, size] index per group."""
        self.problem, self.solver, self.pool = problem, solver, pool
        self.sources = PermutedSources(problem, sources, start)
        self.count = self.sources.count
        # T_g: S_g with its columns in the order in which units were given, and the permutations that it stands at.
        self.tables: list[Tensor | None] = [None] * len(problem.groups)
        self.seen: list[list[NDArray[np.int64]]] = [[] for _ in problem.groups]
        # Duals of a group and a source, units in the order as given: the next assignment starts from them.
        self.duals: dict[tuple[int, int], Duals] = {}
        self.unsolved = np.ones((len(problem.groups), self.count), dtype=bool)
        self.solves = 0
        self.sweeps = np.zeros(self.count, dtype=np.int64)

    @property
    def permutations(self) -> list[NDArray[np.int64]]:
        """An [n, size] index per group."""
        return self.sources.permutations

    @property
    def everyone(self) -> Numbers:
        """The numbers of all sources."""
        return np.arange(self.count)

    def run(self, order_of_sweep: OrderOfSweep, max_sweeps: int) -> None:
        """Sweep over the trees until none's best assignment improves any source, at most `max_sweeps` times."""
        for sweep in range(max_sweeps):
            pending = self.unsolved.any(0)
            if not pending.any():
                return
            self.sweeps += pending
            for t in order_of_sweep(sweep):
                self._visit(t)

    def solve(self, t: int, scores: Sequence[Tensor], numbers: Numbers) -> list[Solved]:
        """The best assignments of tree t for the sources `numbers`, given their S_g [m, size, size] of its groups."""
        self.solves += len(numbers)
        blank = [not self.problem.tensors[g] for g in self.problem.trees[t]]
        g = self.problem.trees[t][0]
        known = [self.duals.get((g, n)) for n in numbers.tolist()]
        offered = [
            None if duals is None else duals[index]
            for duals, index in zip(known, self.permutations[g][numbers], strict=True)
        ]
        found = solve_rows(scores, blank, Rows.every(len(numbers)), self.solver, self.pool, offered)
        for n, one in zip(numbers.tolist(), found, strict=True):
            if one.duals is not None:
                kept = np.empty_like(one.duals)
                kept[self.permutations[g][n]] = one.duals
                self.duals[g, n] = kept
        return found

    def solve_child(self, t: int, child: int, scores: Sequence[Tensor]) -> list[Solved]:
        """The best assignments of tree t, given S_g [m, size, size] of its groups, in which the units of one child
        alone move inside their blocks. If children cross S_g says exactly what such an assignment is worth."""
        tree, blocks, rows = self.problem.trees[t], scores[0].shape[1], Rows.every(len(scores[0]))
        total, sizes = scores[0].clone(), [score.shape[1] // blocks for score in scores]
        for g, score, size in zip(tree[1:], scores[1:], sizes[1:], strict=True):
            if g != child:
                pairs = score.unflatten(2, (blocks, size)).unflatten(1, (blocks, size))
                total += pairs.diagonal(dim1=2, dim2=4).sum(-1)
        self.solves += len(rows)
        found = solve_rows([total, scores[tree.index(child)]], [False, False], rows, self.solver, self.pool)
        whole = []
        for one in found:
            sigma, inside = one.answers
            held = [(sigma[:, None] * size + np.arange(size)).reshape(-1) for size in sizes]
            answers = tuple(inside if g == child else index for g, index in zip(tree, held, strict=True))
            whole.append(replace(one, answers=answers))
        return whole

    def score(self, g: int, numbers: Numbers | None = None) -> Tensor:
        """S_g [m, size, size] of the sources `numbers` (None: all), brought up to date. Not to be written to."""
        numbers = self.everyone if numbers is None else numbers
        table, seen = self.tables[g], self.seen[g]
        if table is None:
            table = self.tables[g] = self._full_table(g)
            self.seen[g] = [index.copy() for index in self.permutations]
        else:
            now = self.sources.now(numbers)
            self.sources.correct(table, g, numbers, [index[numbers] for index in seen])
            for index, new in zip(seen, now, strict=True):
                index[numbers] = new
        return self.in_place(g, table, numbers)

    def force(self, t: int, answers: Answers) -> None:
        """Permute tree t of every source by `answers` whatever that does to the objective; it is to be solved again."""
        self._take(t, self.everyone, answers)
        self.unsolved[list(self.problem.trees[t])] = True

    def mark(self) -> Mark:
        """The place where the descent stands, to `go_back` to."""
        return Mark(
            [index.copy() for index in self.permutations],
            [None if table is None else table.clone() for table in self.tables],
            [[index.copy() for index in seen] for seen in self.seen],
            self.unsolved.copy(),
        )

    def go_back(self, mark: Mark, numbers: Numbers) -> None:
        """The sources `numbers` as they were at `mark`: the very same numbers."""
        if not len(numbers):
            return
        (rows,) = chosen(numbers, self.count, device=self.sources.device)
        for g, index in enumerate(mark.permutations):
            self.permutations[g][numbers] = index[numbers]
            before, now = mark.tables[g], self.tables[g]
            if before is not None and now is not None:
                rows.put(now, rows.of(before))
                for there, here in zip(mark.seen[g], self.seen[g], strict=True):
                    here[numbers] = there[numbers]
            elif rows.everything:
                self.tables[g] = None
        self.unsolved[:, numbers] = mark.unsolved[:, numbers]

    def note(self, t: int, numbers: Numbers, answers: Answers) -> None:
        """Permute tree t of the sources `numbers` by `answers`."""
        for g, answer in zip(self.problem.trees[t], answers, strict=True):
            self.permutations[g][numbers] = np.take_along_axis(self.permutations[g][numbers], answer, 1)

    def improves(self, t: int, numbers: Numbers, answers: Answers) -> list[bool]:
        """Tell for each of the sources `numbers` whether permuting tree t by `answers` raises the objective by more
        than rounding, computed from the parameters."""
        gains = self.sources.gains(t, numbers, answers)
        return [gain > _ROUNDING * math.sqrt(squares) for gain, squares in gains.T.tolist()]

    def _full_table(self, g: int) -> Tensor:
        size = self.problem.groups[g].size
        table = torch.zeros(self.count, size, size, device=self.sources.device, dtype=torch.float32)
        for name in self.problem.tensors[g]:
            self.sources.add(table, name, g)
        return table

    def _full_score(self, g: int) -> Tensor:
        """S_g of every source, computed anew."""
        return self.in_place(g, self._full_table(g), self.everyone)

    def in_place(self, g: int, table: Tensor, numbers: Numbers) -> Tensor:
        """S_g of T_g: the columns as units are now."""
        index = self.permutations[g][numbers]
        if (index == self.problem.units[g]).all():
            (rows,) = chosen(numbers, self.count, device=table.device)
            return rows.of(table)
        rows, at = chosen(numbers, self.count, index, device=table.device)
        return along(rows.of(table), 1, at)

    def _visit(self, t: int) -> None:
        """Solve tree t for the sources whose S_g changed, and take the steps that improve; where children cross, then
        for each child by itself."""
        tree = list(self.problem.trees[t])
        todo = np.flatnonzero(self.unsolved[tree].any(0))
        if not len(todo):
            return
        solved = self.solve(t, [self.score(g, todo) for g in tree], todo)
        for g in tree:
            self.unsolved[g, todo] = False
        self._step(t, todo, solved)
        for child in tree[1:] if self.problem.crossed[t] else ():
            self._step(t, todo, self.solve_child(t, child, [self.score(g, todo) for g in tree]))

    def _step(self, t: int, todo: Numbers, solved: Sequence[Solved]) -> None:
        """Take the steps of tree t that improve the sources `todo`."""
        quadratic = self.problem.quadratic[t]  # S_g is its slope only, which says nothing sure
        accepted = [one.moves and not quadratic and one.gain >= _TRUSTED * one.scale for one in solved]
        doubted = [
            k
            for k, one in enumerate(solved)
            if one.moves and not accepted[k] and (quadratic or one.gain > -_TRUSTED * one.scale)
        ]
        if doubted:
            for k, improves in zip(
                doubted, self.improves(t, todo[doubted], stacked([solved[k] for k in doubted])), strict=True
            ):
                accepted[k] = improves
        steps = [k for k, one in enumerate(accepted) if one]
        if steps:
            self._take(t, todo[steps], stacked([solved[k] for k in steps]))

    def _take(self, t: int, numbers: Numbers, answers: Answers) -> None:
        """Permute tree t of the sources `numbers` by `answers`; what that changes is to be solved again."""
        numbers, answers = those_that_move(numbers, answers)
        if len(numbers):
            self.note(t, numbers, answers)
            for g in self.problem.corrected[t]:
                self.unsolved[g, numbers] = True


@dataclass(frozen=True)
class Mark:
    """The place where a descent stood: permutations, T_g, what they stand at, and what was still to be solved."""

    permutations: list[NDArray[np.int64]]
    tables: list[Tensor | None]
    seen: list[list[NDArray[np.int64]]]
    unsolved: NDArray[np.bool_]


def stacked(solved: Sequence[Solved]) -> Answers:
    """[m, size] of each group."""
    return tuple(np.stack(index) for index in zip(*(one.answers for one in solved), strict=True))
