"""What the hidden units of networks do on the same inputs, made comparable; and kept, since it does not change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastar.errors import FastarError
from fastar.flat.forward import Batch, forward, in_float32, on_device, without_statistics
from fastar.matching.activation.record import Kind, Observer
from fastar.matching.activation.sample_axes import Along, Key, moving_axes, rows_moved, samples_of
from fastar.matching.checks import check_finite
from fastar.runtime.progress import SILENT, Progress
from fastar.runtime.seeds import derive_seed
from fastar.symmetry.permutations import Permutations
from fastar.symmetry.symmetry import Group, Member, Symmetry

# Positions of an image or sequence at which units are looked at: neighbours say nearly the same.
POSITIONS = 16
# Samples (positions of images) of each place, of all batches together.
SAMPLES = 4096
# Kept numbers are of mean 0 and variance 1, of which half precision holds three digits.
KEPT = torch.float16

# Which places of a group are looked at: the first kind that it has any of.
_PREFERRED: tuple[Kind, ...] = ("read", "made", "other")
# A unit moves if it deviates from its mean by more than rounding of that mean.
_STILL = 1e-6

Tables = dict[str, Tensor]
"""Group -> [samples, size], or of N networks [N, samples, size]; groups that could not be observed are missing."""


class UnitActivations:
    """Looks at what the units of networks of one architecture do on the same batches.

    A group's activations are the inputs of every linear map and convolution that reads its units; where there are
    none, the outputs of those that make them; where there are none of these, what norms, scales and shifts with a
    parameter for each unit give out; what the first batch of the first network shows decides. Of each such place at
    most 4096 samples are taken each time a forward passes it, spread over images and positions, the same of every
    network. Networks run in float32, whatever they and the batches are in. Batch-norm normalises with the batch, so no
    statistics are needed.

    Samples of a place may move with another group (`moving_axes`: in a mixer, tokens' hidden units are seen once for
    each channel). Then all positions of that group are looked at, `order` has it matched first, and `rows` says where
    the samples come from once it is. Places whose samples move in another way are left out.

    Args:
        model: of the architecture, with any weights; copied, not touched.
        batches: inputs [batch, ...] as the model takes them; from elsewhere each is brought when it is looked at.
        device: where networks are looked at; `meta` for the shapes alone.

    Raises:
        FastarError: no batches.
    """

    def __init__(self, model: nn.Module, symmetry: Symmetry, batches: Sequence[Batch], device: torch.device):
        if not batches:
            raise FastarError("matching by activations needs at least one batch of images; give some")
        self.symmetry, self.device = symmetry, device
        self._batches = list(batches)
        self.order: list[int] = list(range(len(symmetry.families)))
        self._along: dict[Key, tuple[Along, ...] | None] = {}
        self._model: nn.Module | None = model  # until it has been looked at
        self._twin = without_statistics(model, device)
        for parameter in self._twin.parameters():  # never read: each network brings its own
            parameter.data = parameter.data.new_empty(0)
        self._wanted = {(member.tensor, member.axis) for group in symmetry.groups for member in group.members}
        self._drawn: dict[tuple[Key, int, int], Tensor] = {}
        self._first: tuple[str, dict[Key, torch.Size]] | None = None
        self._members: dict[str, list[Member]] = {}

    def __call__(self, state: Mapping[str, Tensor], where: str) -> Tables:
        """Of each group, [samples, size] float32: its units' activations, place after place, in each of mean 0 and norm
        1 (0 for a unit that never changes), so that the product of two networks' tables is the sum of correlations.

        Args:
            state: parameter name -> tensor, on the device; of buffers those count that groups permute. Others are the
                model's.
            where: what to call the network in errors.

        Raises:
            FastarError: activations that are not finite, or not as many as the first network showed.
        """
        rows = self._rows({name: in_float32(state[name]) for name in self.symmetry.computed_with(state, state)}, where)
        left = Counter((m.tensor, m.axis) for members in self._members.values() for m in members)
        tables = {}
        for group in self.symmetry.groups:
            parts = []
            for member in self._members[group.name]:
                key = member.tensor, member.axis
                left[key] -= 1  # let go after its last use: all tables and all rows would be twice as much
                values = rows[key] if left[key] else rows.pop(key)
                parts.append(_standardised(_per_unit(values, member, group.size)))
            if parts:
                tables[group.name] = torch.cat(parts)
        return tables

    @property
    def unseen(self) -> tuple[str, ...]:
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
        if not any(self._along.get((m.tensor, m.axis)) for m in self._members[group]):
            return None
        assert self._first is not None
        parts, begin = [], 0
        for member in self._members[group]:
            key = member.tensor, member.axis
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
        """Values [samples, positions] that run along axes of parameters, at the places that groups are looked at."""
        seen: dict[Key, list[Tensor]] = {}
        kinds: dict[Key, Kind] = {}
        share = max(1, SAMPLES // len(self._batches))

        def keep(name: str, axis: int, kind: Kind, values: Tensor) -> None:
            key = name, axis
            if key not in self._wanted:
                return
            most, kept = min(len(values) * POSITIONS, share), seen.setdefault(key, [])
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

        with torch.no_grad(), Observer({id(tensor): name for name, tensor in state.items()}, keep):
            for batch in self._batches:
                forward(self._twin, state, on_device(batch, self.device))
                if not self._members:
                    self._choose(kinds, seen)
        rows = {key: torch.cat(seen.pop(key)) for key in list(seen)}
        if self._first is None:
            self._first = where, {key: values.shape for key, values in rows.items()}
        self._check(rows, where)
        return rows

    def _choose(self, kinds: Mapping[Key, Kind], seen: dict[Key, list[Tensor]]) -> None:
        """Of what the first batch of the first network has shown, where each group is looked at; the rest goes."""
        left, shown = list(self.order), set[str]()
        groups_of = [[self.symmetry.groups[g] for g in family] for family in self.symmetry.families]
        self.order = []
        while left:
            # The first whose samples are along groups that have been matched by then.
            ready = (f for f in left if all(self._usable(m, shown) for g in groups_of[f] for m in _chosen(g, kinds)))
            family = next(ready, left[0])
            for group in groups_of[family]:
                usable = tuple(member for member in group.members if self._usable(member, shown))
                self._members[group.name] = _chosen(replace(group, members=usable), kinds)
            shown |= {group.name for group in groups_of[family] if self._members[group.name]}
            self.order.append(family)
            left.remove(family)
        self._wanted = {(m.tensor, m.axis) for members in self._members.values() for m in members}
        for key in seen.keys() - self._wanted:
            del seen[key]

    def _usable(self, member: Member, shown: set[str]) -> bool:
        """Tell whether the samples of a place stay, or move with groups that are `shown` already."""
        along = self._along.get((member.tensor, member.axis), ())
        return along is not None and all(one.group in shown for one in along)

    def _draw(self, key: Key, batch: int, count: int, most: int) -> Tensor:
        """Which of a place's rows are looked at, the same for every network; drawn, since even steps would always meet
        the same columns of an image."""
        known = self._drawn.get((key, batch, count))
        if known is None:
            generator = torch.Generator().manual_seed(derive_seed(0, "activations", *key, batch))
            known = torch.randint(count, (most,), generator=generator, device="cpu").to(self.device)
            self._drawn[key, batch, count] = known
        return known

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


@dataclass(frozen=True)
class _Place:
    """Where a group's table lies in a row: `samples` times `size` numbers from `begin` on."""

    begin: int
    samples: int
    size: int


