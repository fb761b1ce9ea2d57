"""Labels of functions of two tensors, position by position: what has to move together where both are seen in parts."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from fastar.symmetry.axes import AxisSolver
from fastar.symmetry.axis_views import Copies, Dim, Draft, Factor, Part, View, factor_length


def combine(solver: AxisSolver, first: Sequence[Dim | None], second: Sequence[Dim | None]) -> list[Dim | None]:
    """Labels of a pointwise function of two tensors of as many dimensions, None where one is broadcast."""
    a, b = Draft(solver, first), Draft(solver, second)
    for d, (mine, theirs) in enumerate(zip(first, second, strict=True)):
        if mine is not None and theirs is not None:  # what is all alike is as good as broadcast
            if all(isinstance(factor, Copies) for factor in theirs):
                b.dims[d] = None
            elif all(isinstance(factor, Copies) for factor in mine):
                a.dims[d] = None
    while not (_align(a, b) and _agree(a, b) and _agree(b, a)):
        pass
    out: list[list[Factor] | None] = []
    for one, other in zip(a.dims, b.dims, strict=True):
        if one is None or other is None:
            out.append(other if one is None else one)
            continue
        pairs = list(zip(one, other, strict=True))
        for here, there in pairs:
            if isinstance(here, tuple) and isinstance(there, tuple):
                solver.unify(here, there)
        out.append([there if _decides(there, here) else here for here, there in pairs])
    for x, y in ((a, b), (b, a)):
        for view in x.views():
            _unify_view(view, x, y)
    result = Draft(solver, [None if dim is None else tuple(dim) for dim in out])
    settled = result.settled().dims
    return [None if dim is None else settled[d] for d, dim in enumerate(out)]


def _decides(mine: Factor, other: Factor) -> bool:
    """Tell whether `mine` says more than `other`: it is then the result's label."""
    if isinstance(other, Copies) or not isinstance(mine, Part):
        return isinstance(other, Copies)
    return not isinstance(other, Part) or len(mine.view.lengths) > len(other.view.lengths)


def _align(a: Draft, b: Draft) -> bool:
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


def _partners(view: View, mine: Draft, other: Draft) -> list[Factor | None]:
    """The factors of the other tensor where the parts of `view` are; None where it is broadcast or all alike."""
    out: list[Factor | None] = []
    for d, at in mine.sites(view):
        dim = other.dims[d]
        factor = None if dim is None else dim[at]
        out.append(None if isinstance(factor, Copies) else factor)
    return out


def _agree(mine: Draft, other: Draft) -> bool:
    """Tell whether every view of `mine` can stay as it is beside the other tensor; one that cannot is separated."""
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


def _unify_view(view: View, mine: Draft, other: Draft) -> None:
    """Require that `view` moves as what the other tensor has in its place."""
    shared = [factor for factor in _partners(view, mine, other) if factor is not None]
    if not shared:
        return
    (first, *_), count = shared, len(shared)
    if isinstance(first, Part) and len(first.view.lengths) > count:
        return  # seen from the other tensor, this view is the outer part of a longer one
    assert not isinstance(first, Copies)
    axis = first.view.axis if isinstance(first, Part) else first
    solver = mine.solver
    solver.unify(solver.blocks(view.axis, prod(view.lengths[count:])), axis)
