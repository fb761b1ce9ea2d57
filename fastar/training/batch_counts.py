"""The batches that batch-norm layers have seen, counted by one addition a step instead of one a layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

BUFFER = "num_batches_tracked"


class BatchCounts:
    """Keeps `num_batches_tracked` of all layers of `model` in one tensor, of which each layer holds an element.

    Nothing reads it between steps (but layers with momentum None, which go on counting for themselves). A ResNet-18 has
    20 of them, a tenth of all that a step launches on a GPU.
    """

    def __init__(self, model: nn.Module):
        self._layers = [
            layer
            for layer in model.modules()
            if isinstance(layer, _BatchNorm) and layer.num_batches_tracked is not None and layer.momentum is not None
        ]
        self._counts: Sequence[torch.Tensor | None] = [layer.num_batches_tracked for layer in self._layers]
        if self._layers:
            self._all = torch.stack([count for count in self._counts if count is not None])
            self._counts = self._all.unbind()
            self._give(self._counts)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Around one forward pass in training mode: it counts one batch for every layer, used once or not.

        Where a layer is held in eval mode, all count for themselves.
        """
        if not self._layers or not all(layer.training for layer in self._layers):
            yield
            return
        self._give([None] * len(self._layers))  # a layer without the buffer does not count
        try:
            yield
        finally:
            self._give(self._counts)
        self._all.add_(1)

    def _give(self, counts: Sequence[torch.Tensor | None]) -> None:
        for layer, count in zip(self._layers, counts, strict=True):
            layer._buffers[BUFFER] = count
