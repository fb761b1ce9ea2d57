"""The one way from a .beton file to batches: FFCV's loader, kept from hanging, leaking and changing the process."""

import copy
import hashlib
import queue
import weakref
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from ffcv.loader import Loader, OrderOption
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.pipeline.compiler import Compiler

from fastar.data.content import content_of_one_size
from fastar.data.ffcv.checksums import Checksums
from fastar.data.ffcv.decode import CropDecoder, Plan
from fastar.data.ffcv.format import Beton, FixedLayout, damaged
from fastar.errors import FastarError
from fastar.runtime.progress import Progress

Images = Generator[np.ndarray, None, None]

BATCH = 1024
# Compiling FFCV's loops takes 1 to 2 s a file; running them as plain Python costs 15 to 30 us a sample.
COMPILE_FROM = 100_000


class GuardedIterator(EpochIterator):
    """FFCV's epoch, whose thread hands over its own error instead of leaving the reader waiting for ever."""

    def __init__(self, loader: Loader, order: np.ndarray, plan: Plan | None = None):
        self.failure: BaseException | None = None
        self.plan = plan
        super().__init__(loader, order)

    def run_pipeline(self, b_ix: int, batch_indices: Any, batch_slot: int, cuda_event: Any) -> Any:
        if self.plan is not None:
            # The one argument of a decoder that can differ between epochs of one loader.
            self.storage_state = (*self.memory_context.state, self.plan)
        return super().run_pipeline(b_ix, batch_indices, batch_slot, cuda_event)

    def run(self) -> None:
        try:
            super().run()
        except BaseException as error:  # noqa: BLE001 (raised again where the batches are read)
            self.failure = error
            while not self.terminate_event.is_set():
                try:
                    self.output_queue.put(None, timeout=0.1)
                    return
                except queue.Full:
                    continue

    def __next__(self) -> Any:
        try:
            return super().__next__()
        except StopIteration:
            if self.failure is not None:
                raise self.failure from None
            raise

    def close(self) -> None:
        """Stop the thread, wherever it is, and wait for it. Safe to call again."""
        super().close()
        self.closed = True
        while self.is_alive():
            # The thread may be waiting for space in the queue, without a time limit when it has just finished.
            try:
                self.output_queue.get_nowait()
            except queue.Empty:
                self.join(0.01)

    def __del__(self) -> None:
        # FFCV's own closes here; by then the thread has ended, because it holds a reference to this object.
        return


class GuardedLoader(Loader):
    """FFCV's loader of a file's images, whose epochs are `GuardedIterator`s; without a `decoder` FFCV's own decodes.

    With `compiled` its loops are compiled; without, they run as Python.
    """

    def __init__(
        self, path: Path, batch_size: int, *, compiled: bool, ahead: int = 3, decoder: CropDecoder | None = None
    ):
        with patch.object(Compiler, "is_enabled", compiled):
            super().__init__(
                str(path),
                batch_size=batch_size,
                num_workers=1,
                os_cache=True,
                order=OrderOption.SEQUENTIAL,
                seed=0,
                drop_last=False,
                batches_ahead=ahead,
                pipelines={"label": None} if decoder is None else {"image": [decoder], "label": None},
            )

    def epoch(self, order: np.ndarray, batch_size: int, plan: Plan | None = None) -> GuardedIterator:
        """An epoch of the samples `order` (int64), in that order."""
        loader = copy.copy(self)  # shares all that took time to make
        loader.batch_size = batch_size
        return GuardedIterator(loader, order.astype(np.uint64), plan)


@contextmanager
def _loader_errors(path: Path) -> Iterator[None]:
    """Inside, whatever FFCV's thread or compiler runs into belongs to this file; the cause stays attached."""
    try:
        yield
    except FastarError:
        raise
    except Exception as error:
        raise FastarError(f"{path}: FFCV's loader failed ({type(error).__name__}: {error})") from error


def read_images(beton: Beton, batch_size: int = BATCH, *, compile_from: int = COMPILE_FROM) -> Images:
    """Yield images uint8 [b, H, W, C] of one size, in file order, every one exactly once.

    The arrays are FFCV's own buffers: copy them before asking for the next batch. An error in the loader's thread is
    raised here as FastarError. Close the generator to leave early.
    """
    count = len(beton.labels)
    with _loader_errors(beton.path):
        batch_size = min(batch_size, count)
        loader = GuardedLoader(beton.path, batch_size, compiled=count >= compile_from)
        batches = loader.epoch(np.arange(count), batch_size)
        try:
            with closing(batches):
                for (images,) in batches:
                    yield images.numpy()
        finally:
            # FFCV's objects refer to each other; until they are collected the whole file would count as memory.
            loader.memory_manager.context.mmap, batches.storage_state = None, ()


def read_chosen(beton: Beton, index: np.ndarray, progress: Progress, description: str) -> tuple[np.ndarray, str]:
    """Images uint8 [n, H, W, C] of one size of the samples `index` (sorted), and the digest of all content."""
    assert isinstance(beton.layout, FixedLayout)  # others stream
    images, digest, start = np.empty((len(index), *beton.layout.shape), np.uint8), hashlib.sha256(), 0
    with closing(read_images(beton)) as batches, progress.task(description, len(beton.labels), "images") as advance:
        for some in batches:
            stop = start + len(some)
            these = slice(*np.searchsorted(index, (start, stop)))
            images[these] = some[index[these] - start]
            digest.update(some.data)
            start = stop
            advance(len(some))
    return images, content_of_one_size(digest, beton.labels)


class ImageReader:
    """Epochs of images of differing sizes, cut and resized while they are decoded, on `threads`.

    Each image is compared with its checksum when it is first read, the tables of the file here.
    """

    def __init__(self, beton: Beton, checksums: Checksums, *, threads: int):
        if beton.tables_digest() != checksums.tables:
            raise damaged(beton.path, "its tables are not those that were written")
        self._path = beton.path
        with _loader_errors(beton.path):
            decoder = CropDecoder(beton.path, beton.sizes, checksums.images, threads)
            weakref.finalize(self, decoder.close)
            self._loader = GuardedLoader(beton.path, 1, compiled=False, ahead=2, decoder=decoder)

    def epoch(self, order: np.ndarray, batch_size: int, plan: Plan) -> Generator[torch.Tensor, None, None]:
        """Yield images uint8 [b, size, size, 3] of the samples `order`, in that order, three batches ahead.

        Close the generator to leave early.
        """
        with _loader_errors(self._path), closing(self._loader.epoch(order, batch_size, plan)) as batches:
            for (images,) in batches:
                yield images
