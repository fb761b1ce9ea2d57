"""A chunk's sources as permuted so far: their parameters on the device, and how a step changes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastar.matching.blocks import Answers
from fastar.matching.weight.problem import Problem, Site
from fastar.matching.weight.unit_products import dot, dots
from fastar.symmetry.batched_index import Rows, along, chosen, download, put_along

# From this share of moved units on, gathering them apart costs more than taking them all.
_MOST = 0.6

# Copies of a source's largest parameter that a step holds beside it: what it becomes, and the difference.
LARGEST_HELD = 2


@dataclass(frozen=True)
class Change:
    """What a step makes of one parameter of some sources.

    Args:
        axis: that moves, in memory order.
        rows: the sources.
        mine: [m, ...], their parameter so far: a view of it, or a copy where they do not follow each other.
        positions: [m, length] on the axis that may change; None: all.
        new: [m, ...], what is at `positions` afterwards.
        theta: [1, ...] or [m, ...], theta there; None unless asked for, like `difference`.
        difference: `new` less what is there.
    """

    name: str
    axis: int
    rows: Rows
    mine: Tensor
    positions: Tensor | None
    new: Tensor
    theta: Tensor | None
    difference: Tensor | None


class PermutedSources:
    """Parameters of n sources in memory order, name -> [n, ...], all sources of a step moved together.

    On a GPU an operation costs its launch, so none is made for a source by itself. What is given is not written to: a
    parameter is copied when it is first moved.
    """

    def __init__(self, problem: Problem, sources: Mapping[str, Tensor]):
        self.problem = problem
        self.data = dict(sources)
        self.owned: set[str] = set()
        self.count = next(iter(sources.values())).shape[0] if sources else 0
        self.device = next(iter(problem.theta.values())).device
        self._products = {name: np.full(self.count, np.nan) for name in sources}  # with theta; nan: not known

    def objectives(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """[n] <theta, permuted source> over all parameters, and over those of at least two axes."""
        unknown = [name for name, values in self._products.items() if np.isnan(values).any()]
        theta = self.problem.theta
        if self.device.type == "cpu":
            for name in unknown:
                values = self._products[name]
                for n in np.flatnonzero(np.isnan(values)):
                    values[n] = dot(theta[name], self.data[name][n])
        elif unknown:
            found = download(torch.stack([dots(theta[name], self.data[name]) for name in unknown]))
            self._products |= dict(zip(unknown, found, strict=True))
        weights = [values for name, values in self._products.items() if self.data[name].ndim > 2]
        return _sums(list(self._products.values()), self.count), _sums(weights, self.count)

    def step(self, g: int, numbers: NDArray[np.int64], answer: NDArray[np.int64]) -> GroupStep:
        """Of permuting group g of the sources `numbers` by `answer` [m, size]. Nothing is changed yet."""
        return GroupStep(self, g, numbers, answer)

    def write(self, change: Change) -> None:
        """Let a change happen."""
        name, rows = change.name, change.rows
        if change.positions is None:
            self.put(name, rows, change.new)
            return
        self._changed(name, rows)
        self._own(name)
        if rows.index is None:
            put_along(rows.of(self.data[name]), change.axis, change.positions, change.new)
        else:
            put_along(change.mine, change.axis, change.positions, change.new)
            rows.put(self.data[name], change.mine)

    def put(self, name: str, rows: Rows, values: Tensor) -> None:
        """Have `values` [m, ...] be the parameter of `rows`; of all rows it is kept, so it must not be another's."""
        self._changed(name, rows)
        if rows.everything:
            self.data[name] = values
            self.owned.add(name)
        else:
            self._own(name)
            rows.put(self.data[name], values)

    def permuted(
        self, f: int, numbers: NDArray[np.int64], answers: Answers
    ) -> tuple[Rows, Iterator[tuple[str, Tensor]]]:
        """The sources `numbers`, and one after the other the parameters that family f touches, as new tensors [m, ...]
        with its units permuted by `answers`, [m, size] of each group."""
        problem, family = self.problem, self.problem.families[f]
        units = dict(zip(family, answers, strict=True))
        made: dict[tuple[object, ...], int] = {}
        arrays: list[NDArray[np.int64]] = []
        of_names: dict[str, list[tuple[int, int]]] = {}  # name -> (axis, which array)
        for name in problem.touched[f]:
            sites = problem.of_family(f, name)
            for axis in sorted({site.axis for site in sites}):
                own, length = [p for p in sites if p.axis == axis], self.data[name].shape[axis + 1]
                key = (length, *(_kind(site) for site in own))
                if key not in made:
                    made[key] = len(arrays)
                    at = np.tile(np.arange(length), (len(numbers), 1))
                    for site in own:
                        positions = site.member.positions(units[site.group], problem.groups[site.group].size)
                        at[:, site.member.offset : site.member.offset + positions.shape[1]] = positions
                    arrays.append(at)
                of_names.setdefault(name, []).append((axis, made[key]))
        rows, *index = chosen(numbers, self.count, *arrays, device=self.device)

        def each() -> Iterator[tuple[str, Tensor]]:
            for name, axes in of_names.items():
                row = rows.of(self.data[name])
                for axis, which in axes:
                    row = along(row, axis, index[which])
                yield name, row

        return rows, each()

    def permute(self, f: int, numbers: NDArray[np.int64], answers: Answers) -> None:
        """Permute family f of the sources `numbers` by `answers`, [m, size] of each group."""
        moving = np.any([(index != np.arange(index.shape[1])).any(1) for index in answers], axis=0)
        if moving.any():
            rows, parameters = self.permuted(f, numbers[moving], tuple(index[moving] for index in answers))
            for name, row in parameters:
                self.put(name, rows, row)

    def _own(self, name: str) -> None:
        if name not in self.owned:
            self.data[name] = self.data[name].clone()
            self.owned.add(name)

    def _changed(self, name: str, rows: Rows) -> None:
        self._products[name][rows.numbers] = np.nan


