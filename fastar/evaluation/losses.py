"""Losses and accuracies of many models that share each batch of data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
from fastar.evaluation.stacked import networks_at_once, stackable, stacked_logits, stacks
from fastar.flat import FlatLayout
from fastar.flat.forward import call
from fastar.flat.state_check import drops_caches, forget
from fastar.runtime.cuda_graph import CallGraph
from fastar.runtime.full_precision import full_precision

Batches = Callable[[], Iterable[tuple[Any, Tensor]]]
"""A fresh pass over (images, or whatever the model takes; labels); every sample exactly once."""


@dataclass(frozen=True)
class Measured:
    """Mean loss and accuracy of each model, float64 [K]."""

    loss: Tensor
    accuracy: Tensor


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
    graph: bool = False,
    called: Sequence[str] | None = None,
    advance: Callable[[int], None] = lambda count: None,
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
        graph: replay the work of each batch of a pass as a CUDA graph (all K models in one); a GPU.
        called: names of the models, for errors.
        advance: told the number of (model, batch) evaluations done.

    Raises:
        FastarError: a loss that is not finite, batch-norm without data to re-estimate it from, or a graph on a CPU.
    """
    if rows.ndim != 2 or rows.shape[1] != layout.numel:
        raise ValueError(f"rows must be [K, {layout.numel}], got {tuple(rows.shape)}")
    count = len(rows)
    views = layout.views(rows)
    names = list(views)
    singles = [{name: view[k] for name, view in views.items()} for k in range(count)]
    found: list[Statistics | None] = list(statistics) if statistics is not None else [None] * count
    if method not in ("population", "reference"):
        raise ValueError(f"method={method!r}: population or reference")
    stacked = views if count > 1 and stackable(model) and all(value is None for value in found) else None
    results = {}
    graphed = _graphed if graph else _plain
    with full_precision(), bound(model, names) as bind, evaluating(model):
        if batch_norm_layers(model):
            todo = [k for k in range(count) if found[k] is None]
            if todo and statistics_batches is None:
                raise FastarError("the model has batch-norm: statistics_batches are needed to re-estimate it")
            if todo and statistics_batches is not None:
                estimate = _population if method == "population" else _moving_average
                for k, value in zip(
                    todo,
                    estimate(model, bind, [singles[k] for k in todo], statistics_batches, graphed, advance),
                    strict=True,
                ):
                    found[k] = value
        for split, batches in splits.items():
            measured = _measure(model, bind, singles, found, batches, rows.device, graphed, advance, stacked)
            wrong = (~torch.isfinite(measured.loss)).nonzero().flatten().tolist()
            if wrong:
                name = f"model {wrong[0]}" if called is None else called[wrong[0]]
                raise FastarError(
                    f"{name} has a loss that is not finite on {split}: its weights, or what they compute, are too "
                    "large for float32; measure without it"
                )
            results[split] = measured
    return results


Work = Callable[[Tensor, Tensor], Tensor]


def _plain(work: Work, moved: Sequence[Tensor], device: torch.device) -> Work:
    return work


def _graphed(work: Work, moved: Sequence[Tensor], device: torch.device) -> Work:
    """`work` on a batch as a CUDA graph; batches of another shape than the first (the last one) go without it."""
    graph = CallGraph(work, moved, device, setting="evaluation.graph")
    return lambda images, labels: (graph if graph.fits(images, labels) else work)(images, labels)


def _population(
    model: nn.Module,
    bind: Callable[[Mapping[str, Tensor]], None],
    singles: Sequence[Mapping[str, Tensor]],
    batches: Batches,
    graphed: Callable[[Work, Sequence[Tensor], torch.device], Work],
    advance: Callable[[int], None],
) -> list[Statistics]:
    batch = BatchStatistics(model)
    populations = [PopulationStatistics(batch) for _ in singles]

    def show(images: Tensor, labels: Tensor) -> Tensor:
        for parameters, population in zip(singles, populations, strict=True):
            bind(parameters)
            call(model, images)
            population.add()
        return batch.buffer

    moved = [batch.buffer, *(tensor for population in populations for tensor in population.state())]
    work = graphed(show, moved, batch.buffer.device)
    with batch.capturing():
        for images, labels in batches():
            work(images, labels)
            advance(len(singles))
    return [population.result() for population in populations]


def _moving_average(
    model: nn.Module,
    bind: Callable[[Mapping[str, Tensor]], None],
    singles: Sequence[Mapping[str, Tensor]],
    batches: Batches,
    graphed: Callable[[Work, Sequence[Tensor], torch.device], Work],
    advance: Callable[[int], None],
) -> list[Statistics]:
    layers = batch_norm_layers(model)
    found = [own_statistics(model) for _ in singles]
    kept = {name: layer.momentum for name, layer in layers.items()}
    for layer in layers.values():
        layer.momentum = 0.1
        layer.train()

    def show(images: Tensor, labels: Tensor) -> Tensor:
        for parameters, statistics in zip(singles, found, strict=True):
            bind(parameters)
            set_statistics(model, statistics)
            call(model, images)  # writes into `statistics`
        return labels

    moved = [tensor for statistics in found for tensor in statistics.values()]
    work = graphed(show, moved, moved[0].device)
    for images, labels in batches():
        work(images, labels)
        advance(len(singles))
    for name, layer in layers.items():
        layer.momentum = kept[name]
        layer.eval()
    return found


def _measure(
    model: nn.Module,
    bind: Callable[[Mapping[str, Tensor]], None],
    singles: Sequence[Mapping[str, Tensor]],
    statistics: Sequence[Statistics | None],
    batches: Batches,
    device: torch.device,
    graphed: Callable[[Work, Sequence[Tensor], torch.device], Work],
    advance: Callable[[int], None],
    stacked: Mapping[str, Tensor] | None,
) -> Measured:
    losses = torch.zeros(len(singles), dtype=torch.float64, device=device)
    correct = torch.zeros(len(singles), dtype=torch.int64, device=device)
    tried = False

    def add(images: Tensor, labels: Tensor) -> Tensor:
        nonlocal stacked, tried
        if not tried and not (stacked is not None and isinstance(images, Tensor) and stacks(model, stacked, images)):
            stacked = None
        tried = True
        at_once = networks_at_once(model, len(labels), labels.device) if stacked is not None else 1
        if stacked is not None and at_once > 1:
            for start in range(0, len(singles), at_once):
                part = slice(start, start + at_once)
                together = stacked_logits(model, {name: view[part] for name, view in stacked.items()}, images).float()
                each = F.cross_entropy(together.flatten(0, 1), labels.repeat(len(together)), reduction="none")
                losses[part] += each.view(len(together), -1).sum(1)
                correct[part] += (together.argmax(2) == labels).sum(1)
                del together, each  # before the next ones are made
            return losses
        for k, parameters in enumerate(singles):
            bind(parameters)
            own = statistics[k]
            if own is not None:
                set_statistics(model, own)
            logits = call(model, images).float()
            losses[k].add_(F.cross_entropy(logits, labels, reduction="sum"))
            correct[k].add_((logits.argmax(1) == labels).sum())
        return losses

    work = graphed(add, [losses, correct], device)
    seen = 0
    for images, labels in batches():
        work(images, labels)
        seen += len(labels)
        advance(len(singles))
    if not seen:
        raise FastarError("no data to evaluate on: the split is empty")
    return Measured(loss=(losses / seen).cpu(), accuracy=(correct.double() / seen).cpu())
