"""The part that all descents against one theta share: its parameters in memory order, and which group touches which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from fastar.symmetry.batched_index import memory_order
from fastar.symmetry.symmetry import Member, Symmetry


@dataclass(frozen=True)
class Site:
    """A member of a group, with its axis in memory order, and the one that it lies `within`.

    `times` is how often its products count in S_g, `part` the stretch of another axis, (axis, begin, length), that they
    are of. Where children lie within a parent's axis, the S_g of each tells of all that moving blocks and its own units
    does to its stretch: so often the parent's counts less there.
    """

    group: int
    member: Member
    axis: int
    within: int | None = None
    times: int = 1
    part: tuple[int, int, int] | None = None

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes that move with the group."""
        return (self.axis,) if self.within is None else (self.within, self.axis)


class Problem:
    """The networks' parameters as they are read, and the sites of their groups; all chunks share it. Read-only.

    `tensors` of a group are the names of the parameters that count in its S_g, `touched` of a tree those that it
    permutes. `sites` of a parameter are those that count, `axes_of` it all on each of its axes, but those `inside`,
    that lie within another axis. `corrected` of a tree are the groups whose S_g change when it is permuted.
    """

    def __init__(self, symmetry: Symmetry, theta: Mapping[str, Tensor], sources: Mapping[str, Tensor]):
        self.groups = symmetry.groups
        self.trees = symmetry.trees
        self.names = symmetry.counted(theta, sources)
        self.matrices = {name for name in self.names if theta[name].ndim > 1}  # however they are read
        self._symmetry = symmetry
        first = symmetry.read({name: sources[name][0] for name in self.names})
        self.orders = {name: memory_order(one) for name, one in first.items()}
        read = symmetry.read({name: theta[name].detach() for name in self.names})
        self.theta = {n: read[n].permute(order).contiguous().float() for n, order in self.orders.items()}
        self.sites: dict[str, list[Site]] = {name: [] for name in self.names}
        self.axes_of: dict[str, dict[int, list[Site]]] = {name: {} for name in self.names}
        self.inside: dict[str, list[Site]] = {name: [] for name in self.names}
        self.blocks = [symmetry.blocks[group.name] for group in self.groups]
        for g, group in enumerate(self.groups):
            for member in group.members:
                if member.tensor in self.sites:
                    self._place(g, member, symmetry)
        self.units = [np.arange(group.size) for group in self.groups]
        self.tensors = [
            sorted({name for name, sites in self.sites.items() if any(s.group == g for s in sites)})
            for g in range(len(self.groups))
        ]
        self.touched = [sorted({name for g in tree for name in self.tensors[g]}) for tree in self.trees]
        # On a tensor that a tree permutes along two axes at once the objective is quadratic, and S_g only its slope.
        self.quadratic = [any(self.twice(t, name) for name in touched) for t, touched in enumerate(self.touched)]
        # The best order of one child depends on the other, where two lie on different axes within one.
        self.crossed = [
            any(len({site.axis for site in self.inside[name] if site.group in tree}) > 1 for name in touched)
            for tree, touched in zip(self.trees, self.touched, strict=True)
        ]
        self.corrected = [sorted(self._corrected(t)) for t in range(len(self.trees))]

    def _place(self, g: int, member: Member, symmetry: Symmetry) -> None:
        """Note a member of group `g`."""
        name, order = member.tensor, self.orders[member.tensor]
        axis = order.index(member.axis)
        if member.within is not None:
            site = Site(g, member, axis, order.index(member.within))
            self.inside[name].append(site)
            self.sites[name].append(site)
            return
        site = Site(g, member, axis)
        self.axes_of[name].setdefault(axis, []).append(site)
        parts: dict[int, list[tuple[int, int, int]]] = {}
        for group, one in symmetry.inside:
            if one.tensor == name and one.within == member.axis:
                on, length = order.index(one.axis), group.size // symmetry.blocks[group.name] * one.inner * one.outer
                parts.setdefault(on, []).append((on, one.offset, length))
        whole = [on for on, some in parts.items() if sum(part[2] for part in some) == self.theta[name].shape[on]]
        if len(whole) != 1:
            self.sites[name].append(replace(site, times=1 - len(whole)))
        less = [part for on, some in parts.items() if on not in whole for part in some]
        self.sites[name] += [replace(site, times=-1, part=part) for part in less]

    def twice(self, t: int, name: str) -> bool:
        """Tell whether tree t lies on two axes of this parameter."""
        return len(self._axes(t, name)) > 1

    def _axes(self, t: int, name: str) -> set[tuple[int, ...]]:
        """The axes of a parameter that tree t permutes."""
        return {site.axes for site in self.sites[name] if site.group in self.trees[t]}

    def _corrected(self, t: int) -> set[int]:
        """The groups whose S_g change when tree t is permuted: those on another axis of a parameter of its."""
        return {
            site.group for name in self.touched[t] for site in self.sites[name] if self._axes(t, name) != {site.axes}
        }

    def part(self, sources: Mapping[str, Tensor], begin: int, end: int) -> dict[str, Tensor]:
        """The sources `begin` to `end` - 1, [n, ...] in memory order; views where nothing has to be converted."""
        found = {}
        given = self._symmetry.read({name: sources[name][begin:end].detach() for name in self.names}, leading=1)
        for name, order in self.orders.items():
            rows = given[name].permute(0, *(axis + 1 for axis in order))
            # Rows may lie far apart (one row of a store per source), but each must be contiguous for the products.
            found[name] = (rows if rows[0].is_contiguous() else rows.contiguous()).float()
        return found
