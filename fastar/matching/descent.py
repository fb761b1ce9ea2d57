"""Coordinate descent over permutation groups (git re-basin's weight matching) for a chunk of sources against one theta.

The objective of source n is <theta, pi(theta_n)> over all parameters. With every group but g held, it is linear in g's
permutation: sum_i S_g[i, perm[i]], where S_g[i, j] is the inner product of what unit i of theta and unit j of the
permuted source own.

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

from fastar.matching.assignment import Solver, solve_assignment
from fastar.matching.layout import add_products, dot, in_memory_order, memory_order
from fastar.matching.symmetry import Member, Symmetry

# Gains read off S_g are trusted when this far above float32 rounding of its sums, relative to the sizes of the terms;
# smaller ones are computed again from the parameters themselves.
_TRUSTED = 1e-4
# Rounding of a difference computed from the parameters, relative to the root of the sum of squares of its terms.
_ROUNDING = 4 * 2.0**-23
# From this share of moved units on, gathering them apart costs more than taking them all.
_MOST = 0.6

OrderOfSweep = Callable[[int], Sequence[int]]


@dataclass(frozen=True)
class Place:
    """A member of a group, with its axis in memory order."""

    group: int
    member: Member
    axis: int


class Problem:
    """What all chunks share: theta in memory order, and which group touches which parameter where. Read-only."""

    def __init__(self, symmetry: Symmetry, theta: Mapping[str, Tensor], sources: Mapping[str, Tensor]):
        self.groups = symmetry.groups
        # Of a tied tensor's names only the first one given counts.
        self.names = [
            n
            for n in symmetry.parameters
            if n in theta and n in sources and not (n in symmetry.tied and symmetry.tied[n] in theta)
        ]
        self.orders = {name: memory_order(sources[name][0]) for name in self.names}
        self.theta = {name: in_memory_order(theta[name], self.orders[name]).float() for name in self.names}
        self.places: dict[str, list[Place]] = {name: [] for name in self.names}
        for g, group in enumerate(self.groups):
            for member in group.members:
                if member.tensor in self.places:
                    axis = self.orders[member.tensor].index(member.axis)
                    self.places[member.tensor].append(Place(g, member, axis))
        self.tensors = [sorted({m.tensor for m in group.members if m.tensor in self.places}) for group in self.groups]
        # On a tensor that a group permutes along two axes at once the objective is quadratic, and S_g only its slope.
        self.quadratic = [
            any(len({p.axis for p in self.places[name] if p.group == g}) > 1 for name in self.tensors[g])
            for g in range(len(self.groups))
        ]

    def source(self, name: str, sources: Mapping[str, Tensor], begin: int, end: int) -> Tensor:
        """sources[name][begin:end] in memory order, [n, ...]; a view where nothing has to be converted."""
        order = [0, *(axis + 1 for axis in self.orders[name])]
        rows = sources[name][begin:end].detach().permute(order)
        # Rows may lie far apart (one row of a store per source), but each must be contiguous for the products.
        contiguous = rows[0].is_contiguous()
        return (rows if contiguous else rows.contiguous()).float()


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
        """Sweep over the groups until no group's best assignment improves any source, at most `max_sweeps` times."""
        for sweep in range(max_sweeps):
            pending = [n for n in range(self.count) if any(flags[n] for flags in self.unsolved)]
            if not pending:
                return
            for n in pending:
                self.sweeps[n] += 1
            for g in order_of_sweep(sweep):
                self._visit(g)

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
        for g, group in enumerate(self.problem.groups):
            index = self.permutations[g][n]
            if not np.array_equal(index, np.arange(group.size)):
                for name, row in self.permuted(g, n, index).items():
                    self.replace(name, n, row)

    def _visit(self, g: int) -> None:
        """Solve group g for the sources whose S_g changed, and take the steps that improve."""
        todo = [n for n in range(self.count) if self.unsolved[g][n]]
        if not todo:
            return
        score = self.score(g)
        tables = score.cpu().numpy()
        for n, answer in zip(todo, self.solve(score, todo), strict=True):
            self.unsolved[g][n] = False
            if (answer != np.arange(len(answer))).any():
                self._step(g, n, answer, tables[n])

    def solve(self, score: Tensor, todo: Sequence[int]) -> list[NDArray[np.int64]]:
        """The best assignment of each source in `todo`; side by side where there is a pool."""
        tables = score.cpu().numpy()
        self.solves += len(todo)

        def solve(n: int) -> NDArray[np.int64]:
            return solve_assignment(tables[n], solver=self.solver)

        return list(self.pool.map(solve, todo) if self.pool is not None and len(todo) > 1 else map(solve, todo))

    def _full_score(self, g: int) -> Tensor:
        size = self.problem.groups[g].size
        score = torch.zeros(self.count, size, size, device=self.device())
        for name in self.problem.tensors[g]:
            self.add(score, name, g)
        return score

    def device(self) -> torch.device:
        return next(iter(self.problem.theta.values())).device

    def _step(self, g: int, n: int, answer: NDArray[np.int64], table: NDArray[np.float32]) -> None:
        """Permute group g of source n by `answer` if that raises the objective."""
        if self.problem.quadratic[g]:
            self._quadratic_step(g, n, answer)
            return
        size = len(answer)
        moved = np.flatnonzero(answer != np.arange(size))
        now, then = table[moved, moved].astype(np.float64), table[moved, answer[moved]].astype(np.float64)
        gain, scale = float((then - now).sum()), float(np.abs(then).sum() + np.abs(now).sum())
        if gain <= -_TRUSTED * scale:
            return
        changes, everything = self._changes(g, n, answer, moved)
        if gain < _TRUSTED * scale and not _improves([(c.theta, c.difference) for c in changes.values()]):
            return
        self._take(g, n, answer, changes, everything)

    def force(self, g: int, n: int, answer: NDArray[np.int64]) -> None:
        """Permute group g of source n by `answer` whatever that does to the objective; it is to be solved again.

        S_g must be up to date (`score`).
        """
        if self.problem.quadratic[g]:
            self._take_quadratic(g, n, answer, self.permuted(g, n, answer))
        else:
            moved = np.flatnonzero(answer != np.arange(len(answer)))
            if len(moved):
                self._take(g, n, answer, *self._changes(g, n, answer, moved))
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
        for g, index in enumerate(mark.permutations):
            back = np.argsort(self.permutations[g][n])[index[n]]
            if (back != np.arange(len(back))).any():
                for name, row in self.permuted(g, n, back).items():
                    self.replace(name, n, row)
                self.permutations[g][n] = index[n]
            before, now = mark.scores[g], self.scores[g]
            if before is None or now is None:
                self.scores[g] = None
            else:
                now[n] = before[n]
            self.unsolved[g][n] = mark.unsolved[g][n]

    def _changes(
        self, g: int, n: int, answer: NDArray[np.int64], moved: NDArray[np.int64]
    ) -> tuple[dict[str, _Change], bool]:
        """How permuting group g by `answer` changes its parameters, and whether that counts as all of its units."""
        everything = len(moved) > _MOST * len(answer)
        units = torch.from_numpy(np.arange(len(answer)) if everything else moved).to(self.device())
        index = torch.from_numpy(answer).to(self.device())
        return {
            name: self._change(g, n, name, units, index, everything) for name in self.problem.tensors[g]
        }, everything

    def _take(
        self, g: int, n: int, answer: NDArray[np.int64], changes: Mapping[str, _Change], everything: bool
    ) -> None:
        """Permute group g of source n by `answer`."""
        for name, change in changes.items():
            self._correct_scores(g, n, name, change)
            self._own(name)
            self.products.pop((name, n), None)
            row = self.data[name][n]
            if everything and change.whole:
                row.copy_(change.new)
            else:
                row.index_copy_(change.axis, change.positions, change.new)
        self._taken(g, n, answer)
        score = self.scores[g]
        assert score is not None
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

    def _quadratic_step(self, g: int, n: int, answer: NDArray[np.int64]) -> None:
        """The same for a group that lies on two axes of one tensor: compare whole tensors, then start S_g anew."""
        rows = self.permuted(g, n, answer)
        if _improves([(self.problem.theta[name], row - self.data[name][n]) for name, row in rows.items()]):
            self._take_quadratic(g, n, answer, rows)

    def _take_quadratic(self, g: int, n: int, answer: NDArray[np.int64], rows: Mapping[str, Tensor]) -> None:
        for name, row in rows.items():
            theta, difference = self.problem.theta[name], row - self.data[name][n]
            self.replace(name, n, row)
            for place in self.problem.places[name]:
                self.unsolved[place.group][n] = True
                score = self.scores[place.group]
                if score is not None and place.group != g:
                    size = self.problem.groups[place.group].size
                    add_products(score[n : n + 1], theta, difference[None], place.member, place.axis, size)
        self.scores[g] = None
        self.unsolved[g][n] = True
        self._taken(g, n, answer)

    def permuted(self, g: int, n: int, index: NDArray[np.int64]) -> dict[str, Tensor]:
        """New tensors: the parameters of source n that group g touches, with its units permuted."""
        size, units = self.problem.groups[g].size, torch.from_numpy(index).to(self.device())
        out = {}
        for name in self.problem.tensors[g]:
            row = self.data[name][n]
            places = [p for p in self.problem.places[name] if p.group == g]
            for axis in sorted({p.axis for p in places}):
                at = torch.arange(row.shape[axis], device=row.device)
                for member in (p.member for p in places if p.axis == axis):
                    positions = member.positions(units, size)
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

    def _taken(self, g: int, n: int, answer: NDArray[np.int64]) -> None:
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


def _improves(pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether sum <theta, difference> is above zero by more than its own rounding."""
    gain, squares = 0.0, 0.0
    for theta, difference in pairs:
        terms = theta.double() * difference.double()
        gain += float(terms.sum())
        # Each difference of two float32 numbers may be off by half a unit in the last place.
        squares += float(terms.square().sum())
    return gain > _ROUNDING * math.sqrt(squares)
