"""The losses of several networks of one architecture, each of its own batch, in few operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from fastar.losses.loss import Loss
from fastar.losses.targets import sample_count
from fastar.losses.terms import IGNORED

StackedLoss = Callable[[Any, Any, float], tuple[Tensor, Tensor]]
"""(outputs [K, b, ...], targets [K, b, ...], label smoothing) -> the loss of each network, [K], for gradients and as
it is told of: both are the same to rounding."""


def stacked_losses(loss: Loss, outputs: Any, targets: Any) -> list[StackedLoss]:
    """Ways to take `loss` of K networks, the fastest first. All are the same to rounding, the last to the bit.

    Args:
        outputs, targets: such as it will be taken of.
    """

    def one_by_one(outputs: Any, targets: Any, smoothing: float) -> tuple[Tensor, Tensor]:
        pairs = ((of_network(outputs, k), of_network(targets, k)) for k in range(sample_count(outputs)))
        found = torch.stack([loss.mean(*pair, smoothing) for pair in pairs])
        return found, found.detach()

    named = loss.function is None and not loss.whole and loss.name == "cross_entropy"
    plain = isinstance(outputs, Tensor) and isinstance(targets, Tensor) and outputs.ndim == 3 and targets.ndim == 2
    if not (named and plain and targets.dtype == torch.int64):
        return [one_by_one]
    return [_classes_first, _classes_last, one_by_one]


def of_network(batch: Any, k: int) -> Any:
    """The batch of network number `k`, of one whose tensors are [K, ...]."""
    return tree_map_only(Tensor, lambda one: one[k], batch)


def _classes_first(outputs: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy with the samples innermost: few classes are no whole vector, a batch is several."""
    if outputs.requires_grad:  # in the order of its axes, as that of a batch alone: sums over it are the same then
        outputs.register_hook(lambda gradient: gradient.contiguous())
    found = F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none", label_smoothing=smoothing)
    return _means(found, targets)


def _classes_last(outputs: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy of all samples of all networks, as of one batch."""
    given = outputs.flatten(0, 1), targets.flatten()
    found = F.cross_entropy(*given, reduction="none", label_smoothing=smoothing)
    return _means(found.view(targets.shape), targets)


def _means(found: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over each network's samples that are not ignored; and summed in the order of one network's loss."""
    ignored = targets == IGNORED
    places = ignored * IGNORED  # as if there were one class: its number, 0
    rows = found.detach().neg().unsqueeze(2)
    told = [F.nll_loss(row, place) for row, place in zip(rows.unbind(), places.unbind(), strict=True)]
    return found.sum(1) / (~ignored).sum(1), torch.stack(told)
