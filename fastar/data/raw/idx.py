"""IDX files, plain or gzipped: the format of MNIST and Fashion-MNIST."""

import gzip
import zlib
from io import BufferedReader
from pathlib import Path

import numpy as np

from fastar.config import DatasetSpec
from fastar.data.raw.raw_split import ArraySplit, RawDataset
from fastar.errors import FastarError

_LARGEST = 1 << 30  # bytes; MNIST's images have 47 million


def find_idx(root: Path, spec: DatasetSpec) -> RawDataset | None:
    """The four IDX files in `root`, or None where there is none of them."""
    names = [f"{stem}-{part}-ubyte" for stem in ("train", "t10k") for part in ("images-idx3", "labels-idx1")]
    found = {name: path for name in names if (path := _find(root, name)) is not None}
    if not found:
        return None
    for name in names:
        if name not in found:
            raise FastarError(f"{root}: {name}[.gz] is missing; put all four IDX files there")
    paths, splits = tuple(found.values()), []
    for images, labels in (paths[:2], paths[2:]):
        pixels = read_idx(images, 3)
        if pixels.shape[1:] != (spec.height, spec.width):
            size = f"{pixels.shape[1]}x{pixels.shape[2]}"
            raise FastarError(
                f"{images}: images are {size}, {spec.name} has {spec.height}x{spec.width}; check --dataset"
            )
        splits.append(ArraySplit(pixels[..., None], read_idx(labels, 1), spec.classes, str(images)))
    return RawDataset(splits[0], splits[1], "IDX files", root, files=paths)


def _find(root: Path, name: str) -> Path | None:
    dotted = name.replace("-idx", ".idx")
    return next((root / file for file in (name, f"{name}.gz", dotted, f"{dotted}.gz") if (root / file).is_file()), None)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of an IDX file with that many dimensions; FastarError names a file that is damaged."""
    front = 4 + 4 * dimensions
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            stream: gzip.GzipFile | BufferedReader = gzip.GzipFile(fileobj=file) if zipped else file
            head = stream.read(front)
            if len(head) < front or head[:4] != bytes((0, 0, 8, dimensions)):
                raise FastarError(
                    f"{path}: not an IDX file of unsigned bytes in {dimensions} dimensions; get the file again"
                )
            shape = tuple(int(size) for size in np.frombuffer(head, ">u4", dimensions, 4))
            size = int(np.prod(shape, dtype=object))
            if size > _LARGEST:
                raise FastarError(f"{path}: its front says that it holds {size:,} bytes; damaged, get the file again")
            data = stream.read(size + 1)  # beyond the end: there gzip compares its checksum
    except (OSError, EOFError, zlib.error) as error:
        raise FastarError(f"{path}: cannot be read ({error}); get the file again") from error
    if len(data) > size:
        raise FastarError(f"{path}: more than the {front + size:,} bytes that are due; damaged, get the file again")
    if len(data) < size:
        has = front + len(data)
        raise FastarError(f"{path}: {has:,} bytes where {front + size:,} are due; truncated, get the file again")
    return np.frombuffer(data, np.uint8).reshape(shape)
