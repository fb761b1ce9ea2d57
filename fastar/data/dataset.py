"""The data set that training and evaluation take, wherever its images live."""

from collections.abc import Iterator
from typing import Protocol

import torch

from fastar.errors import FastarError

Batch = tuple[torch.Tensor, torch.Tensor]
"""(images fp32 [b, C, H, W] channels-last and normalised, labels int64 [b]), on the data set's device."""


class Dataset(Protocol):
    """One split: `DeviceDataset` holds it on the device, `StreamingDataset` decodes it as it is read."""

    classes: int
    digest: str
    """SHA-256 of the files that it came from."""

    def __len__(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of its images, where no other size is asked for."""
        ...

    def batch_count(self, batch_size: int, drop_last: bool = True) -> int:
        """Batches per epoch."""
        ...

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
        ...

    def sequential(self, batch_size: int, *, augment: bool = False, seed: int = 0, epoch: int = 0) -> Iterator[Batch]:
        """Batches in file order, every sample exactly once; the last may be short. See `batches`."""
        ...


def count_batches(count: int, batch_size: int, drop_last: bool) -> int:
    """Batches in an epoch of `count` samples."""
    return count // batch_size if drop_last else -(-count // batch_size)


def chosen_batches(count: int, batch_size: int, drop_last: bool, begin: int) -> slice:
    """The part of an epoch's order of `count` samples that makes its batches from number `begin` on.

    Raises:
        FastarError: a batch size below 1 or with no whole batch, or `begin` outside the epoch.
    """
    if batch_size < 1:
        raise FastarError(f"batch size {batch_size} must be at least 1")
    if drop_last and batch_size > count:
        raise FastarError(f"batch size {batch_size} exceeds the {count} samples of the split; lower it")
    whole = count_batches(count, batch_size, drop_last)
    if not 0 <= begin <= whole:
        raise FastarError(
            f"batch {begin} is outside the epoch's {whole} batches of {batch_size}; begin within 0..{whole}"
        )
    return slice(begin * batch_size, min(whole * batch_size, count))
