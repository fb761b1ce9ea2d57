"""The part that all descents against one theta share: its parameters in memory order, and which group touches which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fastar.symmetry.batched_index import memory_order
from fastar.symmetry.symmetry import Member, Symmetry


@dataclass(frozen=True)
class Site:
    """A member of a group, with its axis in memory order."""

    group: int
    member: Member
    axis: int


class Problem:
    """The networks' parameters and the sites of their groups; all chunks share it. Read-only.

    `tensors` of a group and `touched` of a tree are the names of the parameters that it permutes, `axes_of` a parameter
    the sites on each of its axes, and `corrected` of a tree the groups whose S_g change when it is permuted.
    """

    def __init__(self, symmetry: Symmetry, theta: Mapping[str, Tensor], sources: Mapping[str, Tensor]):
        self.groups = symmetry.groups
        self.trees = symmetry.trees
        self.names = symmetry.counted(theta, sources)
        self.orders = {name: memory_order(sources[name][0]) for name in self.names}
        self.theta = {n: theta[n].detach().permute(order).contiguous().float() for n, order in self.orders.items()}
        self.sites: dict[str, list[Site]] = {name: [] for name in self.names}
        for g, group in enumerate(self.groups):
            for member in group.members:
                if member.tensor in self.sites:
                    axis = self.orders[member.tensor].index(member.axis)
                    self.sites[member.tensor].append(Site(g, member, axis))
        self.units = [np.arange(group.size) for group in self.groups]
        self.axes_of: dict[str, dict[int, list[Site]]] = {name: {} for name in self.names}
        for name, sites in self.sites.items():
            for site in sites:
                self.axes_of[name].setdefault(site.axis, []).append(site)
        self.tensors = [sorted({m.tensor for m in group.members if m.tensor in self.sites}) for group in self.groups]
        self.touched = [sorted({name for g in tree for name in self.tensors[g]}) for tree in self.trees]
        # On a tensor that a tree permutes along two axes at once the objective is quadratic, and S_g only its slope.
        self.quadratic = [any(self.twice(t, name) for name in touched) for t, touched in enumerate(self.touched)]
        self.corrected = [sorted(self._corrected(t)) for t in range(len(self.trees))]

    def twice(self, t: int, name: str) -> bool:
        """Tell whether tree t lies on two axes of this parameter."""
        return len(self._axes(t, name)) > 1

    def _axes(self, t: int, name: str) -> set[int]:
        """The axes of a parameter that tree t permutes."""
        return {site.axis for site in self.sites[name] if site.group in self.trees[t]}

    def _corrected(self, t: int) -> set[int]:
        """The groups whose S_g change when tree t is permuted: those on another axis of a parameter of its."""
        return {
            site.group for name in self.touched[t] for site in self.sites[name] if self._axes(t, name) != {site.axis}
        }

    def part(self, sources: Mapping[str, Tensor], begin: int, end: int) -> dict[str, Tensor]:
        """The sources `begin` to `end` - 1, [n, ...] in memory order; views where nothing has to be converted."""
        found = {}
        for name, order in self.orders.items():
            rows = sources[name][begin:end].detach().permute(0, *(axis + 1 for axis in order))
            # Rows may lie far apart (one row of a store per source), but each must be contiguous for the products.
            found[name] = (rows if rows[0].is_contiguous() else rows.contiguous()).float()
        return found
