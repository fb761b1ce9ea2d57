"""The source models Z as rows of one tensor."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastar.errors import FastarError
from fastar.flat import FlatLayout
from fastar.runtime.memory import free_bytes
from fastar.training.placement import choose_placement, does_not_fit
from fastar.training.prefetch import SLOTS, FetchedRows, ResidentRows, RowFeed, Slots

# Sources matched at a time where they are not on the device: enough for batched products, whatever N is.
PART_ROWS = 16


class SourcesStore:
    """The parameters of N sources, one row each, kept permuted to match the star model.

    The rows live on the device, in (pinned) host memory, or in a memory-mapped file that has no name and is gone with
    the process. Outside `device`, the device holds two rows for the steps and at most 16 while they are matched.

    Args:
        layout: where parameters lie in a row.
        states: one state dict per source.
        names: what to call them in errors.
        device: where the rows are used.
        store: `sources.store`: auto, device, host or file (see `placement.choose_placement`).
        folder: where the file of a `file` store is made; None: the system's temporary folder.
        beside: bytes of each source that are to be kept beside its parameters (see `make_beside`).

    Raises:
        FastarError: a source of another architecture, or with values that are not finite; more than fit in the place
            that was chosen.
    """

    def __init__(
        self,
        layout: FlatLayout,
        states: Sequence[Mapping[str, Tensor]],
        names: Sequence[str],
        device: torch.device,
        *,
        store: str = "auto",
        folder: Path | None = None,
        beside: int = 0,
    ):
        if not states:
            raise FastarError("a star model needs at least one source")
        self.layout = layout
        self.names = list(names)
        self.device = device
        self._folder = folder
        self.store = choose_placement(store, (4 * layout.numel + beside) * len(states), device, sources=len(states))
        self.rows = self._make(len(states), layout.numel, torch.float32)
        self._slots: Slots | None = None
        self._feed: RowFeed | None = None
        for row, state, name in zip(self.rows, states, self.names, strict=True):
            try:
                layout.flatten(state, out=row)
            except FastarError as error:
                raise FastarError(f"source {name}: {error}") from error
            if not torch.isfinite(row).all():
                raise FastarError(f"source {name} has NaN or infinite values; train it again or leave it out")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def rows_on_device(self) -> int:
        """How many rows of device memory the steps need."""
        return len(self) if self._resident else SLOTS

    def views(self) -> dict[str, Tensor]:
        """Parameter name to [N, *shape] view of the rows, where they live."""
        return self.layout.views(self.rows)

    def parts(self, size: int = PART_ROWS) -> Iterator[dict[str, Tensor]]:
        """All sources in order, as [n, *shape] views on the device; what is written into them before the next is kept.

        One part of all rows where the rows are on the device (or device and host are one), else of at most `size`.
        """
        self._settle()
        if self._usable_in_place:
            yield self.views()
            return
        size = max(1, min(size, len(self), int(free_bytes(self.device) // 8 // (4 * self.layout.numel))))
        # Once: two would be twice the memory.
        whole = torch.empty(size, self.layout.numel, device=self.device, dtype=torch.float32)
        for begin in range(0, len(self), size):
            here = self.rows[begin : begin + size]
            there = whole[: len(here)].copy_(here)
            yield self.layout.views(there)
            here.copy_(there)

    def make_beside(self, width: int, dtype: torch.dtype) -> Tensor:
        """Zeros [N, width] that live where the rows do; the caller's own."""
        return self._make(len(self), width, dtype)

    def feed(self, indices: Sequence[int]) -> RowFeed:
        """The rows for steps that need the sources `indices`, in this order; the feed before is over."""
        self._settle()
        if self._resident:
            self._feed = ResidentRows(self.rows, indices)
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
        return _rows_on_device((count, width), dtype, self.device)

    @property
    def _resident(self) -> bool:
        return self.store == "device" or (self.store == "host" and self.device.type == "cpu")

    @property
    def _usable_in_place(self) -> bool:
        """Whether the device can work on the rows where they live; a file's rows are a CPU's own memory too."""
        return self.rows.device.type == self.device.type

    def _settle(self) -> None:
        if self._feed is not None:
            self._feed.close()
            self._feed = None


def _rows_on_device(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    try:
        return torch.zeros(shape, dtype=dtype, device=device)
    except torch.OutOfMemoryError as error:
        remedy = "use sources.store=host or file, or fewer sources"
        needed = dtype.itemsize * shape[0] * shape[1]
        raise does_not_fit(needed, device, shape[0], "device", remedy, free_bytes(device)) from error


def _rows_in_file(shape: tuple[int, int], dtype: torch.dtype, folder: Path | None) -> Tensor:
    """Zeros over a file without a name: it takes no memory that cannot be given up, and nothing has to be cleaned."""
    size = dtype.itemsize * shape[0] * shape[1]
    where = folder or Path(tempfile.gettempdir())
    try:
        with tempfile.TemporaryFile(dir=where) as file:
            # Reserved now: a page for which the disk has no room when it is written would end the process.
            os.posix_fallocate(file.fileno(), 0, size)
            mapped = np.memmap(file, dtype=np.uint8, mode="r+", shape=(size,))
    except OSError as error:
        raise FastarError(
            f"sources.store=file: no {size / 1e9:.2f} GB for {shape[0]} sources in {where} ({error.strerror}); "
            "free space there or use fewer sources"
        ) from error
    return torch.from_numpy(mapped).view(dtype).view(shape)
