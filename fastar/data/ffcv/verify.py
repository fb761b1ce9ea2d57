"""Reading a .beton file back through FFCV: is it what was meant, and what are its content's digest and statistics."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastar.data.ffcv.format import SAMPLES, BetonLayout
from fastar.data.ffcv.read import read_batches
from fastar.data.raw.raw_split import RawSplit
from fastar.errors import FastarError
from fastar.runtime.progress import SILENT, Progress


@dataclass(frozen=True)
class SplitSummary:
    """What a whole split holds; `mean` and `std` per channel for pixels in 0..1 (population standard deviation)."""

    count: int
    digest: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


class ContentDigest:
    """SHA-256 over images and labels in file order, however they are cut into batches."""

    def __init__(self) -> None:
        self._images, self._labels = hashlib.sha256(), hashlib.sha256()

    def update(self, images: np.ndarray, labels: np.ndarray) -> None:
        self._images.update(np.ascontiguousarray(images).data)
        self._labels.update(np.ascontiguousarray(labels, dtype="<i8").data)

    def hexdigest(self) -> str:
        return hashlib.sha256(self._images.digest() + self._labels.digest()).hexdigest()


def verify_beton(
    path: Path,
    raw: RawSplit,
    indices: np.ndarray,
    layout: BetonLayout,
    *,
    progress: Progress = SILENT,
    description: str = "verifying",
) -> SplitSummary:
    """Decode all of `path` through FFCV; compare count, every label, and 64 evenly spread images with `raw`."""
    sample = np.unique(np.linspace(0, layout.count - 1, SAMPLES).astype(np.int64))
    digest = ContentDigest()
    total, squares = np.zeros(layout.channels, np.int64), np.zeros(layout.channels, np.int64)
    start = 0
    with progress.task(description, layout.count, "images") as advance:
        for images, labels in read_batches(path, layout):
            stop = start + len(labels)
            wrong = np.flatnonzero(labels != raw.labels[indices[start:stop]])
            for position in sample[(sample >= start) & (sample < stop)]:
                if not np.array_equal(images[position - start], raw[int(indices[position])][0]):
                    wrong = np.append(wrong, position - start)
            if len(wrong):
                where = raw.where(int(indices[start + wrong[0]]))
                raise FastarError(
                    f"{path}: sample {start + wrong[0]} differs from {where}; check the disk and run again"
                )
            digest.update(images, labels)
            # Sums of whole numbers: exact, so the statistics do not depend on the order of samples.
            counts = [np.bincount(images[..., c].reshape(-1), minlength=256) for c in range(layout.channels)]
            levels = np.arange(256)
            total += [int(count @ levels) for count in counts]
            squares += [int(count @ levels**2) for count in counts]
            start = stop
            advance(len(labels))
    if start != layout.count:
        raise FastarError(
            f"{path}: {start} samples read back where {layout.count} are due; check the disk and run again"
        )
    pixels = layout.count * layout.height * layout.width
    mean = total / pixels
    std = np.sqrt(np.maximum(squares / pixels - mean**2, 0))
    if (std == 0).any():
        raise FastarError(f"{raw.where(0)}: every image is one flat colour; check the raw data")
    return SplitSummary(layout.count, digest.hexdigest(), tuple((mean / 255).tolist()), tuple((std / 255).tolist()))
