"""A split held whole on the device: read once through FFCV, shuffled, augmented and normalised there."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from fastar.config import Augmentation
from fastar.data.augment import Draws, Normalisation, augmented, draw_augmentation
from fastar.data.dataset import Batch, chosen_batches, count_batches
from fastar.data.sampling import epoch_order
from fastar.data.splits import VALIDATION, chosen_images, stored_in
from fastar.errors import FastarError
from fastar.runtime.progress import SILENT, Progress
from fastar.runtime.seeds import derive_seed
from fastar.runtime.timing import span

if TYPE_CHECKING:
    from fastar.data.ffcv.folder import DatasetFiles

# A split is kept normalised (fp32) beside its bytes where that takes at most this much: digits, MNIST, test splits.
NORMALISED_BYTES = 256 << 20
# Samples are gathered in blocks of about this much fp32; batches are slices of a block. No result depends on it.
BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}


class DeviceDataset:
    """Images uint8 [n, H, W, C] and labels int64 [n] on one device, and the batches made of them.

    `index` holds each sample's position in the file, which is what its augmentation depends on.
    """

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        classes: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        augmentation: Augmentation,
        index: torch.Tensor | None = None,
        digest: str = "",
        normalised_bytes: int = NORMALISED_BYTES,
        block_bytes: int | None = None,
    ):
        if images.dtype != torch.uint8 or images.ndim != 4 or labels.dtype != torch.int64:
            raise ValueError(f"need uint8 [n, H, W, C] and int64 labels, not {images.dtype} {tuple(images.shape)}")
        if len(images) != len(labels) or len(mean) != images.shape[3] or len(std) != images.shape[3]:
            raise ValueError(f"{len(images)} images, {len(labels)} labels, {len(mean)} means do not fit together")
        self.images, self.labels, self.classes = images, labels, classes
        self.augmentation, self.digest = augmentation, digest
        self.index = torch.arange(len(labels), device=labels.device) if index is None else index
        self._normalise = Normalisation(mean, std, images.shape[1], images.shape[2], images.device)
        self._normalised = self._normalise(images) if images.numel() * 4 <= normalised_bytes else None
        self._block_bytes = BLOCK_BYTES[images.device.type] if block_bytes is None else block_bytes

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        return self.images.device

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        _, height, width, channels = self.images.shape
        return channels, height, width

    def batch_count(self, batch_size: int, drop_last: bool = True) -> int:
        """Batches per epoch."""
        return count_batches(len(self), batch_size, drop_last)

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
        """One epoch, from batch number `begin`: see `Dataset.batches`. `size` cannot differ from the images'.

        Batches are views of larger tensors: read them, do not write into them.
        """
        chosen = chosen_batches(len(self), batch_size, drop_last, begin)
        if size is not None and (size, size) != self.input_shape[1:]:
            _, height, width = self.input_shape
            raise FastarError(f"images of {size}x{size} asked for, the data set's are {height}x{width} and stay so")
        order = epoch_order(len(self), seed, epoch, self.device)[chosen]
        return self._blocks(order, batch_size, self._key(augment, seed, epoch))

    def sequential(self, batch_size: int, *, augment: bool = False, seed: int = 0, epoch: int = 0) -> Iterator[Batch]:
        """See `Dataset.sequential`."""
        chosen_batches(len(self), batch_size, False, 0)
        key = self._key(augment, seed, epoch)
        if key is None and self._normalised is not None:
            images = self._normalised.permute(0, 3, 1, 2)
            return zip(images.split(batch_size), self.labels.split(batch_size), strict=True)
        return self._blocks(torch.arange(len(self), device=self.device), batch_size, key)

    def _key(self, augment: bool, seed: int, epoch: int) -> int | None:
        return derive_seed(seed, "augmentation", epoch) if augment and self.augmentation else None

    def _blocks(self, order: torch.Tensor, batch_size: int, key: int | None) -> Iterator[Batch]:
        sample_bytes = 4 * self.images[0].numel()
        block = max(1, self._block_bytes // (sample_bytes * batch_size)) * batch_size
        draws = None
        if key is not None:
            with span("augment"):
                draws = draw_augmentation(self.augmentation, key, self.index[order])
        for start in range(0, len(order), block):
            with span("augment"):
                images, labels = self._block(order, slice(start, start + block), draws)
            yield from zip(images.split(batch_size), labels.split(batch_size), strict=True)

    def _block(self, order: torch.Tensor, of_order: slice, draws: Draws | None) -> Batch:
        """The samples `order[of_order]`: images fp32 [b, C, H, W], labels [b]."""
        chosen = order[of_order]
        if draws is not None:
            down, right, mirrored = draws
            moves = down[of_order], right[of_order], mirrored[of_order]
            pixels = augmented(self.images, chosen, moves, self._normalise)
        elif self._normalised is not None:
            pixels = self._normalised.index_select(0, chosen)
        else:
            pixels = self._normalise(self.images.index_select(0, chosen))
        return pixels.permute(0, 3, 1, 2), self.labels.index_select(0, chosen)


def load(
    files: "DatasetFiles",
    split: str,
    device: torch.device | str,
    *,
    limit: int | None = None,
    validation: float = 0.0,
    augmentation: Augmentation | None = None,
    progress: Progress = SILENT,
) -> DeviceDataset:
    """Read a split ("train", "validation" or "test") once through FFCV into memory of `device`.

    `limit` keeps at most so many samples, classes balanced, in file order; `validation` is the share of the training
    images that are the split "validation" and not in "train" (`fastar.data.splits`); `augmentation` replaces the
    dataset's own. The pixels are compared with the digest taken when they were written.
    """
    # Only here: FFCV takes seconds, and tensors of a user's own need none of it.
    from fastar.data.ffcv.format import FixedLayout, check_beton
    from fastar.data.ffcv.read import read_chosen

    stored = stored_in(split)
    path, layout = files.path(stored), files.layout(stored)
    assert isinstance(layout, FixedLayout)  # others stream
    index = np.arange(layout.count)
    if limit is not None or split == VALIDATION or (validation and split == "train"):
        # Chosen before any is read: what is left out takes no memory.
        index = chosen_images(
            check_beton(path, layout), split, validation=validation, limit=limit, classes=files.classes, name=files.name
        )
    images, labels, content = read_chosen(path, layout, index, progress, f"reading {files.name} {split}")
    if content != files.metadata["content"][stored]:
        raise FastarError(
            f"{path}: its pixels are not those that were written (damaged or replaced); "
            f"delete {path.parent} and write it again"
        )
    try:
        return DeviceDataset(
            torch.from_numpy(images).to(device),
            torch.from_numpy(labels).to(device),
            classes=layout.classes,
            mean=files.mean,
            std=files.std,
            augmentation=files.augmentation if augmentation is None else augmentation,
            index=torch.from_numpy(index).to(device),
            digest=files.digest,
        )
    except torch.OutOfMemoryError as error:
        needed = images.nbytes / 1e6
        raise FastarError(
            f"{files.name} {split}: {needed:,.0f} MB of images do not fit on {device}; use a smaller limit"
        ) from error
