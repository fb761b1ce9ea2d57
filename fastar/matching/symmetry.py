"""Permutation symmetries of an architecture: which axes of which tensors must be permuted together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastar.errors import FastarError
from fastar.matching.permutations import Permutations
from fastar.seeds import derive_seed


@dataclass(frozen=True, slots=True)
class Member:
    """One place where a group's units lie: positions offset .. offset + outer * size * inner of an axis of a tensor.

    Args:
        tensor: parameter or buffer name.
        axis: axis of that tensor.
        inner: neighbouring positions that belong to one unit (H * W after flattening [C, H, W]).
        outer: how many times the whole run of units is repeated along the axis.
        offset: where the group starts on the axis (after a concatenation).
    """

    tensor: str
    axis: int
    inner: int = 1
    outer: int = 1
    offset: int = 0

    def positions(self, units: Tensor, size: int) -> Tensor:
        """Positions on the axis, int64 [..., outer * len * inner], of `units` [..., len] of a group of `size` units."""
        outer = torch.arange(self.outer, device=units.device) * (size * self.inner)
        inner = torch.arange(self.inner, device=units.device)
        index = outer[:, None, None] + (units * self.inner)[..., None, :, None] + inner
        return index.flatten(-3) + self.offset


@dataclass(frozen=True, slots=True)
class Group:
    """Hidden units that are permuted together, named after the first module that produces them."""

    name: str
    size: int
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Symmetry:
    """All groups of one architecture.

    Args:
        groups: in the order in which a forward pass reaches them.
        parameters: name -> shape of every parameter, including those that no group moves.
        buffers: name -> shape of every buffer of the state dict.
        tied: parameter name -> the other name of the same tensor; such a name is permuted, but counted once.
    """

    groups: tuple[Group, ...]
    parameters: Mapping[str, tuple[int, ...]]
    buffers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)

    def group(self, name: str) -> Group:
        """The group called `name`."""
        for group in self.groups:
            if group.name == name:
                return group
        raise FastarError(f"no group {name!r}: the groups are {', '.join(g.name for g in self.groups)}")

    def identity(self, count: int | None = None) -> Permutations:
        """Permutations that move nothing, [size] or, with `count`, [count, size]."""
        shape = () if count is None else (count,)
        return Permutations({g.name: torch.arange(g.size).expand(*shape, g.size).contiguous() for g in self.groups})

    def random(self, seed: int, count: int | None = None) -> Permutations:
        """Uniformly random permutations, a function of `seed` alone."""
        out = {}
        for group in self.groups:
            generator = torch.Generator().manual_seed(derive_seed(seed, "permutation", group.name))
            rows = [torch.randperm(group.size, generator=generator) for _ in range(1 if count is None else count)]
            out[group.name] = rows[0] if count is None else torch.stack(rows)
        return Permutations(out)

    def check(self, permutations: Permutations) -> None:
        """Raise FastarError unless `permutations` are of these groups."""
        sizes = {group.name: group.size for group in self.groups}
        given = {name: index.shape[-1] for name, index in permutations.items()}
        if sizes != given:
            wrong = sorted(set(sizes.items()) ^ set(given.items()))[0]
            raise FastarError(
                f"permutations do not fit this architecture (group {wrong[0]!r} of {wrong[1]} units): "
                "derive the symmetry and the permutations from one model"
            )

    def apply(self, permutations: Permutations, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of one network with its units permuted: new tensors of the same memory format.

        Tensors that no group moves are copied too; names that this architecture does not have are an error.

        Raises:
            FastarError: batched permutations, other groups, a missing tensor or one of another shape.
        """
        if permutations.count is not None:
            raise FastarError("apply takes one network's permutations; select(n) one, or use apply_rows")
        self.check(permutations)
        self.check_state(state, "state")
        out = {name: tensor.detach().clone(memory_format=torch.preserve_format) for name, tensor in state.items()}
        self.apply_rows(permutations, {name: tensor[None] for name, tensor in out.items()})
        return out

    def apply_rows(self, permutations: Permutations, sources: Mapping[str, Tensor]) -> None:
        """Permute N networks in place.

        Args:
            permutations: [N, size] per group; [size] permutes all N alike.
            sources: name -> [N, *shape], usually views of one [N, P] store. Names may be missing.
        """
        self.check(permutations)
        for group in self.groups:
            index = permutations[group.name]
            for member in group.members:
                rows = sources.get(member.tensor)
                if rows is None:
                    continue
                if index.ndim == 2 and index.shape[0] != rows.shape[0]:
                    raise FastarError(
                        f"{index.shape[0]} permutations for {rows.shape[0]} sources of {member.tensor!r}: give one each"
                    )
                positions = member.positions(index, group.size).to(rows.device)
                length = positions.shape[-1]
                for n, row in enumerate(rows.unbind()):
                    at = positions if positions.ndim == 1 else positions[n]
                    row.narrow(member.axis, member.offset, length).copy_(row.index_select(member.axis, at))

    def check_state(self, state: Mapping[str, Tensor], where: str, *, leading: int = 0) -> None:
        """Raise FastarError unless `state` has every parameter in its shape; `leading` counts batch axes to ignore."""
        for name, shape in self.parameters.items():
            tensor = state.get(name)
            if tensor is None:
                if name in self.tied and self.tied[name] in state:
                    continue
                raise FastarError(f"{where} lacks parameter {name!r}: it is of another architecture than the model")
            if tuple(tensor.shape[leading:]) != shape:
                raise FastarError(
                    f"{name!r} of {where} has shape {list(tensor.shape[leading:])}, the model's is {list(shape)}: "
                    "it is of another architecture"
                )
        for name in state:
            if name not in self.parameters and name not in self.buffers:
                raise FastarError(f"{where} has a tensor {name!r} that the model lacks: it is of another architecture")
