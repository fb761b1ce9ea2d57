"""Matching by what the units of two networks do: correlations of their activations (git re-basin's section 3.1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastar.errors import FastarError
from fastar.matching.assignment import Solver
from fastar.matching.families import solve_family
from fastar.matching.forwards import Batch, forward, without_statistics
from fastar.matching.networks import check_networks
from fastar.matching.observing import Kind, Observer
from fastar.matching.permutations import Permutations
from fastar.matching.symmetry import Group, Member, Symmetry
from fastar.progress import SILENT, Progress
from fastar.seeds import derive_seed

# Positions of an image or sequence at which units are looked at: neighbours say nearly the same.
POSITIONS = 16

# Which places of a group are looked at: the first kind that it has any of.
_PREFERRED: tuple[Kind, ...] = ("read", "made", "other")

_Key = tuple[str, int]


def match_activations(
    model: nn.Module,
    symmetry: Symmetry,
    theta: Mapping[str, Tensor],
    sources: Mapping[str, Tensor],
    batches: Sequence[Batch],
    *,
    solver: Solver = "auto",
    progress: Progress = SILENT,
) -> Permutations:
    """Permutations [N, size] to start `match_weights` from: those of `correlate_units`, but a source for which they
    lower <theta, pi(theta_n)> stays as it is.

    Arguments and errors as of `correlate_units`.
    """
    found, _ = correlate_units(model, symmetry, theta, sources, batches, solver=solver, progress=progress)
    names = symmetry.counted(theta, sources)
    out = []
    for n in range(len(sources[names[0]])):
        state = {name: sources[name][n] for name in names}
        one = found.select(n)
        worse = _objective(theta, symmetry.apply(one, state), names) < _objective(theta, state, names)
        out.append(symmetry.identity() if worse else one)
    return Permutations.stack(out)


def correlate_units(
    model: nn.Module,
    symmetry: Symmetry,
    theta: Mapping[str, Tensor],
    sources: Mapping[str, Tensor],
    batches: Sequence[Batch],
    *,
    solver: Solver = "auto",
    progress: Progress = SILENT,
) -> tuple[Permutations, tuple[str, ...]]:
    """Permutations [N, size] that pair units whose activations correlate most, all groups in one pass; and the groups
    that could not be observed, whose units stay (inside their blocks, if these move).

    A group's activations are the inputs of every linear map and convolution that reads its units; where there are
    none, the outputs of those that make them; where there are none of these, what norms, scales and shifts with a
    parameter for each unit give out. Each source costs a forward pass of the batches. Batch-norm normalises with the
    batch, so no statistics are needed. A family's assignment is exact: blocks pair by their parent's own activations
    and the best pairing of the units inside. The weights are not looked at: <theta, pi(theta_n)> may fall.

    Args:
        model: of the architecture, with any weights; copied, not touched.
        theta: parameter name -> tensor; buffers may be among them and do not count.
        sources: parameter name -> [N, *shape], on theta's device.
        batches: inputs [batch, ...] as the model takes them, on theta's device.

    Raises:
        FastarError: no batches, activations that are not finite, or not as many for a source as for theta.
    """
    if not batches:
        raise FastarError("matching by activations needs at least one batch of images; give some")
    count, device = check_networks(symmetry, theta, sources)
    names = symmetry.counted(theta, sources)  # the model ties a tied tensor's other name to it
    twin = without_statistics(model, device)
    everywhere = {(member.tensor, member.axis) for group in symmetry.groups for member in group.members}
    found = []
    with torch.no_grad(), progress.task("activations", count, "sources") as advance:
        wanted, kinds = _activations(twin, {name: theta[name] for name in names}, batches, everywhere, "theta")
        seen = {group.name: _chosen(group, kinds) for group in symmetry.groups}
        keys = {(member.tensor, member.axis) for members in seen.values() for member in members}
        wanted = {key: rows for key, rows in wanted.items() if key in keys}
        for n in range(count):
            own, _ = _activations(twin, {name: sources[name][n] for name in names}, batches, keys, f"source {n}")
            for name, axis in keys:
                if (name, axis) not in own or own[name, axis].shape != wanted[name, axis].shape:
                    raise FastarError(
                        f"source {n} shows other numbers of activations at {name!r} than theta: the model's forward "
                        "depends on values; match by weights"
                    )
            one = {}
            for family in symmetry.families:
                groups = [symmetry.groups[g] for g in family]
                tables = [_table(group, seen[group.name], wanted, own) for group in groups]
                for group, index in zip(groups, solve_family(tables, solver=solver), strict=True):
                    one[group.name] = torch.from_numpy(index)
            found.append(Permutations(one))
            advance()
    of_seen = {group.parent for group in symmetry.groups if seen[group.name]}  # blocks move as their units correlate
    unseen = tuple(g.name for g in symmetry.groups if g.members and not seen[g.name] and g.name not in of_seen)
    return Permutations.stack(found), unseen


def _chosen(group: Group, kinds: Mapping[_Key, Kind]) -> list[Member]:
    """The members at which a group is looked at."""
    for kind in _PREFERRED:
        members = [member for member in group.members if kinds.get((member.tensor, member.axis)) == kind]
        if members:
            return members
    return []


def _activations(
    model: nn.Module, state: Mapping[str, Tensor], batches: Sequence[Batch], keys: Iterable[_Key], where: str
) -> tuple[dict[_Key, Tensor], dict[_Key, Kind]]:
    """Values [samples, positions] that run along axes of parameters, for as many of `keys` as are seen; their kinds."""
    wanted = set(keys)
    seen: dict[_Key, list[Tensor]] = {}
    kinds: dict[_Key, Kind] = {}

    def keep(name: str, axis: int, kind: Kind, values: Tensor) -> None:
        if (name, axis) not in wanted:
            return
        rows, kept = values.flatten(0, -2), seen.setdefault((name, axis), [])
        if len(rows) > (most := len(values) * POSITIONS):
            # The same for every network; drawn, since even steps would always meet the same columns of an image.
            generator = torch.Generator().manual_seed(derive_seed(0, "activations", name, axis, len(kept)))
            rows = rows[torch.randint(len(rows), (most,), generator=generator).to(rows.device)]
        kept.append(rows.float())
        kinds[name, axis] = kind

    with Observer({id(tensor): name for name, tensor in state.items()}, keep):
        for batch in batches:
            forward(model, state, batch)
    out = {key: torch.cat(rows) for key, rows in seen.items()}
    for (name, _), rows in out.items():
        if not bool(torch.isfinite(rows).all()):
            raise FastarError(f"{where}: activations at {name!r} are not finite; retrain or remove it")
    return out, kinds


def _table(
    group: Group, members: Sequence[Member], first: Mapping[_Key, Tensor], second: Mapping[_Key, Tensor]
) -> NDArray[np.float32]:
    """Correlations [size, size] of a group's units, summed over `members`; 0 if there are none."""
    if not members:
        return np.zeros((group.size, group.size), dtype=np.float32)
    rows = [
        [_per_unit(one[member.tensor, member.axis], member, group.size) for one in (first, second)]
        for member in members
    ]
    table: NDArray[np.float32] = torch.stack([_correlation(a, b) for a, b in rows]).sum(0).cpu().numpy()
    return table


def _per_unit(rows: Tensor, member: Member, size: int) -> Tensor:
    """[samples, channels] as [samples, size]; channels of one unit become samples of it."""
    positions = torch.from_numpy(member.positions(np.arange(size), size)).to(rows.device)
    picked = rows[:, positions].unflatten(1, (member.outer, size, member.inner))
    return picked.movedim(2, -1).flatten(0, 2)


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    """[size, size] of the units of two networks; 0 for a unit that never changes."""
    a, b = (x - x.mean(0) for x in (first, second))
    a, b = (x / x.norm(dim=0).clamp_min(1e-12) for x in (a, b))
    return a.T @ b


def _objective(theta: Mapping[str, Tensor], state: Mapping[str, Tensor], names: Sequence[str]) -> float:
    return sum(float((theta[name].double() * state[name].double()).sum()) for name in names)
