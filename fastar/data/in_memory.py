"""A split held whole on the device: read once, shuffled, augmented and normalised there."""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch

from fastar.config import Augmentation
from fastar.data.augment import Normalisation, augmented, draw_augmentation
from fastar.data.dataset import Batch, OrderedDataset
from fastar.data.sampling import AugmentationKeys
from fastar.data.splits import chosen_images, stored_in
from fastar.errors import FastarError
from fastar.runtime.progress import SILENT, Progress
from fastar.runtime.timing import span

if TYPE_CHECKING:
    from fastar.data.ffcv.folder import DatasetFiles
    from fastar.data.raw_arrays import RawArrays

# A split is kept normalised (fp32) beside its bytes where that takes at most this much: digits, MNIST, test splits.
NORMALISED_BYTES = 256 << 20
# Samples are gathered in blocks of about this much fp32; batches are slices of a block. No result depends on it.
BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}
# Label and place (int64) of an image.
EXTRA_BYTES = 16


def held_bytes(count: int, pixels: int) -> int:
    """Bytes that a `DeviceDataset` of `count` images takes, each of so many values."""
    return count * (pixels * (5 if 4 * count * pixels <= NORMALISED_BYTES else 1) + EXTRA_BYTES)


class DeviceDataset(OrderedDataset):
    """Images uint8 [n, H, W, C] and labels int64 [n] on one device, and the batches made of them.

    `index` holds each sample's position in the file, which is what its augmentation depends on. Batches are views of
    larger tensors: read them, do not write into them.
    """

    in_memory = True

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        augmentation: Augmentation,
        alternate: bool = False,
        index: torch.Tensor | None = None,
        normalised_bytes: int = NORMALISED_BYTES,
        block_bytes: int | None = None,
    ):
        if images.dtype != torch.uint8 or images.ndim != 4 or labels.dtype != torch.int64:
            raise ValueError(f"need uint8 [n, H, W, C] and int64 labels, not {images.dtype} {tuple(images.shape)}")
        if len(images) != len(labels) or len(mean) != images.shape[3] or len(std) != images.shape[3]:
            raise ValueError(f"{len(images)} images, {len(labels)} labels, {len(mean)} means do not fit together")
        self.images, self.labels, self.device, self.augmentation = images, labels, images.device, augmentation
        self.alternate = alternate
        self.index = torch.arange(len(labels), device=labels.device) if index is None else index
        self._normalise = Normalisation(mean, std, images.shape[1], images.shape[2], images.device)
        self._normalised = self._normalise(images) if images.numel() * 4 <= normalised_bytes else None
        self._block_bytes = BLOCK_BYTES[images.device.type] if block_bytes is None else block_bytes

    def __len__(self) -> int:
        return len(self.labels)

    def _check_size(self, size: int) -> None:
        height, width = self.images.shape[1:3]
        if (size, size) != (height, width):
            raise FastarError(f"images of {size}x{size} asked for, the data set's are {height}x{width} and stay so")

    @property
    def _augments(self) -> bool:
        return bool(self.augmentation)

    def _made(
        self, order: torch.Tensor | None, batch_size: int, keys: AugmentationKeys | None, size: int | None
    ) -> Iterator[Batch]:
        if not self.augmentation:
            keys = None
        if order is None and keys is None and self._normalised is not None:
            images = self._normalised.permute(0, 3, 1, 2)
            return zip(images.split(batch_size), self.labels.split(batch_size), strict=True)
        return self._blocks(torch.arange(len(self), device=self.device) if order is None else order, batch_size, keys)

    def _blocks(self, order: torch.Tensor, batch_size: int, keys: AugmentationKeys | None) -> Iterator[Batch]:
        sample_bytes = 4 * self.images[0].numel()
        block = max(1, self._block_bytes // (sample_bytes * batch_size)) * batch_size
        for chosen in order.split(block) if len(order) else ():
            with span("augment"):
                if keys is not None:
                    draws = draw_augmentation(self.augmentation, keys, self.index[chosen])
                    pixels = augmented(self.images, chosen, draws, self._normalise)
                elif self._normalised is not None:
                    pixels = self._normalised.index_select(0, chosen)
                else:
                    pixels = self._normalise(self.images.index_select(0, chosen))
                images, labels = pixels.permute(0, 3, 1, 2), self.labels.index_select(0, chosen)
            yield from zip(images.split(batch_size), labels.split(batch_size), strict=True)


def load(
    files: "DatasetFiles | RawArrays",
    split: str,
    device: torch.device | str,
    *,
    limit: int | None = None,
    validation: float = 0.0,
    alternate: bool = False,
    progress: Progress = SILENT,
) -> DeviceDataset:
    """Read a split ("train", "validation" or "test") into memory of `device`, from .beton files or raw arrays.

    `limit` keeps at most so many samples, classes balanced, in file order; `validation` is the share of the training
    images that are the split "validation" and not in "train" (`fastar.data.splits`); `alternate` mirrors them in every
    other epoch (`fastar.data.sampling.augmentation_keys`).
    """
    # Chosen before any is read: what is left out takes no memory.
    choose = partial(
        chosen_images, split=split, validation=validation, limit=limit, classes=files.classes, name=files.name
    )
    images, labels, index = files.read(stored_in(split), choose, progress, f"reading {files.name} {split}")
    try:
        return DeviceDataset(
            torch.from_numpy(images).to(device),
            torch.from_numpy(labels).to(device),
            mean=files.mean,
            std=files.std,
            augmentation=files.augmentation,
            alternate=alternate,
            index=torch.from_numpy(index).to(device),
        )
    except torch.OutOfMemoryError as error:
        needed = images.nbytes / 1e6
        raise FastarError(
            f"{files.name} {split}: {needed:,.0f} MB of images do not fit on {device}; use a smaller limit"
        ) from error