class GroupStep:
    """One group of some sources permuted, a parameter after the other: indices are made on the host, and uploaded once.

    Only units that move are gathered, as many of each source as of the one with the most (others add some that stay).
    """

    def __init__(self, sources: PermutedSources, g: int, numbers: NDArray[np.int64], answer: NDArray[np.int64]):
        self.sources, self.group = sources, g
        problem, size = sources.problem, sources.problem.groups[g].size
        moved = answer != np.arange(size)
        most = int(moved.sum(1).max())
        units = np.tile(np.arange(size), (len(numbers), 1))
        if most <= _MOST * size:
            units = np.argsort(~moved, axis=1, kind="stable")[:, :most]
        origins = np.take_along_axis(answer, units, 1)
        arrays: list[NDArray[np.int64]] = [answer]
        made: dict[tuple[object, ...], tuple[int | None, int]] = {}
        self._indices: dict[str, tuple[int, int | None, int]] = {}  # name -> axis, positions, where from
        for name in problem.tensors[g]:
            sites = [site for site in problem.sites[name] if site.group == g]
            axis = sites[0].axis
            length = sources.data[name].shape[axis + 1]
            key = (length, *(_kind(site) for site in sites))
            if key not in made:
                to, origin = (
                    np.concatenate([site.member.positions(some, size) for site in sites], axis=1)
                    for some in (units, origins)
                )
                whole = to.shape[1] == length and bool((to[0] == np.arange(length)).all())
                made[key] = (None if whole else len(arrays), len(arrays) + (not whole))
                arrays += [origin] if whole else [to, origin]
            self._indices[name] = (axis, *made[key])
        self.rows, *self._arrays = chosen(numbers, sources.count, *arrays, device=sources.device)
        self.answer: Tensor = self._arrays[0]

    def changes(self, differs: Callable[[str], bool]) -> Iterator[Change]:
        """What becomes of each parameter; with its difference where `differs(name)`. Write each before the next."""
        for name in self._indices:
            yield self._change(name, differs(name))

    def _change(self, name: str, differs: bool) -> Change:
        axis, to, origin = self._indices[name]
        mine = self.rows.of(self.sources.data[name])
        new = along(mine, axis, self._arrays[origin])
        positions = None if to is None else self._arrays[to]
        if not differs:
            return Change(name, axis, self.rows, mine, positions, new, None, None)
        theta = self.sources.problem.theta[name][None]
        if positions is None:
            return Change(name, axis, self.rows, mine, None, new, theta, new - mine)
        part = along(theta.expand(len(self.rows), *theta.shape[1:]), axis, positions)
        return Change(name, axis, self.rows, mine, positions, new, part, new - along(mine, axis, positions))


def gains(pairs: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """[2, m] float64: the sum over `pairs` of <theta, difference>, and of the squares of its terms.

    Args:
        pairs: theta [1, ...] or [m, ...], and the difference [m, ...].
    """
    totals: Tensor | None = None
    for theta, difference in pairs:
        terms = difference.double().mul_(theta).flatten(1)
        both = (
            [terms.sum()[None], terms.square_().sum()[None]]
            if len(terms) == 1
            else [terms.sum(1), terms.square_().sum(1)]
        )
        found = torch.stack(both)
        totals = found if totals is None else totals.add_(found)
    assert totals is not None
    return totals


def _kind(site: Site) -> tuple[int, int, int, int]:
    return site.group, site.member.inner, site.member.outer, site.member.offset


def _sums(values: Sequence[NDArray[np.float64]], count: int) -> NDArray[np.float64]:
    return np.array([math.fsum(value[n] for value in values) for n in range(count)], dtype=np.float64)
