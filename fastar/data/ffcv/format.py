"""The .beton file format: what fastar writes into one, and the check that it is whole before FFCV opens it.

FFCV itself trusts a file: a truncated, empty or foreign one gives an IndexError, wrong pixels, or a crash.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fastar.data.ffcv.encode import JPEG_MODE, PAGE, RAW_MODE, Encoded, EncodedImages, Encoding, encoded_images
from fastar.data.ffcv.names import (
    ALLOC_TABLE_TYPE,
    CURRENT_VERSION,
    TYPE_ID_HANDLER,
    Field,
    FieldDescType,
    HeaderType,
    IntField,
    NDArrayField,
    RGBImageField,
    get_metadata_type,
)
from fastar.data.raw.raw_split import ImageSplit, RawSplit, UnusableImage
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
        image = RGBImageField(write_mode="raw") if self._rgb else NDArrayField(np.dtype("uint8"), self.shape)
        return {"image": image, "label": IntField()}

    def encoded(self, raw: RawSplit, indices: np.ndarray, workers: int = 1) -> EncodedImages:
        """The raw images `indices` as the file holds them; in place of one that cannot be used, its error."""
        for index in indices.tolist():
            image, _ = raw[index]
            if image.shape == self.shape and image.dtype == np.uint8:
                yield Encoded(RAW_MODE, image.shape[0], image.shape[1], image.tobytes())
            else:
                reason = f"image is {image.dtype} {list(image.shape)}, not uint8 {list(self.shape)}"
                yield UnusableImage(raw.where(index), reason, "convert it")

    def describe(self) -> str:
        """The kind of images, for messages."""
        return f"{'x'.join(map(str, self.shape))} images"

    def pointers(self, image: np.ndarray) -> np.ndarray:
        """Places of each image's first byte, out of the sample table's image column."""
        return image["data_ptr"] if self._rgb else image

    def fault(self, image: np.ndarray, sizes: np.ndarray) -> str | None:
        """The first fault of a file's images (table column, and bytes of each), or None."""
        height, width, _ = self.shape
        if self._rgb:
            same = (image["mode"] == RAW_MODE) & (image["height"] == height) & (image["width"] == width)
            if not same.all():
                return f"its images are not all raw {height}x{width}"
        return None if (sizes == math.prod(self.shape)).all() else "its allocation table does not match its samples"

    @property
    def _rgb(self) -> bool:
        return self.shape[2] == 3


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

    def describe(self) -> str:
        return "RGB images of any size"

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


Layout = FixedLayout | VariableLayout


def field_descriptors(fields: dict[str, Field]) -> np.ndarray:
    """The file's second part: type, name and arguments of each field."""
    codes = {handler: code for code, handler in TYPE_ID_HANDLER.items()}
    table = np.zeros(len(fields), dtype=FieldDescType)
    for row, (name, field) in zip(table, fields.items(), strict=True):
        row["type_id"] = codes[type(field)]
        row["name"][: len(name)] = np.frombuffer(name.encode("ascii"), np.uint8)
        row["arguments"][:] = field.to_binary()[0]
    return table


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


def check_beton(path: Path, layout: Layout) -> np.ndarray:
    """Check header, fields, sizes, labels and allocation table; returns the labels (int64 [count]).

    Nothing of FFCV's reader or loader runs.

    Raises:
        FastarError: it names the file and its first fault.
    """
    try:
        if path.exists() and not path.is_file():
            raise _Fault("is no file")  # opening a pipe would wait
        try:
            data = np.memmap(path, np.uint8, mode="r")
        except ValueError:  # an empty file cannot be mapped
            raise _Fault("empty file") from None
        return _checked_tables(data, _checked_front(data, layout), layout)
    except _Fault as fault:
        raise FastarError(f"{path}: {fault}; delete its folder and write it again") from None
    except FileNotFoundError:
        raise FastarError(f"{path}: missing; write it again") from None
    except OSError as error:
        raise FastarError(f"{path}: cannot be read ({error.strerror}); check the file") from error


class _Fault(Exception):
    """A fault of a file, in words."""


