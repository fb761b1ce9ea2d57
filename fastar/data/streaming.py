"""A split that streams: decoded from its .beton file by FFCV as it is read, normalised on the device."""

from collections.abc import Generator
from contextlib import closing
from functools import cache
from typing import Literal

import numpy as np
import torch

from fastar.data.augment import Normalisation, mirrored_and_normalised
from fastar.data.crops import Crop, centre, random_boxes
from fastar.data.dataset import Batch, OrderedDataset
from fastar.data.ffcv.decode import Plan
from fastar.data.ffcv.folder import DatasetFiles
from fastar.data.ffcv.read import ImageReader
from fastar.data.sampling import AugmentationKeys, draw_mirrored, epoch_order, paged_order
from fastar.data.splits import chosen_images, stored_in
from fastar.errors import FastarError
from fastar.runtime.device import cpus
from fastar.runtime.progress import SILENT, Progress
from fastar.runtime.timing import span

Order = Literal["random", "pages"]
Batches = Generator[Batch, None, None]

WINDOW = 64
"""Pages of 8 MiB that order "pages" shuffles together: half a gigabyte of memory, some 2,000 images."""


class StreamingDataset(OrderedDataset):
    """Batches of images of any size, cut out and resized to `size` squared while they are decoded. See `Dataset`.

    The pixels do not depend on the number of threads. Decoding runs in them, up to three batches ahead.

    Args:
        files: the finished dataset.
        split: train, validation or test.
        device: where batches go.
        size: of the images, where no other is asked for.
        crop: what is cut out of an augmented image (`fastar.data.crops.random_boxes`), which is also mirrored with
            probability 1/2; of others the centred square of 224/256 of the shorter side.
        order: random, or pages for files larger than memory: shuffled in windows of 64 pages of the file, so that each
            page is read once an epoch, front to back. The files hold the images in a shuffled order, so every window
            mixes all classes; a file that keeps them by class is refused.
        threads: that decode (None: one per CPU of this process).
        limit: at most so many samples, classes balanced.
        validation: the share of the training images that are the split "validation" and not in "train"
            (`fastar.data.splits`).
        alternate: mirror in every other epoch (`fastar.data.sampling.augmentation_keys`).
        progress: told where checksums of the images must be made first (`DatasetFiles.checksums`).
        window: pages that order "pages" shuffles together.
    """

    def __init__(
        self,
        files: DatasetFiles,
        split: str,
        device: torch.device | str,
        *,
        size: int = 224,
        crop: Crop = "random-resized",
        order: Order = "random",
        threads: int | None = None,
        limit: int | None = None,
        validation: float = 0.0,
        alternate: bool = False,
        progress: Progress = SILENT,
        window: int = WINDOW,
    ):
        self._check_size(size)
        if threads is not None and threads < 1:
            raise FastarError(f"threads={threads} must be at least 1")
        if order == "pages" and not files.shuffled:
            raise FastarError(
                f"{files.folder}: holds its images by class, so reading it page by page would not mix classes; "
                "use dataset.order=random, or write it again shuffled"
            )
        self._size, self._crop, self._paged, self._window = size, crop, order == "pages", window
        self.device, self.alternate = torch.device(device), alternate
        place = self.device
        self._normalisation = cache(lambda side: Normalisation(files.mean, files.std, side, side, place))
        stored = stored_in(split)
        beton, checksums = files.beton(stored), files.checksums(stored, progress)
        self._reader = ImageReader(beton, checksums, threads=threads or cpus())
        self._labels, self._pages = beton.labels, beton.pages
        self._index = chosen_images(
            beton.labels, split, validation=validation, limit=limit, classes=files.classes, name=files.name
        )

    def __len__(self) -> int:
        return len(self._index)

    def _check_size(self, size: int) -> None:
        if size < 1:
            raise FastarError(f"size={size} must be at least 1")

    def _order(self, seed: int, epoch: int) -> np.ndarray:
        if self._paged:
            return paged_order(self._pages[self._index], self._window, seed, epoch)
        return epoch_order(len(self), seed, epoch, torch.device("cpu")).numpy()

    def _made(
        self, order: np.ndarray | None, batch_size: int, keys: AugmentationKeys | None, size: int | None
    ) -> Batches:
        order, size = self._index[slice(None) if order is None else order], size or self._size
        if len(order) == 0:
            return
        boxes = centre if keys is None else random_boxes(self._crop, keys.crop)
        plan = Plan(size, boxes, pinned=self.device.type == "cuda")
        normalise, start = self._normalisation(size), 0
        with closing(self._reader.epoch(order, batch_size, plan)) as batches:
            for pixels in batches:
                index = order[start : start + len(pixels)]
                start += len(pixels)
                with span("augment"):
                    mirrored = None
                    if keys is not None:
                        mirrored = self._moved(torch.from_numpy(draw_mirrored(keys, index)))
                    images = mirrored_and_normalised(self._moved(pixels), mirrored, normalise)
                    labels = self._moved(torch.from_numpy(self._labels[index]))
                yield images.permute(0, 3, 1, 2), labels

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        """On the device; the host does not wait for a GPU (pinned memory is reused only after the copy)."""
        if self.device.type == "cuda" and not tensor.is_pinned():
            tensor = tensor.pin_memory()  # a copy from pageable memory would wait for the stream
        return tensor.to(self.device, non_blocking=True)
