"""Losses and accuracies of many models that share each batch of data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastar.errors import FastarError
from fastar.evaluation.batch_norm import (
    BatchStatistics,
    PopulationStatistics,
    Statistics,
    batch_norm_layers,
    evaluating,
    own_statistics,
    set_statistics,
)
from fastar.flat import FlatLayout
from fastar.flat.forward import call
from fastar.flat.state_check import drops_caches, forget
from fastar.losses import Loss, find_loss, sample_count
from fastar.runtime.cuda_graph import CallGraph, Record
from fastar.runtime.full_precision import full_precision

Batches = Callable[[], Iterable[tuple[Any, Any]]]
"""A fresh pass over (inputs, targets); every sample exactly once."""


class Measured(dict[str, Tensor]):
    """Figures of each model: its mean loss ("loss") and its metrics by their names, float64 [K]."""

    @property
    def loss(self) -> Tensor:
        return self["loss"]


@contextmanager
def bound(model: nn.Module, names: Sequence[str]) -> Iterator[Callable[[Mapping[str, Tensor]], None]]:
    """A function that makes given tensors the parameters of `model`; afterwards it has its own again."""
    parameters = dict(model.named_parameters())
    chosen = [parameters[name] for name in names]
    own = {name: parameter.data for name, parameter in zip(names, chosen, strict=True)}
    caches = drops_caches(model)

    def bind(tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in zip(names, chosen, strict=True):
            parameter.data = tensors[name]
        if caches:
            forget(model)

    try:
        yield bind
    finally:
        bind(own)


@torch.no_grad()
def evaluate_rows(
    model: nn.Module,
    layout: FlatLayout,
    rows: Tensor,
    splits: Mapping[str, Batches],
    *,
    statistics: Sequence[Statistics | None] | None = None,
    statistics_batches: Batches | None = None,
    method: str = "population",
    loss: Loss | None = None,
    graph: bool = False,
    called: Sequence[str] | None = None,
    record: Record | None = None,
    show: Callable[[str, int, Any, Any], None] | None = None,
) -> dict[str, Measured]:
    """Evaluate K models of one architecture in two passes: batch-norm statistics, then losses.

    Args:
        model: gives the architecture; its own state is left as it was.
        layout: where parameters lie in a row.
        rows: [K, P] fp32 parameters, on the data's device.
        splits: name of a split to its data.
        statistics: batch-norm statistics to use for a model as they are; None (for all or for one): re-estimate.
        statistics_batches: the data they are re-estimated from; needed where the model has batch-norm.
        method: "population" (exact over all data) or "reference" (moving average with momentum 0.1, as the
            paper's code).
        loss: with its metrics; None: cross-entropy and accuracy.
        graph: replay the work of each batch of a pass as a CUDA graph (all K models in one); a GPU.
        called: names of the models, for errors.
        record: captures the graph; None: as a CUDA graph.
        show: told of every (split, model, outputs, targets); not with `graph`.

    Raises:
        FastarError: a loss that is not finite, batch-norm without data to re-estimate it from, or a graph on a CPU.
    """
    if rows.ndim != 2 or rows.shape[1] != layout.numel:
        raise ValueError(f"rows must be [K, {layout.numel}], got {tuple(rows.shape)}")
    if method not in ("population", "reference"):
        raise ValueError(f"method={method!r}: population or reference")
    views, results = layout.views(rows), {}
    found: list[Statistics | None] = list(statistics) if statistics is not None else [None] * len(rows)
    with full_precision(), bound(model, list(views)) as bind, evaluating(model):
        passes = _Passes(model, bind, views, graph, record)
        todo = [k for k, one in enumerate(found) if one is None] if batch_norm_layers(model) else []
        if todo and statistics_batches is None:
            raise FastarError("the model has batch-norm: statistics_batches are needed to re-estimate it")
        if todo and statistics_batches is not None:
            estimate = passes.population if method == "population" else passes.moving_average
            for k, value in zip(todo, estimate(todo, statistics_batches), strict=True):
                found[k] = value
        for split, batches in splits.items():
            shown = None if show is None else partial(show, split)
            results[split] = passes.measure(found, batches, find_loss() if loss is None else loss, shown)
            wrong = (~torch.isfinite(results[split].loss)).nonzero().flatten().tolist()
            if wrong:
                name = f"model {wrong[0]}" if called is None else called[wrong[0]]
                raise FastarError(
                    f"{name} has a loss that is not finite on {split}: its weights, or what they compute, are too "
                    "large for float32, or the data hold numbers that are not finite; measure without it"
                )
    return results


@dataclass(frozen=True)
class _Passes:
    """Passes over data with K models.

    Args:
        bind: makes given tensors the parameters of `model`.
        views: parameters [K, ...] of the models, by name.
        graph: replay the work of each batch as a CUDA graph.
    """

    model: nn.Module
    bind: Callable[[Mapping[str, Tensor]], None]
    views: Mapping[str, Tensor]
    graph: bool
    record: Record | None

    def one(self, k: int) -> dict[str, Tensor]:
        """The parameters of model `k`."""
        return {name: view[k] for name, view in self.views.items()}

    def run(self, work: Callable[[Any, Any], Tensor], moved: Sequence[Tensor], batches: Batches) -> int:
        """Do `work`, which changes the tensors `moved`, on every batch; the number of samples."""
        samples = 0
        # Batches of another shape than the first (the last one) go without the graph.
        graph = None
        if self.graph:
            graph = CallGraph(work, moved, moved[0].device, setting="evaluation.graph", record=self.record)
        for inputs, targets in batches():
            (graph if graph is not None and graph.fits(inputs, targets) else work)(inputs, targets)
            samples += sample_count(inputs)
        return samples

    def population(self, chosen: Sequence[int], batches: Batches) -> list[Statistics]:
        """The exact batch-norm statistics of the models `chosen` over all data."""
        batch = BatchStatistics(self.model)
        populations = [PopulationStatistics(batch) for _ in chosen]
        singles = [self.one(k) for k in chosen]

        def show(inputs: Any, targets: Any) -> Tensor:
            for parameters, population in zip(singles, populations, strict=True):
                self.bind(parameters)
                call(self.model, inputs)
                population.add()
            return batch.buffer

        moved = [batch.buffer, *(tensor for population in populations for tensor in population.state())]
        with batch.capturing():
            self.run(show, moved, batches)
        return [population.result() for population in populations]

    def moving_average(self, chosen: Sequence[int], batches: Batches) -> list[Statistics]:
        """The moving averages of batch-norm statistics, as the paper's code takes them."""
        found = [own_statistics(self.model) for _ in chosen]
        singles = [self.one(k) for k in chosen]

        def show(inputs: Any, targets: Any) -> Tensor:
            for parameters, statistics in zip(singles, found, strict=True):
                self.bind(parameters)
                set_statistics(self.model, statistics)
                call(self.model, inputs)  # writes into `statistics`
            return next(iter(found[0].values()))

        with evaluating(self.model):
            for layer in batch_norm_layers(self.model).values():
                layer.momentum = 0.1
                layer.train()
            self.run(show, [tensor for statistics in found for tensor in statistics.values()], batches)
        return found

    def measure(
        self,
        statistics: Sequence[Statistics | None],
        batches: Batches,
        loss: Loss,
        show: Callable[[int, Any, Any], None] | None = None,
    ) -> Measured:
        """The mean loss and the metrics of all models, with these batch-norm statistics (None: there is no
        batch-norm). `show` is told of every (model, outputs, targets)."""
        count = len(statistics)
        singles = [self.one(k) for k in range(count)]
        device = next(iter(self.views.values())).device
        totals = {name: one.begin(device, count) for name, one in loss.measures().items()}
        moved = totals["loss"].tensors()
        if self.graph:
            moved = [tensor for some in totals.values() for tensor in some.tensors()]

        def add(inputs: Any, targets: Any) -> Tensor:
            for k, (parameters, own) in enumerate(zip(singles, statistics, strict=True)):
                self.bind(parameters)
                if own is not None:
                    set_statistics(self.model, own)
                outputs = call(self.model, inputs)
                for some in totals.values():
                    some.add(k, outputs, targets)
                if show is not None:
                    show(k, outputs, targets)
            return moved[0]

        if not self.run(add, moved, batches):
            raise FastarError("no data to evaluate on: the split is empty")
        return Measured(
            (name, torch.tensor(some.values(), dtype=torch.float64, device="cpu")) for name, some in totals.items()
        )
