"""The .beton file format: what fastar writes into one, and the check that it is whole before FFCV opens it.

FFCV itself trusts a file: a truncated, empty or foreign one gives an IndexError, wrong pixels, or a crash.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

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
from fastar.data.raw.raw_split import RawSplit
from fastar.errors import FastarError

JPEG_MODE, RAW_MODE = 0, 1
SAMPLES = 64  # images of a new file that are compared with the raw ones
_BLOCK = 1 << 16
_BLOCKS = 256


class Layout(Protocol):
    """What a file must hold, for writing and checking it: the image and label of `count` samples."""

    @property
    def count(self) -> int: ...

    @property
    def classes(self) -> int: ...

    @property
    def page_size(self) -> int:
        """Bytes of a page of the file; an encoded image must fit into one."""
        ...

    @property
    def equal_sizes(self) -> bool:
        """Every image takes the same number of bytes."""
        ...

    def image_bytes_of(self, raw: RawSplit, indices: np.ndarray, *, skip: bool = False) -> float:
        """Bytes that one of these images will take; a mean, from a sample, where they differ.

        An image of the sample that cannot be used is an error, or with `skip` left out.
        """
        ...

    def fields(self) -> dict[str, Field]:
        """FFCV's fields in file order."""
        ...

    def encoders(self, index: int) -> dict[str, Field]:
        """The fields that write the raw sample `index`; they describe themselves in the file as `fields` does."""
        ...

    def describe(self) -> str:
        """The kind of images, for messages."""
        ...

    def complaint(self, image: np.ndarray) -> tuple[str, str] | None:
        """What is wrong with a raw image that was to be written, and what to do; or None."""
        ...

    def pointers(self, image: np.ndarray) -> np.ndarray:
        """Where each image's bytes start, out of the sample table's image column."""
        ...

    def fault(self, image: np.ndarray, sizes: np.ndarray) -> str | None:
        """What is wrong with a file's images (table column, and bytes of each), or None."""
        ...


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

    @property
    def page_size(self) -> int:
        return 1 << 21

    @property
    def equal_sizes(self) -> bool:
        return True

    def image_bytes_of(self, raw: RawSplit, indices: np.ndarray, *, skip: bool = False) -> float:
        return self.image_bytes

    def encoders(self, index: int) -> dict[str, Field]:
        return self.fields()

    def describe(self) -> str:
        return f"{self.height}x{self.width}x{self.channels} images"

    def complaint(self, image: np.ndarray) -> tuple[str, str] | None:
        shape = (self.height, self.width, self.channels)
        if image.shape == shape and image.dtype == np.uint8:
            return None
        return f"image is {image.dtype} {list(image.shape)}, not uint8 {list(shape)}", "convert it"

    def pointers(self, image: np.ndarray) -> np.ndarray:
        return image["data_ptr"] if self.channels == 3 else image

    def fault(self, image: np.ndarray, sizes: np.ndarray) -> str | None:
        if self.channels == 3:
            same = (image["mode"] == RAW_MODE) & (image["height"] == self.height) & (image["width"] == self.width)
            if not same.all():
                return f"its images are not all raw {self.height}x{self.width}"
        return None if (sizes == self.image_bytes).all() else "its allocation table does not match its samples"


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

    Raises FastarError that names the file and its first fault. Nothing of FFCV's reader or loader runs.
    """

    def fault(what: str) -> FastarError:
        return FastarError(f"{path}: {what}; delete its folder and write it again")

    if path.exists() and not path.is_file():
        raise fault("is no file")  # opening a pipe would wait
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
            raise fault(f"its field {name!r} is not what fastar writes for {layout.describe()}")

    start = HeaderType.itemsize + expected.nbytes
    metadata = part(get_metadata_type(list(fields.values())), start, count, "sample table")
    table_start = int(header["alloc_table_ptr"])
    if table_start < start + metadata.nbytes or len(data) - table_start != count * ALLOC_TABLE_TYPE.itemsize:
        raise fault("truncated, or its allocation table is damaged")
    table = part(ALLOC_TABLE_TYPE, table_start, count, "allocation table")

    labels = np.array(metadata["f1"], dtype=np.int64)
    if labels.min() < 0 or labels.max() >= layout.classes:
        raise fault(f"labels are not all in 0..{layout.classes - 1}")
    pointers = layout.pointers(metadata["f0"])
    by_sample = table[np.argsort(table["sample_id"], kind="stable")]
    sizes = by_sample["size"]
    # The images first: what is said of them is plainer.
    found = layout.fault(metadata["f0"], sizes)
    if found is not None:
        raise fault(found)
    in_file = np.argsort(pointers, kind="stable")
    starts, stops = pointers[in_file], pointers[in_file] + sizes[in_file]
    if not (
        np.array_equal(by_sample["sample_id"], np.arange(count))
        and np.array_equal(by_sample["ptr"], pointers)
        and (stops[:-1] <= starts[1:]).all()
    ):
        raise fault("its allocation table does not match its samples")
    if starts[0] < start + metadata.nbytes or int(stops[-1]) > table_start:
        raise fault("its images lie outside the file's pages")
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
