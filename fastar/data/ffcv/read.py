"""The one way from a .beton file to batches: FFCV's loader, kept from hanging, leaking and changing the process."""

import copy
import hashlib
import queue
import weakref
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ffcv.loader import Loader, OrderOption
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.pipeline.compiler import Compiler

from fastar.data.ffcv import torch_threads_kept
from fastar.data.ffcv.checksums import Checksums, content_of_one_size
from fastar.data.ffcv.decode import CropDecoder, Plan
from fastar.data.ffcv.format import FixedLayout, VariableLayout, check_beton, damaged
from fastar.errors import FastarError
from fastar.runtime.progress import Progress

Batches = Generator[tuple[np.ndarray, np.ndarray], None, None]

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
    """FFCV's loader whose epochs are `GuardedIterator`s; `decoder` is the images' own, FFCV's where there is none.

    With `compiled` its loops are compiled; without, they run as Python.
    """

    def __init__(
        self, path: Path, batch_size: int, *, compiled: bool, ahead: int = 3, decoder: CropDecoder | None = None
    ):
        before = Compiler.is_enabled
        Compiler.set_enabled(compiled)
        try:
            super().__init__(
                str(path),
                batch_size=batch_size,
                num_workers=1,
                os_cache=True,
                order=OrderOption.SEQUENTIAL,
                seed=0,
                drop_last=False,
                batches_ahead=ahead,
                pipelines={} if decoder is None else {"image": [decoder], "label": None},
            )
        finally:
            Compiler.set_enabled(before)

    def epoch(self, order: np.ndarray, batch_size: int, plan: Plan | None = None) -> GuardedIterator:
        """An epoch of the samples `order` (int64), in that order."""
        Compiler.set_num_threads(self.num_workers)
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


def read_batches(
    path: Path, layout: FixedLayout, batch_size: int = BATCH, *, compile_from: int = COMPILE_FROM
) -> Batches:
    """Yield (images uint8 [b, H, W, C], labels int64 [b]) in file order, every sample exactly once.

    The arrays are FFCV's own buffers: copy them before asking for the next batch. The file is checked first; an error
    in the loader's thread is raised here as FastarError. Close the generator to leave early.
    """
    check_beton(path, layout)
    with torch_threads_kept(), _loader_errors(path):
        batch_size = min(batch_size, layout.count)
        loader = GuardedLoader(path, batch_size, compiled=layout.count >= compile_from)
        batches = loader.epoch(np.arange(layout.count), batch_size)
        try:
            with closing(batches):
                for images, labels in batches:
                    yield images.numpy(), labels.numpy().reshape(-1)
        finally:
            # FFCV's objects refer to each other; until they are collected the whole file would count as memory.
            loader.memory_manager.context.mmap, batches.storage_state = None, ()


def read_chosen(
    path: Path, layout: FixedLayout, index: np.ndarray, progress: Progress, description: str
) -> tuple[np.ndarray, np.ndarray, str]:
    """Images uint8 [n, H, W, C] and labels int64 [n] of the samples `index` (sorted), and the digest of all content."""
    images, labels = np.empty((len(index), *layout.shape), np.uint8), np.empty(len(index), np.int64)
    digest, all_labels, start = hashlib.sha256(), np.empty(layout.count, np.int64), 0
    with (
        closing(read_batches(path, layout)) as batches,
        progress.task(description, layout.count, "images") as advance,
    ):
        for some_images, some_labels in batches:
            stop = start + len(some_labels)
            these = slice(*np.searchsorted(index, (start, stop)))
            images[these], labels[these] = some_images[index[these] - start], some_labels[index[these] - start]
            digest.update(some_images.data)
            all_labels[start:stop] = some_labels
            start = stop
            advance(len(some_labels))
    return images, labels, content_of_one_size(digest, all_labels)


class ImageReader:
    """Epochs of a .beton file of images of differing sizes, cut and resized while they are decoded, on `threads`.

    The file is checked here, but for its images: each is compared with its checksum when it is first read. `labels`
    int64 [n]; `pages` int64 [n] is the page of the file that each lies in.
    """

    def __init__(self, path: Path, layout: VariableLayout, checksums: Checksums, *, threads: int):
        self._path = path
        beton = check_beton(path, layout)
        if beton.tables_digest() != checksums.tables:
            raise damaged(path, "its tables are not those that were written")
        self.labels = beton.labels
        self.pages = (beton.pointers // np.uint64(layout.PAGE)).astype(np.int64)
        with _loader_errors(path), torch_threads_kept():
            decoder = CropDecoder(path, beton.sizes, checksums.images, threads)
            weakref.finalize(self, decoder.close)
            self._loader = GuardedLoader(path, 1, compiled=False, ahead=2, decoder=decoder)

    def epoch(self, order: np.ndarray, batch_size: int, plan: Plan) -> Generator[torch.Tensor, None, None]:
        """Yield images uint8 [b, size, size, 3] of the samples `order`, in that order, three batches ahead.

        torch's threads stay as they are. Close the generator to leave early.
        """
        with _loader_errors(self._path):
            with torch_threads_kept():
                batches = self._loader.epoch(order, batch_size, plan)
            with closing(batches):
                while True:
                    # FFCV's thread sets torch's thread count when it starts, which is before its first batch.
                    with torch_threads_kept():
                        batch = next(batches, None)
                    if batch is None:
                        return
                    yield batch[0]
