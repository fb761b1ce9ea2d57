"""The .beton file format: what fastar writes into one, and the check that it is whole before FFCV opens it.

FFCV itself trusts a file: a truncated, empty or foreign one gives an IndexError, wrong pixels, or a crash.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastar.data.ffcv_names import (
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
from fastar.errors import FastarError

_RAW_MODE = 1
_BLOCK = 1 << 16
_BLOCKS = 256


@dataclass(frozen=True)
class BetonLayout:
    """What a file must hold: `count` raw images uint8 [H, W, C], labels in 0..classes-1."""

    count: int
    height: int
    width: int
    channels: int
    classes: int

    @property
    def image_bytes(self) -> int:
        return self.height * self.width * self.channels

    def fields(self) -> dict[str, Field]:
        """FFCV's fields in file order: RGB images as FFCV images, others as arrays of bytes."""
        image = (
            RGBImageField(write_mode="raw")
            if self.channels == 3
            else NDArrayField(np.dtype("uint8"), (self.height, self.width, self.channels))
        )
        return {"image": image, "label": IntField()}


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


def check_beton(path: Path, layout: BetonLayout) -> np.ndarray:
    """Check header, fields, sizes, labels and allocation table; returns the labels (int64 [count]).

    Raises FastarError that names the file and its first fault. Nothing of FFCV's reader or loader runs.
    """

    def fault(what: str) -> FastarError:
        return FastarError(f"{path}: {what}; delete its folder and write it again")

    try:
        data = np.memmap(path, np.uint8, mode="r")
    except FileNotFoundError:
        raise FastarError(f"{path}: missing; write it again") from None
    except ValueError:  # an empty file cannot be mapped
        raise fault("empty file") from None
    except OSError as error:
        raise FastarError(f"{path}: cannot be read ({error.strerror}); check the file") from error

    def part(dtype: np.dtype, start: int, count: int, what: str) -> np.ndarray:
        stop = start + count * dtype.itemsize
        if stop > len(data):
            raise fault(f"truncated in its {what} ({len(data):,} bytes)")
        return data[start:stop].view(dtype)

    header = part(HeaderType, 0, 1, "header")[0]
    fields = layout.fields()
    if header["version"] != CURRENT_VERSION or header["num_fields"] != len(fields):
        raise fault("not a .beton file of fastar (foreign header)")
    page_size, count = int(header["page_size"]), int(header["num_samples"])
    if page_size < 1 << 21 or page_size & (page_size - 1):
        raise fault(f"damaged header (page size {page_size})")
    if count != layout.count:
        raise fault(f"holds {count} samples where {layout.count} are due")
    expected = field_descriptors(fields)
    written = part(FieldDescType, HeaderType.itemsize, len(fields), "fields")
    for name, want, got in zip(fields, expected, written, strict=True):
        if any(not np.array_equal(want[key], got[key]) for key in ("type_id", "name", "arguments")):
            shape = f"{layout.height}x{layout.width}x{layout.channels}"
            raise fault(f"its field {name!r} is not what fastar writes for {shape} images")

    start = HeaderType.itemsize + expected.nbytes
    metadata = part(get_metadata_type(list(fields.values())), start, count, "sample table")
    table_start = int(header["alloc_table_ptr"])
    if table_start < start + metadata.nbytes or len(data) - table_start != count * ALLOC_TABLE_TYPE.itemsize:
        raise fault("truncated, or its allocation table is damaged")
    table = part(ALLOC_TABLE_TYPE, table_start, count, "allocation table")

    labels = np.array(metadata["f1"], dtype=np.int64)
    if labels.min() < 0 or labels.max() >= layout.classes:
        raise fault(f"labels are not all in 0..{layout.classes - 1}")
    image = metadata["f0"]
    pointers = image
    if layout.channels == 3:
        pointers = image["data_ptr"]
        if not (
            (image["mode"] == _RAW_MODE) & (image["height"] == layout.height) & (image["width"] == layout.width)
        ).all():
            raise fault(f"its images are not all raw {layout.height}x{layout.width}")
    order = np.argsort(table["sample_id"], kind="stable")
    by_sample = table[order]
    if not (
        np.array_equal(by_sample["sample_id"], np.arange(count))
        and np.array_equal(by_sample["ptr"], pointers)
        and (table["size"] == layout.image_bytes).all()
        and len(np.unique(pointers)) == count
    ):
        raise fault("its allocation table does not match its samples")
    if pointers.min() < start + metadata.nbytes or int(pointers.max()) + layout.image_bytes > table_start:
        raise fault("its images lie outside the file's pages")
    return labels