def _part(data: np.ndarray, dtype: np.dtype, start: int, count: int, what: str) -> np.ndarray:
    stop = start + count * dtype.itemsize
    if stop > len(data):
        raise _Fault(f"truncated in its {what} ({len(data):,} bytes)")
    return data[start:stop].view(dtype)


def _checked_front(data: np.ndarray, layout: Layout) -> np.void:
    """The header, once it and the fields behind it are as fastar writes them."""
    header = _part(data, HeaderType, 0, 1, "header")[0]
    fields = layout.fields()
    if header["version"] != CURRENT_VERSION or header["num_fields"] != len(fields):
        raise _Fault("not a .beton file of fastar (foreign header)")
    page_size, count = int(header["page_size"]), int(header["num_samples"])
    if page_size < 1 << 21 or page_size & (page_size - 1):
        raise _Fault(f"damaged header (page size {page_size})")
    if count != layout.count:
        raise _Fault(f"holds {count} samples where {layout.count} are due")
    written = _part(data, FieldDescType, HeaderType.itemsize, len(fields), "fields")
    for name, want, got in zip(fields, field_descriptors(fields), written, strict=True):
        if any(not np.array_equal(want[key], got[key]) for key in ("type_id", "name", "arguments")):
            raise _Fault(f"its field {name!r} is not what fastar writes for {layout.describe()}")
    return header


def _checked_tables(data: np.ndarray, header: np.void, layout: Layout) -> np.ndarray:
    """The labels, once the tables of samples and of their places agree."""
    fields = layout.fields()
    start, count = HeaderType.itemsize + len(fields) * FieldDescType.itemsize, layout.count
    metadata = _part(data, get_metadata_type(list(fields.values())), start, count, "sample table")
    end = start + metadata.nbytes
    table_start = int(header["alloc_table_ptr"])
    if table_start < end or len(data) - table_start != count * ALLOC_TABLE_TYPE.itemsize:
        raise _Fault("truncated, or its allocation table is damaged")
    table = _part(data, ALLOC_TABLE_TYPE, table_start, count, "allocation table")

    labels = np.array(metadata["f1"], dtype=np.int64)
    if labels.min() < 0 or labels.max() >= layout.classes:
        raise _Fault(f"labels are not all in 0..{layout.classes - 1}")
    pointers = layout.pointers(metadata["f0"])
    by_sample = table[np.argsort(table["sample_id"], kind="stable")]
    sizes = by_sample["size"]
    # The images first: what is said of them is plainer.
    found = layout.fault(metadata["f0"], sizes)
    if found is not None:
        raise _Fault(found)
    in_file = np.argsort(pointers, kind="stable")
    starts, stops = pointers[in_file], pointers[in_file] + sizes[in_file]
    if not (
        np.array_equal(by_sample["sample_id"], np.arange(count))
        and np.array_equal(by_sample["ptr"], pointers)
        and (stops[:-1] <= starts[1:]).all()
    ):
        raise _Fault("its allocation table does not match its samples")
    if starts[0] < end or int(stops[-1]) > table_start:
        raise _Fault("its images lie outside the file's pages")
    return labels


def front_bytes(data: np.ndarray, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of a checked file before its pages, and those of its allocation table."""
    fields = layout.fields()
    rows = layout.count * get_metadata_type(list(fields.values())).itemsize
    header = data[: HeaderType.itemsize].view(HeaderType)[0]
    return data[: HeaderType.itemsize + field_descriptors(fields).nbytes + rows], data[int(header["alloc_table_ptr"]) :]


def image_table(path: Path, layout: Layout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The bytes of a checked file, the image column of its sample table, and the size of each image."""
    data = np.memmap(path, np.uint8, mode="r")
    front, allocated = front_bytes(data, layout)
    row = get_metadata_type(list(layout.fields().values()))
    table = front[len(front) - layout.count * row.itemsize :].view(row)["f0"]
    by_number = allocated.view(ALLOC_TABLE_TYPE)
    return data, table, by_number["size"][np.argsort(by_number["sample_id"], kind="stable")]
