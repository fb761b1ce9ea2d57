"""Prefetch of source rows: each is on the device when its step needs it, and fetched while others run."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

SLOTS = 2


class RowFeed:
    """Rows of a table on the device, one per step. Here all are there.

    Args:
        table: [rows, P].
        indices: the source of each step.
    """

    def __init__(self, table: Tensor, indices: Sequence[int]):
        self._table = table
        self._indices = indices

    def take(self, step: int) -> Tensor:
        """The source [P] of step number `step`; work queued from now on may read it."""
        return self._table[self._indices[step]]

    def done(self, step: int) -> None:
        """Note that all work which reads the source of step number `step` has been queued."""

    def close(self) -> None:
        """Wait for what is being fetched."""


class Slots:
    """Device memory for two rows, and what is needed to fill it: kept from epoch to epoch.

    On a GPU rows are copied on a stream of its own, from pinned memory. Rows that are not pinned (a file's) are first
    read into a pinned buffer by a thread, so that the disk is not waited for either; on a CPU that thread is all.
    """

    def __init__(self, rows: Tensor, device: torch.device):
        self.rows = rows
        self.device = device
        self.table = torch.zeros(SLOTS, rows.shape[1], device=device, dtype=torch.float32)
        self.cuda = device.type == "cuda"
        self.pinned = self.cuda and rows.is_pinned()
        self.stream = torch.cuda.Stream(device) if self.cuda else None
        staging = self.table if not self.cuda else None
        if self.cuda and not self.pinned:
            staging = torch.empty(SLOTS, rows.shape[1], pin_memory=True, dtype=torch.float32, device="cpu")
        self.staging = staging
        self.reader = None if self.pinned else ThreadPoolExecutor(1, thread_name_prefix="sources")
        self._host_rows = None if self.pinned else rows.numpy()
        self._landing = None if staging is None else staging.numpy()
        self._sent: list[torch.cuda.Event | None] = [None] * SLOTS

    def fetch(self, row: int, slot: int, free: torch.cuda.Event | None) -> None:
        """Bring row number `row` into `slot`, on the stream once `free` has passed."""
        if self._landing is not None and self._host_rows is not None:
            sent = self._sent[slot]
            if sent is not None:
                sent.synchronize()  # the pinned buffer is still being read
            np.copyto(self._landing[slot], self._host_rows[row])  # without the interpreter's lock
        if self.stream is not None:
            source = self.rows[row] if self.staging is None else self.staging[slot]
            with torch.cuda.stream(self.stream):
                if free is not None:
                    self.stream.wait_event(free)
                self.table[slot].copy_(source, non_blocking=True)
                self._sent[slot] = self.stream.record_event()

    def wait(self, slot: int) -> None:
        """Make the current stream wait for what was fetched into `slot`."""
        sent = self._sent[slot]
        if sent is not None:
            torch.cuda.current_stream(self.device).wait_event(sent)


class FetchedRows(RowFeed):
    """Rows that are fetched two steps ahead into two slots: device memory does not grow with their number."""

    def __init__(self, slots: Slots, indices: Sequence[int]):
        super().__init__(slots.table, indices)
        self._slots = slots
        self._coming: dict[int, Future[None] | None] = {}
        # The slots' last readers of the epoch before may still be queued.
        now = torch.cuda.current_stream(slots.device).record_event() if slots.cuda else None
        for step in range(min(SLOTS, len(indices))):
            self._request(step, now)

    def take(self, step: int) -> Tensor:
        coming = self._coming.pop(step, None)
        if coming is not None:
            coming.result()
        self._slots.wait(step % SLOTS)
        return self._table[step % SLOTS]

    def done(self, step: int) -> None:
        if step + SLOTS < len(self._indices):
            read = torch.cuda.current_stream(self._slots.device).record_event() if self._slots.cuda else None
            self._request(step + SLOTS, read)

    def close(self) -> None:
        for coming in self._coming.values():
            if coming is not None:
                coming.result()
        self._coming.clear()
        if self._slots.stream is not None:
            self._slots.stream.synchronize()

    def _request(self, step: int, free: torch.cuda.Event | None) -> None:
        arguments = (self._indices[step], step % SLOTS, free)
        if self._slots.reader is None:
            self._slots.fetch(*arguments)
            self._coming[step] = None
        else:
            self._coming[step] = self._slots.reader.submit(self._slots.fetch, *arguments)
