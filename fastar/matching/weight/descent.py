"""Coordinate descent over permutation groups (git re-basin's weight matching) for a chunk of sources against one theta.

The objective of source n is <theta, pi(theta_n)> over all parameters. With every group but g held, it is linear in g's
permutation: sum_i S_g[i, perm[i]], where S_g[i, j] is the inner product of what unit i of theta and unit j of the
permuted source own. A tree of groups (a parent and its children, or a group alone) is one step.

What makes it fast: the sources are kept permuted; S_g stays in memory and, when a neighbouring group moves k of its n
units, is corrected by a product over those k units only; a group whose S_g did not change since it was solved is not
solved again. All sources of a chunk that a visit to a tree moves are moved together, so that a GPU is given as many
operations for all of them as for one; decisions are the host's, from one or two small copies a visit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastar.matching.assignment import Solver
from fastar.matching.blocks import Answers, Solved, solve_rows
from fastar.matching.weight.permuted_sources import PermutedSources, Step, gains, those_that_move
from fastar.matching.weight.problem import Problem
from fastar.matching.weight.unit_products import add_products
from fastar.symmetry.batched_index import Rows, along, chosen, download

# Gains read off S_g are trusted when this far above float32 rounding of its sums, relative to the sizes of the terms;
# smaller ones are computed again from the parameters themselves.
_TRUSTED = 1e-4
# Rounding of a difference computed from the parameters, relative to the root of the sum of squares of its terms.
_ROUNDING = 4 * 2.0**-23

OrderOfSweep = Callable[[int], Sequence[int]]
Numbers = NDArray[np.int64]


class Descent:
    """One chunk of sources: parameters as permuted so far, S_g of each group, and what is still to be solved.

    `answers` of several sources are an [m, size] index for each group of a tree.
    """

    def __init__(
        self,
        problem: Problem,
        sources: Mapping[str, Tensor],
        start: Sequence[NDArray[np.int64]],
        solver: Solver,
        pool: ThreadPoolExecutor | None,
    ):
        """`sources`: name -> [n, ...] in memory order, not written to. `start`: an [n, size] index per group."""
        self.problem, self.solver, self.pool = problem, solver, pool
        self.sources = PermutedSources(problem, sources, start)
        self.count = self.sources.count
        self.permutations = [np.array(index) for index in start]
        self.scores: list[Tensor | None] = [None] * len(problem.groups)
        self.unsolved = np.ones((len(problem.groups), self.count), dtype=bool)
        self.solves = 0
        self.sweeps = np.zeros(self.count, dtype=np.int64)

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

    def add(self, score: Tensor, name: str, g: int) -> None:
        """Add what one parameter contributes to S_g of every source."""
        everyone, size = Rows.every(self.count), self.problem.groups[g].size
        for site in self.problem.sites[name]:
            if site.group == g:
                theta, own = self.problem.theta[name][None], self.sources.data[name]
                add_products(score, theta, own, site.member, site.axis, size, everyone)

    def solve(self, t: int, scores: Sequence[Tensor], numbers: Numbers) -> list[Solved]:
        """The best assignments of tree t, given the S_g of its groups, for each of the sources `numbers`."""
        self.solves += len(numbers)
        (rows,) = chosen(numbers, self.count, device=self.sources.device)
        blank = [not self.problem.tensors[g] for g in self.problem.trees[t]]
        return solve_rows(scores, blank, rows, self.solver, self.pool)

    def score(self, g: int) -> Tensor:
        """S_g of every source, [n, size, size]: computed where it is not known."""
        known = self.scores[g]
        if known is None:
            known = self.scores[g] = self._full_score(g)
        return known

    def force(self, t: int, answers: Answers) -> None:
        """Permute tree t of every source by `answers` whatever that does to the objective; it is to be solved again.

        Its S_g must be up to date (`score`).
        """
        self._take(t, self.everyone, answers)
        self.unsolved[list(self.problem.trees[t])] = True

    def mark(self) -> Mark:
        """The place where the descent stands, to `go_back` to."""
        return Mark(
            [index.copy() for index in self.permutations],
            [None if score is None else score.clone() for score in self.scores],
            self.unsolved.copy(),
        )

    def go_back(self, mark: Mark, numbers: Numbers) -> None:
        """The sources `numbers` as they were at `mark`: the very same numbers, since permuting back only moves them."""
        if not len(numbers):
            return
        for t, tree in enumerate(self.problem.trees):
            back = tuple(
                np.take_along_axis(np.argsort(self.permutations[g][numbers], 1), mark.permutations[g][numbers], 1)
                for g in tree
            )
            self.sources.permute(t, numbers, back)
        (rows,) = chosen(numbers, self.count, device=self.sources.device)
        for g, index in enumerate(mark.permutations):
            self.permutations[g][numbers] = index[numbers]
            before, now = mark.scores[g], self.scores[g]
            if before is None or now is None:
                self.scores[g] = None
            else:
                rows.put(now, rows.of(before))
        self.unsolved[:, numbers] = mark.unsolved[:, numbers]

    def note(self, t: int, numbers: Numbers, answers: Answers) -> None:
        """Note that tree t of the sources `numbers` has been permuted by `answers`."""
        for g, answer in zip(self.problem.trees[t], answers, strict=True):
            self.permutations[g][numbers] = np.take_along_axis(self.permutations[g][numbers], answer, 1)

    def _full_score(self, g: int) -> Tensor:
        size = self.problem.groups[g].size
        score = torch.zeros(self.count, size, size, device=self.sources.device, dtype=torch.float32)
        for name in self.problem.tensors[g]:
            self.add(score, name, g)
        return score

    def _visit(self, t: int) -> None:
        """Solve tree t for the sources whose S_g changed, and take the steps that improve."""
        tree = list(self.problem.trees[t])
        todo = np.flatnonzero(self.unsolved[tree].any(0))
        if not len(todo):
            return
        solved = self.solve(t, [self.score(g) for g in tree], todo)
        for g in tree:
            self.unsolved[g, todo] = False
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

    def improves(self, t: int, numbers: Numbers, answers: Answers) -> list[bool]:
        """Tell for each of the sources `numbers` whether permuting tree t by `answers` raises the objective by more
        than rounding, computed from the parameters."""
        changes = Step(self.sources, t, numbers, answers).changes(lambda name: True)
        return [gain > _ROUNDING * math.sqrt(squares) for gain, squares in download(gains(changes)).T.tolist()]

    def _take(self, t: int, numbers: Numbers, answers: Answers) -> None:
        """Permute tree t of the sources `numbers` by `answers`, and bring all S_g up to date."""
        numbers, answers = those_that_move(numbers, answers)
        if not len(numbers):
            return
        corrected = {name: self.problem.corrected(t, name) for name in self.problem.touched[t]}
        step = Step(self.sources, t, numbers, answers)
        for change in step.changes(lambda name: any(self.scores[site.group] is not None for site in corrected[name])):
            for site in corrected[change.name]:
                self.unsolved[site.group, numbers] = True
                score = self.scores[site.group]
                if score is not None:
                    assert change.theta is not None
                    assert change.difference is not None
                    size = self.problem.groups[site.group].size
                    add_products(score, change.theta, change.difference, site.member, site.axis, size, change.rows)
            self.sources.write(change)
            del change  # before the next is made
        for g, answer in zip(self.problem.trees[t], step.answers, strict=True):
            score = self.scores[g]
            if self.problem.quadratic[t]:
                self.scores[g], self.unsolved[g, numbers] = None, True
            elif score is not None:
                columns = along(step.rows.of(score), 1, answer)
                if step.rows.everything:
                    self.scores[g] = columns
                else:
                    step.rows.put(score, columns)
        self.note(t, numbers, answers)


@dataclass(frozen=True)
class Mark:
    """The place where a descent stood: permutations, S_g and what was still to be solved."""

    permutations: list[NDArray[np.int64]]
    scores: list[Tensor | None]
    unsolved: NDArray[np.bool_]


def stacked(solved: Sequence[Solved]) -> Answers:
    """[m, size] of each group."""
    return tuple(np.stack(index) for index in zip(*(one.answers for one in solved), strict=True))
