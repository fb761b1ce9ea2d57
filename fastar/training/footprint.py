"""What a step's forward and backward take beside the weights: counted tensor by tensor, without the work.

Bytes do not depend on the device: the tensors are the same. What a GPU's libraries take for themselves (workspaces,
rounding of the allocator) is not counted.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

# Numbers of images at which a footprint is counted; it is a straight line through them. (With very few, another moment
# of the step may be the fullest.)
FEW, MORE = 64, 128


@dataclass(frozen=True)
class Footprint:
    """Bytes at the fullest moment: `fixed` (such as gradients) and `per_image`."""

    fixed: float
    per_image: float

    def of(self, images: int) -> int:
        """Bytes with so many images at once."""
        return max(0, round(self.fixed + self.per_image * images))


class LiveBytes(TorchDispatchMode):
    """While it is entered, counts the bytes of storages that operations make and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # Views of what was there before share its storage; only storages that are new are counted.
        given = {s._cdata for s in _storages((args, kwargs))}
        for storage in _storages(out):
            key = storage._cdata
            if key in given or key in self._known:
                continue
            size = storage.nbytes()
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)
        return out

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _storages(value: Any) -> Iterator[torch.UntypedStorage]:
    if isinstance(value, Tensor):
        yield value.untyped_storage()
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _storages(one)
    elif isinstance(value, dict):
        yield from _storages(list(value.values()))


def training_footprint(build: Callable[[], nn.Module], shape: tuple[int, int, int], dtype: torch.dtype) -> Footprint:
    """Of forward and backward in `dtype` on images of `shape` (C, H, W); `build` makes the network, on a CPU."""

    def run(model: nn.Module, images: Tensor, labels: Tensor) -> None:
        with _autocast(dtype):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()

    def prepared(module: nn.Module) -> None:
        module.train()
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)  # gradients have their place already

    return _line(build(), dtype, prepared, run, shape)


def evaluation_footprint(build: Callable[[], nn.Module], shape: tuple[int, int, int]) -> Footprint:
    """Of a forward pass in fp32 without gradients."""

    @torch.no_grad()
    def run(model: nn.Module, images: Tensor, labels: Tensor) -> None:
        F.cross_entropy(model(images), labels)

    return _line(build(), torch.float32, nn.Module.eval, run, shape)


def seconds_per_image(
    build: Callable[[], nn.Module], shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, batch: int
) -> tuple[float, float]:
    """Seconds of forward and backward in `dtype`, and of forward alone in fp32, per image on `device` in batches.

    The median of three after a first one.
    """
    model = build().to(device).train()
    images = torch.randn(batch, *shape, device=device).to(memory_format=torch.channels_last)
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
    taken = []
    for _ in range(4):
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - begin)
    return sorted(taken[1:])[1]


@contextmanager
def _autocast(dtype: torch.dtype, device: str = "cpu") -> Iterator[None]:
    if dtype == torch.float32:
        yield
        return
    with torch.autocast(device, dtype, cache_enabled=False):
        yield


def _line(
    model: nn.Module,
    dtype: torch.dtype,
    prepare: Callable[[nn.Module], object],
    run: Callable[[nn.Module, Tensor, Tensor], None],
    shape: tuple[int, int, int],
) -> Footprint:
    peaks = []
    fake = FakeTensorMode()  # tensors of every size, and no work: operations only say what they would make
    _without_data(model, dtype, fake)
    with fake:
        prepare(model)
        for count in (FEW, MORE):
            images = torch.zeros(count, *shape).to(memory_format=torch.channels_last)
            labels = torch.zeros(count, dtype=torch.int64)
            with LiveBytes() as live:
                run(model, images, labels)
            peaks.append(live.peak)
    per_image = (peaks[1] - peaks[0]) / (MORE - FEW)
    return Footprint(peaks[0] - FEW * per_image, per_image)


def _without_data(model: nn.Module, dtype: torch.dtype, mode: FakeTensorMode) -> None:
    """Matrices in `dtype`, as `flat.WorkingWeights` holds them, and all else as it is, but none with any memory."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                data = parameter.detach()
                module._parameters[name] = nn.Parameter(mode.from_tensor(data.to(dtype) if data.ndim > 1 else data))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer)
