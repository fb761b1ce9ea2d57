"""Labels of a tensor's dimensions: the positions along them, for `fastar.symmetry.positions`.

Most dimensions are labelled by themselves. After a reshape an axis of hidden units may lie along several dimensions,
[B, N, E] read as [B, N, heads, E / heads]: a `Cell` labels them together, one position for each tuple of indices. As
long as operations treat the dimensions alike, any permutation of the cell travels through them. An operation that acts
along one of them (a softmax, a product) demands that the cell's positions lie in blocks (`Constraints.outer`).

Dimensions in no cell stay in place, those in `alike` aside, along which all values are equal.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastar.symmetry.positions import Array, Constraints, Solution

TWO_IN_BLOCKS = "the order inside each block stays, since another axis of the parameter has an order in each block too"


@dataclass(frozen=True, eq=False)
class Cell:
    """Dimensions, ascending, and the positions along them, [their sizes]. None of the sizes is 1."""

    dims: tuple[int, ...]
    at: Array


def cell(dims: Sequence[int], at: Array) -> Cell:
    """A cell whose dimensions come in any order."""
    order = sorted(range(len(dims)), key=dims.__getitem__)
    return Cell(tuple(dims[i] for i in order), at.transpose(order))


@dataclass(frozen=True, eq=False)
class Labels:
    """Labels of a tensor of `shape`. A dimension may be in several cells, whose permutations then agree on it.

    Args:
        numbers: of whole numbers that say which position of a dimension is meant (the largest values'): the positions.
            They move with it, as numbers.
    """

    shape: tuple[int, ...]
    cells: tuple[Cell, ...] = ()
    alike: frozenset[int] = frozenset()
    numbers: Array | None = None

    def touching(self, dims: Collection[int]) -> list[Cell]:
        """The cells that have one of `dims`."""
        return [one for one in self.cells if not set(one.dims).isdisjoint(dims)]

    @property
    def fixed(self) -> set[int]:
        """Dimensions, longer than 1, that stay in place."""
        moving = {d for one in self.cells for d in one.dims} | self.alike
        return {d for d, n in enumerate(self.shape) if n > 1 and d not in moving}

    def moved(self, to: Mapping[int, int] | Sequence[int], shape: Sequence[int]) -> Labels:
        """The same with dimension d called to[d]; those without a name are of size 1, and left out."""
        names = to if isinstance(to, Mapping) else dict(enumerate(to))
        cells = tuple(cell([names[d] for d in one.dims], one.at) for one in self.cells)
        return Labels(tuple(shape), cells, frozenset(names[d] for d in self.alike if d in names))


def fresh(known: Constraints, shape: Sequence[int]) -> Labels:
    """Labels about which nothing is known: each dimension by itself."""
    return Labels(tuple(shape), tuple(Cell((d,), known.fresh((n,))) for d, n in enumerate(shape) if n > 1))


def current(known: Constraints, x: Labels) -> Labels | None:
    """`x` after `Constraints.put_in_blocks`; None where an axis that it has moves by itself along others it has not."""
    if not known.in_blocks:
        return x
    at = {known.array_of(one.at): one.dims[0] for one in x.cells if len(one.dims) == 1}
    cells = []
    for one in x.cells:
        found = known.now(one.at)
        if found is None:
            cells.append(one)
            continue
        arrays, positions = found
        if any(array not in at for array in arrays):
            return None
        cells.append(cell([*(at[array] for array in arrays), *one.dims], positions))
    return Labels(x.shape, tuple(cells), x.alike, x.numbers)


def in_blocks(known: Constraints, x: Labels, blocks: Collection[int], dims: Collection[int]) -> Labels:
    """`x`, whose `dims` move by themselves along `blocks`, if nothing is known of it and it is a parameter."""
    single = {one.dims[0]: one for one in x.cells if len(one.dims) == 1}
    along = [d for d in blocks if d in single]
    changed = False
    for d in dims:
        if along and d in single and d not in along:
            changed |= known.put_in_blocks(single[d].at, [single[k].at for k in along])
    found = current(known, x) if changed else x
    assert found is not None
    return found


def settled(known: Constraints, x: Labels, so_far: Solution | None) -> Labels:
    """Labels of a parameter, at the end: each axis in one cell; one that has to move by itself along others with them.

    Of several that do, in one parameter, all but the longest are held: they would need the others' axes as well.

    Args:
        so_far: the solution before, if any parameter has such an axis.
    """
    found = current(known, x)
    assert found is not None
    cells, several = [], []
    for one in found.cells:
        last = len(one.dims) - 1
        of_blocks = [d for d in one.dims if any(other.dims == (d,) for other in found.cells)]
        (own,) = [d for d in one.dims if d not in of_blocks] or [one.dims[last]]
        if len(one.dims) == 1:
            cells.append(one)
        elif known.has_outer(one.at, [one.dims.index(own)]) or (so_far and so_far.crossed[one.at].any()):
            cells.append(Cell((own,), outer(known, one, [own])))
        else:
            several.append((found.shape[own], own, one))
    several.sort(key=lambda those: those[:2], reverse=True)
    for _, own, one in several[1:]:
        known.missed.append((TWO_IN_BLOCKS, one.at.ravel()))
        alone_at = outer(known, one, [own])
        known.hold(alone_at, TWO_IN_BLOCKS)
        cells.append(Cell((own,), alone_at))
    for _, _, one in several[:1]:
        cells = [other for other in cells if not set(other.dims) & set(one.dims)]
        cells.append(one)
    known.lines += [one.at.ravel() for one in cells if len(one.dims) == 1]
    return Labels(found.shape, tuple(cells))


def outer(known: Constraints, one: Cell, dims: Collection[int]) -> Array:
    """Positions of the blocks in which a cell's positions lie that have the same indices along `dims`, ascending."""
    return known.outer(one.at, [axis for axis, d in enumerate(one.dims) if d in dims])


def hold(known: Constraints, x: Labels, dims: Collection[int], why: str) -> None:
    """Hold the dimensions in place."""
    for one in x.touching(dims):
        stay(known, one, dims, why)


def stay(known: Constraints, one: Cell, dims: Collection[int], why: str | None) -> None:
    """Let a cell's positions keep their indices along `dims`."""
    number = np.zeros([1] * one.at.ndim, np.int64)
    for axis, (d, n) in enumerate(zip(one.dims, one.at.shape, strict=True)):
        if d in dims:
            number = number * n + np.arange(n).reshape([-1 if k == axis else 1 for k in range(one.at.ndim)])
    known.mark(one.at, number, why)


def combine(known: Constraints, shape: Sequence[int], parts: Iterable[Labels], why: str) -> Labels:
    """Labels of a function, value by value, of tensors that are given by their labels in the result's dimensions.

    Where a part has size 1 along a dimension, or its values are alike, it says nothing about it.
    """
    parts = list(parts)
    together = [set(one.dims) for part in parts for one in part.cells if len(one.dims) > 1]
    for dims in together:  # a parameter that meets several dimensions in one cell
        first, *rest = sorted(dims)
        parts = [in_blocks(known, part, [first], rest) for part in parts]
    cells: list[Cell] = []
    fixed: set[int] = set()
    for part in parts:
        mine = part.fixed
        for one in cells:
            if mine & set(one.dims):
                stay(known, one, mine, why)
        for one in part.cells:
            if fixed & set(one.dims):
                stay(known, one, fixed, why)
            for other in list(cells):
                both = set(one.dims) & set(other.dims)
                if both:
                    known.tie(outer(known, one, both), outer(known, other, both))
                if both == set(one.dims):
                    break  # `other` says as much
                if both == set(other.dims):
                    cells.remove(other)
            else:
                cells.append(one)
        fixed |= mine
    alike = {d for d, n in enumerate(shape) if n > 1} - fixed - {d for one in cells for d in one.dims}
    return Labels(tuple(shape), tuple(cells), frozenset(alike))


def broadcast(known: Constraints, shape: Sequence[int], operands: Iterable[Labels], why: str) -> Labels:
    """`combine` of tensors whose last dimensions are the result's."""
    parts = []
    for x in operands:
        missing = len(shape) - len(x.shape)
        names = {d: d + missing for d, n in enumerate(x.shape) if n > 1}
        lengths = [1] * missing + list(x.shape)
        parts.append(x.moved(names, lengths))
    return combine(known, shape, parts, why)


def inside(known: Constraints, x: Labels, dims: Collection[int]) -> Labels:
    """`x`, to which a function that treats all positions along `dims` alike may be applied."""
    for one in x.touching(dims):
        rest = set(one.dims) - set(dims)
        if rest:
            outer(known, one, rest)
    return x


def reduce(known: Constraints, x: Labels, dims: Collection[int], *, keep: bool = False) -> Labels:
    """Labels after a symmetric function (sum, mean, maximum) over `dims`."""
    cells = []
    for one in x.cells:
        rest = tuple(d for d in one.dims if d not in dims)
        if rest:
            cells.append(Cell(rest, outer(known, one, rest)))
    if keep:
        shape = tuple(1 if d in dims else n for d, n in enumerate(x.shape))
        return Labels(shape, _different(cells), x.alike - set(dims))
    left = [d for d in range(len(x.shape)) if d not in dims]
    names = {d: i for i, d in enumerate(left)}
    shape = tuple(x.shape[d] for d in left)
    return Labels(shape, _different(cells), x.alike - set(dims)).moved(names, shape)


def _different(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """Cells of the same dimensions once: their positions agree already."""
    return tuple({one.dims: one for one in cells}.values())


def alone(known: Constraints, x: Labels, d: int) -> Array | None:
    """Positions of dimension `d`, which then moves by itself, whatever the others do. None where it stays."""
    if x.shape[d] == 1 or d in x.fixed:
        return None
    if d in x.alike:
        return known.fresh((x.shape[d],))
    first, *others = (outer(known, one, [d]) for one in x.touching([d]))
    for other in others:
        known.tie(first, other)
    return first


def labelled(shape: Sequence[int], axes: Mapping[int, Array | None]) -> Labels:
    """Labels of dimensions that move by themselves; those not given stay."""
    cells = tuple(Cell((d,), at) for d, at in axes.items() if at is not None and shape[d] > 1)
    return Labels(tuple(shape), cells)
