"""Permutation symmetries of an architecture: the axes of its tensors that must be permuted together."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastar.errors import FastarError
from fastar.flat.state_check import check_state, tensors_of, ties_of
from fastar.runtime.seeds import derive_seed
from fastar.symmetry.arrangement import Arrangement
from fastar.symmetry.batched_index import Rows, along, chosen, memory_order
from fastar.symmetry.permutations import Permutations


@dataclass(frozen=True, slots=True)
class Member:
    """One site of a group's units: positions offset .. offset + outer * size * inner of an axis of a tensor.

    Args:
        tensor: parameter or buffer name.
        axis: axis of that tensor; of one that is arranged, of what is read of it.
        inner: neighbouring positions that belong to one unit (H * W after flattening [C, H, W]).
        outer: how many times the whole run of units is repeated along the axis.
        offset: where the group starts on the axis (after a concatenation).
        within: of a child, the axis on which its parent's blocks lie, one at each position, if its own axis holds only
            the units of one block (of a convolution read as [groups, out, in], out and in are two children within
            axis 0): the slices of axis `within` move as the parent's member there says, and in slice g this axis by
            tau_g. `inner`, `outer` and `offset` then speak of the units of one block.
    """

    tensor: str
    axis: int
    inner: int = 1
    outer: int = 1
    offset: int = 0
    within: int | None = None

    @property
    def place(self) -> int | tuple[int, int]:
        """The axis, or of one `within` another, both."""
        return self.axis if self.within is None else (self.within, self.axis)

    def inside(self, index: NDArray[np.int64], blocks: int) -> NDArray[np.int64]:
        """Positions on the axis, [..., blocks, length], in each slice of the axis `within`, of units that are permuted
        by `index` [..., size], once the slices have moved."""
        units = index.reshape(*index.shape[:-1], blocks, -1)
        return self.positions(units % units.shape[-1], units.shape[-1])

    def positions(self, units: NDArray[np.int64], size: int) -> NDArray[np.int64]:
        """Positions on the axis, [..., outer * len * inner], of `units` [..., len] of a group of `size` units."""
        if self.inner == self.outer == 1:
            return units + self.offset if self.offset else units
        outer, inner = np.arange(self.outer) * (size * self.inner), np.arange(self.inner)
        index: NDArray[np.int64] = outer[:, None, None] + (units * self.inner)[..., None, :, None] + inner
        return index.reshape(*units.shape[:-1], -1) + self.offset


@dataclass(frozen=True, slots=True)
class Group:
    """Hidden units that are permuted together, named after the first module that produces them.

    A group whose `parent` has a units is made of a blocks of b units: unit g * b + d is the d-th of block g. Whole
    blocks move as the parent's units do, and the units of a block among themselves: index[g * b + d] = sigma(g) * b +
    tau_g(d), where sigma is the parent's permutation and tau_g any of b. So attention heads are a parent, and the units
    inside them a child for queries and keys and another for values; the groups of a group-norm are a parent, their
    channels a child.

    Args:
        name: unique in a symmetry.
        size: units; of a child, a multiple of its parent's.
        members: where the units lie. A parent may have none of its own.
        parent: the name of the group that moves whole blocks of this one. A parent has no parent itself.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    parent: str | None = None


