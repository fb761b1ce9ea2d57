"""What work on tensors takes beside the weights: counted tensor by tensor, without the work.

Bytes do not depend on the device: the tensors are the same. What a GPU's libraries take for themselves (workspaces) is
not counted.
"""

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


@dataclass(frozen=True)
class Footprint:
    """Bytes at the fullest moment with so many images at once, counted at two numbers of images.

    The fullest moment is another one for few images than for many, so that bytes are the largest of some straight
    lines: between the counts they are at most what is said.
    """

    counted: tuple[tuple[int, int], tuple[int, int]]
    """(images, bytes), (more images, bytes)."""

    @property
    def per_image(self) -> float:
        """Bytes that another image adds."""
        (few, low), (more, high) = self.counted
        return (high - low) / (more - few)

    def of(self, images: int) -> int:
        """Bytes with so many images at once."""
        few, low = self.counted[0]
        return max(0, round(low + self.per_image * (images - few)))


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


def count_bytes(
    model: nn.Module,
    run: Callable[[Network, Tensor, Tensor], None],
    shape: Sequence[int],
    images: int,
    dtype: torch.dtype = torch.float32,
) -> Footprint:
    """Of `run(network, images, labels)` on up to `images` images of `shape` (C, H, W), channels-last.

    `network` is `model` in its present mode, with parameters and buffers of no memory: matrices in `dtype`, as
    `flat.WorkingWeights` holds them, all else as it is. `model` is not touched, wherever it is.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes seconds to import

    found = []
    with FakeTensorMode(allow_non_fake_inputs=True):  # tensors of every size, and no work
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
            if len(shape) == 3:
                pixels = pixels.to(memory_format=torch.channels_last)
            labels = torch.zeros(count, dtype=torch.int64, device="cpu")
            for tensor in tensors.values():
                tensor.grad = None
            with LiveBytes() as live:
                run(network, pixels, labels)
            found.append((count, live.peak))
    return Footprint((found[0], found[1]))


def _without_data(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """On a CPU, whatever device it is from: nothing of the device is asked for."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device="cpu")
