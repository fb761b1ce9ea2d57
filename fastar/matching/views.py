"""Axes of tensors seen in parts: what a reshape leaves undecided until an operation needs to know it.

A reshape may cut an axis of hidden units into several ([B, N, E] to [B, N, heads, E / heads]) and another one may put
them together again. As long as operations treat the parts alike, any permutation of the axis travels through them, so
each dimension of a tensor is labelled by factors: whole axes, and parts of a view of an axis. An operation that acts
inside one part demands that the axis moves in blocks (`AxisSolver.blocks`); one that needs parts apart from each other
makes them independent axes (`separate`), the outermost moving and the others fixed where nothing better is known.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from math import prod

from fastar.matching.axes import Axis, AxisSolver, CannotSplit, fixed, length_of


@dataclass(frozen=True, eq=False)
class View:
    """An axis read as several, outermost first; none of `lengths` is 1. Two views are never equal, only identical."""

    axis: Axis
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """One of the axes that a view consists of. All parts of a view are in the same tensor, once each."""

    view: View
    index: int


Factor = Axis | Part
Dim = tuple[Factor, ...]  # outermost first


@dataclass(frozen=True)
class Dims:
    """Labels of a tensor's dimensions."""

    dims: tuple[Dim, ...]

    @classmethod
    def plain(cls, axes: Sequence[Axis]) -> Dims:
        """Labels that are whole axes."""
        return cls(tuple((axis,) for axis in axes))

    def axes(self) -> Iterator[Axis]:
        """Every axis that occurs, views' own included."""
        for dim in self.dims:
            for factor in dim:
                yield factor.view.axis if isinstance(factor, Part) else factor


def factor_length(factor: Factor) -> int:
    """Positions of a factor."""
    return factor.view.lengths[factor.index] if isinstance(factor, Part) else length_of(factor)


