"""Permutation groups written by hand, for networks whose graph cannot be traced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from fastar.errors import FastarError, did_you_mean
from fastar.symmetry.random_network import ExampleInputs
from fastar.symmetry.symmetry import Group, Member, Symmetry, without_groups
from fastar.symmetry.verify import verify_symmetry


@dataclass(frozen=True)
class Span:
    """A stretch of an axis: `outer` copies of a group's units after each other, each unit `inner` positions wide.

    `Span("conv1", inner=49)` is what flattening [channels, 7, 7] gives.
    """

    group: str
    inner: int = 1
    outer: int = 1


# A group whose units fill the axis, a span of one, None for an axis that stays, or after each other: groups, spans, and
# numbers of positions that stay.
AxisSpec = str | Span | None | Sequence[str | Span | int]


@dataclass(frozen=True)
class PermutationSpec:
    """Hidden units that move together, as names of groups on the axes of a network's parameters and buffers.

        PermutationSpec({
            "fc1.weight": ("hidden", None), "fc1.bias": ("hidden",),
            "fc2.weight": (None, "hidden"), "fc2.bias": (None,),
        })

    Args:
        axes: name -> one entry per axis: a group, a `Span`, None, or a sequence of groups, spans and numbers of
            positions that stay, which lie after each other. Every parameter has to be there, and batch-norm statistics
            (`running_mean`, `running_var`); other buffers may be. Of parameters that are tied, one name is enough.
        blocks: group -> its parent: the group's units lie in as many blocks as the parent has units, and whole blocks
            move with them (attention heads). A parent has no parent.
        sizes: group -> units, for groups that never fill an axis by themselves.
    """

    axes: Mapping[str, Sequence[AxisSpec]]
    blocks: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)

    def symmetry(self, model: nn.Module, example_inputs: ExampleInputs, *, verify: bool = True) -> Symmetry:
        """The symmetry that is written down, proven like a derived one by running `model` (it is not traced).

        Raises:
            FastarError: a name the model does not have (with the nearest), parameters left out, an axis of another
                length, or permuting the groups changes the model's outputs.
        """
        empty = without_groups(model)
        name = type(model).__name__
        shapes = {**empty.parameters, **empty.buffers}
        self._check_names(name, empty)
        sizes = self._sizes(shapes)
        members: dict[str, list[Member]] = {}
        for tensor in self.axes:
            owner = empty.tied.get(tensor, tensor)
            if tensor != owner and owner in self.axes:
                continue  # it says the same as its owner, which is followed under both names
            for group, member in self._members(tensor, shapes[tensor], sizes):
                members.setdefault(group, []).extend(replace(member, tensor=name) for name in empty.names[owner])
        groups = [Group(one, sizes[one], tuple(sites), self.blocks.get(one)) for one, sites in members.items()]
        known = {group.name for group in groups}
        bare = [Group(one, sizes[one], ()) for one in dict.fromkeys(self.blocks.values()) if one not in known]
        groups.sort(key=lambda group: group.parent is not None)  # parents come before their children
        symmetry = replace(empty, groups=(*bare, *groups))
        if verify:
            verify_symmetry(model, symmetry, example_inputs)
        return symmetry

    def _check_names(self, model: str, empty: Symmetry) -> None:
        names = {**empty.parameters, **empty.buffers}
        for name in self.axes:
            if name not in names:
                hint = did_you_mean(name, names) or "see model.state_dict()"
                raise FastarError(f"PermutationSpec: {model} has no parameter or buffer {name!r}: {hint.strip()}")
        needed = [*empty.parameters, *(n for n in empty.buffers if n.endswith(("running_mean", "running_var")))]
        placed = {empty.tied.get(name, name) for name in self.axes}
        missing = [name for name in needed if empty.tied.get(name, name) not in placed]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            listed = ", ".join(map(repr, missing[:3]))
            raise FastarError(
                f"PermutationSpec leaves out {listed}{more} of {model}: write None for each axis that stays in place"
            )
        for name, owner in empty.tied.items():
            if name in self.axes and self.axes.get(owner, self.axes[name]) != self.axes[name]:
                raise FastarError(f"PermutationSpec: {name!r} and {owner!r} are one tensor: give both the same axes")
        for child, parent in self.blocks.items():
            if parent in self.blocks:
                raise FastarError(f"PermutationSpec.blocks: {parent!r}, the parent of {child!r}, has a parent itself")

    def _entries(self, tensor: str, axis: int, length: int) -> list[Span | int]:
        """The spans of an axis of `length`, and numbers of positions that stay, in order."""
        entry = self.axes[tensor][axis]
        if entry is None:
            return [length]
        out: list[Span | int] = []
        for one in [entry] if isinstance(entry, str | Span) else entry:
            one = Span(one) if isinstance(one, str) else one
            if isinstance(one, Span):
                valid = min(one.inner, one.outer) >= 1
            else:
                valid = isinstance(one, int) and not isinstance(one, bool) and one >= 0
            if not valid:
                raise FastarError(
                    f"PermutationSpec[{tensor!r}], axis {axis}: {one!r} is neither a group, a Span nor a number of "
                    "positions that stay"
                )
            out.append(one)
        return out

    def _sizes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """Units of every group: as given, or the length of an axis that holds the group alone."""
        sizes = dict(self.sizes)
        source = {group: "sizes" for group in sizes}
        used: list[str] = []
        for tensor, axes in self.axes.items():
            if len(axes) != len(shapes[tensor]):
                raise FastarError(
                    f"PermutationSpec[{tensor!r}] names {len(axes)} axes; it has {len(shapes[tensor])}: "
                    f"{list(shapes[tensor])}"
                )
            for axis, length in enumerate(shapes[tensor]):
                entries = self._entries(tensor, axis, length)
                spans = [one for one in entries if isinstance(one, Span)]
                used += [span.group for span in spans]
                if len(entries) != 1 or not spans:
                    continue
                (span,) = spans
                units, rest = divmod(length, span.inner * span.outer)
                where = f"axis {axis} of {tensor!r}"
                if rest or sizes.setdefault(span.group, units) != units:
                    wrong = "needs whole units" if rest else f"has {sizes[span.group]} units ({source[span.group]})"
                    raise FastarError(
                        f"PermutationSpec: {where} has {length} positions, {span.inner * span.outer} to a unit, but "
                        f"group {span.group!r} {wrong}: correct one of them"
                    )
                source.setdefault(span.group, where)
        for group in [*used, *self.blocks, *self.blocks.values()]:
            if group not in sizes:
                raise FastarError(
                    f"PermutationSpec: no axis tells how many units group {group!r} has: give sizes={{{group!r}: ...}}"
                )
        return sizes

    def _members(self, tensor: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> Iterator[tuple[str, Member]]:
        """The groups on the axes of a tensor, each with its site there."""
        for axis, length in enumerate(shape):
            offset = 0
            for one in self._entries(tensor, axis, length):
                if isinstance(one, Span):
                    yield one.group, Member(tensor, axis, one.inner, one.outer, offset)
                offset += sizes[one.group] * one.inner * one.outer if isinstance(one, Span) else one
            if offset != length:
                raise FastarError(
                    f"PermutationSpec: what is written for axis {axis} of {tensor!r} has {offset} positions; the axis "
                    f"has {length}"
                )
