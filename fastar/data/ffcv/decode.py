"""Decoding images of differing sizes to one size inside FFCV's loader, on several threads.

FFCV's own operations keep the largest image's space for every image of every batch in flight, ignore what the JPEG
decoder says, draw crops from a state that depends on the threads' timing, are compiled anew for another output size,
and die of a bus error where the file has become shorter. Here each thread has one such
buffer, the JPEG decoder's return code is checked, the boxes come from outside, files are read with `pread`, and threads
run Python around FFCV's C functions, which release the GIL.
"""

import os
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.libffcv import imdecode, resize_crop

from fastar.data.crops import Boxes
from fastar.data.encode import JPEG_MODE
from fastar.data.ffcv.format import damaged


@dataclass(frozen=True)
class Plan:
    """The form of one epoch's images: cut to `boxes`, resized (by area where that makes them smaller) to `size`
    squared; in pinned memory if they are to go to a GPU."""

    size: int
    boxes: Boxes
    pinned: bool = False


class CropDecoder(SimpleRGBImageDecoder):
    """Reads, decodes, cuts and resizes images as the epoch's `Plan` says, the last of the loader's storage state.

    For loaders made without FFCV's compiler. `sizes` are the bytes of each image in `path`, `sums` their CRC-32, with
    which each image is compared once. Every batch is a tensor of its own, uint8 [b, size, size, 3]. `close` ends the
    threads.
    """

    def __init__(self, path: Path, sizes: np.ndarray, sums: np.ndarray, threads: int):
        super().__init__()
        self._path, self._file = path, os.open(path, os.O_RDONLY)
        self._sizes, self._threads = sizes, threads
        self._sums, self._checked = sums, np.zeros(len(sums), bool)
        self._buffers = threading.local()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decoder") if threads > 1 else None

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        os.close(self._file)

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, None]:
        return replace(previous_state, jit_mode=True, shape=(0, 0, 3), dtype=np.dtype("u1")), None

    def generate_code(self) -> Callable[..., torch.Tensor]:
        def decode(indices: np.ndarray, memory: None, metadata: np.ndarray, state: tuple[Any, ...]) -> torch.Tensor:
            plan: Plan = state[-1]
            index = indices.astype(np.int64)
            rows = metadata[index]
            boxes = plan.boxes(index, rows["height"].astype(np.int64), rows["width"].astype(np.int64))
            images = torch.empty(
                (len(index), plan.size, plan.size, 3), dtype=torch.uint8, pin_memory=plan.pinned, device="cpu"
            )
            into, numbers = images.numpy(), iter(range(len(index)))

            def some() -> None:
                # One that has a large image takes fewer. (`next` holds the GIL.)
                while (position := next(numbers, None)) is not None:
                    self._one(int(index[position]), rows[position], boxes[position].tolist(), into[position])

            if self._pool is None:
                some()
            else:
                # All have ended before an error is raised: none writes into memory that is gone.
                parts = [self._pool.submit(some) for _ in range(self._threads)]
                failed = [error for part in parts if (error := part.exception()) is not None]
                if failed:
                    raise failed[0]
            return images

        return decode

    def _one(self, index: int, row: np.void, box: list[int], into: np.ndarray) -> None:
        height, width = int(row["height"]), int(row["width"])
        content = self._buffer("content", int(self._sizes[index]))
        if os.preadv(self._file, [content.data], int(row["data_ptr"])) != len(content):
            raise damaged(self._path, f"sample {index} cannot be read whole: the file was cut off")
        if not self._checked[index]:
            if zlib.crc32(content.data) != self._sums[index]:
                raise damaged(self._path, f"sample {index} is not what was written")
            self._checked[index] = True
        if row["mode"] == JPEG_MODE:
            image = self._buffer("image", 3 * height * width).reshape(height, width, 3)
            if imdecode(content, image, height, width, height, width, 0, 0, 1, 1, False, False) != 0:
                raise damaged(self._path, f"sample {index} is not a whole JPEG")
        else:
            image = content.reshape(height, width, 3)
        top, left, box_height, box_width = box
        resize_crop(image, top, top + box_height, left, left + box_width, into)

    def _buffer(self, name: str, size: int) -> np.ndarray:
        """This thread's `size` bytes called `name`; kept, because fresh memory costs as much as a copy."""
        buffer = getattr(self._buffers, name, None)
        if buffer is None or len(buffer) < size:
            buffer = np.empty(size + size // 4, np.uint8)
            setattr(self._buffers, name, buffer)
        return buffer[:size]
