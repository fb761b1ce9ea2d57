"""Writing a .beton file with several worker processes, FFCV's parts under a supervisor of our own.

FFCV's writer waits for ever for a worker that died, ignores short writes on a full disk, and leaves shared memory
behind. Here the workers' ends of pipes and their process handles are watched, pages are written whole, and the table of
samples lives in anonymous shared memory, which nothing can leave behind.
"""

import ctypes
import errno
import math
import mmap
import multiprocessing
import os
import shutil
import signal
import time
from multiprocessing.connection import Connection, wait
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import numpy as np

from fastar.data.ffcv.format import Layout, field_descriptors
from fastar.data.ffcv.names import (
    ALLOC_TABLE_TYPE,
    CURRENT_VERSION,
    Field,
    HeaderType,
    MemoryAllocator,
    cv2,
    get_metadata_type,
    handle_sample,
)
from fastar.data.raw.raw_split import RawSplit, UnusableImage
from fastar.errors import FastarError
from fastar.runtime.progress import SILENT, Progress
from fastar.runtime.signals import SCHEDULERS

CHUNK = 128  # samples that a worker takes at a time, or fewer where there are few
TELL_SECONDS = 300.0
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class _Allocator(MemoryAllocator):
    """FFCV's allocator on a buffered file: a page is written whole or the write raises (FFCV drops short writes)."""

    def __enter__(self) -> "_Allocator":
        self.fp = open(self.fname, "r+b")  # closed by FFCV's __exit__
        return self


