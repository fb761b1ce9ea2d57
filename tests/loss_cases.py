"""Losses and metrics over batches, and objects as users have them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastar.losses import Loss


def measured(loss: Loss, batches: Iterable[tuple[Any, Any]]) -> dict[str, float]:
    """The loss and metrics of a pass over (outputs, targets)."""
    totals = {name: metric.begin(torch.device("cpu"), 1) for name, metric in loss.measures().items()}
    for outputs, targets in batches:
        for total in totals.values():
            total.add(0, outputs, targets)
    return {name: total.values()[0] for name, total in totals.items()}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def labels(classes: int, *shape: int, seed: int = 1) -> Tensor:
    """Classes."""
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


class Largest:
    """The largest output of a pass, in the form of torchmetrics."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.found = -torch.inf

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        assert len(predictions) == len(targets)
        self.found = max(self.found, float(predictions.max()))

    def compute(self) -> Tensor:
        return torch.tensor(self.found)


class WithLogits:
    """Outputs as libraries return them."""

    def __init__(self, logits: Any):
        self.logits = logits
