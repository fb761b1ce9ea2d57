"""Axes of tensors in parts: a reshape leaves them undecided until an operation needs to know them.

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

from fastar.symmetry.axes import Axis, AxisSolver, CannotSplit, fixed, length_of


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


@dataclass(frozen=True)
class Copies:
    """Positions that are all alike (an expanded axis, a tensor of one value), in whatever order."""

    length: int


Factor = Axis | Part | Copies
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
                if not isinstance(factor, Copies):
                    yield factor.view.axis if isinstance(factor, Part) else factor


def viewed(axis: Axis, lengths: Sequence[int]) -> list[Factor]:
    """`axis` read as axes of `lengths`, outermost first."""
    if len(lengths) == 1:
        return [axis]
    view = View(axis, tuple(lengths))
    return [Part(view, i) for i in range(len(lengths))]


def factor_length(factor: Factor) -> int:
    """Positions of a factor."""
    if isinstance(factor, Copies):
        return factor.length
    return factor.view.lengths[factor.index] if isinstance(factor, Part) else length_of(factor)


class Draft:
    """The labels of one tensor while they are worked on. A dimension that is None is broadcast."""

    def __init__(self, solver: AxisSolver, dims: Sequence[Dim | None]):
        self.solver = solver
        self.dims: list[list[Factor] | None] = [None if dim is None else list(dim) for dim in dims]

    def views(self) -> list[View]:
        """The views whose parts occur, in order."""
        factors = [factor for dim in self.dims for factor in dim or ()]
        return list(dict.fromkeys(factor.view for factor in factors if isinstance(factor, Part)))

    def sites(self, view: View) -> list[tuple[int, int]]:
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
            if any(site == d for site, _ in self.sites(view)):
                self.separate(view)
        axes: list[Axis] = []
        for factor in self.dims[d] or ():
            assert not isinstance(factor, Part)
            axes.append(self.solver.fresh(factor.length) if isinstance(factor, Copies) else factor)
        self.solver.fix(*[axis for axis in axes if not self.solver.is_fixed(axis)][1:])
        whole = self.solver.merge(axes)
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
        if isinstance(factor, Copies):
            dim[at : at + 1] = [Copies(length) for length in lengths]
            return
        try:
            dim[at : at + 1] = self.solver.split(factor, lengths)
        except CannotSplit:
            dim[at : at + 1] = viewed(factor, lengths)

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
        sites = self.sites(view)
        lengths = list(view.lengths[:1])
        owner = [0]  # part of the coarser view that each part belongs to
        for (d, at), (before, before_at), length in zip(sites[1:], sites, view.lengths[1:], strict=False):
            if d == before and at == before_at + 1:
                lengths[-1] *= length
            else:
                lengths.append(length)
            owner.append(len(lengths) - 1)
        if len(lengths) == len(view.lengths):
            return
        joined = viewed(view.axis, lengths)
        self.substitute(view, [[] if part in owner[:i] else [joined[part]] for i, part in enumerate(owner)])


def reshape(solver: AxisSolver, labels: Dims, shape: Sequence[int]) -> Dims:
    """Labels after a reshape. CannotSplit where the new dimensions cut units that can move at no common position."""
    if 0 in shape:
        solver.fix(*labels.axes())
        return Dims.plain([fixed(n) for n in shape])
    # Dimension 0 is the queue of what has not been placed yet; the others are the new ones.
    draft = Draft(solver, [tuple(factor for dim in labels.dims for factor in dim if factor_length(factor) > 1)])
    for n in shape:
        taken: list[Factor] = []
        draft.dims.append(taken)
        while n > 1:
            queue = draft.dims[0]
            assert queue
            length = factor_length(queue[0])
            if max(length, n) % min(length, n):
                _merge_fixed(solver, queue, n)
                continue
            if length > n:
                draft.split(0, 0, n)
            taken.append(queue.pop(0))
            n //= factor_length(taken[-1])
        if not taken:
            taken.append(fixed(1))
    draft.dims.pop(0)
    return draft.settled()


def _merge_fixed(solver: AxisSolver, queue: list[Factor], n: int) -> None:
    """Put the first two factors together, which must not move: a dimension of `n` ends in the middle of one."""
    for factor in queue[:2]:
        if isinstance(factor, Part) or (isinstance(factor, tuple) and not solver.is_fixed(factor)):
            lengths = " x ".join(str(factor_length(f)) for f in queue[:2])
            raise CannotSplit(f"cuts axes of {lengths} units into {n}")
    queue[:2] = [fixed(prod(factor_length(factor) for factor in queue[:2]))]


def inside(solver: AxisSolver, labels: Dims, along: Collection[int]) -> Dims:
    """Labels on which a function that treats all positions along the dimensions `along` alike may act.

    Where those are the inner parts of a view, the view's axis has to move in blocks; where they are outer ones, parts
    have to be independent.
    """
    draft = Draft(solver, labels.dims)
    for view in draft.views():
        inner = [d in along for d, _ in draft.sites(view)]
        if all(inner) or not any(inner):
            continue
        first = inner.index(True)
        if all(inner[first:]):
            solver.blocks(view.axis, prod(view.lengths[first:]))
        else:
            draft.separate(view)
    return draft.settled()


def reduce(solver: AxisSolver, labels: Dims, along: Collection[int], *, keep: bool = False) -> Dims:
    """Labels after a symmetric function (sum, mean, maximum) over the dimensions `along`."""
    draft = Draft(solver, inside(solver, labels, along).dims)
    for view in draft.views():
        left = [d for d, _ in draft.sites(view) if d not in along]
        if not left or len(left) == len(view.lengths):
            continue
        outer = solver.blocks(view.axis, prod(view.lengths[len(left) :]))
        kept = viewed(outer, view.lengths[: len(left)])
        draft.substitute(view, [*([factor] for factor in kept), *([] for _ in view.lengths[len(left) :])])
    draft.dims = [[fixed(1)] if d in along else dim for d, dim in enumerate(draft.dims) if keep or d not in along]
    return draft.settled()


def cut(solver: AxisSolver, labels: Dims, d: int, start: int, stop: int) -> Dims:
    """Labels of positions start..stop-1 of dimension `d`; units that the cut would go through are fixed."""
    (factor, *others) = labels.dims[d]
    if not others and isinstance(factor, Copies):
        return Dims((*labels.dims[:d], (Copies(stop - start),), *labels.dims[d + 1 :]))
    draft = Draft(solver, labels.dims)
    if not others and isinstance(factor, Part) and factor.index == 0:
        count, lengths = stop - start, factor.view.lengths[1:]
        axis = solver.cut(factor.view.axis, start * prod(lengths), stop * prod(lengths))
        if count > 1:
            left = viewed(axis, (count, *lengths))
        else:
            left = [fixed(count), *(viewed(axis, lengths) if count else map(fixed, lengths))]
        draft.substitute(factor.view, [[one] for one in left])
    else:
        draft.dims[d] = [solver.cut(draft.flatten(d), start, stop)]
    return draft.settled()
