"""Decoding images of differing sizes to one size inside FFCV's loader, on several threads.

FFCV's own operation keeps the largest image's room for every image of every batch in flight, ignores what the JPEG
decoder says, and has to be compiled, for seconds, to use more than one thread. Here each thread has one such room, the
decoder's word counts, and threads run Python around FFCV's C functions, which release the GIL.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from fastar.data.beton import JPEG_MODE
from fastar.data.ffcv_names import AllocationQuery, CenterCropRGBImageDecoder, imdecode, resize_crop
from fastar.errors import FastarError


class CentreCropDecoder(CenterCropRGBImageDecoder):
    """Takes the largest centred square of each image, keeps `ratio` of its side, resizes that to `size` (by area).

    For loaders made without FFCV's compiler. `close` ends its threads.
    """

    def __init__(self, size: int, ratio: float, workers: int):
        super().__init__((size, size), ratio)
        self._workers = workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decoder") if workers > 1 else None

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, Any]:
        state, (destination, _) = super().declare_state_and_memory(previous_state)
        return state, AllocationQuery(destination.shape, destination.dtype)

    def generate_code(self) -> Callable[..., np.ndarray]:
        read, ratio, workers, pool = self.memory_read, self.ratio, self._workers, self._pool
        room = int(self.max_height) * int(self.max_width) * 3

        def some(first: int, indices: np.ndarray, destination: np.ndarray, metadata: Any, state: Any) -> None:
            scratch = np.empty(room, np.uint8)  # untouched pages cost nothing
            for position in range(first, len(indices), workers):
                index = int(indices[position])
                row = metadata[index]
                content, height, width = read(row["data_ptr"], state), int(row["height"]), int(row["width"])
                if row["mode"] == JPEG_MODE:
                    image = scratch[: 3 * height * width].reshape(height, width, 3)
                    if imdecode(content, image, height, width, height, width, 0, 0, 1, 1, False, False) != 0:
                        raise FastarError(f"sample {index} is not a whole JPEG; delete its folder and write it again")
                else:
                    image = content.reshape(height, width, 3)
                side = max(1, int(ratio * min(height, width)))
                top, left = (height - side) // 2, (width - side) // 2
                resize_crop(image, top, top + side, left, left + side, destination[position])

        def decode(indices: np.ndarray, destination: np.ndarray, metadata: Any, state: Any) -> np.ndarray:
            if pool is None:
                some(0, indices, destination, metadata, state)
            else:
                parts = [pool.submit(some, n, indices, destination, metadata, state) for n in range(workers)]
                for part in parts:
                    part.result()
            return destination[: len(indices)]

        return decode
