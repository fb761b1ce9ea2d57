"""Names for the parts of training (load, interpolate, forward, backward, update, ...), and the time each takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType

import torch

_NOTHING = nullcontext()
_clock: PartClock | None = None


def part(name: str) -> AbstractContextManager[object]:
    """Work inside belongs to `name`: a `PartClock` that is running counts its time. Else it costs nothing."""
    return _NOTHING if _clock is None else _clock.measure(name)


class PartClock:
    """While it is entered, adds up the time of every part; a torch profiler shows their names.

    On a GPU a part lasts from when the stream reaches its beginning to when it reaches its end, by events: the work of
    autograd's own thread counts, and so does waiting for the host. Elsewhere it is the clock's time.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._spans: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds: dict[str, float] = {}

    def __enter__(self) -> PartClock:
        global _clock
        assert _clock is None, "one clock at a time"
        _clock = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _clock
        _clock = None

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        with torch.profiler.record_function(name):
            if self._device.type == "cuda":
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                yield
                end.record()
                self._spans.append((name, start, end))
            else:
                begin = time.perf_counter()
                yield
                self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begin

    def seconds(self) -> dict[str, float]:
        """Each part's seconds so far; waits for the GPU."""
        if self._spans:
            torch.cuda.synchronize(self._device)
        for name, start, end in self._spans:
            self._seconds[name] = self._seconds.get(name, 0.0) + start.elapsed_time(end) / 1e3
        self._spans.clear()
        return dict(self._seconds)
