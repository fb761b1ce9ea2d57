"""Encoding images for a .beton file, in processes of their own where there are many. Imports neither FFCV nor torch."""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fastar.data.raw.raw_split import ImageSplit, Picture, UnusableImage
from fastar.data.sampling import draw
from fastar.errors import FastarError
from fastar.runtime.seeds import derive_seed

PAGE = 1 << 23
"""Bytes of a page of a file of images of any size; an encoded image must fit into one."""
JPEG_MODE, RAW_MODE = 0, 1
_LARGEST = 65_535  # the file's table holds 16-bit sides
ALONE = 256  # so many images are encoded before a process has started
_AHEAD = 16  # images that a process encodes before they are asked for


class Encoded(NamedTuple):
    """An image as a file holds it."""

    mode: int
    height: int
    width: int
    content: bytes


EncodedImages = Generator["Encoded | UnusableImage", None, None]


@dataclass(frozen=True)
class Encoding:
    """Storage of images of any size: shrunk to `max_resolution` on the longer side, a share of them as JPEG.

    The others are raw pixels, which load faster and take about 10 times the space. Which images are JPEG is a hash of
    their number among the raw ones.
    """

    max_resolution: int | None = 500
    compress_probability: float = 0.5
    jpeg_quality: int = 90

    def __post_init__(self) -> None:
        if self.max_resolution is not None and not 1 <= self.max_resolution <= _LARGEST:
            raise FastarError(f"max-resolution={self.max_resolution} must be within 1..{_LARGEST}")
        if not 0 <= self.compress_probability <= 1:
            raise FastarError(f"compress-probability={self.compress_probability} must be within 0..1")
        if not 1 <= self.jpeg_quality <= 100:
            raise FastarError(f"jpeg-quality={self.jpeg_quality} must be within 1..100")

    def __str__(self) -> str:
        """The preset's name, if it is one, and the three values, in words."""
        name = next((name for name, preset in PRESETS.items() if preset == self), "no preset's")
        side = f"at most {self.max_resolution} pixels" if self.max_resolution is not None else "as large as they are"
        return f"{name} ({side}, {self.compress_probability:.0%} as JPEG of quality {self.jpeg_quality})"

    def encode(self, image: np.ndarray, index: int, where: str) -> Encoded:
        """The RGB image uint8 [H, W, 3] number `index` of the raw ones, bit for bit as FFCV's RGBImageField.

        Raises:
            UnusableImage: too large for a page of the file, or nothing of it is left.
        """
        import cv2  # only here: it comes with FFCV

        height, width, _ = image.shape
        limit = self.max_resolution
        shrink = min(1.0, limit / max(height, width)) if limit is not None else 1.0
        if max(height, width) * shrink > _LARGEST or height * width * 3 * shrink**2 > PAGE:
            reason = f"{height}x{width} pixels are too many for one page of the file"
            raise UnusableImage(where, reason, "set a smaller max-resolution")
        if int(min(height, width) * shrink) < 1:
            raise UnusableImage(where, f"{height}x{width} pixels leave nothing at max-resolution={limit}", "remove it")
        if shrink < 1:
            image = cv2.resize(image, (int(shrink * width), int(shrink * height)), interpolation=cv2.INTER_AREA)
        word = int(draw(derive_seed(0, "compressed"), np.array([index]))[0])
        mode = JPEG_MODE if word < self.compress_probability * 2**32 else RAW_MODE
        if mode == JPEG_MODE:
            quality = [int(cv2.IMWRITE_JPEG_QUALITY), self.jpeg_quality]
            content = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), quality)[1].tobytes()
        else:
            content = image.tobytes()
        return Encoded(mode, image.shape[0], image.shape[1], content)


# As FFCV publishes them: the training sets of its ImageNet repository for ResNet-50 and ResNet-18, and the JPEG file of
# its benchmarks, which is the smallest and the slowest to load.
PRESETS = {
    "rn50": Encoding(500, 0.5, 90),
    "rn18": Encoding(400, 0.1, 90),
    "jpeg": Encoding(512, 1.0, 90),
}


def encoded_images(
    raw: ImageSplit, indices: Sequence[int], encoding: Encoding, workers: int, *, alone: int = ALONE
) -> EncodedImages:
    """The images `indices` of `raw`, encoded, in that order; in place of one that cannot be used, its error.

    Those beyond `alone` for each are encoded by `workers` processes, which end with this one. Close the generator to
    leave early.

    Raises:
        FastarError: a reader failed, or a process ended before its work was done.
    """
    workers = min(workers, len(indices) // alone)
    with ExitStack() as stack:
        processes = [stack.enter_context(_process()) for _ in range(workers)]
        for number, process in enumerate(processes):
            jobs = [(raw.picture(index), index) for index in indices[number::workers]]
            with suppress(BrokenPipeError), process.stdin as stream:  # type: ignore[union-attr]  # `_received` tells
                pickle.dump((encoding, jobs), stream)
        for number, index in enumerate(indices):
            if processes:
                answer = _received(processes[number % workers])
            else:
                answer = _encoded(encoding, raw.picture(index), index)
            if isinstance(answer, FastarError) and not isinstance(answer, UnusableImage):
                raise answer
            yield answer


def _encoded(encoding: Encoding, picture: Picture, index: int) -> Any:
    """An `Encoded`, or the error that the image is."""
    try:
        return encoding.encode(picture.decode(), index, picture.where)
    except FastarError as error:
        return error
    # Anything else is a fault in a reader: shown with the sample it happened at, and its own type.
    except Exception as error:  # noqa: BLE001 (raised where the images are written)
        return FastarError(f"{picture.where}: cannot be encoded ({type(error).__name__}: {error})")


@contextmanager
def _process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that encodes the images it is given, in order, and writes them to its standard output.

    It has a session of its own, so that Ctrl-C and a scheduler's signals reach this process alone.
    """
    serving = "import sys; sys.path[:] = sys.argv[1].split('\\n'); from fastar.data.encode import serve; serve()"
    command = [sys.executable, "-c", serving, "\n".join(sys.path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            with suppress(BrokenPipeError):
                stream.close()  # type: ignore[union-attr]


def _received(process: subprocess.Popen[bytes]) -> Any:
    assert process.stdout is not None
    try:
        return pickle.load(process.stdout)
    except (EOFError, pickle.UnpicklingError):
        code = process.wait()
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        what = f"a writer process ended before its work was done ({how}; out of memory?); run again"
        raise FastarError(what) from None


def serve() -> None:
    """Serve as such a process: read jobs from standard input, write encoded images to standard output."""
    answers, results = os.fdopen(os.dup(1), "wb"), queue.Queue[Any](_AHEAD)
    os.dup2(2, 1)  # what a library prints is no answer
    import cv2

    cv2.setNumThreads(1)
    encoding, jobs = pickle.load(sys.stdin.buffer)

    def encode() -> None:
        for picture, index in jobs:
            results.put(_encoded(encoding, picture, index))
        results.put(None)

    threading.Thread(target=encode, daemon=True).start()
    with suppress(BrokenPipeError):  # nobody is left to read them
        while (result := results.get()) is not None:
            pickle.dump(result, answers, protocol=pickle.HIGHEST_PROTOCOL)
            answers.flush()
    os._exit(0)  # the thread may be encoding
