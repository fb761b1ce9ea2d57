"""Checksums of a file's images, kept beside it (`train.checksums`), so that each image is checked when it is read.

The digest of a whole file would have to be taken before the first batch, which for ImageNet reads hundreds of
gigabytes; a CRC-32 of each image costs some microseconds when the image is decoded anyway. The file of checksums names
the content that they are of and ends in its own SHA-256: a damaged one, or one of other data, does not count.
"""

import hashlib
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastar.data.ffcv.format import Layout, front_bytes, image_table
from fastar.data.raw.listing import readable
from fastar.data.raw.raw_split import read_file
from fastar.errors import FastarError
from fastar.runtime.progress import Progress

_MAGIC = b"fastar checksums 1\n"


@dataclass(frozen=True)
class Checksums:
    """A split's file in numbers: SHA-256 of its `content` (as the metadata has it) and of its `tables`, hexadecimal,
    and the CRC-32 of each image's bytes (`images`, uint32 [n])."""

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


def tables_digest(path: Path, layout: Layout) -> str:
    """SHA-256, hexadecimal, of all of a checked file but its images: header, fields, table of samples, their places."""
    data = np.memmap(path, np.uint8, mode="r")
    front, table = front_bytes(data, layout)
    digest = hashlib.sha256(front.data)
    digest.update(table.data)
    return digest.hexdigest()


def take_checksums(path: Path, layout: Layout, labels: np.ndarray, progress: Progress, description: str) -> Checksums:
    """Read all of a checked file of images of any size; `labels` int64 [n] are its own.

    The digest of the content covers every image's size, mode and bytes and every label, in order, wherever in the file
    they lie.
    """
    digest, sums = hashlib.sha256(labels.astype("<i8").tobytes()), np.empty(layout.count, np.uint32)
    with progress.task(description, layout.count, "images") as advance:
        for position, (row, content) in enumerate(stored_images(path, layout)):
            digest.update(f"{row['mode']} {row['height']} {row['width']} {len(content)} ".encode())
            digest.update(content)
            sums[position] = zlib.crc32(content)
            advance()
    return Checksums(digest.hexdigest(), tables_digest(path, layout), sums)


def kept_checksums(path: Path, content: str) -> Checksums | None:
    """The checksums beside the .beton `path`; None where there are none, or they are damaged or of other `content`."""
    with readable(path):
        try:
            kept = Checksums.from_bytes(read_file(checksums_path(path), path.stat().st_size))
        except FileNotFoundError:
            return None
    return kept if kept is not None and kept.content == content else None
