"""A cache of source networks' activations: matching moves units, and leaves what they compute as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fastar.errors import FastarError
from fastar.flat.forward import Batch
from fastar.matching.activation.statistics import Tables, UnitActivations, resampled
from fastar.matching.checks import check_finite
from fastar.runtime.progress import SILENT, Progress
from fastar.symmetry import Permutations, Symmetry
from fastar.symmetry.batched_index import along

# Cached numbers are of mean 0 and variance 1, of which half precision holds three digits.
CACHED = torch.float16


class ActivationCache:
    """The activations of N sources, computed once.

    Args:
        measure: computes the activations of a network.
        states: parameter name -> tensor of each source, on any device.
        names: what to call them in errors ("source 3").
        allocate: makes the [N, width] numbers of a dtype, wherever they are to live; by default on the device.

    Raises:
        FastarError: as `UnitActivations`.
    """

    def __init__(
        self,
        measure: UnitActivations,
        states: Iterable[Mapping[str, Tensor]],
        names: Sequence[str],
        *,
        allocate: Callable[[int, torch.dtype], Tensor] | None = None,
        progress: Progress = SILENT,
    ):
        self.measure = measure
        self._shapes: dict[str, torch.Size] = {}
        self.rows = torch.empty(0, 0, dtype=CACHED, device="cpu")
        with progress.task("activations", len(names), "sources") as advance:
            for n, (state, name) in enumerate(zip(states, names, strict=True)):
                tables = measure({key: value.to(measure.device) for key, value in state.items()}, name)
                if not n:
                    self._shapes = {group: table.shape for group, table in tables.items()}
                    width = sum(table.numel() for table in tables.values())
                    if allocate is not None and width:
                        self.rows = allocate(width, CACHED)
                    else:
                        self.rows = torch.empty(len(names), width, dtype=CACHED, device=measure.device)
                for group, own in self._tables(self.rows[n : n + 1]).items():
                    own[0].copy_(tables[group] * own.shape[1] ** 0.5)
                advance()

    def __len__(self) -> int:
        return len(self.rows)

    def permuted(self, permutations: Permutations) -> SourceActivations:
        """All of the sources, once they have been permuted by `permutations` ([N, size], or [size] for all)."""
        return SourceActivations(self, permutations, range(len(self)))

    def tables(self, numbers: Sequence[int]) -> Tables:
        """Tables [n, samples, size] of the sources `numbers`, float32 on the device, as `UnitActivations` gives."""
        return {
            group: own.to(self.measure.device).float().div_(own.shape[1] ** 0.5)
            for group, own in self._tables(self.rows[list(numbers)]).items()
        }

    def _tables(self, rows: Tensor) -> Tables:
        """Views [n, samples, size] of rows [n, width]."""
        parts = rows.split([shape.numel() for shape in self._shapes.values()], 1) if self._shapes else ()
        return {
            group: part.unflatten(1, shape) for (group, shape), part in zip(self._shapes.items(), parts, strict=True)
        }


@dataclass(frozen=True)
class SourceActivations:
    """Activations of sources that have been permuted since they were cached.

    Args:
        permutations: [N, size] of all sources in the cache, or [size] for all.
        numbers: which of them these are.
        theta: the tables of the theta that they are compared with, once they were computed.
    """

    cache: ActivationCache
    permutations: Permutations
    numbers: Sequence[int]
    theta: Tables | None = field(default=None, repr=False)

    def with_theta(self, theta: Mapping[str, Tensor]) -> SourceActivations:
        """The same, to be compared with `theta`, whose activations are computed now.

        Raises:
            FastarError: theta, or its activations, are not finite.
        """
        try:
            return replace(self, theta=self.cache.measure(theta, "theta"))
        except FastarError:
            for name in self.cache.measure.symmetry.counted(theta, theta):
                check_finite(theta[name], name, "theta")  # then that is why
            raise

    def part(self, begin: int, end: int | None = None) -> SourceActivations:
        """Those at positions `begin` to `end` - 1 among these."""
        return replace(self, numbers=self.numbers[begin:end])

    def tables(self, begin: int, end: int) -> Tables:
        """Tables of these at `begin` to `end` - 1, as `ActivationCache.tables`, with their units where they are now."""
        numbers = self.numbers[begin:end]
        tables, index = self.cache.tables(numbers), torch.tensor(list(numbers), dtype=torch.int64, device="cpu")
        now = {name: one if one.ndim == 1 else one[index] for name, one in self.permutations.items()}
        indices = {name: one.cpu().numpy() for name, one in now.items()}
        return {
            group: resampled(
                along(table, 1, now[group].to(table.device).expand(len(table), -1)),
                self.cache.measure.rows(group, indices),
            )
            for group, table in tables.items()
        }


def cache_bytes(model: nn.Module, symmetry: Symmetry, batches: Sequence[Batch]) -> int:
    """Bytes that a source takes in `ActivationCache`; from the shapes of the batches, nothing is computed."""
    meta = torch.device("meta")
    state = {name: torch.empty(shape, device=meta, dtype=torch.float32) for name, shape in symmetry.parameters.items()}
    tables = UnitActivations(model, symmetry, batches, meta)(state, "the model")
    return CACHED.itemsize * sum(table.numel() for table in tables.values())
