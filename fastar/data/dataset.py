"""The one form in which training and evaluation take data, wherever the samples live."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastar.data.sampling import AugmentationKeys, augmentation_keys, epoch_order, epoch_orders
from fastar.errors import FastarError
from fastar.runtime.ranks import share as share_of
from fastar.runtime.timing import span

Batch = Any
"""One batch, on the data set's device. Of image sets: (images fp32 [b, C, H, W] channels-last and
normalised, labels int64 [b]). Of users' data: what they gave."""

Share = tuple[int, int]
"""A rank, and the number of ranks: its share of each batch (`runtime.ranks.share`)."""


def first_not_finite(batch: Any) -> tuple[int, list[int], float] | None:
    """The first number of a batch that is NaN or infinite: the tensor's place, the number's index, its value; None: all
    are finite."""
    for place, one in enumerate(tree_leaves(batch)):
        if not isinstance(one, Tensor) or not one.ndim or not one.is_floating_point():
            continue
        finite = torch.isfinite(one)
        if not bool(finite.all()):
            index = torch.unravel_index(finite.flatten().byte().argmin(), one.shape)
            return place, [int(i) for i in index], float(one[index])
    return None


class Dataset(ABC):
    """One split, as training and evaluation read it. Callers use the public methods alone."""

    device: torch.device
    exact = True
    """A batch is a function of (seed, epoch, its place), so that a pass can begin at any of them."""
    in_memory = False
    """Samples lie in memory: several passes can be gone through side by side, for as little as one after the other."""

    @abstractmethod
    def __len__(self) -> int: ...

    def batch_count(self, batch_size: int, drop_last: bool = True) -> int:
        """Batches per epoch."""
        return len(self) // batch_size if drop_last else -(-len(self) // batch_size)

    @abstractmethod
    def batches(
        self,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        augment: bool = True,
        drop_last: bool = True,
        begin: int = 0,
        size: int | None = None,
        share: Share | None = None,
    ) -> Iterator[Batch]:
        """The batches `begin`, `begin` + 1, ... of an epoch; those before are neither read nor decoded.

        The order is a fresh permutation for every (seed, epoch); a sample's augmentation is a function of
        (seed, epoch, its index) alone. `size` is the side of square images (None: the set's own). `share`: the samples
        of each batch that belong to a rank, alone; None in place of a batch of which it has none. Batches are for
        reading: their memory may be shared.

        Raises:
            FastarError: no whole batch, `begin` beyond the epoch, or a size that the set cannot give.
        """

    @abstractmethod
    def sequential(self, batch_size: int) -> Iterator[Batch]:
        """Batches in file order, not augmented, every sample exactly once; the last may be short. See `batches`."""

    def side_by_side(
        self, batch_size: int, *, seeds: Sequence[int], epoch: int, drop_last: bool = True, begin: int = 0
    ) -> Iterator[Batch]:
        """The batches of an epoch of trainings with these seeds, of data `in_memory`; each tensor [seeds, batch, ...],
        and each row what `batches` gives."""
        raise NotImplementedError

    def order(self, seed: int, epoch: int) -> Tensor:
        """The places in `sequential` of an epoch's samples, in their order: int64 [n]; of data that are `exact`."""
        raise NotImplementedError

    def sample_number(self, seed: int, epoch: int, place: int) -> int:
        """The number, in the order of the file, of the sample at a place of an epoch; of data that are `exact`."""
        raise NotImplementedError


