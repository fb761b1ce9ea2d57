"""A fixed way of reading a tensor in which all its hidden units lie in regular runs, though they do not as it is."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastar.errors import FastarError
from fastar.symmetry.batched_index import selected


@dataclass(frozen=True, slots=True)
class Arrangement:
    """How a tensor is read so that units lie in regular runs: positions of its axes in another order, then its axes
    split, then what these became merged.

    Channels that were shuffled are read in the order in which they came by an order of their axis. Experts' matrices
    [E, in, out], whose outputs are units of their own in each expert, are read as [E * out, in] by
    `axes=((0, 2), (1,))`. A convolution's weight [groups * out, in, 3, 3] is read as [groups, out, in, 3, 3] by
    `split={0: (groups, out)}` and `axes=((0,), (1,), (2,), (3,), (4,))`.

    Args:
        axes: the finer axes, each once, in groups; each group becomes one axis of what is read, outermost first. Finer
            axes are the tensor's, but for those that are split; they are numbered from 0, in the tensor's order.
        orders: axis of the tensor -> its positions in the order in which they are read; others stay. An order of
            several axes together is not needed: no layout of units asks for one.
        split: axis of the tensor -> the lengths of the finer axes that it is read as, outermost first, once it is in
            order; others stay whole.
    """

    axes: tuple[tuple[int, ...], ...]
    orders: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    split: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    def check(self, shape: Sequence[int], where: str) -> None:
        """Raise FastarError unless this reads every number of a tensor of `shape` once; `where` is what to call it."""
        for axis, order in self.orders.items():
            if axis not in range(len(shape)) or sorted(order) != list(range(shape[axis])):
                raise FastarError(
                    f"arrangement of {where}: its order of axis {axis} is no permutation of the positions there: the "
                    f"tensor is {list(shape)}"
                )
        for axis, lengths in self.split.items():
            if axis not in range(len(shape)) or min(lengths, default=0) < 1 or math.prod(lengths) != shape[axis]:
                raise FastarError(
                    f"arrangement of {where}: it splits axis {axis} into {list(lengths)}, which does not give the "
                    f"positions there: the tensor is {list(shape)}"
                )
        flat = [axis for group in self.axes for axis in group]
        finer = [axis for group in self.finer(shape) for axis in group]
        if sorted(flat) != finer:
            what = f"{len(finer)} once they are split" if self.split else f"{len(finer)}"
            raise FastarError(
                f"arrangement of {where}: its axes are {flat}, the tensor has {what}: name each of them once, from 0"
            )

    def read(self, tensor: Tensor, leading: int = 0) -> Tensor:
        """The arranged tensor, a copy, or a view where that is possible; `leading` batch axes stay in front."""
        batch, shape = tensor.shape[:leading], tensor.shape[leading:]
        for axis in self.orders:
            tensor = self.ordered(tensor, axis, leading + axis)
        if self.split:
            tensor = tensor.reshape(*batch, *self.fine(shape))
        return tensor.permute(self._permuted(leading)).reshape(*batch, *self.lengths(shape))

    def ordered(self, values: Tensor, axis: int, along: int = -1) -> Tensor:
        """Values that run `along` one of their axes as the tensor runs along its `axis`, in the order that is read."""
        if axis not in self.orders:
            return values
        return selected(values, along % values.ndim, _index(self.orders[axis], values.device))

    def written(self, arranged: Tensor, shape: Sequence[int], leading: int = 0) -> Tensor:
        """The tensor, of `shape` without batch axes, that is read as `arranged`; a view where that is possible."""
        to, fine = self._permuted(leading), self.fine(shape)
        apart = [arranged.shape[axis] if axis < leading else fine[axis - leading] for axis in to]
        tensor = arranged.reshape(apart).permute([to.index(axis) for axis in range(len(to))])
        if self.split:
            tensor = tensor.reshape(*arranged.shape[:leading], *shape)
        for axis, order in self.orders.items():
            tensor = selected(tensor, leading + axis, _index(order, tensor.device).argsort())
        return tensor

    def write(self, arranged: Tensor, tensor: Tensor, leading: int = 0) -> None:
        """Put what was read back into `tensor`, in place."""
        written = self.written(arranged, tensor.shape[leading:], leading)
        if written.data_ptr() != tensor.data_ptr():  # else what was read is a view of `tensor`
            tensor.copy_(written)

    def lengths(self, shape: Sequence[int]) -> list[int]:
        """The lengths of the axes that are read of a tensor of `shape`."""
        fine = self.fine(shape)
        return [math.prod(fine[axis] for axis in group) for group in self.axes]

    def finer(self, shape: Sequence[int]) -> list[list[int]]:
        """The finer axes of each axis of a tensor of `shape`."""
        found, begin = [], 0
        for axis in range(len(shape)):
            end = begin + len(self.split.get(axis, (1,)))
            found.append(list(range(begin, end)))
            begin = end
        return found

    @classmethod
    def plain(cls, axes: int) -> Arrangement:
        """The one that reads a tensor of so many axes as it is."""
        return cls(tuple((axis,) for axis in range(axes)))

    def fine(self, shape: Sequence[int]) -> list[int]:
        """The lengths of the finer axes."""
        return [one for axis, length in enumerate(shape) for one in self.split.get(axis, (length,))]

    def _permuted(self, leading: int) -> list[int]:
        return [*range(leading), *(leading + axis for group in self.axes for axis in group)]


@functools.lru_cache(maxsize=256)  # one for each layer: made of thousands of Python's numbers
def _index(order: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # autograd keeps no tensors that were made in it
        return torch.tensor(order, dtype=torch.int64, device="cpu").to(device)
