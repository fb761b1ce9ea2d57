"""Lines of text for units that stay in place, though they would move if it were not for something that is named."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastar.symmetry.groups import module_of
from fastar.symmetry.labels import Labels
from fastar.symmetry.positions import Array, Solution

Named = Sequence[tuple[str, Array]]
"""What holds positions, and the positions that it reads or has a value for."""


@dataclass(frozen=True)
class Explained:
    """What a graph says of positions that stay.

    Args:
        tensors: labels of parameters and buffers.
        solution: the units of the groups that were derived.
        free: those that there would be if nothing were held.
        named: what holds positions, in words, and those that it holds.
    """

    tensors: Mapping[str, Labels]
    solution: Solution
    free: Solution
    named: tuple[tuple[str, Array], ...]


def held_by(
    parameters: Mapping[str, Labels], holders: Named, last: Collection[str], solution: Solution, free: Solution
) -> list[str]:
    """A line for each class of units that stay because something has a value for each, or depends on their order.

    Args:
        last: holders that are named only where no other is.
        free: the solution without what holds them. An output is named only where the units that it shows are read by
            several modules: else it is what the network computes.
    """
    lost = _lost(solution, free)
    modules: dict[int, set[str]] = {}  # class -> those whose parameters have its units
    first: dict[int, str] = {}
    for tensor, x in parameters.items():
        for one in x.cells:
            for kind in _kinds(free, one.at) & lost:
                modules.setdefault(kind, set()).add(module_of(tensor))
                if one.dims[0] == 0 or kind not in first:
                    first.setdefault(kind, tensor)
    named: dict[int, list[str]] = {}
    for what, at in holders:
        for kind in _kinds(free, at) & lost & first.keys():
            if len(modules[kind]) > 1 or not what.startswith("output "):
                named.setdefault(kind, []).append(what)
    return [
        f"{module_of(first[kind])} ({free.classes[kind].count} units): held by "
        + ", ".join(dict.fromkeys([name for name in names if name not in last] or names))
        for kind, names in named.items()
    ]


def missed_freedom(parameters: Mapping[str, Labels], held: Named) -> list[str]:
    """A line for each reason why units stay that groups cannot express the freedom of, with the modules."""
    modules: dict[str, list[str]] = {}
    for why, at in held:
        for tensor, x in parameters.items():
            if any(np.isin(one.at, at).any() for one in x.cells):
                modules.setdefault(why, []).append(module_of(tensor))
    return [f"{', '.join(dict.fromkeys(names))}: {why}" for why, names in modules.items()]


def _kinds(solution: Solution, at: Array) -> set[int]:
    """The classes of units that positions are in."""
    return {int(kind) for kind in np.unique(solution.kind[at]) if kind >= 0}


def _lost(solution: Solution, free: Solution) -> set[int]:
    """The classes of `free` of which units cannot move, or not by themselves, in `solution`."""
    out = set()
    for kind, units in enumerate(free.classes):
        at = np.flatnonzero(free.kind == kind)
        moving = at[solution.kind[at] >= 0]
        found = set(zip(solution.kind[moving].tolist(), solution.unit[moving].tolist(), strict=True))
        if len(found) < units.count:
            out.add(kind)
    return out