class ActivationCache:
    """What the units of N sources do, looked at once: matching moves units, not what they do.

    Args:
        measure: computes the activations of a network.
        states: parameter name -> tensor of each source, on any device.
        names: what to call them in errors ("source 3").
        place: makes the [N, width] numbers that are kept, wherever they are to live; by default on the device.

    Raises:
        FastarError: as `UnitActivations`.
    """

    def __init__(
        self,
        measure: UnitActivations,
        states: Iterable[Mapping[str, Tensor]],
        names: Sequence[str],
        *,
        place: Callable[[int, torch.dtype], Tensor] | None = None,
        progress: Progress = SILENT,
    ):
        self.measure = measure
        self._places: dict[str, _Place] = {}
        self.rows = torch.empty(0, 0, dtype=KEPT, device="cpu")
        with progress.task("activations", len(names), "sources") as advance:
            for n, (state, name) in enumerate(zip(states, names, strict=True)):
                tables = measure({key: value.to(measure.device) for key, value in state.items()}, name)
                if not n:
                    self._places, width = _places(tables)
                    if place is not None and width:
                        self.rows = place(width, KEPT)
                    else:
                        self.rows = torch.empty(len(names), width, dtype=KEPT, device=measure.device)
                for group, table in tables.items():
                    self._part(self.rows[n : n + 1], group)[0].copy_(table * len(table) ** 0.5)
                advance()

    def __len__(self) -> int:
        return len(self.rows)

    def permuted(self, permutations: Permutations) -> SourceActivations:
        """All of the sources, once they have been permuted by `permutations` ([N, size], or [size] for all)."""
        return SourceActivations(self, permutations, range(len(self)))

    def tables(self, numbers: Sequence[int]) -> Tables:
        """Of the sources `numbers`: [n, samples, size] float32 on the device, as `UnitActivations` gives."""
        first, count = numbers[0], len(numbers)
        follow = list(numbers) == list(range(first, first + count))
        rows = self.rows[first : first + count] if follow else self.rows[list(numbers)]
        return {
            group: self._part(rows, group).to(self.measure.device).float().div_(place.samples**0.5)
            for group, place in self._places.items()
        }

    def _part(self, rows: Tensor, group: str) -> Tensor:
        place = self._places[group]
        own = rows[:, place.begin : place.begin + place.samples * place.size]
        return own.unflatten(1, (place.samples, place.size))