class Parts:
    """The labels of one tensor while they are worked on. A dimension that is None is broadcast."""

    def __init__(self, solver: AxisSolver, dims: Sequence[Dim | None]):
        self.solver = solver
        self.dims: list[list[Factor] | None] = [None if dim is None else list(dim) for dim in dims]

    def views(self) -> list[View]:
        """The views whose parts occur, in order."""
        factors = [factor for dim in self.dims for factor in dim or ()]
        return list(dict.fromkeys(factor.view for factor in factors if isinstance(factor, Part)))

    def places(self, view: View) -> list[tuple[int, int]]:
        """Dimension and position in it of each part of `view`."""
        found = {
            factor.index: (d, at)
            for d, dim in enumerate(self.dims)
            for at, factor in enumerate(dim or ())
            if isinstance(factor, Part) and factor.view is view
        }
        return [found[index] for index in range(len(view.lengths))]

    def substitute(self, view: View, pieces: Sequence[Sequence[Factor]]) -> None:
        """Put `pieces[i]` where part i of `view` is."""
        for dim in self.dims:
            for at in range(len(dim or ()) - 1, -1, -1):
                factor = dim[at]  # type: ignore[index]
                if isinstance(factor, Part) and factor.view is view:
                    dim[at : at + 1] = pieces[factor.index]  # type: ignore[index]

    def separate(self, view: View) -> None:
        """Make the parts of `view` axes of their own, the outermost moving at most unless more is known."""
        try:
            axes = self.solver.split(view.axis, view.lengths)
        except CannotSplit:
            outer, rest = self.solver.fresh(view.lengths[0]), prod(view.lengths[1:])
            self.solver.unify(view.axis, self.solver.merge([outer, fixed(rest)]))
            axes = [outer, *(fixed(length) for length in view.lengths[1:])]
        self.substitute(view, [(self.solver.resolve(axis),) for axis in axes])

    def flatten(self, d: int) -> Axis:
        """Make dimension `d` one axis; of several factors that can move, the outermost keeps moving."""
        for view in self.views():
            if any(place == d for place, _ in self.places(view)):
                self.separate(view)
        moving = [axis for axis in self.dims[d] or () if not self.solver.is_fixed(axis)]  # type: ignore[arg-type]
        for axis in moving[1:]:
            self.solver.fix(axis)  # type: ignore[arg-type]
        whole = self.solver.merge(self.dims[d] or [])  # type: ignore[arg-type]
        self.dims[d] = [whole]
        return whole

    def split(self, d: int, at: int, outer: int) -> None:
        """Replace the factor at `at` of dimension `d` by two, the first of `outer` positions."""
        dim = self.dims[d]
        assert dim is not None
        factor = dim[at]
        lengths = (outer, factor_length(factor) // outer)
        if isinstance(factor, Part):
            view, i = factor.view, factor.index
            finer = View(view.axis, (*view.lengths[:i], *lengths, *view.lengths[i + 1 :]))
            pieces = [[Part(finer, j + (j > i))] for j in range(len(view.lengths))]
            pieces[i].append(Part(finer, i + 1))
            self.substitute(view, pieces)
            return
        try:
            dim[at : at + 1] = self.solver.split(factor, lengths)
        except CannotSplit:
            view = View(factor, lengths)
            dim[at : at + 1] = [Part(view, 0), Part(view, 1)]

    def settled(self) -> Dims:
        """The labels, with neighbouring parts of one view put together, and factors of one position left out."""
        for view in self.views():
            self._join_neighbours(view)
        out: list[Dim] = []
        for dim in self.dims:
            kept: list[Factor] = []
            for factor in dim or ():
                before = kept[-1] if kept else None
                if factor_length(factor) == 1:
                    continue
                whole = isinstance(factor, tuple) and isinstance(before, tuple)
                if whole and any(self.solver.is_fixed(one) for one in (factor, before)):  # type: ignore[arg-type]
                    kept[-1] = self.solver.merge([before, factor])  # type: ignore[list-item]
                else:
                    kept.append(factor)
            out.append(tuple(kept) or (fixed(prod(factor_length(f) for f in dim or ())),))
        return Dims(tuple(out))

    def _join_neighbours(self, view: View) -> None:
        places = self.places(view)
        lengths = list(view.lengths[:1])
        owner = [0]  # part of the coarser view that each part belongs to
        for (d, at), (before, before_at), length in zip(places[1:], places, view.lengths[1:], strict=False):
            if d == before and at == before_at + 1:
                lengths[-1] *= length
            else:
                lengths.append(length)
            owner.append(len(lengths) - 1)
        if len(lengths) == len(view.lengths):
            return
        coarser = View(view.axis, tuple(lengths))
        seen: set[int] = set()
        pieces: list[list[Factor]] = []
        for part in owner:
            whole: Factor = Part(coarser, part) if len(lengths) > 1 else view.axis
            pieces.append([] if part in seen else [whole])
            seen.add(part)
        self.substitute(view, pieces)


def plain(solver: AxisSolver, labels: Dims) -> tuple[Axis, ...]:
    """Every dimension as one axis, for operations that know nothing of parts."""
    parts = Parts(solver, labels.dims)
    return tuple(parts.flatten(d) for d in range(len(labels.dims)))


def reshape(solver: AxisSolver, labels: Dims, shape: Sequence[int]) -> Dims:
    """Labels after a reshape. CannotSplit where the new dimensions cut units that can move at no common position."""
    if 0 in shape:
        for axis in labels.axes():
            solver.fix(axis)
        return Dims.plain([fixed(n) for n in shape])
    # Dimension 0 is the queue of what has not been placed yet; the others are the new ones.
    parts = Parts(solver, [tuple(factor for dim in labels.dims for factor in dim if factor_length(factor) > 1)])
    for n in shape:
        taken: list[Factor] = []
        parts.dims.append(taken)
        while n > 1:
            queue = parts.dims[0]
            assert queue
            length = factor_length(queue[0])
            if max(length, n) % min(length, n):
                _merge_fixed(solver, queue, n)
                continue
            if length > n:
                parts.split(0, 0, n)
            taken.append(queue.pop(0))
            n //= factor_length(taken[-1])
        if not taken:
            taken.append(fixed(1))
    parts.dims.pop(0)
    return parts.settled()


def _merge_fixed(solver: AxisSolver, queue: list[Factor], n: int) -> None:
    """Put the first two factors together, which must not move: a dimension of `n` ends in the middle of one."""
    for factor in queue[:2]:
        if isinstance(factor, Part) or not solver.is_fixed(factor):
            lengths = " x ".join(str(factor_length(f)) for f in queue[:2])
            raise CannotSplit(f"cuts axes of {lengths} units into {n}")
    queue[:2] = [fixed(prod(factor_length(factor) for factor in queue[:2]))]


def inside(solver: AxisSolver, labels: Dims, along: Collection[int]) -> Dims:
    """Labels on which a function that treats all positions along the dimensions `along` alike may act.

    Where those are the inner parts of a view, the view's axis has to move in blocks; where they are outer ones, parts
    have to be independent.
    """
    parts = Parts(solver, labels.dims)
    for view in parts.views():
        inner = [d in along for d, _ in parts.places(view)]
        if all(inner) or not any(inner):
            continue
        first = inner.index(True)
        if all(inner[first:]):
            solver.blocks(view.axis, prod(view.lengths[first:]))
        else:
            parts.separate(view)
    return parts.settled()


def reduce(solver: AxisSolver, labels: Dims, along: Collection[int], *, keep: bool = False) -> Dims:
    """Labels after a symmetric function (sum, mean, maximum) over the dimensions `along`."""
    parts = Parts(solver, inside(solver, labels, along).dims)
    for view in parts.views():
        left = [d for d, _ in parts.places(view) if d not in along]
        if not left or len(left) == len(view.lengths):
            continue
        lengths = view.lengths[: len(left)]
        outer = solver.blocks(view.axis, prod(view.lengths[len(left) :]))
        shorter = View(outer, lengths)
        pieces: list[list[Factor]] = [[outer] if len(left) == 1 else [Part(shorter, i)] for i in range(len(left))]
        parts.substitute(view, pieces + [[] for _ in view.lengths[len(left) :]])
    dims = parts.dims
    if keep:
        parts.dims = [[fixed(1)] if d in along else dim for d, dim in enumerate(dims)]
    else:
        parts.dims = [dim for d, dim in enumerate(dims) if d not in along]
    return parts.settled()


def cut(solver: AxisSolver, labels: Dims, d: int, start: int, stop: int) -> Dims:
    """Labels of positions start..stop-1 of dimension `d`; units that the cut would go through are fixed."""
    parts = Parts(solver, labels.dims)
    dim = labels.dims[d]
    (factor, *others) = dim
    if not others and isinstance(factor, Part) and factor.index == 0:
        lengths = factor.view.lengths
        rest = prod(lengths[1:])
        axis = solver.cut(factor.view.axis, start * rest, stop * rest)
        shape = (stop - start, *lengths[1:])
        narrowed = View(axis, tuple(n for n in shape if n > 1))
        if stop == start:
            parts.substitute(factor.view, [[fixed(n)] for n in shape])
        elif len(narrowed.lengths) == 1:
            parts.substitute(factor.view, [[fixed(1) if n == 1 else axis] for n in shape])
        else:
            skip = 1 if shape[0] == 1 else 0
            parts.substitute(
                factor.view, [[fixed(1)] if n == 1 else [Part(narrowed, i - skip)] for i, n in enumerate(shape)]
            )
        return parts.settled()
    parts.dims[d] = [solver.cut(parts.flatten(d), start, stop)]
    return parts.settled()


def combine(solver: AxisSolver, first: Sequence[Dim | None], second: Sequence[Dim | None]) -> list[Dim | None]:
    """Labels of a pointwise function of two tensors of as many dimensions, None where one is broadcast."""
    a, b = Parts(solver, first), Parts(solver, second)
    while not (_align(a, b) and _agree(a, b) and _agree(b, a)):
        pass
    out: list[list[Factor] | None] = []
    for one, other in zip(a.dims, b.dims, strict=True):
        if one is None or other is None:
            out.append(other if one is None else one)
            continue
        for x, y in zip(one, other, strict=True):
            if isinstance(x, tuple) and isinstance(y, tuple):
                solver.unify(x, y)
        out.append([y if isinstance(y, Part) and _longer(y, x) else x for x, y in zip(one, other, strict=True)])
    for mine, theirs in ((a, b), (b, a)):
        for view in mine.views():
            _unify_view(view, mine, theirs)
    result = Parts(solver, [None if dim is None else tuple(dim) for dim in out])
    settled = result.settled().dims
    return [None if dim is None else settled[d] for d, dim in enumerate(out)]


def _longer(mine: Part, other: Factor) -> bool:
    return not isinstance(other, Part) or len(mine.view.lengths) > len(other.view.lengths)


def _align(a: Parts, b: Parts) -> bool:
    """Give dimensions that both have the same factors; False when views were separated on the way."""
    for d in range(len(a.dims)):
        at = 0
        while True:
            one, other = a.dims[d], b.dims[d]
            if one is None or other is None or at >= max(len(one), len(other)):
                break
            n, m = factor_length(one[at]), factor_length(other[at])
            if n > m and n % m == 0:
                a.split(d, at, m)
            elif m > n and m % n == 0:
                b.split(d, at, n)
            elif n != m:
                a.flatten(d)
                b.flatten(d)
                return False
            at += 1
    return True


def _partners(view: View, mine: Parts, other: Parts) -> list[Factor | None]:
    """What the other tensor has where the parts of `view` are."""
    out: list[Factor | None] = []
    for d, at in mine.places(view):
        dim = other.dims[d]
        out.append(None if dim is None else dim[at])
    return out


def _agree(mine: Parts, other: Parts) -> bool:
    """Whether every view of `mine` can stay as it is beside the other tensor; else it is separated, and False."""
    for view in mine.views():
        partners = _partners(view, mine, other)
        shared = [factor for factor in partners if factor is not None]
        if not shared:
            continue
        leading = all(factor is not None for factor in partners[: len(shared)])
        first = shared[0]
        if isinstance(first, Part):
            theirs = first.view
            matching = all(
                isinstance(factor, Part) and factor.view is theirs and factor.index == i
                for i, factor in enumerate(shared)
            )
            # Equal views; or one of them is a view of the other's outer parts.
            fits = matching and (len(theirs.lengths) == len(shared) or len(shared) == len(view.lengths))
        else:
            fits = len(shared) == 1
        if not (leading and fits):
            mine.separate(view)
            for theirs in dict.fromkeys(factor.view for factor in shared if isinstance(factor, Part)):
                other.separate(theirs)
            return False
    return True


def _unify_view(view: View, mine: Parts, other: Parts) -> None:
    """Require that `view` moves as what the other tensor has in its place."""
    shared = [factor for factor in _partners(view, mine, other) if factor is not None]
    if not shared:
        return
    (first, *_), count = shared, len(shared)
    if isinstance(first, Part) and len(first.view.lengths) > count:
        return  # seen from the other tensor, this view is the outer part of a longer one
    axis = first.view.axis if isinstance(first, Part) else first
    solver = mine.solver
    solver.unify(solver.blocks(view.axis, prod(view.lengths[count:])), axis)
