"""Named spans of training (load, augment, interpolate, forward, backward, update, ...), and the time of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

Clock = Callable[[], float]
_clocks: tuple[SpanClock, ...] = ()


class span:
    """Work inside belongs to `name`, and to no span around it: every `SpanClock` that is running counts its time."""

    __slots__ = ("_clocks", "_name")

    def __init__(self, name: str):
        self._name, self._clocks = name, _clocks

    def __enter__(self) -> None:
        for clock in self._clocks:
            clock.begin(self._name)

    def __exit__(self, *error: object) -> None:
        for clock in self._clocks:
            clock.end()


@contextmanager
def no_spans() -> Iterator[None]:
    """Stop all clocks inside: a CUDA graph must not hold a clock's events."""
    global _clocks
    before, _clocks = _clocks, ()
    try:
        yield
    finally:
        _clocks = before


class SpanClock:
    """While it is entered, adds up the time of every span.

    A span within another counts for itself, and not for the outer one. On a GPU a span lasts from when the stream
    reaches its beginning to when it reaches its end, by events: the work of autograd's own thread counts, and so does
    waiting for the host. Elsewhere it is the clock's time.

    Args:
        device: where the work runs.
        names: whether torch's profiler is to see the spans; it costs some microseconds each.
        clock: seconds, on a host.
    """

    def __init__(self, device: torch.device, *, names: bool = False, clock: Clock = time.perf_counter):
        self._cuda = device.type == "cuda"
        self._device = device
        self._clock = clock
        self._names = names
        self._open: list[tuple[str, Any, Any]] = []
        self._spans: list[tuple[str, str | None, Any, Any]] = []
        self._seconds: dict[str, float] = {}

    def __enter__(self) -> SpanClock:
        global _clocks
        assert self not in _clocks, "a clock runs once at a time"
        _clocks = (*_clocks, self)
        return self

    def __exit__(self, *error: object) -> None:
        global _clocks
        _clocks = tuple(clock for clock in _clocks if clock is not self)

    def begin(self, name: str) -> None:
        """Begin a span."""
        self._seconds.setdefault(name, 0.0)  # in the order of their beginnings
        named = torch.profiler.record_function(name) if self._names else None
        if named is not None:
            named.__enter__()
        self._open.append((name, named, self._now()))

    def end(self) -> None:
        """End the span that began last."""
        end = self._now()
        name, named, begin = self._open.pop()
        self._spans.append((name, self._open[-1][0] if self._open else None, begin, end))
        if named is not None:
            named.__exit__(None, None, None)

    def seconds(self) -> dict[str, float]:
        """Seconds of each span so far; waits for the GPU."""
        if self._cuda and self._spans:
            torch.cuda.synchronize(self._device)
        for name, outer, begin, end in self._spans:
            took = begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
            self._seconds[name] += took
            if outer is not None:
                self._seconds[outer] -= took
        self._spans.clear()
        # The rest of a span that is all inner spans may round to less than nothing.
        return {name: max(took, 0.0) for name, took in self._seconds.items()}

    def _now(self) -> Any:
        if not self._cuda:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def shares(spans: Mapping[str, float]) -> dict[str, float]:
    """Each span's share of all of them.

    >>> shares({"load": 1.0, "forward": 3.0})
    {'load': 0.25, 'forward': 0.75}
    """
    whole = sum(spans.values())
    return {name: took / whole if whole > 0 else 0.0 for name, took in spans.items()}
