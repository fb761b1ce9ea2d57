"""A chunk's sources under permutations: their parameters as they were given, and what a permutation makes of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastar.matching.weight.problem import Problem, Site
from fastar.matching.weight.unit_products import add_products, dot, dots
from fastar.symmetry.batched_index import Rows, along, chosen, download

# From this share of moved units on, gathering them apart costs more than taking them all.
_MOST = 0.6

# Copies of a source's largest parameter that are held beside it: what it becomes and what it was; or, of the part that
# moves, a difference and its terms in float64.
LARGEST_HELD = 2.5

Indices = Sequence[NDArray[np.int64]]
"""An index [m, size] for each group."""

Moves = tuple[int, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
"""An axis, positions [m, k] on it whose units change, and where each was and is taken from."""


Taken = tuple[int, int | None, NDArray[np.int64]]
"""An axis, the one that it lies within, and positions [m, length] on it, or [m, slices, length]: see `along`."""


class PermutedSources:
    """Parameters of n sources in memory order, name -> [n, ...], and where their units are now.

    What is given is never moved nor written to: `permutations` say which of a source's units is at each place, and a
    parameter is gathered when it is needed. On a GPU an operation costs its launch, so none is made for a source by
    itself.
    """

    def __init__(self, problem: Problem, sources: dict[str, Tensor], permutations: Indices):
        """`permutations`: to begin with."""
        self.problem, self.data = problem, sources
        self.permutations = [np.array(index) for index in permutations]
        self.count = next(iter(sources.values())).shape[0] if sources else 0
        self.device = next(iter(problem.theta.values())).device

    def now(self, numbers: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """The permutations of the sources `numbers`."""
        if len(numbers) == self.count:
            return self.permutations
        return [index[numbers] for index in self.permutations]

    def permuted(self) -> Iterator[tuple[str, Tensor]]:
        """Name and [n, ...] of each parameter, with the units where they are now."""
        everyone = np.arange(self.count)
        # Sources with the same indices on an axis are not gathered apart; above all the identity is no gather.
        plans = {name: _full(self.problem, name, (), self.permutations) for name in self.data}
        _, *arrays = chosen(
            everyone, self.count, *(at for plan in plans.values() for _, _, at in plan), device=self.device
        )
        place = iter(arrays)
        for name, rows in self.data.items():
            new = rows
            for axis, within, _ in plans[name]:
                new = along(new, axis, next(place), within)
            yield name, new

    def objectives(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """[n] <theta, permuted source> over all parameters, and over those of at least two axes."""
        theta = self.problem.theta
        matrices = [name in self.problem.matrices for name in self.data]
        products: list[Any] = []
        if self.device.type == "cpu":
            for name, rows in self.permuted():
                own = theta[name].reshape(-1)
                products.append([dot(own, row.reshape(-1)) for row in rows])
        elif self.data:
            products = list(download(torch.stack([dots(theta[name], rows) for name, rows in self.permuted()])))
        weights = [values for values, matrix in zip(products, matrices, strict=True) if matrix]
        return _sums(products, self.count), _sums(weights, self.count)

    def add(self, score: Tensor, name: str, g: int) -> None:
        """Add what one parameter contributes to a table T_g of every source (see `correct`)."""
        self._add(score, np.arange(self.count), [s for s in self.problem.sites[name] if s.group == g], name, None)

    def correct(self, score: Tensor, g: int, numbers: NDArray[np.int64], seen: Indices) -> None:
        """Bring T_g [n, size, size] of the sources `numbers` from the permutations `seen` [m, size] to those of now.

        T_g[i, j] is the inner product of what unit i of theta and unit j of the source own, the source's other axes
        permuted, its units of g numbered as they were given. Only what the other groups have moved is multiplied.
        """
        for name in self.problem.tensors[g]:
            axes = len(self.problem.axes_of[name]) + len(self.problem.inside[name])
            sites = [s for s in self.problem.sites[name] if s.group == g and axes > 1]
            if sites:
                self._add(score, numbers, sites, name, seen)

    def gains(self, t: int, numbers: NDArray[np.int64], answers: Indices) -> NDArray[np.float64]:
        """[2, m]: the change of the objective if tree t of the sources `numbers` is permuted by `answers`, computed
        from the parameters, and the sum of the squares of its terms."""
        before = self.now(numbers)
        after = list(before)
        for g, answer in zip(self.problem.trees[t], answers, strict=True):
            after[g] = np.take_along_axis(before[g], answer, 1)
        totals: Tensor | None = None
        for name in self.problem.touched[t]:
            difference = self._difference(name, (), numbers, before, after, None)
            if difference is None:
                continue
            _, theta, change = difference
            terms = change.double().mul_(theta).flatten(1)
            found = torch.stack([terms.sum(1), terms.square_().sum(1)])
            totals = found if totals is None else totals.add_(found)
        return np.zeros((2, len(numbers))) if totals is None else download(totals)

    def _add(
        self, score: Tensor, numbers: NDArray[np.int64], sites: Sequence[Site], name: str, seen: Indices | None
    ) -> None:
        """Add to the tables of `numbers` what the sites' parameter contributes now, less what it did at `seen`."""
        for site in sites:
            member, axis = site.member, site.axis
            length = score.shape[1] * member.inner * member.outer
            if site.within is not None:
                length //= self.data[name].shape[site.within + 1]
            stretch, offset = None, member.offset
            if length < self.data[name].shape[axis + 1]:  # of an axis that holds several groups only its own part
                stretch, offset = (axis, offset, length), 0
            difference = self._difference(name, site.axes, numbers, seen, self.now(numbers), stretch)
            if difference is not None:
                rows, theta, change = difference
                add_products(score, theta, change, site, offset, rows)

    def _difference(
        self,
        name: str,
        but: tuple[int, ...],
        numbers: NDArray[np.int64],
        before: Indices | None,
        after: Indices,
        stretch: tuple[int, int, int] | None,
    ) -> tuple[Rows, Tensor, Tensor] | None:
        """Rows, theta and a parameter of the sources `numbers` permuted by `after`, less the same by `before` (None:
        as it is), along all axes but some; None if there is no difference. Of the axis that changes only what moves is
        taken, of theta likewise.
        """
        problem = self.problem
        moves: Moves | None = None
        fixed = _full(problem, name, but, after)
        old = fixed
        if before is not None and problem.inside[name]:
            old = _full(problem, name, but, before)
            if len(old) == len(fixed) and all(
                a[:2] == b[:2] and not _differ(a[2], b[2]) for a, b in zip(old, fixed, strict=True)
            ):
                return None
        elif before is not None:
            changed = [
                axis
                for axis, sites in problem.axes_of[name].items()
                if axis not in but and any(_differ(before[s.group], after[s.group]) for s in sites)
            ]
            if not changed:
                return None
            if len(changed) == 1:
                (axis,) = changed
                moves = self._moves(name, axis, before, after)
            if moves is None:
                old = _full(problem, name, but, before)
            else:
                fixed = old = [one for one in fixed if one[0] != moves[0]]
        arrays = [at for _, _, at in fixed]
        if moves is not None:
            arrays += moves[1:]
        elif before is not None:
            arrays += [at for _, _, at in old]
        rows, *places = chosen(numbers, self.count, *arrays, device=self.device)
        theta, mine = problem.theta[name][None], rows.of(self.data[name])
        if stretch is not None:
            axis, begin, length = stretch
            theta, mine = theta.narrow(axis + 1, begin, length), mine.narrow(axis + 1, begin, length)
        fix, rest = places[: len(fixed)], places[len(fixed) :]
        if moves is not None:
            axis = moves[0]
            theta = along(theta.expand(len(rows), *theta.shape[1:]), axis, rest[0])
            was, new = along(mine, axis, rest[1]), along(mine, axis, rest[2])
            for (axis, _, _), at in zip(fixed, fix, strict=True):
                was, new = along(was, axis, at), along(new, axis, at)
            return rows, theta, new.sub_(was)
        new = mine
        for (axis, within, _), at in zip(fixed, fix, strict=True):
            new = along(new, axis, at, within)
        if before is None:
            return rows, theta, new
        was = mine
        for (axis, within, _), at in zip(old, rest, strict=True):
            was = along(was, axis, at, within)
        return rows, theta, new.sub_(was) if fix else new - was

    def _moves(self, name: str, axis: int, before: Indices, after: Indices) -> Moves | None:
        """Positions [m, k] on an axis whose units change, and where each was and is taken from; None: most change."""
        parts = []
        for site in self.problem.axes_of[name][axis]:
            old, new = before[site.group], after[site.group]
            moved = old != new
            most = int(moved.sum(1).max())
            if most:
                units = np.argsort(~moved, axis=1, kind="stable")[:, :most]
                size = old.shape[1]
                three = (units, np.take_along_axis(old, units, 1), np.take_along_axis(new, units, 1))
                parts.append([site.member.positions(one, size) for one in three])
        if sum(part[0].shape[1] for part in parts) > _MOST * self.data[name].shape[axis + 1]:
            return None
        to, was, new = (
            parts[0] if len(parts) == 1 else (np.concatenate(one, axis=1) for one in zip(*parts, strict=True))
        )
        return axis, to, was, new


