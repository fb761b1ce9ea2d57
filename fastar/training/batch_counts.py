"""The batches that batch-norm layers have seen, counted by one addition a step instead of one a layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

BUFFER = "num_batches_tracked"


class _Calls:
    """Stands where a layer has its count, and is asked to count as that is."""

    def __init__(self) -> None:
        self.number = 0

    def add_(self, number: int) -> None:
        self.number += number


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
        self._calls = [_Calls() for _ in self._layers]
        self._counts: tuple[Tensor, ...] = ()
        if self._layers:
            self._all = torch.stack([cast(Tensor, layer.num_batches_tracked) for layer in self._layers])
            self._counts = self._all.unbind()
            self._give_back()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Around one forward pass, which is not compiled: counts as the layers would, however often each is used.

        One addition where each is used once, as is usual; else one for each that was used.
        """
        if not self._layers:
            yield
            return
        for layer, calls in zip(self._layers, self._calls, strict=True):
            calls.number = 0
            if layer.momentum is not None:
                # What is no tensor is not launched: the layer itself says when it has seen a batch.
                layer._buffers[BUFFER] = cast(Tensor, calls)
        try:
            yield
        finally:
            self._give_back()
        if all(calls.number == 1 for calls in self._calls):
            self._all.add_(1)
            return
        for count, calls in zip(self._counts, self._calls, strict=True):
            if calls.number:
                count.add_(calls.number)

    def _give_back(self) -> None:
        for layer, count in zip(self._layers, self._counts, strict=True):
            layer._buffers[BUFFER] = count
