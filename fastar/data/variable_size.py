"""Images of differing sizes in a .beton file, as JPEG or as raw pixels: how they are written, and checked."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastar.data.ffcv.checksums import Checksums, take_checksums
from fastar.data.ffcv.format import JPEG_MODE, RAW_MODE, SAMPLES, check_beton, image_table
from fastar.data.ffcv.names import Field, IntField, RGBImageField, cv2
from fastar.data.raw.raw_split import RawSplit, UnusableImage
from fastar.data.sampling import draw
from fastar.errors import FastarError
from fastar.runtime.progress import SILENT, Progress
from fastar.runtime.seeds import derive_seed

_LARGEST = 65_535  # the file's table holds 16-bit sides
_ESTIMATE = 64


@dataclass(frozen=True)
class Encoding:
    """How images are stored: shrunk to `max_resolution` on the longer side, a share of them as JPEG, the rest raw.

    Raw pixels load faster and take about 10 times the room; which images are JPEG is a hash of their number among the
    raw ones.
    """

    max_resolution: int | None = 500
    compress_probability: float = 0.5
    jpeg_quality: int = 90

    def __post_init__(self) -> None:
        if self.max_resolution is not None and not 1 <= self.max_resolution <= _LARGEST:
            raise FastarError(f"max-resolution={self.max_resolution} must be within 1..{_LARGEST}")
        if not 0 <= self.compress_probability <= 1:
            raise FastarError(f"compress-probability={self.compress_probability} must be within 0..1")
        if not 1 <= self.jpeg_quality <= 100:
            raise FastarError(f"jpeg-quality={self.jpeg_quality} must be within 1..100")

    def __str__(self) -> str:
        """In words, for messages: the preset's name, if it is one, and the three values."""
        name = next((name for name, preset in PRESETS.items() if preset == self), "no preset's")
        side = f"at most {self.max_resolution} pixels" if self.max_resolution is not None else "as large as they are"
        return f"{name} ({side}, {self.compress_probability:.0%} as JPEG of quality {self.jpeg_quality})"


# What FFCV publishes: the training sets of its ImageNet repository for ResNet-50 and ResNet-18, and the JPEG file of
# its benchmarks, which is the smallest and the slowest to load.
PRESETS = {
    "rn50": Encoding(500, 0.5, 90),
    "rn18": Encoding(400, 0.1, 90),
    "jpeg": Encoding(512, 1.0, 90),
}


@dataclass(frozen=True)
class VariedLayout:
    """What a file must hold: `count` RGB images of any size, labels in 0..classes-1. See `ffcv.format.Layout`."""

    count: int
    classes: int
    encoding: Encoding

    @property
    def page_size(self) -> int:
        return 1 << 23

    @property
    def equal_sizes(self) -> bool:
        return False

    def fields(self) -> dict[str, Field]:
        return {"image": RGBImageField(), "label": IntField()}

    def encoders(self, index: int) -> dict[str, Field]:
        word = int(draw(derive_seed(0, "compressed"), np.array([index]))[0])
        jpeg = word < self.encoding.compress_probability * 2**32
        image = RGBImageField(
            write_mode="jpg" if jpeg else "raw",
            max_resolution=self.encoding.max_resolution,
            jpeg_quality=self.encoding.jpeg_quality,
        )
        return {"image": image, "label": IntField()}

    def encoded(self, image: np.ndarray, index: int) -> tuple[np.void, np.ndarray]:
        """What the file must hold of the raw image `index`: its row of the table (but for the pointer), its bytes."""
        field = self.encoders(index)["image"]
        row, kept = np.zeros(1, field.metadata_type), []

        def allocate(size: int) -> tuple[int, np.ndarray]:
            kept.append(np.empty(size, np.uint8))
            return 0, kept[-1]

        with single_threaded_opencv():
            field.encode(row, image, allocate)
        return row[0], kept[0]

    def image_bytes_of(self, raw: RawSplit, indices: np.ndarray, *, skip: bool = False) -> float:
        sizes = []
        for index in indices[np.unique(np.linspace(0, len(indices) - 1, _ESTIMATE).astype(np.int64))]:
            try:
                image = raw[int(index)][0]
                complaint = self.complaint(image)
                if complaint is not None:
                    raise UnusableImage(raw.where(int(index)), *complaint)
                sizes.append(len(self.encoded(image, int(index))[1]))
            except UnusableImage:
                if not skip:
                    raise
        return float(np.mean(sizes)) if sizes else 1.0

    def describe(self) -> str:
        return "RGB images of any size"

    def complaint(self, image: np.ndarray) -> tuple[str, str] | None:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            return f"image is {image.dtype} {list(image.shape)}, not uint8 [H, W, 3]", "convert it"
        height, width, _ = image.shape
        limit = self.encoding.max_resolution
        shrink = min(1.0, limit / max(height, width)) if limit is not None else 1.0
        if max(height, width) * shrink > _LARGEST or height * width * 3 * shrink**2 > self.page_size:
            return f"{height}x{width} pixels are too many for one page of the file", "set a smaller max-resolution"
        if int(min(height, width) * shrink) < 1:
            return f"{height}x{width} pixels leave nothing at max-resolution={limit}", "remove the image"
        return None

    def pointers(self, image: np.ndarray) -> np.ndarray:
        return image["data_ptr"]

    def fault(self, image: np.ndarray, sizes: np.ndarray) -> str | None:
        pixels = image["height"].astype(np.int64) * image["width"]
        if (pixels == 0).any() or not np.isin(image["mode"], (JPEG_MODE, RAW_MODE)).all():
            return "its sample table is damaged"
        raw = image["mode"] == RAW_MODE
        if (sizes[raw] != 3 * pixels[raw]).any() or (sizes == 0).any():
            return "its allocation table does not match its samples"
        return None


def verify_varied(
    path: Path,
    raw: RawSplit,
    indices: np.ndarray,
    layout: VariedLayout,
    *,
    progress: Progress = SILENT,
    description: str = "verifying",
) -> Checksums:
    """Compare every label, and the bytes of 64 evenly spread images, with `raw`; returns what all of the file holds."""
    labels = check_beton(path, layout)
    wrong = np.flatnonzero(labels != raw.labels[indices])
    sums = take_checksums(path, layout, labels, progress, description)
    data, table, sizes = image_table(path, layout)
    for position in np.unique(np.linspace(0, layout.count - 1, SAMPLES).astype(np.int64)):
        row, index = table[position], int(indices[position])
        want, pixels = layout.encoded(raw[index][0], index)
        same = all(want[key] == row[key] for key in ("mode", "height", "width"))
        if not (same and np.array_equal(pixels, data[row["data_ptr"] : row["data_ptr"] + sizes[position]])):
            wrong = np.append(wrong, position)
    if len(wrong):
        where = raw.where(int(indices[wrong[0]]))
        raise FastarError(f"{path}: sample {wrong[0]} differs from {where}; check the disk and run again")
    return sums


@contextmanager
def single_threaded_opencv() -> Iterator[None]:
    """OpenCV's threads do not survive a fork: neither those that fork nor their children may have started any."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(0)
    try:
        yield
    finally:
        cv2.setNumThreads(before)
