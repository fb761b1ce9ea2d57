"""Batch-norm statistics of interpolated models, re-estimated from data (paper, appendix B.3)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Statistics = dict[str, Tensor]
"""Buffer name (`bn1.running_mean`, `bn1.running_var`) to tensor."""


def batch_norm_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """The layers of `model` that keep running statistics, by name."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None
    }


def set_statistics(model: nn.Module, statistics: Mapping[str, Tensor]) -> None:
    """Make `statistics` the running statistics of `model`; the tensors are used, not copied."""
    for name, layer in batch_norm_layers(model).items():
        for kind in ("running_mean", "running_var"):
            layer._buffers[kind] = statistics[f"{name}.{kind}"]


def own_statistics(model: nn.Module) -> Statistics:
    """Copies of the running statistics of `model`."""
    found = {}
    for name, layer in batch_norm_layers(model).items():
        for kind in ("running_mean", "running_var"):
            value = getattr(layer, kind)
            found[f"{name}.{kind}"] = value.clone()
    return found


class PopulationStatistics:
    """Accumulates the exact mean and variance over all batches that one model was shown, in float64.

    Each batch is normalised with its own statistics on the way (as in training). Over batches, means are weighted
    by their counts and variances combined by the law of total variance: no moving average, no forgetting.
    """

    def __init__(self, model: nn.Module):
        self._layers = batch_norm_layers(model)
        self._sums: dict[str, Tensor] = {}
        self._count: dict[str, int] = {}

    @contextmanager
    def collecting(self, model: nn.Module) -> Iterator[None]:
        """Inside, forward passes of `model` (one batch each) are added to the statistics."""
        counts: dict[str, int] = {}
        hooks = []
        kept = {name: (layer.momentum, layer.training) for name, layer in self._layers.items()}
        own = own_statistics(model)
        for name, layer in self._layers.items():

            def remember(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                counts[name] = args[0].numel() // args[0].shape[1]

            hooks.append(layer.register_forward_pre_hook(remember))
            layer.momentum = 1.0  # running statistics become those of the batch
            layer.train()
        set_statistics(model, own)  # scratch that the forward passes write into
        try:
            yield
            for name, layer in self._layers.items():
                self._add(name, layer, counts[name])
        finally:
            for hook in hooks:
                hook.remove()
            for name, (momentum, training) in kept.items():
                self._layers[name].momentum = momentum
                self._layers[name].train(training)

    def _add(self, name: str, layer: _BatchNorm, count: int) -> None:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        mean = layer.running_mean.double()
        square = layer.running_var.double() * ((count - 1) / count) + mean.square()  # torch keeps the unbiased one
        sums = torch.stack([mean, square]) * count
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums
        self._count[name] = self._count.get(name, 0) + count

    def result(self) -> Statistics:
        """Running means and (biased) variances of everything seen."""
        found: Statistics = {}
        for name, sums in self._sums.items():
            mean, square = sums / self._count[name]
            variance = (square - mean.square()).clamp_min(0)
            found[f"{name}.running_mean"] = mean.float()
            found[f"{name}.running_var"] = variance.float()
        return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """`model` in eval mode; afterwards its mode and running statistics are what they were."""
    modes = {module: module.training for module in model.modules()}
    own = {name: (layer.running_mean, layer.running_var) for name, layer in batch_norm_layers(model).items()}
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes.items():
            module.training = training
        for name, layer in batch_norm_layers(model).items():
            layer._buffers["running_mean"], layer._buffers["running_var"] = own[name]


@torch.no_grad()
def re_estimate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Statistics:
    """Population statistics of `model` over `batches`; the model itself is left as it was.

    Args:
        model: on the batches' device.
        batches: (images, labels) pairs that together hold every sample once.

    Returns:
        Statistics for `set_statistics`; empty where the model has no batch-norm.
    """
    if not batch_norm_layers(model):
        return {}
    population = PopulationStatistics(model)
    with evaluating(model):
        for images, _ in batches:
            with population.collecting(model):
                model(images)
    return population.result()
