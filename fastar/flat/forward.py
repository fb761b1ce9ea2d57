"""Forward passes of a network on batches of whatever its forward takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from fastar.flat.state_check import attributes_kept, copied

Batch = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""The inputs of a forward: one tensor, several arguments, or arguments by name; tensors may lie deeper in them."""


def without_statistics(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy in evaluation mode and float32 on `device`, whose batch-norm normalises with the batch and keeps no
    statistics."""
    twin = copied(model).to(device).float().eval()
    for module in twin.modules():
        if isinstance(module, _BatchNorm):
            module.train()
            module.track_running_stats = False
    return twin


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The same batch on `device`."""
    moved: Batch = tree_map_only(Tensor, lambda one: one.to(device), batch)
    return moved


def forward(model: nn.Module, parameters: Mapping[str, Tensor], batch: Batch) -> Any:
    """The outputs of `model`, in float32, for a batch with these parameters, both in float32 too; it keeps its own."""
    arguments, named = arguments_of(tree_map_only(Tensor, in_float32, batch))
    values = {name: in_float32(value) for name, value in parameters.items()}
    with attributes_kept(model):
        return torch.func.functional_call(model, values, arguments, named)


def in_float32(tensor: Tensor) -> Tensor:
    """The same in float32 if it holds floating-point numbers."""
    return tensor.float() if tensor.is_floating_point() else tensor


def call(model: Callable[..., Any], batch: Batch) -> Any:
    """The outputs of `model` for a batch as it is."""
    arguments, named = arguments_of(batch)
    return model(*arguments, **named)


def arguments_of(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and the keyword arguments that a batch stands for."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,), {}


def gaps(first: Sequence[Tensor], second: Sequence[Tensor], order: float = math.inf) -> list[float]:
    """The distance of each output of a network from another's: the largest difference, or its norm of this `order`.

    Where both are NaN, or the same infinity, they do not differ; a distance is infinite where one value alone is no
    finite number, and all are where shapes differ.
    """
    if [one.shape for one in first] != [one.shape for one in second]:
        return [math.inf] * max(len(first), 1)
    found = []
    for a, b in zip(first, second, strict=True):
        same = (a == b) | (a.isnan() & b.isnan())
        difference = torch.where(same, 0, (a - b).abs().nan_to_num(nan=math.inf, posinf=math.inf))
        found.append(float(torch.linalg.vector_norm(difference, order)) if a.numel() else 0.0)
    return found
