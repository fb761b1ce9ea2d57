"""The .beton file format: what fastar writes into one, and the check that it is whole before FFCV opens it.

FFCV itself trusts a file: a truncated, empty or foreign one gives an IndexError, wrong pixels, or a crash.
"""

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from ffcv.fields import IntField, NDArrayField, RGBImageField
from ffcv.fields.base import Field
from ffcv.types import (
    ALLOC_TABLE_TYPE,
    CURRENT_VERSION,
    TYPE_ID_HANDLER,
    FieldDescType,
    HeaderType,
    get_metadata_type,
)

from fastar.data.encode import JPEG_MODE, PAGE, RAW_MODE, Encoded, EncodedImages, Encoding, encoded_images
from fastar.data.raw.raw_split import ImageSplit, RawSplit, UnusableImage, readable
from fastar.errors import FastarError

_BLOCK = 1 << 16
_BLOCKS = 256


@dataclass(frozen=True)
class FixedLayout:
    """The content of a file of `count` raw images uint8 [H, W, C] = `shape`, with labels in 0..classes-1."""

    count: int
    classes: int
    shape: tuple[int, int, int]

    PAGE: ClassVar[int] = 1 << 21
    """Bytes of a page of the file; an encoded image must fit into one."""

    def fields(self) -> dict[str, Field]:
        """FFCV's fields in file order: RGB images as FFCV images, others as arrays of bytes."""
        rgb = self.shape[2] == 3
        image = RGBImageField(write_mode="raw") if rgb else NDArrayField(np.dtype("uint8"), self.shape)
        return {"image": image, "label": IntField()}

    def encoded(self, raw: RawSplit, indices: np.ndarray, workers: int = 1) -> EncodedImages:
        """The raw images `indices` as the file holds them; in place of one that cannot be used, its error."""
        for index in indices.tolist():
            image, _ = raw[index]
            if image.shape == self.shape and image.dtype == np.uint8:
                yield Encoded(RAW_MODE, image.shape[0], image.shape[1], image.tobytes())
            else:
                reason = f"image is {image.dtype} {list(image.shape)}, must be uint8 {list(self.shape)}"
                yield UnusableImage(raw.where(index), reason, "resize it or check --dataset")

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} images"

    def fault(self, image: np.ndarray, sizes: np.ndarray) -> str | None:
        """The first fault of a file's images (table column, and bytes of each), or None."""
        height, width, _ = self.shape
        if image.dtype.names is not None:
            same = (image["mode"] == RAW_MODE) & (image["height"] == height) & (image["width"] == width)
            if not same.all():
                return f"its images are not all raw {height}x{width}"
        return None if (sizes == math.prod(self.shape)).all() else "its allocation table does not match its samples"


@dataclass(frozen=True)
class VariableLayout:
    """RGB images of any size, JPEG or raw, by `encoding`; see `FixedLayout`."""

    count: int
    classes: int
    encoding: Encoding

    PAGE: ClassVar[int] = PAGE

    def fields(self) -> dict[str, Field]:
        return {"image": RGBImageField(), "label": IntField()}

    def encoded(self, raw: RawSplit, indices: np.ndarray, workers: int = 1) -> EncodedImages:
        assert isinstance(raw, ImageSplit)
        return encoded_images(raw, indices.tolist(), self.encoding, workers)

    def __str__(self) -> str:
        return "RGB images of any size"

    def fault(self, image: np.ndarray, sizes: np.ndarray) -> str | None:
        pixels = image["height"].astype(np.int64) * image["width"]
        if (pixels == 0).any() or not np.isin(image["mode"], (JPEG_MODE, RAW_MODE)).all():
            return "its sample table is damaged"
        raw = image["mode"] == RAW_MODE
        if (sizes[raw] != 3 * pixels[raw]).any() or (sizes == 0).any():
            return "its allocation table does not match its samples"
        return None


Layout = FixedLayout | VariableLayout


def damaged(path: Path, what: str) -> FastarError:
    """The error for a file of a dataset that is not what was written."""
    return FastarError(f"{path}: {what}; delete {path.parent} and write it again")


