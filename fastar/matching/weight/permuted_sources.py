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
from fastar.matching.weight.problem import Problem
from fastar.matching.weight.unit_products import dot, dots
from fastar.symmetry.batched_index import Rows, along, chosen, download, put_along

# From this share of moved units on, gathering them apart costs more than taking them all.
_MOST = 0.6

# Copies of a source's largest parameter that a step holds beside it: what it becomes, and the difference.
LARGEST_HELD = 2


@dataclass(frozen=True)
class Change:
    """One parameter of some sources, as a step makes it.

    Args:
        rows: the sources.
        axis: that moves, in memory order; where several do, the last of them.
        positions: [m, length] on the axis that may change; None: all.
        new: [m, ...], what is at `positions` afterwards.
        theta: [1, ...] or [m, ...], theta there; None unless asked for, like `difference`.
        difference: `new` less what is there.
    """

    name: str
    rows: Rows
    axis: int
    positions: Tensor | None
    new: Tensor
    theta: Tensor | None
    difference: Tensor | None


class PermutedSources:
    """Parameters of n sources in memory order, name -> [n, ...], all sources of a step moved together.

    On a GPU an operation costs its launch, so none is made for a source by itself. What is given is not written to: a
    parameter is copied when it is first moved.
    """

    def __init__(self, problem: Problem, sources: Mapping[str, Tensor], permutations: Sequence[NDArray[np.int64]]):
        """`permutations`: an [n, size] index per group, to begin with."""
        self.problem = problem
        self.data = dict(sources)
        self.owned: set[str] = set()
        self.count = next(iter(sources.values())).shape[0] if sources else 0
        self.device = next(iter(problem.theta.values())).device
        for t, tree in enumerate(problem.trees):
            self.permute(t, np.arange(self.count), tuple(permutations[g] for g in tree))

    def objectives(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """[n] <theta, permuted source> over all parameters, and over those of at least two axes."""
        theta, data = self.problem.theta, self.data
        products = []
        if self.device.type == "cpu":
            products = [np.array([dot(theta[name], row) for row in rows]) for name, rows in data.items()]
        elif data:
            products = list(download(torch.stack([dots(theta[name], rows) for name, rows in data.items()])))
        weights = [values for values, rows in zip(products, data.values(), strict=True) if rows.ndim > 2]
        return _sums(products, self.count), _sums(weights, self.count)

    def permute(self, t: int, numbers: NDArray[np.int64], answers: Answers) -> None:
        """Permute tree t of the sources `numbers` by `answers`, [m, size] of each group."""
        numbers, answers = those_that_move(numbers, answers)
        if len(numbers):
            for change in Step(self, t, numbers, answers).changes(lambda name: False):
                self.write(change)
                del change  # before the next is made

    def write(self, change: Change) -> None:
        """Let a change happen. `new` is kept where it is all of a parameter of all sources."""
        name, rows = change.name, change.rows
        if rows.everything and change.positions is None:
            self.data[name] = change.new
            self.owned.add(name)
            return
        if name not in self.owned:
            self.data[name] = self.data[name].clone()
            self.owned.add(name)
        values = change.new
        if change.positions is not None:
            values = rows.of(self.data[name])
            put_along(values, change.axis, change.positions, change.new)
            if rows.index is None:
                return
        rows.put(self.data[name], values)


class Step:
    """A tree of some sources permuted, a parameter after the other: indices are made on the host, and uploaded once.

    Only units that move are gathered, as many of each source as of the one with the most (others add some that stay).
    A parameter that the tree permutes along several axes is gathered whole. Nothing changes before `write`.

    Args:
        answers: [m, size] of each group, of the m sources `numbers`.
    """

    def __init__(self, sources: PermutedSources, t: int, numbers: NDArray[np.int64], answers: Answers):
        self.sources = sources
        problem = sources.problem
        units = {g: _moving_units(answer) for g, answer in zip(problem.trees[t], answers, strict=True)}
        arrays = list(answers)
        self._axes: dict[str, list[tuple[int, int | None, int]]] = {}  # name -> axis, positions, where from
        for name in problem.touched[t]:
            axes = problem.axes(t, name)
            for axis, sites in axes.items():
                length = sources.data[name].shape[axis + 1]
                to, origin = (
                    np.concatenate(
                        [s.member.positions(units[s.group][k], problem.groups[s.group].size) for s in sites], axis=1
                    )
                    for k in range(2)
                )
                if len(axes) > 1:
                    every = np.tile(np.arange(length), (len(numbers), 1))
                    np.put_along_axis(every, to, origin, 1)
                    to, origin = np.arange(length)[None], every
                whole = to.shape[1] == length and bool((to[0] == np.arange(length)).all())
                arrays += [origin] if whole else [to, origin]
                at = (axis, None if whole else len(arrays) - 2, len(arrays) - 1)
                self._axes.setdefault(name, []).append(at)
        self.rows, *self._arrays = chosen(numbers, sources.count, *arrays, device=sources.device)
        self.answers: list[Tensor] = self._arrays[: len(answers)]

    def changes(self, differs: Callable[[str], bool]) -> Iterator[Change]:
        """The changes of all parameters; with differences where `differs(name)`. Write each before the next."""
        for name in self._axes:
            yield self._change(name, differs(name))

    def _change(self, name: str, differs: bool) -> Change:
        mine = self.rows.of(self.sources.data[name])
        new, positions, axis = mine, None, 0
        for axis, to, origin in self._axes[name]:
            new = along(new, axis, self._arrays[origin])
            positions = None if to is None else self._arrays[to]
        if not differs:
            return Change(name, self.rows, axis, positions, new, None, None)
        theta = self.sources.problem.theta[name][None]
        if positions is not None:
            theta = along(theta.expand(len(self.rows), *theta.shape[1:]), axis, positions)
            mine = along(mine, axis, positions)
        return Change(name, self.rows, axis, positions, new, theta, new - mine)


def those_that_move(numbers: NDArray[np.int64], answers: Answers) -> tuple[NDArray[np.int64], Answers]:
    """Those of the sources `numbers` that `answers` [m, size] move any unit of, and their answers."""
    moving = np.any([(index != np.arange(index.shape[1])).any(1) for index in answers], axis=0)
    return numbers[moving], tuple(index[moving] for index in answers)


def _moving_units(answer: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Units [m, most] that may change, as many of each source, and what they become: all where most do."""
    moved = answer != np.arange(answer.shape[1])
    most = int(moved.sum(1).max())
    if most > _MOST * answer.shape[1]:
        return np.tile(np.arange(answer.shape[1]), (len(answer), 1)), answer
    units = np.argsort(~moved, axis=1, kind="stable")[:, :most]
    return units, np.take_along_axis(answer, units, 1)


def gains(changes: Iterator[Change]) -> Tensor:
    """[2, m] float64: the sum over changes of <theta, difference>, and of the squares of its terms."""
    totals: Tensor | None = None
    for change in changes:
        assert change.theta is not None
        assert change.difference is not None
        terms = change.difference.double().mul_(change.theta).flatten(1)
        found = torch.stack([terms.sum(1), terms.square_().sum(1)])
        totals = found if totals is None else totals.add_(found)
    assert totals is not None
    return totals


def _sums(values: Sequence[NDArray[np.float64]], count: int) -> NDArray[np.float64]:
    return np.array([math.fsum(value[n] for value in values) for n in range(count)], dtype=np.float64)
