"""Forward passes of a network on batches of whatever its forward takes."""

from __future__ import annotations

from collections.abc import Mapping
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


def call(model: nn.Module, batch: Batch) -> Any:
    """The outputs of `model` for a batch as it is."""
    arguments, named = arguments_of(batch)
    return model(*arguments, **named)


def arguments_of(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and the keyword arguments that a batch stands for."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,), {}
