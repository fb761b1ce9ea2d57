"""Batch-norm statistics of interpolated models, re-estimated from data (paper, appendix B.3)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from fastar.errors import FastarError
from fastar.flat.forward import Batch, call
from fastar.losses import sample_count

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


def statistics_bytes(model: nn.Module) -> int:
    """Bytes of one model's statistics while they are re-estimated: sums in float64, and what they end as."""
    return (3 * 8 + 2 * 4) * sum(layer.num_features for layer in batch_norm_layers(model).values())


def own_statistics(model: nn.Module) -> Statistics:
    """Copies of the running statistics of `model`."""
    return {
        f"{name}.{kind}": getattr(layer, kind).clone()
        for name, layer in batch_norm_layers(model).items()
        for kind in ("running_mean", "running_var")
    }


def values_per_channel(given: Tensor) -> int:
    """The numbers that one statistic of a batch-norm layer is taken of, where it is given [b, C, ...]."""
    return given.numel() // max(given.shape[1], 1)


def layer_of_single_values(model: nn.Module, batch: Batch, samples: int) -> str | None:
    """The first layer that sees one value of each sample in a channel (BatchNorm1d, a 1x1 map), so that a batch of one
    sample has no statistics; None: there is none.

    Args:
        model: run once in evaluation mode, and left as it was.
        batch: of so many `samples`.
    """
    layers, found = batch_norm_layers(model), []
    if not layers:
        return None

    def look(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args and values_per_channel(args[0]) == samples:
            found.append(name)

    with ExitStack() as hooks, torch.no_grad(), evaluating(model):
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(partial(look, name)))
        call(model, batch)
    return found[0] if found else None


def joined(batches: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    """The same, each batch of one sample added to the one before: for models that cannot take statistics of it.

    Raises:
        FastarError: the first batch is of one sample.
    """
    held: tuple[Any, Any] | None = None
    for inputs, targets in batches:
        if sample_count(inputs) != 1:
            if held is not None:
                yield held
            held = inputs, targets
        elif held is None:
            raise FastarError("batch-norm takes no variance of a batch of one sample: give larger batches")
        else:
            held = tree_map(_together, held, (inputs, targets))
    if held is not None:
        yield held


def _together(first: Any, second: Any) -> Any:
    return torch.cat([first, second]) if isinstance(first, Tensor) else first


class BatchStatistics:
    """The statistics of the one batch that a model was last shown, all layers in one buffer.

    Inside `capturing`, layers normalise with the batch (as in training) and write its mean and unbiased variance here.
    """

    def __init__(self, model: nn.Module):
        self.model, self.layers = model, batch_norm_layers(model)
        self.channels = [layer.num_features for layer in self.layers.values()]
        first = next(iter(self.layers.values())).running_mean
        assert first is not None
        self.buffer = torch.zeros(2, sum(self.channels), device=first.device, dtype=torch.float32)
        self._seen: dict[str, int] = {}
        self._counts: dict[tuple[int, ...], Tensor] = {}

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Around forward passes of the model, each followed by `take`; afterwards it is as it was."""

        def remember(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
            if name in self._seen:
                raise FastarError(f"batch-norm layer {name} is used twice in a pass: it has no one set of statistics")
            self._seen[name] = values_per_channel(args[0])
            if self._seen[name] == 1:
                raise FastarError(
                    f"batch-norm layer {name} takes no variance of a batch of one sample: give larger batches"
                )

        with ExitStack() as hooks, evaluating(self.model):
            for (name, layer), views in zip(self.layers.items(), self.buffer.split(self.channels, dim=1), strict=True):
                hooks.enter_context(layer.register_forward_pre_hook(partial(remember, name)))
                layer.momentum = 1.0  # running statistics become those of the batch
                layer.train()
                layer._buffers["running_mean"], layer._buffers["running_var"] = views
            try:
                yield
            finally:
                self._seen.clear()

    def take(self) -> tuple[Tensor, Tensor]:
        """The last batch: values per channel, float64 [C], and [mean, mean square] of them, float64 [2, C]."""
        key = tuple(self._seen.get(name, 0) for name in self.layers)
        self._seen.clear()
        if key not in self._counts:
            each = [
                torch.full((c,), float(n), dtype=torch.float64, device="cpu")
                for n, c in zip(key, self.channels, strict=True)
            ]
            self._counts[key] = torch.cat(each).to(self.buffer.device)
        count = self._counts[key]
        mean, unbiased = self.buffer.double()
        biased = unbiased * ((count - 1) / count.clamp_min(1))  # torch keeps the unbiased one
        moments = torch.stack([mean, biased + mean.square()])
        # Torch adds to 0 times what was there: NaN, for every model after one whose statistics overflowed.
        self.buffer.zero_()
        return count, moments


class PopulationStatistics:
    """Accumulates the exact mean and variance over all batches that one model was shown, in float64.

    Over batches, means are weighted by their counts and variances combined by the law of total variance: no moving
    average, no forgetting.
    """

    def __init__(self, batch: BatchStatistics):
        self._batch = batch
        self._sums = torch.zeros_like(batch.buffer, dtype=torch.float64)
        self._count = torch.zeros_like(self._sums[0])

    def add(self) -> None:
        """Add the batch that the model was just shown."""
        count, moments = self._batch.take()
        self._sums.addcmul_(moments, count)
        self._count += count

    def state(self) -> list[Tensor]:
        """The tensors that `add` changes, themselves."""
        return [self._sums, self._count]

    def result(self) -> Statistics:
        """Running means and (biased) variances of everything seen."""
        mean, square = self._sums / self._count.clamp_min(1)  # 0 where a layer took no part
        moments = torch.stack([mean, (square - mean.square()).clamp_min(0)]).float()
        found: Statistics = {}
        for name, layer in zip(self._batch.layers, moments.split(self._batch.channels, dim=1), strict=True):
            found[f"{name}.running_mean"], found[f"{name}.running_var"] = (part.clone() for part in layer)
        return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """`model` in eval mode; afterwards its modes, and its batch-norm's buffers and momenta, are what they were."""
    modes = {module: module.training for module in model.modules()}
    layers = batch_norm_layers(model).values()
    own = [(layer, dict(layer._buffers), layer.momentum) for layer in layers]
    for layer in layers:
        if layer.num_batches_tracked is not None:  # counted in place by passes in training mode
            layer._buffers["num_batches_tracked"] = layer.num_batches_tracked.clone()
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes.items():
            module.training = training
        for layer, buffers, momentum in own:
            layer._buffers.update(buffers)
            layer.momentum = momentum


@torch.no_grad()
def re_estimate(model: nn.Module, batches: Iterable[tuple[Any, Tensor]]) -> Statistics:
    """Population statistics of `model` over `batches`; the model itself is left as it was.

    Args:
        model: on the batches' device.
        batches: (images, labels) pairs that together hold every sample once.

    Returns:
        Statistics for `set_statistics`; empty where the model has no batch-norm.
    """
    if not batch_norm_layers(model):
        return {}
    batch = BatchStatistics(model)
    population = PopulationStatistics(batch)
    with batch.capturing():
        for images, _ in batches:
            call(model, images)
            population.add()
    return population.result()
