"""Images of one size as their raw files give them, in memory: what stands in for .beton files where FFCV is missing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from fastar.config import DatasetSpec
from fastar.data.content import content_of_one_size, dataset_digest, pixel_statistics
from fastar.data.raw.find import find_raw
from fastar.data.raw.raw_split import RawDataset, RawSplit, UnusableImage
from fastar.runtime.progress import Progress


def stands_in(spec: DatasetSpec) -> bool:
    """Tell whether a data set is read from its raw files each time, without .beton files: FFCV is not installed, and
    images of one size need it as a file format alone."""
    return not spec.variable_size and find_spec("ffcv") is None


class RawArrays:
    """A data set of images of one size in memory: same samples, order, normalisation and digest as its .beton files.

    Attributes:
        name: of the dataset.
        digest: as `DatasetFiles.digest`.
        classes: their names, in the order of labels.
        mean: per channel, of pixels in 0..1, as is `std`.
        std: see `mean`.
        augmentation: in training.
    """

    def __init__(self, spec: DatasetSpec, raw: RawDataset):
        self.name, self.classes, self.augmentation = spec.name, raw.train.classes, spec.augmentation
        shape = spec.height, spec.width, spec.channels
        self._splits = {name: _arrays(split, shape) for name, split in (("train", raw.train), ("test", raw.test))}
        if spec.mean is not None and spec.std is not None:
            self.mean, self.std = spec.mean, spec.std
        else:
            self.mean, self.std = pixel_statistics(self._splits["train"][0], spec.channels, f"{spec.name} train")
        self.digest = dataset_digest(
            {
                **{"dataset": self.name, "classes": list(self.classes), "mean": list(self.mean), "std": list(self.std)},
                "counts": {name: self.count(name) for name in self._splits},
                "content": {
                    name: content_of_one_size(hashlib.sha256(images.data), labels)
                    for name, (images, labels) in self._splits.items()
                },
                **{key: getattr(spec, key) for key in ("channels", "height", "width")},
            }
        )

    def count(self, split: str) -> int:
        return len(self._splits[split][1])

    def read(
        self, split: str, choose: Callable[[np.ndarray], np.ndarray], progress: Progress, description: str
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `DatasetFiles.read`."""
        images, labels = self._splits[split]
        index = choose(labels)
        return images[index], labels[index], index


def read_raw(spec: DatasetSpec, data_root: Path | None, progress: Progress) -> RawArrays:
    """The raw data of `spec`, as `find_raw` finds them; `progress` is told that they stand in."""
    progress.line(
        f"{spec.name}: read from its raw files into memory, since FFCV is not installed; results are the same"
    )
    raw = find_raw(spec, data_root)
    if raw.note is not None:
        progress.line(raw.note)
    return RawArrays(spec, raw)


def _arrays(split: RawSplit, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    images = np.empty((len(split), *shape), np.uint8)
    for index in range(len(split)):
        image, _ = split[index]
        if image.shape != shape:
            reason = f"image is {image.dtype} {list(image.shape)}, must be uint8 {list(shape)}"
            raise UnusableImage(split.where(index), reason, "resize it or check --dataset")
        images[index] = image
    return images, split.labels
