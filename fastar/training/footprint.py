"""What a step's forward and backward take beside the weights: bytes, counted without the work, and seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastar.runtime.device import synchronize
from fastar.runtime.footprint import Footprint, Network, count_bytes

# Timed after a first one, and for no longer than this many seconds in all.
TIMES, SECONDS = 3, 2.0


def training_footprint(
    build: Callable[[], nn.Module], shape: tuple[int, int, int], dtype: torch.dtype, batch: int
) -> Footprint:
    """Of forward and backward in `dtype` on up to `batch` images of `shape` (C, H, W), the new gradients among it;
    `build` makes the network, on a CPU."""

    def run(network: Network, images: Tensor, labels: Tensor) -> None:
        with _autocast(dtype):
            logits = network(images)
        F.cross_entropy(logits.float(), labels).backward()

    return count_bytes(build().train(), run, shape, batch, dtype)


def seconds_per_image(
    build: Callable[[], nn.Module], shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, batch: int
) -> tuple[float, float]:
    """Seconds of forward and backward in `dtype`, and of forward alone in fp32, per image on `device` in batches.

    The median of some after a first one.
    """
    model = build().to(device).train()
    images = torch.randn(batch, *shape, device=device, dtype=torch.float32).to(memory_format=torch.channels_last)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)

    def train() -> None:
        with _autocast(dtype, device.type):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()

    @torch.no_grad()
    def evaluate() -> None:
        model(images)

    return _median(train, device) / batch, _median(evaluate, device) / batch


def _median(run: Callable[[], None], device: torch.device) -> float:
    run()
    synchronize(device)
    taken: list[float] = []
    while not taken or (len(taken) < TIMES and sum(taken) < SECONDS):
        begin = time.perf_counter()
        run()
        synchronize(device)
        taken.append(time.perf_counter() - begin)
    return sorted(taken)[len(taken) // 2]


@contextmanager
def _autocast(dtype: torch.dtype, device: str = "cpu") -> Iterator[None]:
    if dtype == torch.float32:
        yield
        return
    with torch.autocast(device, dtype, cache_enabled=False):
        yield
