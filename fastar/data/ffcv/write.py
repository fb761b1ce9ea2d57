"""Writing a .beton file: header, table of samples, pages of images, table of their places.

FFCV's own writer waits for ever for a worker that died, and ignores short writes on a full disk.
"""

import errno
import math
import os
import shutil
from contextlib import closing
from pathlib import Path
from typing import IO

import numpy as np
from ffcv.types import ALLOC_TABLE_TYPE, HeaderType

from fastar.data.encode import Encoded
from fastar.data.ffcv.format import Layout, front, sample_type
from fastar.data.raw.raw_split import RawSplit
from fastar.errors import FastarError
from fastar.runtime.progress import SILENT, Progress

_ESTIMATE = 64
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def disk_full(path: Path, error: OSError) -> FastarError:
    """The error to show for a failed write below `path`."""
    if error.errno in _FULL:
        free = shutil.disk_usage(path.parent).free
        return FastarError(
            f"{path}: disk full while writing ({free / 1e6:,.1f} MB free); free some space and run again"
        )
    return FastarError(f"{path}: cannot be written ({error.strerror or error}); check the folder")


def predicted_bytes(layout: Layout, raw: RawSplit, indices: np.ndarray, *, skip: bool = False) -> int:
    """Bytes of the file with the raw images `indices`, from a sample of them.

    An image of the sample that cannot be used is an error, or with `skip` left out.
    """
    sample = indices[np.unique(np.linspace(0, len(indices) - 1, _ESTIMATE).astype(np.int64))]
    sizes = []
    for image in layout.encoded(raw, sample):
        if isinstance(image, Encoded):
            sizes.append(len(image.content))
        elif not skip:
            raise image
    # A page is left when the next image does not fit: on average half an image is lost where sizes differ.
    per_page = layout.PAGE / np.mean(sizes or [1])
    pages = math.ceil(layout.count / max(per_page - 0.5, 1)) + 1
    row = sample_type(layout).itemsize + ALLOC_TABLE_TYPE.itemsize
    return layout.PAGE * (pages + 1) + layout.count * row


def write_beton(
    path: Path,
    raw: RawSplit,
    indices: np.ndarray,
    layout: Layout,
    *,
    workers: int = 2,
    skip: bool = False,
    progress: Progress = SILENT,
    description: str = "writing",
) -> dict[int, str]:
    """Write samples `indices` of `raw`, in that order, to `path` (created, or overwritten) and flush it to disk.

    Returns:
        With `skip`, the images that cannot be used, which are left out: position in `indices` to reason.

    Raises:
        FastarError: an image that cannot be used, a full disk, or a process that died. The caller removes the file.
    """
    row = sample_type(layout)
    samples, places = np.zeros(len(indices), row), np.zeros(len(indices), ALLOC_TABLE_TYPE)
    end = (
        -(-(len(front(layout, 0, 0)) + samples.nbytes) // layout.PAGE) * layout.PAGE
    )  # of the last page that was begun, none so far
    place, kept, skipped = end, 0, {}
    try:
        with (
            path.open("wb") as stream,
            closing(layout.encoded(raw, indices, workers)) as images,
            progress.task(description, len(indices), "images") as advance,
        ):
            for position, image in enumerate(images):
                if isinstance(image, Encoded):
                    if place + len(image.content) > end:
                        place, end = end, end + layout.PAGE
                    stream.seek(place)
                    stream.write(image.content)
                    samples["f1"][kept] = raw.labels[indices[position]]
                    if row["f0"].names is None:
                        samples["f0"][kept] = place
                    else:
                        samples["f0"][kept] = image.mode, image.width, image.height, place
                    places[kept] = kept, place, len(image.content)
                    place, kept = place + len(image.content), kept + 1
                elif skip:
                    skipped[position] = image.reason
                else:
                    raise image
                advance()
            if kept == 0:
                raise FastarError(f"{path}: none of the {len(indices)} images can be used ({skipped[0]})")
            _write_tables(stream, layout, samples[:kept], places[:kept], end)
    except OSError as error:
        raise disk_full(path, error) from error
    return skipped


def _write_tables(stream: IO[bytes], layout: Layout, samples: np.ndarray, places: np.ndarray, end: int) -> None:
    """All but the pages, which reach to `end`. Rows of images that were left out stay empty before the pages.

    The header is written last: until then the file's version is 0, and nothing opens it.
    """
    begin, size = front(layout, len(samples), end), HeaderType.itemsize
    stream.seek(size)
    stream.write(begin[size:] + samples.tobytes())
    stream.seek(end)
    stream.write(places.tobytes())
    _flush(stream)
    stream.seek(0)
    stream.write(begin[:size])
    _flush(stream)


def _flush(stream: IO[bytes]) -> None:
    stream.flush()
    os.fsync(stream.fileno())