@dataclass(frozen=True)
class Symmetry:
    """All groups of one architecture.

    Args:
        groups: in the order in which a forward pass reaches them; parents come before their children.
        parameters: name -> shape of every parameter, including those that no group moves.
        buffers: name -> shape of every buffer of the state dict.
        tied: name -> the other name of the same tensor; such a name is permuted, but counted once.
        frozen: lines of text, one for each operation whose symmetry could not be proven, and for all units held by
            something that has a value for each and cannot be permuted (a table, a buffer outside the state dict).
        arranged: name -> how a tensor is read before units are looked for in it; all names of a tied one. Few tensors
            of few networks need it.

    Raises:
        FastarError: two groups of one name, a parent that does not come before its child, has a parent itself, or does
            not divide the child's units; an arrangement that does not read its tensor once, or not all names alike.
    """

    groups: tuple[Group, ...]
    parameters: Mapping[str, tuple[int, ...]]
    buffers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    arranged: Mapping[str, Arrangement] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_groups()
        for name, arrangement in self.arranged.items():
            shape = {**self.buffers, **self.parameters}.get(name)
            if shape is None:
                raise FastarError(f"arrangement of {name!r}: there is no such parameter or buffer")
            arrangement.check(shape, repr(name))
        self._check_within()
        for name, other in self.tied.items() if self.arranged else ():
            if self.arranged.get(name) != self.arranged.get(other):
                raise FastarError(f"arrangement of {name!r}: it is one tensor with {other!r}; arrange both alike")

    def _check_groups(self) -> None:
        before: dict[str, Group] = {}
        for group in self.groups:
            if group.name in before:
                raise FastarError(f"two groups are called {group.name!r}: give each a name of its own")
            if group.parent is not None:
                parent = before.get(group.parent)
                if parent is None or parent.parent is not None:
                    why = "does not come before it" if parent is None else "has a parent itself"
                    raise FastarError(f"group {group.name!r}: its parent {group.parent!r} {why}")
                if parent.size == 0 or group.size % parent.size:
                    raise FastarError(
                        f"group {group.name!r} has {group.size} units: its parent {parent.name!r} must divide them "
                        f"into {parent.size} blocks"
                    )
            before[group.name] = group

    def _check_within(self) -> None:
        """Raise FastarError unless the blocks of all members that have `within` lie there as their parent's units."""
        for group, member in self.inside:
            name, axis, within = member.tensor, member.axis, -1 if member.within is None else member.within
            where = f"group {group.name!r}: its member in axis {axis} of {name!r} lies within axis {within}"
            if group.parent is None:
                raise FastarError(f"{where}, but it has no parent: only the units of a child lie in blocks")
            parent, shape = self.group(group.parent), {**self.buffers, **self.parameters}.get(name, ())
            read = self.arranged[name].lengths(shape) if name in self.arranged else list(shape)
            whole = within in range(len(read)) and within != axis and read[within] == parent.size
            if not whole or Member(name, within) not in parent.members:
                raise FastarError(
                    f"{where}: its parent {parent.name!r} must have a member there, whose {parent.size} units are the "
                    f"whole axis; what is read is {read}"
                )

    @cached_property
    def blocks(self) -> dict[str, int]:
        """Group -> its blocks, as many as its parent has units; 1 where it has none."""
        sizes = {group.name: group.size for group in self.groups}
        return {group.name: 1 if group.parent is None else sizes[group.parent] for group in self.groups}

    @cached_property
    def inside(self) -> tuple[tuple[Group, Member], ...]:
        """The members that have `within`, and their groups."""
        return tuple((group, m) for group in self.groups for m in group.members if m.within is not None)

    @cached_property
    def within(self) -> dict[str, set[tuple[int, int]]]:
        """The pairs of axes, of tensors of `inside`, of such members: within, and their own."""
        found: dict[str, set[tuple[int, int]]] = {}
        for _, member in self.inside:
            if member.within is not None:
                found.setdefault(member.tensor, set()).add((member.within, member.axis))
        return found

    def __repr__(self) -> str:
        units = sum(group.size for group in self.groups)
        frozen = f", {len(self.frozen)} places frozen" if self.frozen else ""
        return f"Symmetry({len(self.groups)} groups, {units} units, {len(self.parameters)} parameters{frozen})"

    @cached_property
    def names(self) -> dict[str, tuple[str, ...]]:
        """Every name of each tensor, under the first of them."""
        found: dict[str, list[str]] = {}
        for name in (*self.parameters, *self.buffers):
            found.setdefault(self.tied.get(name, name), []).append(name)
        return {first: tuple(names) for first, names in found.items()}

    @cached_property
    def trees(self) -> tuple[tuple[int, ...], ...]:
        """Trees of groups, as positions in `groups`: a parent and its children, or a group alone."""
        found: dict[str, list[int]] = {}
        for position, group in enumerate(self.groups):
            found.setdefault(group.parent or group.name, []).append(position)
        return tuple(tuple(positions) for positions in found.values())

    @cached_property
    def moved(self) -> tuple[str, ...]:
        """Every parameter, and the buffers that groups permute: what networks differ in."""
        permuted = (member.tensor for group in self.groups for member in group.members)
        return tuple(dict.fromkeys((*self.parameters, *(name for name in permuted if name in self.buffers))))

    def group(self, name: str) -> Group:
        """The group called `name`."""
        for group in self.groups:
            if group.name == name:
                return group
        raise FastarError(f"no group {name!r}: the groups are {', '.join(g.name for g in self.groups)}")

    def identity(self, count: int | None = None) -> Permutations:
        """Permutations that move nothing, [size] or, with `count`, [count, size]."""
        shape = () if count is None else (count,)
        return Permutations(
            {g.name: torch.arange(g.size, device="cpu").expand(*shape, g.size).contiguous() for g in self.groups}
        )

    def random(self, seed: int, count: int | None = None) -> Permutations:
        """Uniformly random permutations, a function of `seed` alone; blocks move with their parent's units."""
        out: dict[str, Tensor] = {}
        for group in self.groups:
            generator = torch.Generator().manual_seed(derive_seed(seed, "permutation", group.name))
            sigma = torch.zeros(1 if count is None else count, 1, dtype=torch.int64, device="cpu")
            sigma = sigma if group.parent is None else out[group.parent]
            size = group.size // sigma.shape[1]
            drawn = [torch.randperm(size, generator=generator, device="cpu") for _ in range(sigma.numel())]
            inside = torch.stack(drawn).unflatten(0, sigma.shape)
            out[group.name] = (sigma[:, :, None] * size + inside).flatten(1)
        return Permutations({name: index[0] if count is None else index for name, index in out.items()})

    def check(self, permutations: Permutations) -> None:
        """Raise FastarError unless `permutations` are of these groups, and move whole blocks as their parents say."""
        sizes = {group.name: group.size for group in self.groups}
        given = {name: index.shape[-1] for name, index in permutations.items()}
        if sizes != given:
            wrong = sorted(set(sizes.items()) ^ set(given.items()))[0]
            raise FastarError(
                f"permutations do not fit this architecture (group {wrong[0]!r} of {wrong[1]} units): "
                "derive the symmetry and the permutations from one model"
            )
        for group in self.groups:
            if group.parent is None:
                continue
            sigma = permutations[group.parent]
            index = permutations[group.name].unflatten(-1, (sigma.shape[-1], -1))
            if bool((index // index.shape[-1] != sigma[..., None]).any()):
                raise FastarError(
                    f"permutation of group {group.name!r} does not move its blocks of {index.shape[-1]} units as "
                    f"its parent {group.parent!r} moves them: take both from one matching"
                )

    def read(self, state: Mapping[str, Tensor], leading: int = 0) -> Mapping[str, Tensor]:
        """`state` as members speak of it: tensors that are arranged are read so, others the same objects.

        `leading` counts batch axes in front.
        """
        read = {n: one.read(state[n], leading) for n, one in self.arranged.items() if n in state}
        return {**state, **read} if read else state

    def apply(self, permutations: Permutations, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of one network with its units permuted: new tensors of the same memory format.

        Tensors that no group moves are copied too; names that this architecture does not have are an error. What is no
        tensor (a module's `get_extra_state`), and the modules' versions (`_metadata`, as of `state_dict()`), are handed
        on.

        Raises:
            FastarError: batched permutations, other groups, a missing tensor or one of another shape.
        """
        if permutations.count is not None:
            raise FastarError("apply takes one network's permutations; select(n) one, or use apply_rows")
        self.check_state(state, "state")
        out = OrderedDict(state)
        if hasattr(state, "_metadata"):
            out._metadata = state._metadata  # type: ignore[attr-defined]
        for name, tensor in state.items():
            if isinstance(tensor, Tensor):
                out[name] = tensor.detach().clone(memory_format=torch.preserve_format)
        self.apply_rows(permutations, {n: tensor[None] for n, tensor in out.items() if isinstance(tensor, Tensor)})
        return out

    def apply_rows(self, permutations: Permutations, sources: Mapping[str, Tensor]) -> None:
        """Permute N networks in place.

        Args:
            permutations: [N, size] per group; [size] permutes all N alike.
            sources: name -> [N, *shape], usually views of one [N, P] store. Names may be missing.

        Raises:
            FastarError: permutations of other groups, or not as many as sources; nothing has moved then.
        """
        self.check(permutations)
        moving = {member.tensor for group in self.groups for member in group.members}
        for name, rows in sources.items():
            if name in moving and permutations.count not in (None, len(rows)):
                raise FastarError(
                    f"{permutations.count} permutations for {len(rows)} sources of {name!r}: give one each"
                )
        one = sum(rows[0].numel() for rows in sources.values() if len(rows))
        indices = {name: index.cpu().numpy() for name, index in permutations.items()}
        self._move(indices, {name: rows for name, rows in sources.items() if name not in self.arranged}, one)
        for name, arrangement in self.arranged.items():
            if name not in sources:
                continue
            rows = sources[name]
            most = max(1, one // max(1, 3 * math.prod(rows.shape[1:])))  # read, moved and put back: each makes a copy
            for begin in range(0, len(rows), most):
                part, these = rows[begin : begin + most], slice(begin, begin + most)
                read = arrangement.read(part, leading=1)
                self._move({g: i if i.ndim == 1 else i[these] for g, i in indices.items()}, {name: read}, one)
                arrangement.write(read, part, leading=1)

    def _move(self, indices: Mapping[str, NDArray[np.int64]], sources: Mapping[str, Tensor], one: int) -> None:
        """Permute N networks in place, as members speak of them.

        Args:
            indices: [N, size] or [size] of each group.
            one: numbers that a network has.
        """
        for group in self.groups:
            index = indices[group.name]
            of_axes: dict[tuple[torch.device, int, Member], list[Member]] = {}  # those whose positions are the same
            for member in group.members:
                rows = sources.get(member.tensor)
                if rows is None:
                    continue
                alike = replace(member, tensor="", axis=0, offset=0)
                of_axes.setdefault((rows.device, len(rows), alike), []).append(member)
            for (device, count, alike), members in of_axes.items():
                each = np.broadcast_to(index, (count, group.size))
                moving = np.flatnonzero((each != np.arange(group.size)).any(1))
                if not len(moving):
                    continue
                if alike.within is None:
                    to = alike.positions(each[moving], group.size)
                else:  # the slices have moved: parents come first
                    to = alike.inside(each[moving], self.blocks[group.name])
                some, at = chosen(moving, count, to, device=device)
                for member in members:
                    _permute(sources[member.tensor], some, at, member, one)

    def counted(self, theta: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> list[str]:
        """The parameters that both have; of a tied tensor's names only the first one given."""
        return [
            name
            for name in self.parameters
            if name in theta and name in sources and not (name in self.tied and self.tied[name] in theta)
        ]

    def computed_with(self, theta: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> list[str]:
        """The parameters that `counted` gives, and the buffers that groups permute: all that a forward pass reads."""
        buffers = (name for name in self.moved if name in self.buffers and name in theta and name in sources)
        return [*self.counted(theta, sources), *buffers]

    def check_state(self, state: Mapping[str, Tensor], where: str, *, leading: int = 0) -> None:
        """Raise FastarError, naming the first differences, unless `state` has every parameter in its shape, and buffers
        at most besides; `leading` counts batch axes to ignore."""
        check_state(self.parameters, self.buffers, self.tied, state, where, leading)


def _permute(sources: Tensor, rows: Rows, positions: Tensor, member: Member, one: int) -> None:
    """`rows` of sources [N, *shape] with `positions` [m, length] of the member's stretch of its axis after each other;
    of a member that has `within`, [m, blocks, length].

    On a GPU as many rows at a time as make a copy of at most `one` numbers, a network's.
    """
    order = memory_order(sources[0])
    x = sources.narrow(member.axis + 1, member.offset, positions.shape[-1]).permute(0, *(axis + 1 for axis in order))
    axis, within = order.index(member.axis), None if member.within is None else order.index(member.within)
    if x.device.type == "cpu":
        for n, at in zip(rows.numbers.tolist(), positions, strict=True):
            x[n].copy_(along(x[n : n + 1], axis, at[None], within)[0])
        return
    for some, part in rows.split(max(1, one // x[0].numel())):
        part.put(x, along(part.of(x), axis, positions[some], within))


def without_groups(model: nn.Module) -> Symmetry:
    """The symmetry of `model`'s architecture that permutes nothing: nothing is traced."""
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    buffers = {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items() if name not in parameters}
    return Symmetry((), parameters, buffers, ties_of(model, ()))