@dataclass(frozen=True)
class SourceActivations:
    """Sources as they are now: what their units did, and how they have been permuted since.

    Args:
        permutations: [N, size] of all sources that are kept, or [size] for all.
        numbers: which of them these are.
        theta: the tables of the theta that they are compared with, once they were computed.
    """

    cache: ActivationCache
    permutations: Permutations
    numbers: Sequence[int]
    theta: Tables | None = field(default=None, repr=False)

    def with_theta(self, theta: Mapping[str, Tensor]) -> SourceActivations:
        """The same, to be compared with `theta`, which is looked at now.

        Raises:
            FastarError: theta, or what its units do, is not finite.
        """
        try:
            return replace(self, theta=self.cache.measure(theta, "theta"))
        except FastarError:
            for name in self.cache.measure.symmetry.counted(theta, theta):
                check_finite(theta[name], name, "theta")  # then that is why
            raise

    def then(self, moves: Permutations) -> SourceActivations:
        """The same once they have been permuted by `moves` too."""
        return replace(self, permutations=self.permutations.then(moves))

    def part(self, begin: int, end: int | None = None) -> SourceActivations:
        """Those at positions `begin` to `end` - 1 among these."""
        return replace(self, numbers=self.numbers[begin:end])

    def tables(self, begin: int, end: int) -> Tables:
        """As `ActivationCache.tables`, of these at `begin` to `end` - 1, with their units where they are now."""
        numbers = self.numbers[begin:end]
        tables, index = self.cache.tables(numbers), torch.tensor(list(numbers), dtype=torch.int64, device="cpu")
        now = {name: one if one.ndim == 1 else one[index] for name, one in self.permutations.items()}
        indices = {name: one.cpu().numpy() for name, one in now.items()}
        return {
            group: resampled(_moved(table, now[group]), self.cache.measure.rows(group, indices))
            for group, table in tables.items()
        }


def cache_bytes(model: nn.Module, symmetry: Symmetry, batches: Sequence[Batch]) -> int:
    """Bytes that a source takes in `ActivationCache`; from the shapes of the batches, nothing is computed."""
    meta = torch.device("meta")
    measure = UnitActivations(model, symmetry, batches, meta)
    tables = measure(
        {name: torch.empty(shape, device=meta, dtype=torch.float32) for name, shape in symmetry.parameters.items()},
        "the model",
    )
    return KEPT.itemsize * _places(tables)[1]


def stacked(tables: Iterator[Tables]) -> Tables:
    """Several networks' tables as [N, samples, size]."""
    each = list(tables)
    return {group: torch.stack([one[group] for one in each]) for group in each[0]}


def _places(tables: Tables) -> tuple[dict[str, _Place], int]:
    places, width = {}, 0
    for group, table in tables.items():
        places[group] = _Place(width, *table.shape)
        width += table.numel()
    return places, width


def _moved(table: Tensor, index: Tensor) -> Tensor:
    """[n, samples, size] with its units in the order of index [n, size], or [size] for all."""
    return table.gather(2, index.to(table.device).expand(len(table), -1)[:, None].expand_as(table))


def resampled(tables: Tensor, rows: NDArray[np.int64] | None) -> Tensor:
    """[n, samples, size] with its samples in the order of rows [n, samples], or [samples] for all; None: as it is."""
    if rows is None:
        return tables
    index = torch.from_numpy(rows).to(tables.device).expand(len(tables), -1)
    return tables.gather(1, index[:, :, None].expand_as(tables))


def _together(values: Tensor, along: Sequence[Along]) -> Tensor:
    """Values [..., length] as [rows, samples, length], where the samples of a row move among themselves: one sample
    where none move."""
    moving = [one.place.axis for one in along]
    still = [axis for axis in range(values.ndim - 1) if axis not in moving]
    return values.permute(*still, *moving, values.ndim - 1).reshape(-1, samples_of(along), values.shape[-1])


def _chosen(group: Group, kinds: Mapping[Key, Kind]) -> list[Member]:
    """The members at which a group is looked at."""
    for kind in _PREFERRED:
        members = [member for member in group.members if kinds.get((member.tensor, member.axis)) == kind]
        if members:
            return members
    return []


def _per_unit(rows: Tensor, member: Member, size: int) -> Tensor:
    """[samples, channels] as [samples, size]; channels of one unit become samples of it."""
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
