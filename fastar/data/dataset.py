"""The one form in which training and evaluation take data, wherever the samples live."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch

from fastar.data.sampling import epoch_order
from fastar.errors import FastarError
from fastar.runtime.seeds import derive_seed

Batch = tuple[torch.Tensor, torch.Tensor]
"""(images fp32 [b, C, H, W] channels-last and normalised, labels int64 [b]), on the data set's device."""


class Dataset(ABC):
    """One split: `DeviceDataset` holds it on the device, `StreamingDataset` decodes it as it is read.

    Callers use the public methods alone. A further form of data is a subclass with the abstract ones.
    """

    device: torch.device

    @abstractmethod
    def __len__(self) -> int: ...

    def batch_count(self, batch_size: int, drop_last: bool = True) -> int:
        """Batches per epoch."""
        return len(self) // batch_size if drop_last else -(-len(self) // batch_size)

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
    ) -> Iterator[Batch]:
        """The batches `begin`, `begin` + 1, ... of an epoch; those before are neither read nor decoded.

        The order is a fresh permutation for every (seed, epoch); a sample's augmentation is a function of
        (seed, epoch, its index) alone. `size` is the side of square images (None: the set's own). Batches are for
        reading: their memory may be shared.

        Raises:
            FastarError: no whole batch, `begin` beyond the epoch, or a size that the set cannot give.
        """
        self._check_batch_size(batch_size, drop_last)
        count = self.batch_count(batch_size, drop_last)
        if not 0 <= begin <= count:
            raise FastarError(
                f"batch {begin} is outside the epoch's {count} batches of {batch_size}; begin within 0..{count}"
            )
        if size is not None:
            self._check_size(size)
        order = self._order(seed, epoch)[begin * batch_size : count * batch_size]
        return self._made(order, batch_size, derive_seed(seed, "augmentation", epoch) if augment else None, size)

    def sequential(self, batch_size: int) -> Iterator[Batch]:
        """Batches in file order, not augmented, every sample exactly once; the last may be short. See `batches`."""
        self._check_batch_size(batch_size, drop_last=False)
        return self._made(None, batch_size, None, None)

    def _check_batch_size(self, batch_size: int, drop_last: bool) -> None:
        if batch_size < 1:
            raise FastarError(f"batch size {batch_size} must be at least 1")
        if drop_last and batch_size > len(self):
            raise FastarError(f"batch size {batch_size} exceeds the {len(self)} samples of the split; lower it")

    @abstractmethod
    def _check_size(self, size: int) -> None:
        """Raise FastarError where images of this side cannot be given."""

    def _order(self, seed: int, epoch: int) -> Any:
        """Positions of all samples as an epoch takes them."""
        return epoch_order(len(self), seed, epoch, self.device)

    @abstractmethod
    def _made(self, order: Any | None, batch_size: int, key: int | None, size: int | None) -> Iterator[Batch]:
        """Batches of the samples `order` (None: all, in the order of the file), augmented by `key` if there is one."""
