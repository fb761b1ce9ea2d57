"""Networks as users give them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from fastar.errors import FastarError
from fastar.evaluation.batches import check_network
from fastar.flat.state_check import check_computed


def device_of(model: nn.Module, name: str) -> torch.device:
    """The device of a network's parameters.

    Raises:
        FastarError: it is no network, or one without weights.
    """
    check_network(model, name)
    first = next(model.parameters(), None)
    if any(isinstance(parameter, UninitializedParameter) for parameter in model.parameters()):
        raise FastarError(f"{name} has parameters without a shape yet: run one batch through its lazy modules first")
    if first is None:
        raise FastarError(
            f"{name}, a {type(model).__name__}, has no parameters: there is nothing to match or to measure"
        )
    if first.is_meta:
        raise FastarError(f"{name} has no weights yet (its parameters are on the meta device): load them first")
    check_computed(model)
    return first.device