def _full(problem: Problem, name: str, but: tuple[int, ...], indices: Indices) -> list[Taken]:
    """The axes of a parameter, but some, that `indices` [m, size] permute, and the position [m, length] each is taken
    from. Of those within others, which come first, [m, blocks, length]: in each slice as it lies in the source."""
    found: list[Taken] = []
    for place in dict.fromkeys((site.axis, site.within) for site in problem.inside[name] if site.axis not in but):
        axis, within = place
        sites = [site for site in problem.inside[name] if (site.axis, site.within) == place]
        length = problem.theta[name].shape[axis]
        inside = np.broadcast_to(np.arange(length), (len(indices[0]), problem.blocks[sites[0].group], length)).copy()
        for site in sites:
            units = _inside(indices[site.group], problem.blocks[site.group])
            to = site.member.positions(np.arange(units.shape[-1]), units.shape[-1])
            inside[..., to] = site.member.positions(units, units.shape[-1])
        if (inside != np.arange(length)).any():
            found.append((axis, within, inside))
    for axis, sites in problem.axes_of[name].items():
        if axis in but:
            continue
        every: NDArray[np.int64] | None = None
        for site in sites:
            index, units = indices[site.group], problem.units[site.group]
            if not _differ(index, units):
                continue
            size, length = index.shape[1], problem.theta[name].shape[axis]
            if every is None:
                if index.shape[1] == length and len(sites) == 1:
                    every = index
                    break
                every = np.tile(np.arange(length), (len(index), 1))
            to = site.member.positions(units[None], size)
            every[:, to[0]] = site.member.positions(index, size)
        if every is not None:
            found.append((axis, None, every))
    return found


def _inside(index: NDArray[np.int64], blocks: int) -> NDArray[np.int64]:
    """[m, blocks, units of a block]: of each block of a source the order that its units are in, wherever it is now."""
    units = index.reshape(len(index), blocks, -1)
    out = np.empty_like(units)
    size = units.shape[-1]
    np.put_along_axis(out, units[..., :1] // size, units % size, 1)
    return out


def _differ(one: NDArray[np.int64], other: NDArray[np.int64]) -> bool:
    return one is not other and bool((one != other).any())


def those_that_move(
    numbers: NDArray[np.int64], answers: Sequence[NDArray[np.int64]]
) -> tuple[NDArray[np.int64], tuple[NDArray[np.int64], ...]]:
    """Those of the sources `numbers` that `answers` [m, size] move any unit of, and their answers."""
    moving = np.any([(index != np.arange(index.shape[1])).any(1) for index in answers], axis=0)
    return numbers[moving], tuple(index[moving] for index in answers)


def _sums(values: Sequence[Sequence[float]], count: int) -> NDArray[np.float64]:
    return np.array([math.fsum(value[n] for value in values) for n in range(count)], dtype=np.float64)