@dataclass(frozen=True)
class Beton:
    """A file whose tables are whole, as `check_beton` returns it. Rows are in the order of samples.

    Args:
        path: of the file.
        layout: its content.
        labels: int64 [n].
        images: the image column of the table of samples [n].
        pointers: the place of each image's first byte [n].
        sizes: the bytes of each image [n].
        tables: the bytes before the pages, and those behind them.
    """

    path: Path
    layout: Layout
    labels: np.ndarray
    images: np.ndarray
    pointers: np.ndarray
    sizes: np.ndarray
    tables: tuple[np.ndarray, np.ndarray]

    @property
    def pages(self) -> np.ndarray:
        """The page of the file that each image lies in, int64 [n]."""
        return (self.pointers // np.uint64(self.layout.PAGE)).astype(np.int64)

    def tables_digest(self) -> str:
        """SHA-256, hexadecimal, of all of the file but its images."""
        digest = hashlib.sha256(self.tables[0].data)
        digest.update(self.tables[1].data)
        return digest.hexdigest()

    def contents(self, positions: Sequence[int] | None = None) -> Iterator[bytes]:
        """The bytes of each image, or of those at `positions`; FastarError where they cannot be read. (A mapped file
        would end the process where the disk fails.)"""
        with readable(self.path), self.path.open("rb", buffering=0) as file:
            for position in range(len(self.labels)) if positions is None else positions:
                size = int(self.sizes[position])
                content = os.pread(file.fileno(), size, int(self.pointers[position]))
                if len(content) != size:
                    raise damaged(self.path, f"is cut off in sample {position}")
                yield content


def front(layout: Layout, count: int, table_start: int) -> bytes:
    """The file's first two parts: the header, and the type, name and arguments of each field."""
    fields = layout.fields()
    header, descriptors = np.zeros(1, HeaderType), np.zeros(len(fields), FieldDescType)
    header["version"], header["num_fields"], header["page_size"] = CURRENT_VERSION, len(fields), layout.PAGE
    header["num_samples"], header["alloc_table_ptr"] = count, table_start
    codes = {handler: code for code, handler in TYPE_ID_HANDLER.items()}
    for row, (name, field) in zip(descriptors, fields.items(), strict=True):
        row["type_id"] = codes[type(field)]
        row["name"][: len(name)] = np.frombuffer(name.encode("ascii"), np.uint8)
        row["arguments"][:] = field.to_binary()[0]
    return header.tobytes() + descriptors.tobytes()


def sample_type(layout: Layout) -> np.dtype:
    """A row of the table of samples: f0 the image, f1 the label."""
    return get_metadata_type(list(layout.fields().values()))


def fingerprint(path: Path) -> dict[str, Any]:
    """Size, and SHA-256 over up to 256 evenly spaced blocks of 64 KiB (the whole file where it is at most 16 MiB).

    Tells a replaced, truncated or grown file in milliseconds; the pixels have their own digest.
    """
    size = path.stat().st_size
    blocks = -(-size // _BLOCK)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        for block in np.unique(np.linspace(0, max(blocks - 1, 0), min(max(blocks, 1), _BLOCKS)).astype(np.int64)):
            stream.seek(int(block) * _BLOCK)
            digest.update(stream.read(_BLOCK))
    return {"bytes": size, "sha256_of_blocks": digest.hexdigest()}


def check_beton(path: Path, layout: Layout) -> Beton:
    """Check header, fields, sizes, labels and allocation table. Nothing of FFCV's reader or loader runs.

    Raises:
        FastarError: it names the file and its first fault.
    """
    with readable(path):
        if not path.is_file():  # opening a pipe would wait
            raise damaged(path, "is no file" if path.exists() else "missing")
        if path.stat().st_size == 0:
            raise damaged(path, "empty file")  # it cannot be mapped
        data = np.memmap(path, np.uint8, mode="r")
    return _checked_tables(path, data, layout)


def _part(path: Path, data: np.ndarray, dtype: np.dtype, start: int, count: int, what: str) -> np.ndarray:
    stop = start + count * dtype.itemsize
    if stop > len(data):
        raise damaged(path, f"truncated in its {what} ({len(data):,} bytes)")
    return data[start:stop].view(dtype)


def _checked_tables(path: Path, data: np.ndarray, layout: Layout) -> Beton:
    """The file, once its front is as fastar writes it, and its tables of samples and of their places agree."""
    header = _part(path, data, HeaderType, 0, 1, "header")[0]
    count, table_start = int(header["num_samples"]), int(header["alloc_table_ptr"])
    wanted = front(layout, count, table_start)
    if data[: len(wanted)].tobytes() != wanted:
        raise damaged(path, f"its header or its fields are not what fastar writes for {layout}")
    if count != layout.count:
        raise damaged(path, f"holds {count} samples where {layout.count} are due")
    metadata = _part(path, data, sample_type(layout), len(wanted), count, "sample table")
    end = len(wanted) + metadata.nbytes
    if table_start < end or len(data) - table_start != count * ALLOC_TABLE_TYPE.itemsize:
        raise damaged(path, "truncated, or its allocation table is damaged")
    table = _part(path, data, ALLOC_TABLE_TYPE, table_start, count, "allocation table")

    labels = np.array(metadata["f1"], dtype=np.int64)
    if labels.min() < 0 or labels.max() >= layout.classes:
        raise damaged(path, f"labels are not all in 0..{layout.classes - 1}")
    images = metadata["f0"]
    pointers = images if images.dtype.names is None else images["data_ptr"]
    by_sample = table[np.argsort(table["sample_id"], kind="stable")]
    sizes = by_sample["size"]
    # The images first: what is said of them is plainer.
    found = layout.fault(images, sizes)
    if found is not None:
        raise damaged(path, found)
    in_file = np.argsort(pointers, kind="stable")
    starts, stops = pointers[in_file], pointers[in_file] + sizes[in_file]
    if not (
        np.array_equal(by_sample["sample_id"], np.arange(count))
        and np.array_equal(by_sample["ptr"], pointers)
        and (stops[:-1] <= starts[1:]).all()
    ):
        raise damaged(path, "its allocation table does not match its samples")
    if starts[0] < end or int(stops[-1]) > table_start:
        raise damaged(path, "its images lie outside the file's pages")
    return Beton(path, layout, labels, images, pointers, sizes, (data[:end], data[table_start:]))
