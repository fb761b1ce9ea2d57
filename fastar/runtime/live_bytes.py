"""Bytes of tensors that are alive at once, counted operation by operation on real tensors or on ones without memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# The fewest images that are counted: batch-norm takes statistics of at least two.
FEW = 16

Network = Callable[[Tensor], Tensor]


class LiveBytes(TorchDispatchMode):
    """While it is entered, counts the bytes of storages that this thread's operations make and that are still alive.

    `now` and `peak` do not depend on the device; workspaces of a GPU's libraries are not counted.
    """

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


@dataclass(frozen=True)
class PeakLine:
    """Peak bytes as a straight line through two (images, bytes).

    Peak memory is a convex, piecewise-linear function of the batch size: between the two it is never underestimated.
    """

    few: tuple[int, int]
    many: tuple[int, int]

    @property
    def per_image(self) -> float:
        """Bytes that another image adds."""
        return (self.many[1] - self.few[1]) / (self.many[0] - self.few[0])

    def at(self, images: int) -> int:
        """Bytes with so many images at once."""
        return max(0, round(self.few[1] + self.per_image * (images - self.few[0])))


def peak_line(
    model: nn.Module,
    run: Callable[[Network, Tensor, Tensor], None],
    shape: Sequence[int],
    images: int,
    dtype: torch.dtype = torch.float32,
) -> PeakLine:
    """Peak bytes of `run(network, images, labels)` on up to `images` images of `shape` (C, H, W), channels-last.

    `network` is `model` in its present mode, on tensors that have sizes and no memory, so that any batch takes the same
    time: matrices in `dtype`, as `flat.WorkingWeights` holds them, all else as it is. `model` is not touched.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes seconds to import

    found = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensors: dict[str, Tensor] = {
            name: _without_data(p.detach(), dtype if p.ndim > 1 else p.dtype).requires_grad_(p.requires_grad)
            for name, p in model.named_parameters()
        }
        tensors |= {name: _without_data(buffer, buffer.dtype) for name, buffer in model.named_buffers()}

        def network(given: Tensor) -> Tensor:
            result: Tensor = torch.func.functional_call(model, tensors, (given,))
            return result

        for count in (FEW, max(images, 2 * FEW)):
            pixels = torch.zeros(count, *shape, dtype=torch.float32, device="cpu")
            pixels = pixels.to(memory_format=torch.channels_last)
            labels = torch.zeros(count, dtype=torch.int64, device="cpu")
            for tensor in tensors.values():
                tensor.grad = None
            with LiveBytes() as live:
                run(network, pixels, labels)
            found.append((count, live.peak))
    return PeakLine(found[0], found[1])


def _without_data(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device="cpu")
