"""The source models Z as rows of one tensor, in device memory, in host memory, or in a file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastar.errors import FastarError, refusal
from fastar.flat import FlatLayout, mean_row
from fastar.runtime.memory import free_bytes
from fastar.training.prefetch import FetchedRows, RowFeed, Slots

Placement = Literal["device", "host", "file"]
Free = Callable[[torch.device], int]
"""Bytes of memory that are free on a device."""

# Sources matched at a time where they are not on the device: enough for batched products, whatever N is.
PART_ROWS = 16
# At most this share of what is free now: activations, matching and evaluation need the rest.
SHARE = 0.5


class SourcesStore:
    """The parameters of N sources, one row each, kept permuted to match the star model.

    The rows live on the device, in (pinned) host memory, or in a memory-mapped file that has no name and is gone with
    the process. Outside `device`, the device holds two rows for the steps and at most 16 while they are matched.

    Args:
        layout: where parameters lie in a row.
        states: one state dict per source, of finite values; each is asked for when its row is filled, and then let go.
        names: of the sources, for errors; as many as there are.
        device: where the rows are used.
        store: `sources.store`: auto, device, host or file (see `choose_placement`).
        folder: where the file of a `file` store is made; None: the system's temporary folder.
        beside: extra bytes of each source that are to be kept where its row is (see `make_beside`).
        free: free memory.
        in_place: whether the device works on rows where they live. None: where it can; a file's rows are a CPU's own
            memory too.
        part_rows: how many it has at a time where not.

    Raises:
        FastarError: a source of another architecture; more than fit in the place that was chosen.
    """

    def __init__(
        self,
        layout: FlatLayout,
        states: Iterable[Mapping[str, Tensor]],
        names: Sequence[str],
        device: torch.device,
        *,
        store: str = "auto",
        folder: Path | None = None,
        beside: int = 0,
        free: Free = free_bytes,
        in_place: bool | None = None,
        part_rows: int = PART_ROWS,
    ):
        if not names:
            raise FastarError("a star model needs at least one source")
        self.layout = layout
        self.names = list(names)
        self.device = device
        self._folder, self._free, self._part_rows = folder, free, part_rows
        needed = (4 * layout.numel + beside) * len(names)
        self.store = choose_placement(store, needed, device, sources=len(names), free=free)
        self.rows = self._make(len(names), layout.numel, torch.float32)
        self._in_place = self.rows.device.type == device.type if in_place is None else in_place
        self._slots: Slots | None = None
        self._feed: RowFeed | None = None
        given = iter(states)
        for row, name in zip(self.rows, self.names, strict=True):
            state = next(given)
            try:
                layout.flatten(state, out=row)
            except FastarError as error:
                raise FastarError(f"source {name}: {error}") from error
            del state  # before the next one is read

    def __len__(self) -> int:
        return len(self.rows)

    def views(self) -> dict[str, Tensor]:
        """Parameter name to [N, *shape] view of the rows, where they live."""
        return self.layout.views(self.rows)

    def parts(self, which: range | None = None) -> Iterator[dict[str, Tensor]]:
        """The sources `which` (None: all) in order, as [n, *shape] views on the device; what is written into one
        before the next is kept.

        One part of all where the rows are on the device (or device and host are one), else of at most `part_rows`.
        """
        self._settle()
        rows = self.rows if which is None else self.rows[which.start : which.stop]
        if not len(rows):
            return
        if self._in_place:
            yield self.layout.views(rows)
            return
        size = max(1, min(self._part_rows, len(rows), int(self._free(self.device) // 8 // (4 * self.layout.numel))))
        # Once: two would be twice the memory.
        whole = torch.empty(size, self.layout.numel, device=self.device, dtype=torch.float32)
        for begin in range(0, len(rows), size):
            here = rows[begin : begin + size]
            there = whole[: len(here)].copy_(here)
            yield self.layout.views(there)
            here.copy_(there)

    def mean(self) -> Tensor:
        """The mean [P] of the rows as they are now, on the device."""
        self._settle()
        return mean_row(row.to(self.device) for row in self.rows)

    def make_beside(self, width: int, dtype: torch.dtype, count: int | None = None) -> Tensor:
        """Zeros [count, width] (None: one row for each source) that live where the rows do; the caller's own."""
        return self._make(len(self) if count is None else count, width, dtype)

    def feed(self, indices: Sequence[int]) -> RowFeed:
        """The rows for steps that need the sources `indices`, in this order; the feed before is over."""
        self._settle()
        if self.store == "device" or (self.store == "host" and self.device.type == "cpu"):
            self._feed = RowFeed(self.rows, indices)
        else:
            if self._slots is None:
                self._slots = Slots(self.rows, self.device)
            self._feed = FetchedRows(self._slots, indices)
        return self._feed

    def release(self) -> None:
        """Give back the memory of all rows; the store holds none any more."""
        self._settle()
        self._slots = None
        self.rows = self.rows.new_empty(0, self.layout.numel)

    def _make(self, count: int, width: int, dtype: torch.dtype) -> Tensor:
        if self.store == "file":
            return _rows_in_file((count, width), dtype, self._folder)
        if self.store == "host":
            return torch.zeros(count, width, dtype=dtype, pin_memory=self.device.type == "cuda", device="cpu")
        try:
            return torch.zeros(count, width, dtype=dtype, device=self.device)
        except torch.OutOfMemoryError as error:
            remedy = "use sources.store=host or file, or fewer sources"
            needed = dtype.itemsize * count * width
            raise _does_not_fit(needed, self.device, count, "device", remedy, self._free(self.device)) from error

    def _settle(self) -> None:
        if self._feed is not None:
            self._feed.close()
            self._feed = None


