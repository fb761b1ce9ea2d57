"""Positions along axes of parameters that no group of a symmetry moves, and exchanges of two of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastar.errors import FastarError
from fastar.symmetry.positions import Array, Solution
from fastar.symmetry.symmetry import Symmetry


@dataclass(frozen=True, eq=False)
class Run:
    """Positions along an axis of a parameter that stay in order among themselves.

    Args:
        tensor: name of the parameter.
        axes: the axis; several that are read as one (`Arrangement.axes`), outermost first.
        at: the positions, along the axes flattened.
        length: of the axes.
        inside: the group whose units have these positions inside them, alike in each; None: no group moves them.
    """

    tensor: str
    axes: tuple[int, ...]
    at: Array
    length: int
    inside: str | None = None


@dataclass(frozen=True, eq=False)
class Exchange:
    """Positions `a` of axes of a tensor, flattened, that change places with as many positions `b`."""

    tensor: str
    axes: tuple[int, ...]
    a: Array
    b: Array

    def swap(self, tensor: Tensor) -> None:
        """Do it, in place; doing it twice changes nothing."""
        rows = in_front(tensor, self.axes)
        a, b = (self._index(tensor, at) for at in (self.a, self.b))
        kept = rows[a].clone()
        rows[a] = rows[b]
        rows[b] = kept

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Take what lies at both from another tensor."""
        for at in (self.a, self.b):
            index = self._index(tensor, at)
            in_front(tensor, self.axes)[index] = in_front(values, self.axes)[index]

    def _index(self, tensor: Tensor, at: Array) -> tuple[Tensor, ...]:
        sizes = [tensor.shape[axis] for axis in self.axes]
        return tuple(torch.from_numpy(k) for k in np.unravel_index(at, sizes))


def in_words(tensor: str, axes: Sequence[int]) -> str:
    """A tensor, and axes of it."""
    return f"{tensor} {'axes' if len(axes) > 1 else 'axis'} {', '.join(map(str, axes))}"


def in_front(tensor: Tensor, axes: Sequence[int]) -> Tensor:
    """A view with these axes before the others."""
    return tensor.permute(*axes, *(axis for axis in range(tensor.ndim) if axis not in axes))


def held_runs(symmetry: Symmetry) -> Iterator[Run]:
    """All runs of two positions and more, of every parameter, once where it has several names. What lies several times
    in a unit (`Member.outer`) has other roles there, and is a run each time.

    Raises:
        FastarError: a parameter has axes that are split, or members within others.
    """
    for name, shape in symmetry.parameters.items():
        if name in symmetry.tied:
            continue
        arranged = symmetry.arranged.get(name)
        if name in symmetry.within or (arranged is not None and arranged.split):
            raise FastarError(f"{name!r}: axes that are split, or within others, cannot be certified")
        axes = tuple((d,) for d in range(len(shape))) if arranged is None else arranged.axes
        for number, dims in enumerate(axes):
            length = math.prod(shape[d] for d in dims)
            order = np.arange(length)
            if arranged is not None and dims[0] in arranged.orders:  # of one axis, which is then not merged
                order = np.array(arranged.orders[dims[0]])
            moved = np.zeros(length, bool)
            for group in symmetry.groups:
                for member in group.members:
                    if (member.tensor, member.axis) != (name, number):
                        continue
                    moved[member.positions(np.arange(group.size), group.size)] = True
                    first = member.positions(np.arange(1), group.size).reshape(member.outer, member.inner)
                    for part in first if member.inner > 1 else ():
                        yield Run(name, dims, order[part], length, group.name)
            stays = order[~moved]
            if len(stays) > 1:
                yield Run(name, dims, stays, length)


def alone(run: Run, i: int, j: int) -> Exchange:
    """Two positions of a run by themselves; of one unit, where they are inside units."""
    return Exchange(run.tensor, run.axes, run.at[[i]], run.at[[j]])


def patterns(length: int, count: int, i: int, j: int) -> Iterator[tuple[Array, Array]]:
    """The ways in which positions i and j of `count` may lie on an axis of `length`: as they are, several times after
    each other, or each as a stretch of neighbours."""
    times, rest = divmod(length, count)
    if rest or not times:
        return
    copies = np.arange(times)
    yield i + count * copies, j + count * copies
    if times > 1:
        yield i * times + copies, j * times + copies


def exchange_of(
    solution: Solution, cells: Mapping[str, Sequence[tuple[tuple[int, ...], Array]]], kind: int, units: tuple[int, int]
) -> list[Exchange]:
    """Two units of a class, wherever they lie, and all that is in them.

    Args:
        cells: of each tensor the axes that are labelled together, and the positions along them.
    """
    of = {kind: [units]}
    for child, one in enumerate(solution.classes):
        if one.parent == kind:
            inside = one.count // solution.classes[kind].count
            of[child] = [(units[0] * inside + k, units[1] * inside + k) for k in range(inside)]
    found = []
    for tensor, those in cells.items():
        for axes, at in those:
            flat = at.ravel()
            pairs = [_places(solution, flat, one, *pair) for one, many in of.items() for pair in many]
            a, b = (np.concatenate(side) for side in zip(*pairs, strict=True))
            if len(a):
                found.append(Exchange(tensor, axes, a, b))
    return found


def _places(solution: Solution, at: Array, kind: int, u: int, v: int) -> tuple[Array, Array]:
    """Where two units are among `at`, in one order."""
    mine = solution.kind[at] == kind
    a, b = (np.flatnonzero(mine & (solution.unit[at] == one)) for one in (u, v))
    return a[np.argsort(solution.slot[at[a]])], b[np.argsort(solution.slot[at[b]])]
