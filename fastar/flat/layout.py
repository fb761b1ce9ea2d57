"""Layouts: the place of each parameter of an architecture in a flat buffer."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from fastar.errors import FastarError

ALIGNMENT = 16  # floats: 64 bytes, a cache line; also what a vectorised load wants of the bf16 copy


@dataclass(frozen=True)
class FlatEntry:
    """One parameter in a flat buffer: elements [offset, offset + numel), seen as `shape`."""

    name: str
    shape: tuple[int, ...]
    offset: int
    numel: int


@dataclass(frozen=True)
class FlatLayout:
    """The place of each parameter of an architecture in a buffer of `numel` = P elements.

    Parameters with two or more dimensions come first and fill [0, matrices); those with fewer (biases, norms) fill
    [matrices, P), so that a working copy can hold the first in the AMP dtype and the second in fp32. Within a section
    they keep the module's order. Each starts at a multiple of 16 elements; the padding between them holds zeros. 4-D
    weights lie in (O, H, W, I) order, so that their view of shape (O, I, H, W) is channels-last contiguous.

    Equal layouts belong to compatible models. `aliases` holds (other name, entry name) of tied parameters.
    """

    entries: tuple[FlatEntry, ...]
    matrices: int
    numel: int
    aliases: tuple[tuple[str, str], ...] = ()

    @classmethod
    def from_module(cls, module: nn.Module) -> "FlatLayout":
        """The layout of `module`'s parameters, on any device (meta too). Tied parameters share one entry."""
        shapes: dict[str, tuple[int, ...]] = {}
        first_names: dict[int, str] = {}
        aliases = []
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise FastarError(f"parameter {name} has no shape yet; run one batch through the lazy module first")
            if not parameter.is_floating_point():
                raise FastarError(f"parameter {name} is {parameter.dtype}; flat parameters must be real floating point")
            if id(parameter) in first_names:
                aliases.append((name, first_names[id(parameter)]))
                continue
            first_names[id(parameter)] = name
            shapes[name] = tuple(parameter.shape)
        if not shapes:
            raise FastarError("a module without parameters has no flat layout; pass one with parameters")
        names = sorted(shapes, key=lambda name: len(shapes[name]) < 2)  # stable: matrices first, each in its order
        entries = []
        offset = matrices = 0
        for name in names:
            numel = prod(shapes[name])
            entries.append(FlatEntry(name, shapes[name], offset, numel))
            offset += -(-numel // ALIGNMENT) * ALIGNMENT
            if len(shapes[name]) >= 2:
                matrices = offset
        return cls(tuple(entries), matrices, offset, tuple(aliases))

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Name -> view of `buffer` [P] with the parameter's shape; of a store [N, P], views [N, *shape]."""
        if buffer.dim() not in (1, 2) or buffer.shape[-1] != self.numel:
            raise FastarError(
                f"a buffer of shape {tuple(buffer.shape)} does not fit this layout; "
                f"pass [{self.numel}] or [N, {self.numel}]"
            )
        return {entry.name: _view(buffer, entry, entry.offset) for entry in self.entries}

    def section_views(self, matrices: torch.Tensor, vectors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Name -> view as `views` gives, of a buffer held in two pieces: [0, matrices) and [matrices, P)."""
        return {
            entry.name: _view(matrices, entry, entry.offset)
            if len(entry.shape) >= 2
            else _view(vectors, entry, entry.offset - self.matrices)
            for entry in self.entries
        }

    def flatten(self, state: Mapping[str, torch.Tensor], out: torch.Tensor | None = None) -> torch.Tensor:
        """The parameters in `state` (a state dict; its other entries are ignored) as a flat buffer [P].

        `out` [P], of any floating dtype, is written and returned where given; else a new fp32 buffer.
        Raises FastarError naming the first parameter that is missing or has another shape, before anything is written.
        """
        state = dict(state.items())  # once: it may lie in a file
        for entry in self.entries:
            given = state.get(entry.name)
            if given is None or given.shape != entry.shape:
                has = "is missing" if given is None else f"has shape {tuple(given.shape)}"
                raise FastarError(
                    f"parameter {entry.name} {has}, needed {entry.shape}; "
                    "pass a state dict of the same architecture and width"
                )
        if out is None:
            out = torch.zeros(self.numel, device=state[self.entries[0].name].device, dtype=torch.float32)
        with torch.no_grad():
            for name, view in self.views(out).items():
                view.copy_(state[name])
        return out

    def unflatten(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Contiguous copies of the parameters in `buffer` [P], tied names included (as one tensor)."""
        copies = {
            name: view.detach().clone(memory_format=torch.contiguous_format)
            for name, view in self.views(buffer).items()
        }
        return {**copies, **{alias: copies[name] for alias, name in self.aliases}}


def mean_row(rows: Iterable[torch.Tensor]) -> torch.Tensor:
    """The mean of rows [P], summed in float64, one after the other; fp32.

    >>> mean_row([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])])
    tensor([2., 4.])
    """
    total, count = None, 0
    for row in rows:
        total, count = row.to(torch.float64, copy=True) if total is None else total.add_(row), count + 1
    assert total is not None, "no rows"
    return (total / count).float()


def _view(buffer: torch.Tensor, entry: FlatEntry, offset: int) -> torch.Tensor:
    flat = buffer[..., offset : offset + entry.numel]
    leading = buffer.shape[:-1]
    if len(entry.shape) != 4:
        return flat.view((*leading, *entry.shape))
    outputs, inputs, height, width = entry.shape
    return flat.view((*leading, outputs, height, width, inputs)).movedim(-1, -3)