class OrderedDataset(Dataset):
    """A split whose samples can be read in any order: `DeviceDataset` holds images on the device, `StreamingDataset`
    decodes them as they are read, and `user_data` has tensors and map-style datasets. A further form is a subclass with
    the abstract methods."""

    alternate = False
    """Images are mirrored in every other epoch (`augmentation_keys`)."""

    def batches(
        self,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        augment: bool = True,
        drop_last: bool = True,
        begin: int = 0,
        size: int | None = None,
        share: Share | None = None,
    ) -> Iterator[Batch]:
        self._check_batch_size(batch_size, drop_last)
        count = self.batch_count(batch_size, drop_last)
        if not 0 <= begin <= count:
            raise FastarError(
                f"batch {begin} is outside the epoch's {count} batches of {batch_size}; begin within 0..{count}"
            )
        if size is not None:
            self._check_size(size)
        order = self._order(seed, epoch)[begin * batch_size : count * batch_size]
        keys = augmentation_keys(seed, epoch, alternate=self.alternate) if augment else None
        if share is None:
            return self._made(order, batch_size, keys, size)
        return self._shares(order, batch_size, keys, size, share)

    def _shares(
        self, order: Any, batch_size: int, keys: AugmentationKeys | None, size: int | None, share: Share
    ) -> Iterator[Batch]:
        """The samples of a rank of each batch. An epoch's last batch is the only one of which it may have none."""
        whole = len(order) // batch_size * batch_size
        own, of_last = share_of(batch_size, *share), share_of(len(order) - whole, *share)
        parts = (
            order[:whole].reshape(-1, batch_size)[:, own.start : own.stop].reshape(-1),
            order[whole + of_last.start : whole + of_last.stop],
        )
        chosen = torch.cat(parts) if isinstance(order, Tensor) else np.concatenate(parts)
        yield from self._made(chosen, len(own), keys, size)
        if len(order) > whole and not of_last:
            yield None

    def sequential(self, batch_size: int) -> Iterator[Batch]:
        self._check_batch_size(batch_size, drop_last=False)
        return self._made(None, batch_size, None, None)

    def side_by_side(
        self, batch_size: int, *, seeds: Sequence[int], epoch: int, drop_last: bool = True, begin: int = 0
    ) -> Iterator[Batch]:
        if self._augments:
            passes = [
                self.batches(batch_size, seed=seed, epoch=epoch, drop_last=drop_last, begin=begin) for seed in seeds
            ]
            for some in zip(*passes, strict=True):
                yield tree_map(lambda *ones: torch.stack(ones), *some)
            return
        count = self.batch_count(batch_size, drop_last)
        with span("augment"):
            orders = epoch_orders(len(self), seeds, epoch, self.device)[:, begin * batch_size : count * batch_size]
        for chosen in orders.split(batch_size, dim=1) if orders.numel() else ():
            batch = next(iter(self._made(chosen.flatten(), chosen.numel(), None, None)))
            yield tree_map(lambda one, shape=chosen.shape: one.unflatten(0, shape), batch)

    @property
    def _augments(self) -> bool:
        """True where draws for a sample depend on a training's seed."""
        return False

    def _check_batch_size(self, batch_size: int, drop_last: bool) -> None:
        if batch_size < 1:
            raise FastarError(f"batch size {batch_size} must be at least 1")
        if drop_last and batch_size > len(self):
            raise FastarError(f"batch size {batch_size} exceeds the {len(self)} samples of the split; lower it")

    def order(self, seed: int, epoch: int) -> Tensor:
        return torch.as_tensor(self._order(seed, epoch), device="cpu")

    def sample_number(self, seed: int, epoch: int, place: int) -> int:
        return int(self._order(seed, epoch)[place])

    @abstractmethod
    def _check_size(self, size: int) -> None:
        """Raise FastarError where images of this side cannot be given."""

    def _order(self, seed: int, epoch: int) -> Any:
        """Positions of all samples as an epoch takes them."""
        return epoch_order(len(self), seed, epoch, self.device)

    @abstractmethod
    def _made(
        self, order: Any | None, batch_size: int, keys: AugmentationKeys | None, size: int | None
    ) -> Iterator[Batch]:
        """Batches of the samples `order` (None: all, in the order of the file), augmented by `keys` if given."""


class Taken(Dataset):
    """A data set whose batches are taken apart.

    Args:
        whole: gives the batches.
        split: takes one apart into (inputs, targets).
    """

    def __init__(self, whole: Dataset, split: Callable[[Any], tuple[Any, Any]]):
        self._whole, self._split = whole, split
        self.device, self.exact, self.in_memory = whole.device, whole.exact, whole.in_memory

    def __len__(self) -> int:
        return len(self._whole)

    def batch_count(self, batch_size: int, drop_last: bool = True) -> int:
        return self._whole.batch_count(batch_size, drop_last)

    def batches(self, batch_size: int, **how: Any) -> Iterator[Batch]:
        batches = self._whole.batches(batch_size, **how)
        return (None if batch is None else self._split(batch) for batch in batches)

    def sequential(self, batch_size: int) -> Iterator[Batch]:
        return map(self._split, self._whole.sequential(batch_size))

    def side_by_side(self, batch_size: int, **how: Any) -> Iterator[Batch]:
        return map(self._split, self._whole.side_by_side(batch_size, **how))

    def order(self, seed: int, epoch: int) -> Tensor:
        return self._whole.order(seed, epoch)

    def sample_number(self, seed: int, epoch: int, place: int) -> int:
        return self._whole.sample_number(seed, epoch, place)