def _rows_in_file(shape: tuple[int, int], dtype: torch.dtype, folder: Path | None) -> Tensor:
    """Zeros over a file without a name: it takes no memory that cannot be given up, and nothing has to be cleaned."""
    size = dtype.itemsize * shape[0] * shape[1]
    where = folder or Path(tempfile.gettempdir())
    what = f"sources.store=file: no {size / 1e9:.2f} GB for {shape[0]} sources in {where}"
    with refusal(what, "free space there or use fewer sources"), tempfile.TemporaryFile(dir=where) as file:
        # Reserved now: a page for which the disk has no space when it is written would end the process.
        os.posix_fallocate(file.fileno(), 0, size)
        mapped = np.memmap(file, dtype=np.uint8, mode="r+", shape=(size,))
    return torch.from_numpy(mapped).view(dtype).view(shape)


def choose_placement(
    setting: str, needed: int, device: torch.device, *, sources: int, free: Free = free_bytes
) -> Placement:
    """The place that `sources.store` means for `needed` bytes of rows that are used on `device`.

    auto: the first of device, pinned host memory (for a GPU) and a file of which half of the free memory is enough.

    Raises:
        FastarError: a place was forced, and the rows do not fit there.
    """
    host, on_gpu = torch.device("cpu"), device.type == "cuda"
    if setting == "auto":
        return automatic(needed, free(device), free(host) if on_gpu else None)
    if setting == "device" and needed > free(device):
        remedy = "use sources.store=auto, host or file, or fewer sources"
        raise _does_not_fit(needed, device, sources, setting, remedy, free(device))
    if setting == "host" and (taken := pinned_bytes(needed) if on_gpu else needed) > free(host):
        remedy = "use sources.store=auto or file, or fewer sources"
        raise _does_not_fit(taken, host, sources, setting, remedy, free(host))
    return "device" if setting == "device" else "host" if setting == "host" else "file"


def _does_not_fit(needed: int, device: torch.device, sources: int, setting: str, remedy: str, free: int) -> FastarError:
    return FastarError(
        f"sources.store={setting}: {sources} sources need {needed / 1e9:.2f} GB on {device}, "
        f"{free / 1e9:.2f} GB are free; {remedy}"
    )


def automatic(needed: int, free: int, free_on_host: int | None) -> Placement:
    """The place that auto chooses for `free` bytes on the device, and `free_on_host` beside a GPU (None: no GPU)."""
    if needed <= SHARE * free:
        return "device"
    if free_on_host is not None and pinned_bytes(needed) <= SHARE * free_on_host:
        return "host"
    return "file"


def pinned_bytes(count: int) -> int:
    """Bytes that torch's pinned allocator takes for `count` bytes: the next power of two."""
    return 1 << max(count - 1, 0).bit_length()
