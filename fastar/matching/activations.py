"""Where to start the matching, from what the units of two networks do: correlations of their activations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fastar.errors import FastarError
from fastar.matching.assignment import Solver, solve_assignment
from fastar.matching.permutations import Permutations
from fastar.matching.symmetry import Member, Symmetry
from fastar.progress import SILENT, Progress
from fastar.seeds import derive_seed

# Positions of an image at which a convolution's outputs are looked at: neighbours say nearly the same.
POSITIONS = 16


def match_activations(
    model: nn.Module,
    symmetry: Symmetry,
    theta: Mapping[str, Tensor],
    sources: Mapping[str, Tensor],
    batches: Sequence[Tensor],
    *,
    solver: Solver = "auto",
    progress: Progress = SILENT,
) -> Permutations:
    """Permutations [N, size] that pair units whose activations correlate most (git re-basin's section 3.1).

    A start for `match_weights`, which needs no agreement of neighbouring layers: all groups in one pass. It needs a few
    batches of images; each source costs a forward pass of them. A group's activations are the outputs of every linear
    or convolution that makes its units; a group that none makes stays as it is. Batch-norm normalises with the batch,
    so no statistics are needed. A source for which the result lowers <theta, pi(theta_n)> stays as it is too.

    Args:
        model: of the architecture, with any weights; copied, not touched.
        theta: parameter name -> tensor; buffers may be among them and do not count.
        sources: parameter name -> [N, *shape], on theta's device.
        batches: images [batch, ...] as the model takes them, on theta's device.

    Raises:
        FastarError: no batches, or activations that are not finite.
    """
    if not batches:
        raise FastarError("matching by activations needs at least one batch of images; give some")
    first = theta[next(name for name in symmetry.parameters if name in theta)]
    count = next(tensor.shape[0] for name, tensor in sources.items() if name in symmetry.parameters)
    twin = copy.deepcopy(model).to(first.device).eval()
    for module in twin.modules():
        if isinstance(module, _BatchNorm):
            module.train()
            module.track_running_stats = False
    makers = _makers(twin, symmetry)
    names = [name for name in symmetry.parameters if name in theta and name in sources]
    found = []
    with torch.no_grad(), _recording(twin, makers) as record, progress.task("activations", count, "sources") as advance:
        wanted = record({name: theta[name] for name in names}, batches, "theta")
        for n in range(count):
            state = {name: sources[name][n] for name in names}
            own = record(state, batches, f"source {n}")
            one = {g.name: torch.arange(g.size) for g in symmetry.groups}
            for group in symmetry.groups:
                tables = [
                    _correlation(
                        _per_unit(wanted[module], member, group.size), _per_unit(own[module], member, group.size)
                    )
                    for module, member in makers.get(group.name, [])
                ]
                if tables:
                    one[group.name] = torch.from_numpy(solve_assignment(torch.stack(tables).sum(0), solver=solver))
            permutations = Permutations(one)
            if _objective(theta, symmetry.apply(permutations, state), names) < _objective(theta, state, names):
                permutations = symmetry.identity()
            found.append(permutations)
            advance()
    return Permutations.stack(found)


def _makers(model: nn.Module, symmetry: Symmetry) -> dict[str, list[tuple[str, Member]]]:
    """Group -> the modules whose outputs are its units, and where they lie among the outputs."""
    modules = dict(model.named_modules())
    out: dict[str, list[tuple[str, Member]]] = {}
    for group in symmetry.groups:
        for member in group.members:
            name, _, leaf = member.tensor.rpartition(".")
            module = modules.get(name)
            makes = isinstance(module, nn.Linear | _ConvNd) and not isinstance(module, _ConvTransposeNd)
            if makes and leaf == "weight" and member.axis == 0:
                out.setdefault(group.name, []).append((name, member))
    return out


@contextmanager
def _recording(model: nn.Module, makers: Mapping[str, Sequence[tuple[str, Member]]]) -> Iterator[_Recorder]:
    recorder = _Recorder(model, sorted({name for made in makers.values() for name, _ in made}))
    try:
        yield recorder
    finally:
        recorder.close()


class _Recorder:
    """Outputs of some modules during forward passes, as [samples, channels]."""

    def __init__(self, model: nn.Module, names: Sequence[str]):
        self._model = model
        self._seen: dict[str, list[Tensor]] = {}
        self._hooks = [model.get_submodule(name).register_forward_hook(self._hook(name)) for name in names]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            values = output if isinstance(module, nn.Linear) else output.movedim(1, -1)
            rows = values.flatten(0, -2)
            seen = self._seen.setdefault(name, [])
            if len(rows) > (most := len(output) * POSITIONS):
                # The same for every network; drawn, since even steps would always meet the same columns of an image.
                generator = torch.Generator().manual_seed(derive_seed(0, "activations", name, len(seen)))
                rows = rows[torch.randint(len(rows), (most,), generator=generator).to(rows.device)]
            seen.append(rows.float())

        return keep

    def __call__(self, state: Mapping[str, Tensor], batches: Sequence[Tensor], where: str) -> dict[str, Tensor]:
        self._seen.clear()
        for images in batches:
            torch.func.functional_call(self._model, dict(state), (images,))
        out = {name: torch.cat(seen) for name, seen in self._seen.items()}
        for name, rows in out.items():
            if not bool(torch.isfinite(rows).all()):
                raise FastarError(f"{where}: activations of {name!r} are not finite; retrain or remove it")
        return out

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _per_unit(rows: Tensor, member: Member, size: int) -> Tensor:
    """[samples, channels] as [samples, size]; channels of one unit become samples of it."""
    positions = member.positions(torch.arange(size, device=rows.device), size)
    picked = rows[:, positions].unflatten(1, (member.outer, size, member.inner))
    return picked.movedim(2, -1).flatten(0, 2)


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    """[size, size] of the units of two networks; 0 for a unit that never changes."""
    a, b = (x - x.mean(0) for x in (first, second))
    a, b = (x / x.norm(dim=0).clamp_min(1e-12) for x in (a, b))
    return a.T @ b


def _objective(theta: Mapping[str, Tensor], state: Mapping[str, Tensor], names: Sequence[str]) -> float:
    return float(np.sum([float((theta[name].double() * state[name].double()).sum()) for name in names]))
