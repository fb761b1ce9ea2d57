"""Barriers between networks as they are: `fastar.barrier`."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

from torch import nn

from fastar.api.curves import Barrier
from fastar.api.networks import device_of
from fastar.errors import FastarError
from fastar.evaluation import Endpoint, Segment, evaluate_paths
from fastar.evaluation.batch_norm import batch_norm_layers, joined, layer_of_single_values
from fastar.evaluation.batches import (
    Batches,
    Data,
    batches_of,
    check_targets,
    float_copy,
    in_float,
    labelled,
    tried,
    with_parameters,
)
from fastar.evaluation.ends import check_end, interpolated_buffers
from fastar.flat import FlatLayout
from fastar.flat.forward import Batch
from fastar.flat.state_check import check_one_value, check_state_of
from fastar.losses import LossChoice, MetricChoice, find_loss, sample_count, split_of
from fastar.runtime.progress import SILENT, Progress
from fastar.symmetry import TIE_ALIKE


def barrier(
    model_a: nn.Module,
    model_b: nn.Module,
    data: Data,
    *,
    loss: LossChoice = "cross_entropy",
    metrics: Sequence[MetricChoice] | None = None,
    points: int = 11,
    statistics_data: Data | None = None,
    progress: Progress = SILENT,
) -> Barrier:
    """The loss barrier between two models of one architecture, as they are (paper, eq. 10).

    Models are evaluated in float32 on the device of `model_a`; neither is changed. Parameters are interpolated, and
    buffers of the state dict that hold a value for each unit (those of frozen batch-norms) and differ. Batch-norm
    statistics are re-estimated at every point, ends included (paper, appendix B.3). All else has to be the same in
    both: other buffers are compared, and each model is run once, on the first batch and with its own batch-norm
    statistics, beside the network that stands for it at its end of the path.

    Args:
        model_a: at t = 0.
        model_b: at t = 1.
        data: what losses are measured on: tensors (inputs, targets), a torch Dataset, a DataLoader, or batches.
        loss: cross_entropy, mse, bce, lm, or a function f(outputs, batch) -> [batch].
        metrics: beside it; None: those that belong to the loss's name.
        points: equispaced values of t, ends included.
        statistics_data: what batch-norm statistics are taken from, best the training data, shuffled; None: `data`. A
            batch of one sample that a layer could not take a variance of is joined to the one before it.

    Raises:
        FastarError: models that are no networks of one architecture, that differ in more than parameters, or that draw
            random numbers in evaluation mode; data, labels or outputs that do not fit; a loss that is not finite.

    Example:
        >>> import fastar, torch
        >>> from torch import nn
        >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2))
        >>> data = torch.randn(60, 4), torch.randint(3, (60,))
        >>> found = fastar.barrier(a, b, data, points=5)
        >>> found
        Barrier(..., cross_entropy ... to ...)
        >>> found.value >= 0, len(found.accuracy)
        (True, 5)
    """
    if not isinstance(points, Integral) or points < 2:
        raise FastarError(f"points={points}: a path needs its two ends, give a whole number of at least 2")
    models = {"model_a": model_a, "model_b": model_b}
    device, _ = (device_of(given, name) for name, given in models.items())
    taken = find_loss(loss, metrics)
    states = [given.state_dict() for given in models.values()]
    check_state_of(model_a, states[1], "model_b")
    check_one_value(model_a, states[1], "model_b", f"a path can hold but one; {TIE_ALIKE}")
    model = with_parameters(float_copy(model_a, device), interpolated_buffers(model_a, model_b))
    layout = FlatLayout.from_module(model)
    split = split_of(model_a, whole=taken.whole)
    batches = in_float(batches_of(data, device, "data", split))
    first = next(batches(), None)
    if first is None:
        raise FastarError("there is no data to measure on: no batch in what was given as data")
    classes = check_targets(model, *first, taken, "data")
    for (name, given), state in zip(models.items(), states, strict=True):
        check_end(float_copy(given, device), model, layout, state, first[0], name)
    if classes is not None:
        batches = labelled(batches, classes, "data")
    ends = [Endpoint(name, layout.flatten(state).to(device)) for name, state in zip("ab", states, strict=True)]
    statistics = batches
    if statistics_data is not None and batch_norm_layers(model):
        given_batches = in_float(batches_of(statistics_data, device, "statistics_data", split))
        statistics = tried(model, given_batches, "statistics_data")
    (measured,) = evaluate_paths(
        model,
        layout,
        [Segment("path", *ends)],
        {"data": batches},
        points=int(points),
        statistics_batches=_without_singles(model, statistics, first),
        loss=taken,
        progress=progress,
    )
    return Barrier.of(measured, "data", taken.name)


def _without_singles(model: nn.Module, batches: Batches, first: tuple[Batch, Any]) -> Batches:
    """The batches that batch-norm statistics are taken from."""
    if not batch_norm_layers(model) or layer_of_single_values(model, first[0], sample_count(first[0])) is None:
        return batches
    return lambda: joined(batches())
