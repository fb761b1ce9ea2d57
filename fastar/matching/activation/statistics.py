"""Standardised activations of hidden units on shared inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastar.errors import FastarError
from fastar.flat.forward import Batch, forward, in_float32, on_device, without_statistics
from fastar.matching.activation.record import Kind, Observer, Place
from fastar.matching.activation.sample_axes import Along, Key, moving_axes, rows_moved, samples_of
from fastar.runtime.seeds import derive_seed
from fastar.symmetry.batched_index import along
from fastar.symmetry.symmetry import Group, Member, Symmetry

# Positions of an image or sequence that are taken: activations of neighbours are nearly the same.
POSITIONS = 16
# Samples (positions of images) at each site, of all batches together.
SAMPLES = 4096

# Sites of a group that are observed: the first kind that it has any of.
_PREFERRED: tuple[Kind, ...] = ("read", "made", "other")
# A unit moves if it deviates from its mean by more than rounding of that mean.
_STILL = 1e-6

Tables = dict[str, Tensor]
"""Group -> [samples, size], or of N networks [N, samples, size]; groups that could not be observed are missing."""


class UnitActivations:
    """Standardised activations of networks of one architecture on the same batches.

    A group's activations are the inputs of every linear map and convolution that reads its units; where there are
    none, the outputs of those that make them; where there are none of these, what norms, scales and shifts with a
    parameter for each unit give out; what the first batch of the first network shows decides. At each such site at
    most `samples` are taken each time a forward passes it, spread over images and positions, the same of every
    network. Networks run in float32, whatever they and the batches are in. Batch-norm normalises with the batch, so no
    statistics are needed.

    Samples at a site may move with another group (`moving_axes`: in a mixer, tokens' hidden units are observed once
    for each channel). Then all positions of that group are taken, `order` has it matched first, and `rows` says where
    the samples come from once it is. Sites whose samples move in another way are left out.

    Args:
        model: of the architecture, with any weights; copied, not touched.
        batches: inputs [batch, ...] as the model takes them; from elsewhere each is brought when it is used.
        device: where networks run; `meta` for the shapes alone.
        samples: the most that are taken at a site.

    Raises:
        FastarError: no batches.
    """

    def __init__(
        self,
        model: nn.Module,
        symmetry: Symmetry,
        batches: Sequence[Batch],
        device: torch.device,
        samples: int = SAMPLES,
    ):
        if not batches:
            raise FastarError("matching by activations needs at least one batch of data; give some")
        self.symmetry, self.device = symmetry, device
        self._batches, self._samples = list(batches), samples
        self.order: list[int] = list(range(len(symmetry.trees)))
        self._along: dict[Key, tuple[Along, ...] | None] = {}
        self._model: nn.Module | None = model  # until its sites are known
        self._twin = without_statistics(model, device)
        for parameter in self._twin.parameters():  # never read: each network brings its own
            parameter.data = parameter.data.new_empty(0)
        self._wanted = {(member.tensor, member.place) for group in symmetry.groups for member in group.members}
        self._first: tuple[str, dict[Key, torch.Size]] | None = None
        self._members: dict[str, list[Member]] = {}

    def __call__(self, state: Mapping[str, Tensor], where: str) -> Tables:
        """Each group's activations, [samples, size] float32, site after site, at each of mean 0 and norm
        1 (0 for a unit that never changes), so that the product of two networks' tables is the sum of correlations.

        Args:
            state: parameter name -> tensor, on the device; of buffers those count that groups permute. Others are the
                model's.
            where: what to call the network in errors.

        Raises:
            FastarError: activations that are not finite, or not as many as the first network showed.
        """
        rows = self._rows({name: in_float32(state[name]) for name in self.symmetry.computed_with(state, state)}, where)
        left = Counter((m.tensor, m.place) for members in self._members.values() for m in members)
        tables = {}
        for group in self.symmetry.groups:
            parts = []
            for member in self._members[group.name]:
                key = member.tensor, member.place
                left[key] -= 1  # let go after its last use: all tables and all rows would be twice as much
                values = rows[key] if left[key] else rows.pop(key)
                parts.append(_standardised(_per_unit(values, member, group.size, self.symmetry.blocks[group.name])))
            if parts:
                tables[group.name] = torch.cat(parts)
        return tables

    @property
    def unobserved(self) -> tuple[str, ...]:
        """The groups that the first network did not show; blocks whose parent it showed are not among them."""
        shown = {group.parent for group in self.symmetry.groups if self._members[group.name]}
        return tuple(
            group.name
            for group in self.symmetry.groups
            if group.members and not self._members[group.name] and group.name not in shown
        )

    def rows(self, group: str, indices: Mapping[str, NDArray[np.int64]]) -> NDArray[np.int64] | None:
        """Sources of the samples of a group's table, [samples] or [N, samples], once the network's units are
        permuted by `indices` [size] or [N, size]; None: they stay."""
        if not any(self._along.get((m.tensor, m.place)) for m in self._members[group]):
            return None
        assert self._first is not None
        parts, begin = [], 0
        for member in self._members[group]:
            key = member.tensor, member.place
            count, times = self._first[1][key][0], member.outer * member.inner
            along = self._along.get(key) or ()
            together = samples_of(along)
            moved = rows_moved(along, indices)[..., None, :] + together * np.arange(count // together)[:, None]
            index = moved.reshape(*moved.shape[:-2], -1)[..., None] * times + np.arange(times)
            parts.append(begin + index.reshape(*index.shape[:-2], -1))
            begin += count * times
        shape = np.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return np.concatenate([np.broadcast_to(part, (*shape, part.shape[-1])) for part in parts], -1)

    def _rows(self, state: Mapping[str, Tensor], where: str) -> dict[Key, Tensor]:
        """Values [samples, positions] that run along axes of parameters, at the sites where groups are observed."""
        observed: dict[Key, list[Tensor]] = {}
        kinds: dict[Key, Kind] = {}
        share = max(1, self._samples // len(self._batches))

        def keep(name: str, axis: Place, kind: Kind, values: Tensor) -> None:
            key = name, axis
            if key not in self._wanted:
                return
            most, kept = min(len(values) * POSITIONS, share), observed.setdefault(key, [])
            rows = _together(values, self._along.get(key) or ())
            if len(rows) > (most := max(1, most // rows.shape[1])):
                rows = rows[self._draw(key, len(kept), len(rows), most)]
            kept.append(rows.flatten(0, -2).float())
            kinds[key] = kind

        if self._model is not None:
            if self.device.type != "meta":  # shapes do not say what moves
                self._along = moving_axes(self._model, self._twin, self.symmetry, self._batches[0], self.device)
                self._wanted -= {key for key, along in self._along.items() if along is None}
            self._model = None

        with (
            torch.no_grad(),
            Observer(
                {id(tensor): name for name, tensor in state.items()}, keep, self.symmetry.arranged, self.symmetry.within
            ),
        ):
            for batch in self._batches:
                forward(self._twin, state, on_device(batch, self.device))
                if not self._members:
                    self._choose(kinds, observed)
        rows = {key: torch.cat(observed.pop(key)) for key in list(observed)}
        if self._first is None:
            self._first = where, {key: values.shape for key, values in rows.items()}
        self._check(rows, where)
        return rows

    def _choose(self, kinds: Mapping[Key, Kind], observed: dict[Key, list[Tensor]]) -> None:
        """Choose the sites of each group by what the first batch of the first network has shown; the rest goes."""
        left, shown = list(self.order), set[str]()
        groups_of = [[self.symmetry.groups[g] for g in tree] for tree in self.symmetry.trees]
        self.order = []
        while left:
            # The first whose samples are along groups that have been matched by then.
            ready = (t for t in left if all(self._usable(m, shown) for g in groups_of[t] for m in _chosen(g, kinds)))
            t = next(ready, left[0])
            for group in groups_of[t]:
                usable = tuple(member for member in group.members if self._usable(member, shown))
                self._members[group.name] = _chosen(replace(group, members=usable), kinds)
            shown |= {group.name for group in groups_of[t] if self._members[group.name]}
            self.order.append(t)
            left.remove(t)
        self._wanted = {(m.tensor, m.place) for members in self._members.values() for m in members}
        for key in observed.keys() - self._wanted:
            del observed[key]

    def _usable(self, member: Member, shown: set[str]) -> bool:
        """Tell whether the samples at a site stay, or move with groups that are `shown` already."""
        along = self._along.get((member.tensor, member.place), ())
        return along is not None and all(one.group.name in shown for one in along)

    def _draw(self, key: Key, batch: int, count: int, most: int) -> Tensor:
        """Rows of a site that are taken, the same for every network; drawn, since even steps would always meet the same
        columns of an image."""
        places = (key[1],) if isinstance(key[1], int) else key[1]
        generator = torch.Generator().manual_seed(derive_seed(0, "activations", key[0], *places, batch))
        return torch.randint(count, (most,), generator=generator, device="cpu").to(self.device)

    def _check(self, rows: Mapping[Key, Tensor], where: str) -> None:
        assert self._first is not None
        first, shapes = self._first
        for key, shape in shapes.items():
            if key not in rows or rows[key].shape != shape:
                raise FastarError(
                    f"{where} shows other numbers of activations at {key[0]!r} than {first}: the model's forward "
                    "depends on values; match by weights"
                )
        if self.device.type == "meta" or not rows:
            return
        # A sum is not finite if one of its terms is not; the device is waited for once.
        if bool(torch.isfinite(torch.stack([values.sum() for values in rows.values()])).all()):
            return
        for (name, _), values in rows.items():
            if not bool(torch.isfinite(values).all()):
                remedy = "lower its learning rate" if where == "theta" else "retrain or remove it"
                raise FastarError(f"{where}: activations at {name!r} are not finite; {remedy}")


def resampled(tables: Tensor, rows: NDArray[np.int64] | None) -> Tensor:
    """[n, samples, size] with its samples in the order of rows [n, samples], or [samples] for all; None: as it is."""
    if rows is None:
        return tables
    return along(tables, 0, torch.from_numpy(rows).to(tables.device).expand(len(tables), -1))


def _together(values: Tensor, along: Sequence[Along]) -> Tensor:
    """Values [..., length] as [rows, samples, length], where the samples of a row move among themselves: one sample
    where none move."""
    moving = [one.member.axis for one in along]
    still = [axis for axis in range(values.ndim - 1) if axis not in moving]
    return values.permute(*still, *moving, values.ndim - 1).reshape(-1, samples_of(along), values.shape[-1])


def _chosen(group: Group, kinds: Mapping[Key, Kind]) -> list[Member]:
    """The members at which a group is observed."""
    for kind in _PREFERRED:
        members = [member for member in group.members if kinds.get((member.tensor, member.place)) == kind]
        if members:
            return members
    return []


def _per_unit(rows: Tensor, member: Member, size: int, blocks: int) -> Tensor:
    """[samples, channels] as [samples, size]; channels of one unit become samples of it."""
    if member.within is not None:
        size //= blocks
        positions = torch.from_numpy(member.positions(np.arange(size), size)).to(rows.device)
        picked = rows.unflatten(1, (blocks, -1))[..., positions].unflatten(2, (member.outer, size, member.inner))
        return picked.permute(0, 2, 4, 1, 3).flatten(0, 2).flatten(1)
    positions = torch.from_numpy(member.positions(np.arange(size), size)).to(rows.device)
    picked = rows[:, positions].unflatten(1, (member.outer, size, member.inner))
    return picked.movedim(2, -1).flatten(0, 2)


def _standardised(x: Tensor) -> Tensor:
    """[samples, size] with columns of mean 0 and norm 1; 0 for a unit that never changes."""
    mean = x.mean(0)
    x = x - mean
    norm = x.norm(dim=0)
    still = norm <= _STILL * len(x) ** 0.5 * mean.abs()
    return x / norm.clamp_min(1e-12).masked_fill(still, torch.inf)
