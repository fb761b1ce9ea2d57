"""Axes of activations that move with hidden units: in a mixer, a unit of the tokens is observed once for each channel,
and channels are hidden units themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fastar.flat.forward import Batch, forward, gaps, in_float32, on_device
from fastar.matching.activation.record import Kind, Observer, Place
from fastar.symmetry.permutations import Permutations
from fastar.symmetry.random_network import RandomNetwork, State
from fastar.symmetry.symmetry import Group, Member, Symmetry
from fastar.symmetry.verify import DRAWS, moving

# Inputs that are run: one has no batch-norm's statistics, and two show as much as many.
_INPUTS = 2
# Values move if they differ by more than this from where they would be, relative to how much they vary.
_DIFFERS = 1e-3

Key = tuple[str, Place]
"""A parameter and one of its axes, or two of which the second lies within the first."""


@dataclass(frozen=True)
class Along:
    """An axis of observed values, `member.axis`, that moves with a group whose units lie on it as `member` says."""

    group: Group
    member: Member


def moving_axes(
    model: nn.Module, twin: nn.Module, symmetry: Symmetry, batch: Batch, device: torch.device
) -> dict[Key, tuple[Along, ...] | None]:
    """Sites where samples move when hidden units do, and the axes of the values that they move along, in order; None
    where they move in a way that is not understood. At all other sites samples stay.

    Found with random weights: groups are permuted, and what is observed is compared. Where nothing else seems to move
    than the units that are observed (the rule), two forward passes of two inputs are all; else float64 decides.

    Args:
        model: of the architecture, with any weights; copied, not touched.
        twin: its copy `without_statistics`, on `device`.
        batch: some inputs as the model takes them.

    Raises:
        FastarError: something seems to move, and the model does not run in float64.
    """
    trial = RandomNetwork(model, _few(batch), 0)
    state = trial.state(DRAWS[0][0])
    names, short = symmetry.computed_with(state, state), {k: in_float32(v).to(device) for k, v in state.items()}
    wanted = {(member.tensor, member.place) for group in symmetry.groups for member in group.members}
    everything = moving(symmetry, 0)

    def suspected(inputs: Batch) -> set[Key]:
        comparison = _Comparison(symmetry, short, names, lambda s: forward(twin, s, on_device(inputs, device)))
        return comparison.differing(everything, wanted)

    try:
        suspects = suspected(_few(batch))
    except (RuntimeError, IndexError, ValueError):  # a forward may be written for batches of one size
        trial, suspects = RandomNetwork(model, batch, 0), suspected(batch)
    if not suspects:
        return {}
    comparison = _Comparison(symmetry, state, list(state), trial.outputs)
    found: dict[Key, tuple[Along, ...] | None] = dict.fromkeys(comparison.differing(everything, suspects), ())
    for tree in symmetry.trees if found else ():
        groups = [symmetry.groups[g] for g in tree]
        alone = Permutations({**symmetry.identity(), **{group.name: everything[group.name] for group in groups}})
        for key in comparison.differing(alone, set(found)):
            before, along = found[key], comparison.explained(key, alone, groups)
            found[key] = None if before is None or along is None else (*before, along)
    return {
        key: tuple(sorted(axes, key=lambda along: along.member.axis)) if axes else None for key, axes in found.items()
    }


class _Comparison:
    """Values at the sites of a network's groups, before and after its units are permuted."""

    def __init__(self, symmetry: Symmetry, state: State, names: Sequence[str], run: Callable[[State], object]):
        self._symmetry, self._state, self._names, self._run = symmetry, state, names, run
        self._sites: dict[Key, list[tuple[Group, Member]]] = {}
        for group in symmetry.groups:
            for member in group.members:
                self._sites.setdefault((member.tensor, member.place), []).append((group, member))
        self._first: dict[Key, list[Tensor]] = {}
        self._now: dict[Key, list[Tensor]] = {}

    def _values(self, state: State, wanted: set[Key]) -> dict[Key, list[Tensor]]:
        """Values of each site, call after call, less the mean of each unit, the largest of size 1."""
        observed: dict[Key, list[Tensor]] = {}

        def keep(name: str, axis: Place, kind: Kind, values: Tensor) -> None:
            if (name, axis) in wanted:
                centred = values - values.mean(tuple(range(values.ndim - 1))) if values.ndim > 1 else values
                largest = centred.abs().amax().clamp_min(torch.finfo(values.dtype).tiny)
                observed.setdefault((name, axis), []).append((centred / largest).float())

        given = {name: state[name] for name in self._names}
        with (
            torch.no_grad(),
            Observer(
                {id(tensor): name for name, tensor in given.items()},
                keep,
                self._symmetry.arranged,
                self._symmetry.within,
            ),
        ):
            self._run(given)
        return observed

    def differing(self, permutations: Permutations, wanted: set[Key]) -> set[Key]:
        """The sites, of those `wanted`, at which more moves than the units that are observed, if all units of the
        network are so permuted."""
        if not self._first:
            self._first = self._values(self._state, wanted)
        self._now = self._values(self._symmetry.apply(permutations, self._state), wanted)
        return {key for key in self._now if not self._agree(key, self._units(key, permutations))}

    def explained(self, key: Key, permutations: Permutations, groups: Sequence[Group]) -> Along | None:
        """The axis that moves with one of `groups`, of those just compared."""
        units = self._units(key, permutations)
        for axis, length in enumerate(units[0].shape[:-1]):
            for group in groups:
                times = length // group.size
                if group.size < 2 or length % group.size:
                    continue
                for inner in (n for n in range(1, times + 1) if times % n == 0):
                    member = Member("", axis, inner, times // inner)
                    at = torch.from_numpy(member.positions(permutations[group.name].numpy(), group.size))
                    same = all(values.ndim > axis + 1 and values.shape[axis] == length for values in units)
                    if same and self._agree(key, [values.index_select(axis, at) for values in units]):
                        return Along(group, member)
        return None

    def _units(self, key: Key, permutations: Permutations) -> list[Tensor]:
        """Values of a site before, its units permuted."""
        first = self._first[key]
        at = np.arange(first[0].shape[-1])
        for number, (group, member) in enumerate(self._sites[key]):
            units = permutations[group.name].numpy()
            if member.within is not None:  # its axis is merged with that one
                blocks = self._symmetry.blocks[group.name]
                first_of = units.reshape(blocks, -1)[:, :1] // (len(units) // blocks) * (len(at) // blocks)
                if not number:  # whatever is in a block moves with it
                    at = (first_of + np.arange(len(at) // blocks)).reshape(-1)
                inside = first_of + member.inside(units, blocks)
                at.reshape(blocks, -1)[:, member.offset : member.offset + inside.shape[1]] = inside
                continue
            positions = member.positions(units, group.size)
            at[member.offset : member.offset + len(positions)] = positions
        index = torch.from_numpy(at).to(first[0].device)
        return [values.index_select(-1, index) for values in first]

    def _agree(self, key: Key, wanted: Sequence[Tensor]) -> bool:
        found = gaps(wanted, self._now[key], order=2)
        return all(gap <= _DIFFERS * float(one.norm()) for gap, one in zip(found, wanted, strict=True))


def _few(batch: Batch) -> Batch:
    """The first inputs of a batch."""
    tensors = [one for one in tree_leaves(batch) if isinstance(one, Tensor) and one.ndim]
    if len({len(one) for one in tensors}) != 1:
        return batch  # they are not all [batch, ...]
    few: Batch = tree_map_only(Tensor, lambda one: one[:_INPUTS] if one.ndim else one, batch)
    return few


def samples_of(along: Sequence[Along]) -> int:
    """Samples that move as one: all positions of the axes."""
    return math.prod(one.member.outer * one.group.size * one.member.inner for one in along)


def rows_moved(along: Sequence[Along], indices: Mapping[str, NDArray[np.int64]]) -> NDArray[np.int64]:
    """Sources of these samples, [..., samples], once the axes' groups are permuted by `indices` [..., size]."""
    rows = np.zeros(1, np.int64)
    for one in along:
        positions = one.member.positions(indices[one.group.name], one.group.size)
        rows = (rows[..., None] * positions.shape[-1] + positions[..., None, :]).reshape(*positions.shape[:-1], -1)
    return rows
