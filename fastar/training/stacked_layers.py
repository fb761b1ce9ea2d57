"""Layers whose sums `torch.func.vmap` takes in another order than each network alone: given their order under it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# A product over more inputs than this is summed in parts, the bias with the first of them (seen with MKL).
SUMMED_AT_ONCE = 384


def round_as_alone(model: nn.Module) -> None:
    """Replace the forward passes of those layers of `model`, for good: it is run under `vmap` alone from then on."""
    for layer in model.modules():
        forward: Callable[[Any, Tensor], Tensor] | None = None
        if type(layer) is nn.Linear:
            forward = _linear
        elif type(layer) is nn.LayerNorm and layer.bias is not None:
            forward = _layer_norm
        elif type(layer) is nn.BatchNorm1d and layer.affine and layer.track_running_stats and layer.momentum:
            forward = _batch_norm
        if forward is not None:
            layer.forward = partial(forward, layer)


def _linear(layer: nn.Linear, inputs: Tensor) -> Tensor:
    found: Tensor = _Linear.apply(inputs, layer.weight, *([] if layer.bias is None else [layer.bias]))
    return found


def _layer_norm(layer: nn.LayerNorm, inputs: Tensor) -> Tensor:
    def function(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(inputs, layer.normalized_shape, weight, bias, layer.eps)

    found: Tensor = _OneByOne.apply(function, inputs, layer.weight, layer.bias)
    return found


def _batch_norm(layer: nn.BatchNorm1d, inputs: Tensor) -> Tensor:
    def function(inputs: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.batch_norm(inputs, mean, variance, weight, bias, True, layer.momentum or 0.0, layer.eps)

    assert layer.num_batches_tracked is not None
    layer.num_batches_tracked.add_(1)
    statistics = layer.running_mean, layer.running_var
    found: Tensor = _OneByOne.apply(function, inputs, *statistics, layer.weight, layer.bias)
    return found


class _OneByOne(torch.autograd.Function):
    """A function of tensors, which `vmap` takes of one network after the other; gradients are those of what it does."""

    @staticmethod
    def forward(function: Callable[..., Tensor], *given: Tensor) -> Tensor:
        return function(*given)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], function: Callable[..., Tensor], *given: Tensor) -> tuple[Tensor, int]:
        rows = [one.unbind(dim) for one, dim in zip(given, dims[1:], strict=True)]
        return torch.stack([function(*row) for row in zip(*rows, strict=True)]), 0


class _Linear(torch.autograd.Function):
    """`F.linear`, which `vmap` takes as the batched products that it is alone, forward and backward."""

    @staticmethod
    def forward(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(inputs, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(info: Any, dims: tuple[int, ...], *given: Tensor) -> tuple[Tensor, int]:
        inputs, *own = (one.movedim(dim, 0) for one, dim in zip(given, dims, strict=True))
        found = _Products.apply(inputs.flatten(1, -2), *own)
        return found.unflatten(1, inputs.shape[1:-1]), 0


class _Products(torch.autograd.Function):
    """Inputs [K, batch, in] times weights [K, out, in], and biases [K, out]."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.biased = bias is not None
        if bias is None:
            return torch.bmm(inputs, weight.transpose(1, 2))
        if inputs.shape[-1] > SUMMED_AT_ONCE:
            return torch.baddbmm(bias.unsqueeze(1), inputs, weight.transpose(1, 2))
        return torch.bmm(inputs, weight.transpose(1, 2)).add_(bias.unsqueeze(1))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        of_inputs = torch.bmm(gradient, weight) if ctx.needs_input_grad[0] else None
        # Not the transpose of the product of transposes, whose sums some CPUs take in another order.
        of_weight = torch.bmm(gradient.transpose(1, 2), inputs)
        return (of_inputs, of_weight, *([gradient.sum(1)] if ctx.biased else []))
