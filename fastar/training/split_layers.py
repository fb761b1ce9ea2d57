"""Layers whose work on a sample depends on the whole batch, where its samples are split between ranks: batch norm over
all of them (torch's own `SyncBatchNorm` is for GPUs alone), and dropout as one rank would draw it."""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastar.runtime import ranks


def synchronise_norms(model: nn.Module) -> None:
    """Let the batch-norm layers of `model` normalise a training batch by the statistics of all ranks' samples.

    Names and tensors of the model stay as they are.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.forward = MethodType(_normalised, module)  # type: ignore[method-assign]


class SplitDraws:
    """Draws of the dropout layers of a model: of the whole batch, of which each rank takes its samples'.

    So, on a CPU, N ranks drop what one would. Layers are `nn.Dropout`s; whatever else draws does so on each rank by
    itself (`StepDraws`).
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self._generator = torch.Generator(device)
        self._samples = 0
        for module in model.modules():
            if type(module) is nn.Dropout:
                module.forward = partial(self._dropped, module)  # type: ignore[method-assign]

    def begin(self, samples: int, seed: int) -> None:
        """Before a batch of so many samples, on all ranks; what is drawn for it follows from the seed."""
        self._samples = samples
        self._generator.manual_seed(seed)

    def _dropped(self, module: nn.Dropout, input: Tensor) -> Tensor:
        own = ranks.share(self._samples, ranks.rank(), ranks.world())
        if not module.training or not 0 < module.p < 1 or len(input) != len(own):
            return type(module).forward(module, input)
        images = input.ndim == 4 and not input.is_contiguous()  # drawn in the order of memory, as torch does
        kept = torch.empty(
            (self._samples, *input.shape[1:]),
            dtype=input.dtype,
            device=input.device,
            memory_format=torch.channels_last if images else torch.contiguous_format,
        )
        kept.bernoulli_(1 - module.p, generator=self._generator).div_(1 - module.p)
        return input * kept[own.start : own.stop]


def _normalised(self: _BatchNorm, input: Tensor) -> Tensor:
    if not (self.training or self.running_mean is None):
        return type(self).forward(self, input)
    self._check_input_dim(input)
    mean, variance, count = _Moments.apply(input)
    if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            rate = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
            self.running_mean.add_(rate * (mean - self.running_mean))
            self.running_var.add_(rate * (variance * (count / (count - 1)) - self.running_var))
    scale = torch.rsqrt(variance + self.eps)
    found = (input.to(torch.float32) - _along(mean, input)) * _along(scale, input)
    if self.weight is not None:
        found = found * _along(self.weight, input)
    if self.bias is not None:
        found = found + _along(self.bias, input)
    return found.to(input.dtype)


def _along(values: Tensor, input: Tensor) -> Tensor:
    """Values [C] as they go with [b, C, ...]."""
    return values.view([1, -1, *[1] * (input.ndim - 2)])


class _Moments(torch.autograd.Function):
    """The mean and the (biased) variance [C] of a tensor [b, C, ...] over the samples of all ranks and all places, and
    the number of values that they are of."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        axes = [axis for axis in range(input.ndim) if axis != 1]
        # Of each rank a row of its own: centred squares do not cancel, as sums of squares do.
        rows = torch.zeros(ranks.world(), 2 * input.shape[1] + 1, device=input.device, dtype=torch.float32)
        mine = rows[ranks.rank()]
        values = input.to(torch.float32)
        mine[0] = values.numel() // values.shape[1]
        mine[1:] = torch.cat([values.mean(axes), values.var(axes, correction=0)])
        ranks.sum_(rows)
        counts, (means, variances) = rows[:, :1], rows[:, 1:].chunk(2, dim=1)
        count = counts.sum()
        mean = (counts * means).sum(0) / count
        variance = (counts * (variances + (means - mean) ** 2)).sum(0) / count
        ctx.save_for_backward(input, mean, count)
        ctx.mark_non_differentiable(count)
        return mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        input, mean, count = ctx.saved_tensors
        both = torch.stack([one.to(torch.float32) for one in gradients[:2]])
        ranks.sum_(both)  # the moments are all ranks', and so each rank's loss depends on this rank's samples
        of_mean, of_variance = both / count
        centred = input.to(torch.float32) - _along(mean, input)
        found: Tensor = _along(of_mean, input) + 2 * _along(of_variance, input) * centred
        return found.to(input.dtype)
