"""Digests and checksums of all that a file holds: taken when it is written, compared when it is verified.

The checksums of images of any size are kept beside their file (`train.checksums`), so that each image is checked when
it is read: the digest of a whole file would have to be taken before the first batch, which for ImageNet reads hundreds
of gigabytes; a CRC-32 of each image costs some microseconds when the image is decoded anyway. The file of checksums
names the content that they are of and ends in its own SHA-256: a damaged one, or one of other data, does not count.
"""

import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastar.data.content import content_of_one_size, pixel_statistics
from fastar.data.encode import Encoded
from fastar.data.ffcv.format import Beton, FixedLayout, Layout, check_beton
from fastar.data.raw.raw_split import RawSplit, readable
from fastar.errors import FastarError
from fastar.runtime.json_files import read_file
from fastar.runtime.progress import SILENT, Progress

_MAGIC = b"fastar checksums 1\n"
_SAMPLES = 64  # images of a new file that are compared with the raw ones


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


def take_checksums(beton: Beton, progress: Progress, description: str) -> Checksums:
    """Read all of a file.

    The digest of the content covers every label and every image (of any size: its mode and sides too), in order,
    wherever in the file they lie.
    """
    fixed = isinstance(beton.layout, FixedLayout)
    sums = np.empty(len(beton.labels), np.uint32)
    digest = hashlib.sha256(b"" if fixed else beton.labels.astype("<i8").tobytes())
    with progress.task(description, len(sums), "images") as advance:
        for position, content in enumerate(beton.contents()):
            if not fixed:
                row = beton.images[position]
                digest.update(f"{row['mode']} {row['height']} {row['width']} {len(content)} ".encode())
            digest.update(content)
            sums[position] = zlib.crc32(content)
            advance()
    whole = content_of_one_size(digest, beton.labels) if fixed else digest.hexdigest()
    return Checksums(whole, beton.tables_digest(), sums)


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
    beton = check_beton(path, layout)
    wrong = np.flatnonzero(beton.labels != raw.labels[indices]).tolist()
    sums = take_checksums(beton, progress, description)
    sample = np.unique(np.linspace(0, layout.count - 1, _SAMPLES).astype(np.int64))
    wanted, stored = layout.encoded(raw, indices[sample]), beton.contents(sample.tolist())
    for position, want, content in zip(sample.tolist(), wanted, stored, strict=True):
        same = isinstance(want, Encoded) and want.content == content
        if same and beton.images.dtype.names is not None:
            same = all(getattr(want, key) == beton.images[key][position] for key in ("mode", "height", "width"))
        if not same:
            wrong.append(position)
    if wrong:
        where = raw.where(int(indices[wrong[0]]))
        raise FastarError(f"{path}: sample {wrong[0]} differs from {where}; check the disk and run again")
    return sums


def measured(beton: Beton) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """See `pixel_statistics`, of a file of images of one size."""
    assert isinstance(beton.layout, FixedLayout)
    channels = beton.layout.shape[2]
    return pixel_statistics((np.frombuffer(c, np.uint8) for c in beton.contents()), channels, str(beton.path))
