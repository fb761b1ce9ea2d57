"""Digests and checksums of all that a file holds: taken when it is written, compared when it is verified.

The checksums of images of any size are kept beside their file (`train.checksums`), so that each image is checked when
it is read: the digest of a whole file would have to be taken before the first batch, which for ImageNet reads hundreds
of gigabytes; a CRC-32 of each image costs some microseconds when the image is decoded anyway. The file of checksums
names the content that they are of and ends in its own SHA-256: a damaged one, or one of other data, does not count.
"""

import hashlib
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastar.data.ffcv.encode import Encoded
from fastar.data.ffcv.format import FixedLayout, Layout, check_beton, front_bytes, image_table
from fastar.data.raw.raw_split import RawSplit, readable
from fastar.errors import FastarError
from fastar.runtime.json_files import read_file
from fastar.runtime.progress import SILENT, Progress

_MAGIC = b"fastar checksums 1\n"
_SAMPLES = 64  # images of a new file that are compared with the raw ones


class ContentDigest:
    """SHA-256 over images of one size and labels in file order, however they are cut into batches."""

    def __init__(self) -> None:
        self._images, self._labels = hashlib.sha256(), hashlib.sha256()

    def update(self, images: np.ndarray, labels: np.ndarray) -> None:
        self._images.update(np.ascontiguousarray(images).data)
        self._labels.update(np.ascontiguousarray(labels, dtype="<i8").data)

    def hexdigest(self) -> str:
        return hashlib.sha256(self._images.digest() + self._labels.digest()).hexdigest()


@dataclass(frozen=True)
class Checksums:
    """A split's file in numbers.

    Args:
        content: SHA-256, hexadecimal, of images and labels (as the metadata has it).
        tables: SHA-256, hexadecimal, of all of the file but its images.
        images: CRC-32 of each image's bytes, uint32 [n].
    """

    content: str
    tables: str
    images: np.ndarray

    def to_bytes(self) -> bytes:
        body = _MAGIC + bytes.fromhex(self.content) + bytes.fromhex(self.tables) + self.images.astype("<u4").tobytes()
        return body + hashlib.sha256(body).digest()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Checksums | None":
        """None where they are damaged."""
        body, start = data[:-32], len(_MAGIC)
        if hashlib.sha256(body).digest() != data[-32:] or body[:start] != _MAGIC:
            return None
        content, tables = body[start : start + 32].hex(), body[start + 32 : start + 64].hex()
        return cls(content, tables, np.frombuffer(body, "<u4", offset=start + 64))


def checksums_path(path: Path) -> Path:
    """The file of checksums beside the .beton `path`."""
    return path.with_suffix(".checksums")


def kept_checksums(path: Path, content: str) -> Checksums | None:
    """The checksums beside the .beton `path`; None where there are none, or they are damaged or of other `content`."""
    with readable(path):
        try:
            kept = Checksums.from_bytes(read_file(checksums_path(path), path.stat().st_size))
        except FileNotFoundError:
            return None
    return kept if kept is not None and kept.content == content else None


def tables_digest(path: Path, layout: Layout) -> str:
    """SHA-256, hexadecimal, of all of a checked file but its images: header, fields, table of samples, their places."""
    front, table = front_bytes(np.memmap(path, np.uint8, mode="r"), layout)
    digest = hashlib.sha256(front.data)
    digest.update(table.data)
    return digest.hexdigest()


def stored_images(path: Path, layout: Layout) -> Iterator[tuple[np.ndarray, bytes]]:
    """The row of the sample table and the bytes of each image of a checked file, in order; FastarError where they
    cannot be read. (A mapped file would end the process where the disk fails.)"""
    _, table, sizes = image_table(path, layout)
    pointers = layout.pointers(table)
    with readable(path), path.open("rb", buffering=0) as file:
        for position, (pointer, size) in enumerate(zip(pointers.tolist(), sizes.tolist(), strict=True)):
            content = os.pread(file.fileno(), size, pointer)
            if len(content) != size:
                raise FastarError(f"{path}: is cut off in sample {position}; delete its folder and write it again")
            yield table[position], content


def take_checksums(path: Path, layout: Layout, labels: np.ndarray, progress: Progress, description: str) -> Checksums:
    """Read all of a checked file; `labels` int64 [n] are its own.

    The digest of the content covers every label and every image (of any size: its mode and sides too), in order,
    wherever in the file they lie.
    """
    sums, fixed = np.empty(layout.count, np.uint32), ContentDigest()
    varied = hashlib.sha256(labels.astype("<i8").tobytes())
    with progress.task(description, layout.count, "images") as advance:
        for position, (row, content) in enumerate(stored_images(path, layout)):
            if isinstance(layout, FixedLayout):
                fixed.update(np.frombuffer(content, np.uint8), labels[position : position + 1])
            else:
                varied.update(f"{row['mode']} {row['height']} {row['width']} {len(content)} ".encode())
                varied.update(content)
            sums[position] = zlib.crc32(content)
            advance()
    content_digest = (fixed if isinstance(layout, FixedLayout) else varied).hexdigest()
    return Checksums(content_digest, tables_digest(path, layout), sums)


def verify_beton(
    path: Path,
    raw: RawSplit,
    indices: np.ndarray,
    layout: Layout,
    *,
    progress: Progress = SILENT,
    description: str = "verifying",
) -> Checksums:
    """Read all of a new file, and compare every label, and 64 evenly spread images, with `raw`."""
    labels = check_beton(path, layout)
    wrong = np.flatnonzero(labels != raw.labels[indices])
    sums = take_checksums(path, layout, labels, progress, description)
    data, table, sizes = image_table(path, layout)
    pointers = layout.pointers(table)
    sample = np.unique(np.linspace(0, layout.count - 1, _SAMPLES).astype(np.int64))
    for position, want in zip(sample, layout.encoded(raw, indices[sample]), strict=True):
        pixels = data[pointers[position] : pointers[position] + sizes[position]]
        same = isinstance(want, Encoded) and want.content == pixels.tobytes()
        if same and table.dtype.names is not None:
            same = all(getattr(want, key) == table[key][position] for key in ("mode", "height", "width"))
        if not same:
            wrong = np.append(wrong, position)
    if len(wrong):
        where = raw.where(int(indices[wrong[0]]))
        raise FastarError(f"{path}: sample {wrong[0]} differs from {where}; check the disk and run again")
    return sums


def measured(path: Path, layout: Layout) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population standard deviation, per channel, of pixels in 0..1 of a checked file.

    Raises:
        FastarError: a channel is one flat colour.
    """
    assert isinstance(layout, FixedLayout)
    channels, levels = layout.shape[2], np.arange(256)
    counts = np.zeros((channels, 256), np.int64)
    for _, content in stored_images(path, layout):
        pixels = np.frombuffer(content, np.uint8).reshape(-1, channels)
        counts += [np.bincount(pixels[:, channel], minlength=256) for channel in range(channels)]
    # Sums of whole numbers: exact, so the statistics do not depend on the order of samples.
    total, squares, number = counts @ levels, counts @ levels**2, counts[0].sum()
    mean = total / number
    std = np.sqrt(np.maximum(squares / number - mean**2, 0))
    if (std == 0).any():
        raise FastarError(f"{path}: every image is one flat colour; check the raw data")
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())
