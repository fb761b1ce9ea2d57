"""Some sources of a chunk at a time, and copies between host and GPU that wait for the device as seldom as they can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Some of `count` sources: their numbers, ascending.

    `index` is the same [m] on the device; None where the numbers follow each other, since a slice does then.
    """

    numbers: NDArray[np.int64]
    count: int
    index: Tensor | None

    @classmethod
    def every(cls, count: int) -> Rows:
        """All of `count` sources."""
        return cls(np.arange(count), count, None)

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def everything(self) -> bool:
        """Tell whether these are all sources."""
        return len(self.numbers) == self.count

    def of(self, x: Tensor) -> Tensor:
        """A view of these rows of x [count, ...] where they follow each other, else a copy."""
        if self.index is None:
            return x.narrow(0, int(self.numbers[0]), len(self.numbers))
        return x.index_select(0, self.index)

    def put(self, x: Tensor, values: Tensor) -> None:
        """Write `values` [m, ...] into these rows of x [count, ...]."""
        if self.index is None:
            self.of(x).copy_(values)
        else:
            x.index_copy_(0, self.index, values)

    def split(self, most: int) -> list[tuple[slice, Rows]]:
        """Parts of at most `most` rows, each with its slice of these."""
        parts = [slice(begin, begin + most) for begin in range(0, len(self), most)]
        return [
            (at, Rows(part, self.count, None if self.index is None or _follow(part) else self.index[at]))
            for at, part in ((at, self.numbers[at]) for at in parts)
        ]


def chosen(numbers: NDArray[np.int64], count: int, *arrays: NDArray[Any], device: torch.device) -> tuple[Any, ...]:
    """`Rows` of the sources `numbers`, and `arrays` on the device, uploaded together."""
    if _follow(numbers):
        return (Rows(numbers, count, None), *upload(arrays, device))
    index, *others = upload([numbers, *arrays], device)
    return (Rows(numbers, count, index), *others)


def _follow(numbers: NDArray[np.int64]) -> bool:
    """Tell whether ascending numbers follow each other without a gap."""
    return len(numbers) == int(numbers[-1]) - int(numbers[0]) + 1


def along(x: Tensor, axis: int, index: Tensor, within: int | None = None) -> Tensor:
    """[m, ...]: of the k-th of x [m, ...], the positions index[k] (of [m, length]) of its `axis`; if given, in the g-th
    slice of its axis `within` the positions index[k, g] (of [m, slices, length])."""
    if within is not None:
        some = index if within < axis else index.mT
        first, last = min(within, axis) + 1, max(within, axis) + 1
        places = [len(index), *(some.shape[1 + (n == last)] if n in (first, last) else 1 for n in range(1, x.ndim))]
        shape = [*x.shape[: axis + 1], index.shape[2], *x.shape[axis + 2 :]]
        return x.gather(axis + 1, some.reshape(places).expand(shape))
    if len(index) == 1:
        return selected(x[0], axis, index[0])[None]
    return x.gather(axis + 1, _expanded(x, axis, index))


def selected(x: Tensor, axis: int, index: Tensor) -> Tensor:
    """`x.index_select(axis, index)` of x in memory order: on a CPU that takes ten times as long along the last of four
    axes as along the last of two."""
    if axis < x.ndim - 1 or axis < 2:
        return x.index_select(axis, index)
    return x.flatten(0, -2).index_select(1, index).unflatten(0, x.shape[:-1])


def put_along(x: Tensor, axis: int, index: Tensor, values: Tensor) -> None:
    """Write `values` where `along` would read them."""
    if len(index) == 1:
        x[0].index_copy_(axis, index[0], values[0])
    else:
        x.scatter_(axis + 1, _expanded(x, axis, index), values)


def _expanded(x: Tensor, axis: int, index: Tensor) -> Tensor:
    shape = [len(index), *x.shape[1 : axis + 1], index.shape[1], *x.shape[axis + 2 :]]
    return index.view(len(index), *(1 for _ in range(axis)), -1, *(1 for _ in x.shape[axis + 2 :])).expand(shape)


def upload(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Arrays of one type as tensors on `device`, in one copy that nobody waits for; on a CPU they share memory."""
    if device.type == "cpu" or not arrays:
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    flat = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays]))
    # From pageable memory a copy waits for all that is queued on the device.
    there = (flat.pin_memory() if device.type == "cuda" else flat).to(device, non_blocking=True)
    parts = there.split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def download(tensor: Tensor) -> NDArray[Any]:
    """A tensor's values on the host, waited for; on a CPU they share memory."""
    if tensor.device.type != "cuda":
        return tensor.detach().cpu().numpy()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True, device="cpu")
    host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).record_event().synchronize()
    return host.numpy()


def memory_order(tensor: Tensor) -> list[int]:
    """The axes of `tensor` from the slowest to the fastest in memory, so that `tensor.permute(order)` is contiguous.

    Channels-last convolution weights of shape (O, I, H, W) give [0, 2, 3, 1].
    """
    strides = tensor.stride()
    return sorted(range(tensor.ndim), key=lambda axis: (-strides[axis], axis))
