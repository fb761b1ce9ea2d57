"""A split that streams: decoded from its .beton file by FFCV as it is read, normalised on the device."""

import os
from collections.abc import Generator
from contextlib import closing

import numpy as np
import torch

from fastar.data.augment import Normalisation, augmented, draw_augmentation
from fastar.data.dataset import chosen_batches
from fastar.data.images import ImageFiles
from fastar.data.reading import CropReader
from fastar.data.registry import Augmentation
from fastar.data.sampling import balanced_subset, epoch_order
from fastar.errors import FastarError
from fastar.seeds import derive_seed

Batches = Generator[tuple[torch.Tensor, torch.Tensor], None, None]

CROP_RATIO = 224 / 256


class StreamingDataset:
    """Batches of images of any size, centre-cropped and resized to `size` while they are decoded.

    The same interface as `DeviceDataset`. `ratio` is the share of the shorter side that the crop keeps; `workers` the
    decoding threads (None: one per CPU of this process); `limit` keeps at most so many samples, classes balanced.
    """

    def __init__(
        self,
        files: ImageFiles,
        split: str,
        device: torch.device | str,
        *,
        size: int = 224,
        ratio: float = CROP_RATIO,
        workers: int | None = None,
        limit: int | None = None,
        augmentation: Augmentation | None = None,
    ):
        if size < 1 or not 0 < ratio <= 1:
            raise FastarError(f"size={size} must be at least 1, ratio={ratio} within 0..1")
        if workers is not None and workers < 1:
            raise FastarError(f"workers={workers} must be at least 1")
        self._path, self._layout = files.path(split), files.layout(split)
        self._size, self._ratio = size, ratio
        self._workers = workers or len(os.sched_getaffinity(0))
        self.device = torch.device(device)
        self.classes, self.digest = len(files.classes), files.digest
        self.augmentation = Augmentation(flip=True) if augmentation is None else augmentation
        self._mean, self._std = tuple(files.metadata["mean"]), tuple(files.metadata["std"])
        self._normalisations: dict[int, Normalisation] = {}
        self._readers: dict[tuple[int, int], CropReader] = {}
        self._index = np.arange(self._layout.count)
        if limit is not None and limit < self._layout.count:
            if limit < 1:
                raise FastarError(f"limit={limit} must be at least 1")
            self._index = balanced_subset(self._reader(64, size).labels, limit, files.name, split)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return 3, self._size, self._size

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
    ) -> Batches:
        """One epoch, from batch number `begin`, of images [3, size, size]: see `Dataset.batches`.

        The pixels do not depend on the number of workers.
        """
        part = chosen_batches(len(self), batch_size, drop_last, begin)
        order = epoch_order(len(self), seed, epoch, torch.device("cpu")).numpy()[part]
        return self._epoch(self._index[order], batch_size, self._key(augment, seed, epoch), size)

    def sequential(self, batch_size: int, *, augment: bool = False, seed: int = 0, epoch: int = 0) -> Batches:
        """As `batches`, in file order, every sample exactly once; the last batch may be short."""
        self._check(batch_size)
        return self._epoch(self._index, batch_size, self._key(augment, seed, epoch), None)

    def _check(self, batch_size: int) -> None:
        if batch_size < 1:
            raise FastarError(f"batch size {batch_size} must be at least 1")

    def _key(self, augment: bool, seed: int, epoch: int) -> int | None:
        return derive_seed(seed, "augmentation", epoch) if augment and self.augmentation else None

    def _reader(self, batch_size: int, size: int) -> CropReader:
        batch_size = min(batch_size, self._layout.count)
        if (batch_size, size) not in self._readers:
            self._readers[batch_size, size] = CropReader(
                self._path,
                self._layout,
                size=size,
                ratio=self._ratio,
                batch_size=batch_size,
                workers=self._workers,
            )
        return self._readers[batch_size, size]

    def _normalisation(self, size: int) -> Normalisation:
        if size not in self._normalisations:
            self._normalisations[size] = Normalisation(self._mean, self._std, size, size, self.device)
        return self._normalisations[size]

    def _epoch(self, order: np.ndarray, batch_size: int, key: int | None, size: int | None) -> Batches:
        size = self._size if size is None else size
        if size < 1:
            raise FastarError(f"size={size} must be at least 1")
        if len(order) == 0:
            return
        normalise, start = self._normalisation(size), 0
        with closing(self._reader(batch_size, size).epoch(order)) as batches:
            for pixels, labels in batches:
                some = torch.from_numpy(pixels).to(self.device)
                if key is None:
                    images = normalise(some)
                else:
                    index = torch.from_numpy(order[start : start + len(labels)]).to(self.device)
                    draws = draw_augmentation(self.augmentation, key, index)
                    images = augmented(some, torch.arange(len(some), device=self.device), draws, normalise)
                start += len(labels)
                # FFCV will write into `labels` again; the images were copied by being normalised.
                yield images.permute(0, 3, 1, 2), torch.from_numpy(labels.copy()).to(self.device)
