"""How many CPU threads a network is worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# Below this a forward pass is over before a second thread has been woken; and threads that wait for each other on a
# busy machine cost a hundred times what they save.
SMALL_FLOPS = 100_000_000


def forward_flops(model: nn.Module, images: Tensor) -> int:
    """Floating-point operations of one forward pass of `model` over the batch `images` (products only)."""
    training = model.training
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.eval()(images)
    finally:
        model.train(training)
    return int(counter.get_total_flops())


@contextmanager
def suitable_threads(model: nn.Module, images: Tensor) -> Iterator[int]:
    """Inside, torch uses one CPU thread if a forward pass of `model` over `images` is small; else as many as before.

    Has no effect on a GPU's work.
    """
    before = torch.get_num_threads()
    chosen = 1 if images.device.type == "cpu" and forward_flops(model, images) < SMALL_FLOPS else before
    torch.set_num_threads(chosen)
    try:
        yield chosen
    finally:
        torch.set_num_threads(before)
