"""Groups of a symmetry, from classes of units and the labels of parameters and buffers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from fastar.symmetry.arrangement import Arrangement
from fastar.symmetry.labels import Labels
from fastar.symmetry.positions import Array, Solution
from fastar.symmetry.symmetry import Group, Member, Symmetry


class Irregular(Exception):
    """Units lie on merged axes in no order that an arrangement can give them. Holds the positions."""

    def __init__(self, at: Array):
        super().__init__("units that lie in no order on several axes")
        self.at = at


def groups_of(
    solution: Solution, tensors: Mapping[str, Labels], first_use: Mapping[str, int], empty: Symmetry
) -> tuple[tuple[Group, ...], dict[str, Arrangement]]:
    """Classes of units as groups, in order of first use, parents directly before their first child.

    Args:
        tensors: labels of parameters and buffers.
        first_use: when they are first used; what never is, stays as it is.
        empty: the symmetry without groups.

    Raises:
        Irregular: see there.
    """
    members: dict[int, list[Member]] = {}
    arranged: dict[str, Arrangement] = {}
    for tensor in sorted(tensors, key=lambda name: first_use.get(name, -1)):
        if tensor not in first_use:
            continue
        placed, arrangement = _members(tensors[tensor], solution)
        for name in empty.names.get(tensor, (tensor,)):
            for kind, member in placed:
                members.setdefault(kind, []).append(replace(member, tensor=name))
            if arrangement is not None:
                arranged[name] = arrangement
    classes = solution.classes
    learned = {kind for kind, found in members.items() if any(m.tensor in empty.parameters for m in found)}
    above = {classes[kind].parent for kind in learned}
    members = {kind: found for kind, found in members.items() if kind in learned or kind in above}
    taken: dict[str, int] = {}
    named: dict[int, str] = {}
    for kind, found in members.items():
        producers = [m.tensor for m in found if m.axis == 0 and m.tensor in empty.parameters]
        named[kind] = _numbered(module_of((producers or [found[0].tensor])[0]), taken)
    for kind in list(members):
        parent = classes[kind].parent
        if parent is not None and parent not in named:
            named[parent] = _numbered(f"{named[kind].partition('#')[0]}:blocks", taken)
    first = {kind: min(first_use[empty.tied.get(m.tensor, m.tensor)] for m in found) for kind, found in members.items()}
    groups: dict[int, Group] = {}
    for kind in sorted(members, key=first.__getitem__):
        parent = classes[kind].parent
        for one in (kind,) if parent is None else (parent, kind):
            over = classes[one].parent
            whose = None if over is None else named[over]
            groups.setdefault(one, Group(named[one], classes[one].count, tuple(members.get(one, ())), whose))
    return tuple(groups.values()), arranged


def _members(x: Labels, solution: Solution) -> tuple[list[tuple[int, Member]], Arrangement | None]:
    """The classes that have units in a tensor, with members without its name, and how it is to be read for them."""
    merged = {d: one.dims for one in x.cells for d in one.dims if len(one.dims) > 1}
    axes = tuple(dict.fromkeys(merged.get(d, (d,)) for d in range(len(x.shape))))
    orders: dict[int, tuple[int, ...]] = {}
    out: list[tuple[int, Member]] = []
    for one in x.cells:
        axis, at = axes.index(one.dims), one.at.ravel()
        kinds = solution.kind[at]
        found = {int(kind): places(solution, at, int(kind)) for kind in np.unique(kinds[kinds >= 0])}
        ordered = sorted(found, key=lambda kind: int(found[kind][0, 0]))
        regular = {kind: runs(found[kind]) for kind in ordered}
        if any(one is None for one in regular.values()):
            here = [found[kind].ravel() for kind in ordered]
            if len(one.dims) > 1:
                raise Irregular(one.at.ravel())
            orders[one.dims[0]] = tuple(int(i) for i in np.concatenate([*here, np.flatnonzero(kinds < 0)]))
            begin = np.cumsum([0, *map(len, here)])
            lie = zip(ordered, begin, strict=False)
            out += [(kind, Member("", axis, found[kind].shape[1], 1, int(offset))) for kind, offset in lie]
            continue
        lines = [(kind, Member("", axis, *run)) for kind, runs_ in regular.items() for run in runs_ or ()]
        out += sorted(lines, key=lambda line: line[1].offset)
    arranged = Arrangement(axes, orders) if merged or orders else None
    return sorted(out, key=lambda line: line[1].axis), arranged


def places(solution: Solution, at: Array, kind: int) -> Array:
    """Where the units of a class are among `at`, [units, positions of each], all in one order."""
    here = np.flatnonzero(solution.kind[at] == kind)
    unit, slot = solution.unit[at[here]], solution.slot[at[here]]
    found = here[np.lexsort((slot, unit))].reshape(solution.classes[kind].count, -1)
    ordered: Array = found[:, np.argsort(found[0])]
    return ordered


def runs(found: Array) -> list[tuple[int, int, int]] | None:
    """(inner, outer, offset) of runs in which units [units, positions of each] lie in order; None if they do not."""
    out: list[tuple[int, int, int]] = []
    units, count = found.shape
    at = 0
    while at < count:
        offset, inner = int(found[0, at]), int(found[1, at] - found[0, at])
        run = offset + np.arange(units)[:, None] * inner + np.arange(max(inner, 0))
        if inner < 1 or not np.array_equal(found[:, at : at + inner], run):
            return None
        before = out[-1] if out else None
        if before is not None and before[0] == inner and before[2] + before[1] * units * inner == offset:
            out[-1] = (inner, before[1] + 1, before[2])
        else:
            out.append((inner, 1, offset))
        at += inner
    return out


def module_of(tensor: str) -> str:
    """The module that a tensor is of; at the top, the tensor itself."""
    module, _, leaf = tensor.rpartition(".")
    return module or leaf


def _numbered(base: str, taken: dict[str, int]) -> str:
    """`base`, or where it is taken `base#1`, `base#2` ..."""
    count = taken[base] = taken.get(base, -1) + 1
    return f"{base}#{count}" if count else base
