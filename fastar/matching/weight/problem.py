"""The part that all descents against one theta share: its parameters in memory order, and which group touches which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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

    `tensors` of a group and `touched` of a tree are the names of the parameters that it permutes.
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
        self.tensors = [sorted({m.tensor for m in group.members if m.tensor in self.sites}) for group in self.groups]
        self.touched = [sorted({name for g in tree for name in self.tensors[g]}) for tree in self.trees]
        # On a tensor that a tree permutes along two axes at once the objective is quadratic, and S_g only its slope.
        self.quadratic = [any(self.twice(t, name) for name in touched) for t, touched in enumerate(self.touched)]

    def axes(self, t: int, name: str) -> dict[int, list[Site]]:
        """The axes of a parameter that tree t permutes, each with the sites of its groups."""
        found: dict[int, list[Site]] = {}
        for site in self.sites[name]:
            if site.group in self.trees[t]:
                found.setdefault(site.axis, []).append(site)
        return found

    def twice(self, t: int, name: str) -> bool:
        """Tell whether tree t lies on two axes of this parameter."""
        return len(self.axes(t, name)) > 1

    def corrected(self, t: int, name: str) -> list[Site]:
        """The sites of other trees on this parameter whose S_g change when tree t is permuted."""
        axes = self.axes(t, name)
        return [s for s in self.sites[name] if s.group not in self.trees[t] and axes.keys() != {s.axis}]

    def part(self, sources: Mapping[str, Tensor], begin: int, end: int) -> dict[str, Tensor]:
        """The sources `begin` to `end` - 1, [n, ...] in memory order; views where nothing has to be converted."""
        found = {}
        for name, order in self.orders.items():
            rows = sources[name][begin:end].detach().permute(0, *(axis + 1 for axis in order))
            # Rows may lie far apart (one row of a store per source), but each must be contiguous for the products.
            found[name] = (rows if rows[0].is_contiguous() else rows.contiguous()).float()
        return found
