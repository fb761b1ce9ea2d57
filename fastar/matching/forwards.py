"""Forward passes of a network with parameters that are given, for the methods of matching that look at data."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Batch = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]
"""What a model's forward takes: one tensor, several, or tensors by name."""


def without_statistics(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy in evaluation mode on `device`, whose batch-norm normalises with the batch and keeps no statistics."""
    twin = copy.deepcopy(model).to(device).eval()
    for module in twin.modules():
        if isinstance(module, _BatchNorm):
            module.train()
            module.track_running_stats = False
    return twin


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The same batch on `device`."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, tuple):
        return tuple(one.to(device) for one in batch)
    return {name: one.to(device) for name, one in batch.items()}


def forward(model: nn.Module, parameters: Mapping[str, Tensor], batch: Batch) -> Any:
    """What `model` makes of a batch with these parameters; it keeps its own."""
    arguments = batch if isinstance(batch, tuple) else () if isinstance(batch, Mapping) else (batch,)
    named = dict(batch) if isinstance(batch, Mapping) else {}
    return torch.func.functional_call(model, dict(parameters), arguments, named)
