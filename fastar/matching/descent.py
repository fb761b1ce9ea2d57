"""Coordinate descent over permutation groups (git re-basin's weight matching) for a chunk of sources against one theta.

The objective of source n is <theta, pi(theta_n)> over all parameters. With every group but g held, it is linear in g's
permutation: sum_i S_g[i, perm[i]], where S_g[i, j] is the inner product of what unit i of theta and unit j of the
permuted source own. Groups that are permuted together (a parent and its children) are one step; a group without a
parent is a family by itself.

What makes it fast: the source is kept permuted; S_g stays in memory and, when a neighbouring group moves k of its n
units, is corrected by a product over those k units only; a group whose S_g did not change since it was solved is not
solved again.
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
from fastar.matching.families import Answers, solve_family
from fastar.matching.layout import add_products, dot
from fastar.matching.problem import Problem

# Gains read off S_g are trusted when this far above float32 rounding of its sums, relative to the sizes of the terms;
# smaller ones are computed again from the parameters themselves.
_TRUSTED = 1e-4
# Rounding of a difference computed from the parameters, relative to the root of the sum of squares of its terms.
_ROUNDING = 4 * 2.0**-23
# From this share of moved units on, gathering them apart costs more than taking them all.
_MOST = 0.6

OrderOfSweep = Callable[[int], Sequence[int]]


class Descent:
    """One chunk of sources: parameters as permuted so far, S_g of each group, and what is still to be solved."""

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
        self.data = dict(sources)
        self.owned = dict.fromkeys(sources, False)
        self.count = next(iter(sources.values())).shape[0] if sources else 0
        self.products: dict[tuple[str, int], float] = {}  # <theta, source n> of each parameter, until it changes
        self.permutations = [np.array(index) for index in start]
        self.scores: list[Tensor | None] = [None] * len(problem.groups)
        self.unsolved = [[True] * self.count for _ in problem.groups]
        self.solves = 0
        self.steps = [0] * self.count
        self.sweeps = [0] * self.count
        for n in range(self.count):
            self._apply_start(n)

    def run(self, order_of_sweep: OrderOfSweep, max_sweeps: int) -> None:
        """Sweep over the families until none's best assignment improves any source, at most `max_sweeps` times."""
        for sweep in range(max_sweeps):
            pending = [n for n in range(self.count) if any(flags[n] for flags in self.unsolved)]
            if not pending:
                return
            for n in pending:
                self.sweeps[n] += 1
            for f in order_of_sweep(sweep):
                self._visit(f)

    def add(self, score: Tensor, name: str, g: int) -> None:
        """Add what one parameter contributes to S_g."""
        for place in self.problem.places[name]:
            if place.group == g:
                size = self.problem.groups[g].size
                add_products(score, self.problem.theta[name], self.data[name], place.member, place.axis, size)

    def objective(self, n: int) -> tuple[float, float]:
        """<theta, permuted source n> over all parameters, and over those of at least two axes."""
        total, weights = [], []
        for name, rows in self.data.items():
            value = self.products.get((name, n))
            if value is None:
                value = self.products[name, n] = dot(self.problem.theta[name], rows[n])
            total.append(value)
            if rows.ndim > 2:
                weights.append(value)
        return math.fsum(total), math.fsum(weights)

    def _apply_start(self, n: int) -> None:
        for f, family in enumerate(self.problem.families):
            answers = tuple(self.permutations[g][n] for g in family)
            if any((index != np.arange(len(index))).any() for index in answers):
                for name, row in self.permuted(f, n, answers).items():
                    self.replace(name, n, row)

    def _visit(self, f: int) -> None:
        """Solve family f for the sources whose S_g changed, and take the steps that improve."""
        family = self.problem.families[f]
        todo = [n for n in range(self.count) if any(self.unsolved[g][n] for g in family)]
        if not todo:
            return
        scores = [self.score(g) for g in family]
        tables = [score.cpu().numpy() for score in scores]
        for n, answers in zip(todo, self.solve(scores, todo), strict=True):
            for g in family:
                self.unsolved[g][n] = False
            if any((answer != np.arange(len(answer))).any() for answer in answers):
                self._step(f, n, answers, [table[n] for table in tables])

    def solve(self, scores: Sequence[Tensor], todo: Sequence[int]) -> list[Answers]:
        """The best assignments of a family, given the S_g of its groups, for each source in `todo`; side by side where
        there is a pool."""
        tables = [score.cpu().numpy() for score in scores]
        self.solves += len(todo)

        def solve(n: int) -> Answers:
            return solve_family([table[n] for table in tables], solver=self.solver)

        return list(self.pool.map(solve, todo) if self.pool is not None and len(todo) > 1 else map(solve, todo))

    def _full_score(self, g: int) -> Tensor:
        size = self.problem.groups[g].size
        score = torch.zeros(self.count, size, size, device=self.device())
        for name in self.problem.tensors[g]:
            self.add(score, name, g)
        return score

    def device(self) -> torch.device:
        return next(iter(self.problem.theta.values())).device

    def _step(self, f: int, n: int, answers: Answers, tables: Sequence[NDArray[np.float32]]) -> None:
        """Permute family f of source n by `answers` if that raises the objective."""
        if self.problem.quadratic[f]:
            self._quadratic_step(f, n, answers)
            return
        gain, scale = 0.0, 0.0
        for answer, table in zip(answers, tables, strict=True):
            moved = np.flatnonzero(answer != np.arange(len(answer)))
            now, then = table[moved, moved].astype(np.float64), table[moved, answer[moved]].astype(np.float64)
            gain, scale = gain + float((then - now).sum()), scale + float(np.abs(then).sum() + np.abs(now).sum())
        if gain <= -_TRUSTED * scale:
            return
        moves = self._moves(f, n, answers)
        pairs = [(c.theta, c.difference) for move in moves for c in move.changes.values()]
        if gain < _TRUSTED * scale and not _improves(pairs):
            return
        self._take(f, n, answers, moves)

    def force(self, f: int, n: int, answers: Answers) -> None:
        """Permute family f of source n by `answers` whatever that does to the objective; it is to be solved again.

        Its S_g must be up to date (`score`).
        """
        if self.problem.quadratic[f]:
            self._take_quadratic(f, n, answers, self.permuted(f, n, answers))
        elif moves := self._moves(f, n, answers):
            self._take(f, n, answers, moves)
        for g in self.problem.families[f]:
            self.unsolved[g][n] = True

    def score(self, g: int) -> Tensor:
        """S_g of every source, [n, size, size]: computed where it is not known."""
        known = self.scores[g]
        if known is None:
            known = self.scores[g] = self._full_score(g)
        return known

    def mark(self) -> Mark:
        """Where the descent stands, to `go_back` to."""
        return Mark(
            [index.copy() for index in self.permutations],
            [None if score is None else score.clone() for score in self.scores],
            [list(flags) for flags in self.unsolved],
        )

    def go_back(self, mark: Mark, n: int) -> None:
        """Source n as it was at `mark`: the very same numbers, since permuting back only moves them."""
        for f, family in enumerate(self.problem.families):
            back = tuple(np.argsort(self.permutations[g][n])[mark.permutations[g][n]] for g in family)
            if any((index != np.arange(len(index))).any() for index in back):
                for name, row in self.permuted(f, n, back).items():
                    self.replace(name, n, row)
        for g, index in enumerate(mark.permutations):
            self.permutations[g][n] = index[n]
            before, now = mark.scores[g], self.scores[g]
            if before is None or now is None:
                self.scores[g] = None
            else:
                now[n] = before[n]
            self.unsolved[g][n] = mark.unsolved[g][n]

    def _moves(self, f: int, n: int, answers: Answers) -> list[_Move]:
        """How permuting family f by `answers` changes the parameters of each of its groups that moves.

        No two of these overlap: groups of a family that is not quadratic share an axis of a parameter, or none.
        """
        moves = []
        for g, answer in zip(self.problem.families[f], answers, strict=True):
            moved = np.flatnonzero(answer != np.arange(len(answer)))
            if len(moved):
                everything = len(moved) > _MOST * len(answer)
                units = torch.from_numpy(np.arange(len(answer)) if everything else moved).to(self.device())
                index = torch.from_numpy(answer).to(self.device())
                names = self.problem.tensors[g]
                changes = {name: self._change(g, n, name, units, index, everything) for name in names}
                moves.append(_Move(g, changes, everything))
        return moves

    def _take(self, f: int, n: int, answers: Answers, moves: Sequence[_Move]) -> None:
        """Permute family f of source n by `answers`."""
        for move in moves:
            for name, change in move.changes.items():
                self._correct_scores(move.group, n, name, change)
                self._own(name)
                self.products.pop((name, n), None)
                row = self.data[name][n]
                if move.everything and change.whole:
                    row.copy_(change.new)
                else:
                    row.index_copy_(change.axis, change.positions, change.new)
        self.taken(f, n, answers)
        for move in moves:
            score = self.scores[move.group]
            assert score is not None
            answer = answers[self.problem.families[f].index(move.group)]
            score[n] = score[n].index_select(1, torch.from_numpy(answer).to(score.device))

    def _change(self, g: int, n: int, name: str, units: Tensor, index: Tensor, everything: bool) -> _Change:
        """How moving `units` of group g changes a parameter of source n."""
        theta, row = self.problem.theta[name], self.data[name][n]
        # Moved units change places among themselves, so what they become is found among what they were.
        places = [p for p in self.problem.places[name] if p.group == g]
        axis, size = places[0].axis, self.problem.groups[g].size
        to = torch.cat([p.member.positions(units, size) for p in places])
        origin = torch.cat([p.member.positions(index[units], size) for p in places])
        if everything and len(places) == 1 and places[0].member.outer == 1 and len(to) == row.shape[axis]:
            new = row.index_select(axis, origin)
            return _Change(axis, to, theta, new, new - row, True)
        old = row.index_select(axis, to)
        where = torch.empty(row.shape[axis], dtype=torch.int64, device=row.device)
        where[to] = torch.arange(len(to), device=row.device)
        new = old.index_select(axis, where[origin])
        return _Change(axis, to, theta.index_select(axis, to), new, new - old, False)

    def _correct_scores(self, g: int, n: int, name: str, change: _Change) -> None:
        """Bring the S_h of the other groups on this parameter up to date, and have them solved again."""
        for place in self.problem.places[name]:
            if place.group == g or place.axis == change.axis:
                continue
            self.unsolved[place.group][n] = True
            score = self.scores[place.group]
            if score is not None:
                size = self.problem.groups[place.group].size
                add_products(score[n : n + 1], change.theta, change.difference[None], place.member, place.axis, size)

    def _quadratic_step(self, f: int, n: int, answers: Answers) -> None:
        """The same for a family that lies on two axes of one tensor: compare whole tensors, then start its S_g anew."""
        rows = self.permuted(f, n, answers)
        if _improves([(self.problem.theta[name], row - self.data[name][n]) for name, row in rows.items()]):
            self._take_quadratic(f, n, answers, rows)

    def _take_quadratic(self, f: int, n: int, answers: Answers, rows: Mapping[str, Tensor]) -> None:
        family = self.problem.families[f]
        for name, row in rows.items():
            theta, difference = self.problem.theta[name], row - self.data[name][n]
            self.replace(name, n, row)
            for place in self.problem.places[name]:
                self.unsolved[place.group][n] = True
                score = self.scores[place.group]
                if score is not None and place.group not in family:
                    size = self.problem.groups[place.group].size
                    add_products(score[n : n + 1], theta, difference[None], place.member, place.axis, size)
        for g in family:
            self.scores[g] = None
            self.unsolved[g][n] = True
        self.taken(f, n, answers)

    def permuted(self, f: int, n: int, answers: Answers) -> dict[str, Tensor]:
        """New tensors: the parameters of source n that family f touches, with its units permuted."""
        family = self.problem.families[f]
        units = {g: torch.from_numpy(index).to(self.device()) for g, index in zip(family, answers, strict=True)}
        out = {}
        for name in self.problem.touched[f]:
            row = self.data[name][n]
            places = self.problem.of_family(f, name)
            for axis in sorted({p.axis for p in places}):
                at = torch.arange(row.shape[axis], device=row.device)
                for place in (p for p in places if p.axis == axis):
                    member = place.member
                    positions = member.positions(units[place.group], self.problem.groups[place.group].size)
                    at[member.offset : member.offset + len(positions)] = positions
                row = row.index_select(axis, at)
            out[name] = row
        return out

    def replace(self, name: str, n: int, row: Tensor) -> None:
        self.products.pop((name, n), None)
        if self.count == 1:
            self.data[name], self.owned[name] = row[None], True
            return
        self._own(name)
        self.data[name][n].copy_(row)

    def _own(self, name: str) -> None:
        """The caller's memory is never written: the first change of a parameter copies it."""
        if not self.owned[name]:
            self.data[name], self.owned[name] = self.data[name].clone(), True

    def taken(self, f: int, n: int, answers: Answers) -> None:
        """Note that family f of source n has been permuted by `answers`."""
        for g, answer in zip(self.problem.families[f], answers, strict=True):
            self.permutations[g][n] = self.permutations[g][n][answer]
        self.steps[n] += 1


@dataclass(frozen=True)
class Mark:
    """Where a descent stood: permutations, S_g and what was still to be solved."""

    permutations: list[NDArray[np.int64]]
    scores: list[Tensor | None]
    unsolved: list[list[bool]]


@dataclass(frozen=True)
class _Change:
    """Some positions of one parameter before and after a step; `theta`, `new` and `difference` hold only those."""

    axis: int
    positions: Tensor
    theta: Tensor
    new: Tensor
    difference: Tensor
    whole: bool


@dataclass(frozen=True)
class _Move:
    """One group's part of a step; `everything`: counted as all of its units."""

    group: int
    changes: dict[str, _Change]
    everything: bool


def _improves(pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether sum <theta, difference> is above zero by more than its own rounding."""
    gain, squares = 0.0, 0.0
    for theta, difference in pairs:
        terms = theta.double() * difference.double()
        gain += float(terms.sum())
        # Each difference of two float32 numbers may be off by half a unit in the last place.
        squares += float(terms.square().sum())
    return gain > _ROUNDING * math.sqrt(squares)