def disk_full(path: Path, error: OSError) -> FastarError:
    """The error to show for a failed write below `path`."""
    if error.errno in _FULL:
        free = shutil.disk_usage(path.parent).free
        return FastarError(
            f"{path}: disk full while writing ({free / 1e6:,.1f} MB free); free some space and run again"
        )
    return FastarError(f"{path}: cannot be written ({error.strerror or error}); check the folder")


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

    Raises FastarError for an image that cannot be used, a full disk, or a worker that died, within seconds.
    The caller removes the file after an error. With `skip` images that cannot be used are left out, and returned:
    position in `indices` to reason.
    """
    fields = layout.fields()
    predicted = predicted_bytes(layout, raw, indices, workers, skip=skip)
    try:
        free = shutil.disk_usage(path.parent).free
        if predicted > free:
            raise FastarError(
                f"{path}: needs {predicted / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB free; free some space"
            )
        return _write(path, raw, indices, layout, fields, workers, skip, progress, description)
    except OSError as error:
        raise disk_full(path, error) from error


def predicted_bytes(layout: Layout, raw: RawSplit, indices: np.ndarray, workers: int, *, skip: bool = False) -> int:
    """Front matter, whole pages (each worker may leave one half empty), allocation table.

    An upper bound for images of one size; for others an estimate from a sample of them.
    """
    per_page = layout.page_size / layout.image_bytes_of(raw, indices, skip=skip)
    # A page is left when the next image does not fit: on average half an image is lost where sizes differ.
    pages = math.ceil(layout.count / (math.floor(per_page) if layout.equal_sizes else max(per_page - 0.5, 1))) + workers
    row = get_metadata_type(list(layout.fields().values())).itemsize + ALLOC_TABLE_TYPE.itemsize
    return layout.page_size * (pages + 1) + layout.count * row


def _write(
    path: Path,
    raw: RawSplit,
    indices: np.ndarray,
    layout: Layout,
    fields: dict[str, Field],
    workers: int,
    skip: bool,
    progress: Progress,
    description: str,
) -> dict[int, str]:
    descriptors = field_descriptors(fields)
    metadata_type = get_metadata_type(list(fields.values()))
    metadata_start = HeaderType.itemsize + descriptors.nbytes
    header = np.zeros(1, dtype=HeaderType)
    with path.open("wb") as stream:
        # The header is written last: until then the file's version is 0, and nothing opens it.
        stream.write(bytes(HeaderType.itemsize) + descriptors.tobytes())

    # Shared with the workers by forking; unmapped when the last array that looks into it goes.
    metadata = np.frombuffer(mmap.mmap(-1, layout.count * metadata_type.itemsize), dtype=metadata_type)
    allocator = _Allocator(str(path), metadata_start + metadata.nbytes, layout.page_size)
    # Small files of one size are not worth a second process; of others every image is work.
    chunk = CHUNK if layout.equal_sizes else max(1, min(CHUNK, layout.count // (8 * workers)))
    job = _Job(raw, indices, metadata, allocator, layout, skip, chunk)
    table, skipped = _run_workers(job, max(1, min(workers, -(-layout.count // job.chunk))), progress, description)
    if len(table) == 0:
        raise FastarError(f"{path}: none of the {len(indices)} images can be used ({skipped[min(skipped)]})")
    # Samples are numbered without those left out; their rows' room stays empty before the pages.
    kept = np.delete(np.arange(layout.count), list(skipped))
    table["sample_id"] = np.searchsorted(kept, table["sample_id"])
    header["version"], header["num_fields"] = CURRENT_VERSION, len(fields)
    header["page_size"], header["num_samples"] = layout.page_size, len(kept)
    with path.open("r+b") as stream:
        stream.seek(metadata_start)
        stream.write(metadata[kept].tobytes())
        header["alloc_table_ptr"] = stream.seek(0, os.SEEK_END)
        stream.write(table.tobytes())
        stream.flush()
        os.fsync(stream.fileno())
        stream.seek(0)
        stream.write(header.tobytes())
        stream.flush()
        os.fsync(stream.fileno())
    return skipped


class _Job:
    """What every worker inherits when it is forked."""

    def __init__(
        self,
        raw: RawSplit,
        indices: np.ndarray,
        metadata: np.ndarray,
        allocator: _Allocator,
        layout: Layout,
        skip: bool,
        chunk: int,
    ):
        self.raw, self.indices, self.skip, self.chunk = raw, indices, skip, chunk
        self.metadata, self.allocator = metadata, allocator
        self.layout = layout
        self.names = metadata.dtype.names

    def encode(self, position: int) -> None:
        index = int(self.indices[position])
        image, label = self.raw[index]
        complaint = self.layout.complaint(image)
        if complaint is not None:
            raise UnusableImage(self.raw.where(index), *complaint)
        fields = self.layout.encoders(index)
        handle_sample((image, label), position, self.names, self.metadata, self.allocator, fields)


def _run_workers(job: _Job, workers: int, progress: Progress, description: str) -> tuple[np.ndarray, dict[int, str]]:
    """Run the job in forked processes; returns the allocation table, and what was left out (position to reason).

    Every process has ended when this returns.
    """
    # Forked, so that raw arrays and the table are shared without copies; the children use NumPy and Pillow only.
    context: Any = multiprocessing.get_context("fork")
    next_chunk = context.Value(ctypes.c_int64, 0)
    processes, pipes, tables = [], {}, []
    skipped: dict[int, str] = {}
    try:
        for _ in range(workers):
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(job, next_chunk, send, os.getpid()), daemon=True)
            # Ctrl-C, and often a scheduler, reach the whole process group; the workers inherit the mask and leave it
            # to the parent, which ends them; it learns of a signal when it knows of the process.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP, *SCHEDULERS})
            try:
                process.start()
                processes.append(process)
                pipes[process.sentinel] = (process, receive)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            send.close()
        done, begun = 0, time.monotonic()
        told = begun
        with progress.task(description, len(job.indices), "images") as advance:
            while pipes:
                ready = wait([*pipes, *(receive for _, receive in pipes.values())])
                for sentinel, (process, receive) in list(pipes.items()):
                    if receive not in ready and sentinel not in ready:
                        continue
                    # What a worker sent before it ended is still in its pipe.
                    while sentinel in pipes and receive.poll():
                        kind, value = _receive(receive, process)
                        if kind == "done":
                            advance(value)
                            done += value
                            told = _tell(progress, description, done, len(job.indices), begun, told)
                        elif kind == "skipped":
                            skipped.update([value])
                        elif kind == "table":
                            tables.append(value)
                            del pipes[sentinel]
                        else:
                            raise value
                    # Its pipe stays open where another thread of this process forked meanwhile and inherited it.
                    if sentinel in pipes and sentinel in ready:
                        raise _died(process)
    finally:
        for process in processes:
            process.kill() if pipes else process.join(5)
            process.kill()
            process.join()
        for _, receive in pipes.values():
            receive.close()
    return np.concatenate(tables), skipped


def _tell(progress: Progress, description: str, done: int, total: int, begun: float, told: float) -> float:
    """A line every five minutes, for whoever reads a log of work that takes hours; when the last one was."""
    now = time.monotonic()
    if now - told < TELL_SECONDS:
        return told
    rate = done / (now - begun)
    left = (total - done) / rate / 60
    progress.line(f"{description}: {done:,} of {total:,} images, {rate:,.1f} images/s, {left:,.0f} minutes left")
    return now


def _receive(receive: Connection, process: Any) -> tuple[str, Any]:
    try:
        return receive.recv()
    except EOFError:
        raise _died(process) from None


def _died(process: Any) -> FastarError:
    process.join(5)  # its pipes close a moment before its exit code is known
    code = process.exitcode
    how = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    return FastarError(f"a writer process ended before its work was done ({how}; out of memory?); run again")


def _work(job: _Job, next_chunk: "Synchronized[int]", send: Connection, parent: int) -> None:
    """One worker: encode chunks until none is left, then send this worker's part of the allocation table."""
    _end_with_parent(parent)
    cv2.setNumThreads(0)  # its threads, if it had any, were not forked with this process
    position = 0
    try:
        job.allocator.__enter__()
        count = len(job.indices)
        while True:
            with next_chunk.get_lock():
                start = next_chunk.value
                next_chunk.value = start + job.chunk
            if start >= count:
                break
            stop = min(start + job.chunk, count)
            for position in range(start, stop):
                try:
                    job.encode(position)
                except UnusableImage as error:
                    if not job.skip:
                        raise
                    send.send(("skipped", (position, error.reason)))
            send.send(("done", stop - start))
        job.allocator.__exit__(None, None, None)
        send.send(("table", np.array(job.allocator.allocations, dtype=ALLOC_TABLE_TYPE)))
    except FastarError as error:
        send.send(("error", error))
    except OSError as error:
        send.send(("error", error))
    # Anything else is a fault in a reader: shown with the sample it happened at, and its own type.
    except Exception as error:  # noqa: BLE001 (raised again in the parent)
        where = job.raw.where(int(job.indices[position]))
        send.send(("error", FastarError(f"{where}: cannot be encoded ({type(error).__name__}: {error})")))
    finally:
        send.close()
        os._exit(0)  # no exit handlers of the parent's libraries


def _end_with_parent(parent: int) -> None:
    """Ask Linux to kill this process when its parent ends: a worker waiting for a page would wait for ever."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
