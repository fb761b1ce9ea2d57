"""Named spans of training (load, augment, interpolate, forward, backward, update, ...), and the time of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch

Clock = Callable[[], float]
_NOTHING = nullcontext()
_clocks: tuple[SpanClock, ...] = ()


def span(name: str) -> AbstractContextManager[object]:
    """Work inside belongs to `name`, and to no span around it: every `SpanClock` that is running counts its time.

    Where none is it costs nothing.
    """
    return _by(_clocks, name) if _clocks else _NOTHING


@contextmanager
def _by(clocks: tuple[SpanClock, ...], name: str) -> Iterator[None]:
    with ExitStack() as stack:
        for clock in clocks:
            stack.enter_context(clock.measure(name))
        yield


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
    """While it is entered, adds up the time of every span; a torch profiler shows their names.

    A span within another counts for itself, and not for the outer one. On a GPU a span lasts from when the stream
    reaches its beginning to when it reaches its end, by events: the work of autograd's own thread counts, and so does
    waiting for the host. Elsewhere it is the clock's time.

    Args:
        device: where the work runs.
        names: whether torch's profiler is to see the spans; it costs some microseconds each.
        clock: seconds, on a host.
    """

    def __init__(self, device: torch.device, *, names: bool = True, clock: Clock = time.perf_counter):
        self._device = device
        self._clock = clock
        self._names = names
        self._open: list[str] = []
        self._events: list[tuple[str, str | None, torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds: dict[str, float] = {}

    def __enter__(self) -> SpanClock:
        global _clocks
        assert self not in _clocks, "a clock runs once at a time"
        _clocks = (*_clocks, self)
        return self

    def __exit__(self, *error: object) -> None:
        global _clocks
        _clocks = tuple(clock for clock in _clocks if clock is not self)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Work inside belongs to `name`, whether or not this clock is entered."""
        outer = self._open[-1] if self._open else None
        self._seconds.setdefault(name, 0.0)  # in the order of their beginnings
        self._open.append(name)
        try:
            with torch.profiler.record_function(name) if self._names else _NOTHING:
                if self._device.type == "cuda":
                    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    start.record()
                    yield
                    end.record()
                    self._events.append((name, outer, start, end))
                else:
                    begin = self._clock()
                    yield
                    self._add(name, outer, self._clock() - begin)
        finally:
            self._open.pop()

    def seconds(self) -> dict[str, float]:
        """Seconds of each span so far; waits for the GPU."""
        if self._events:
            torch.cuda.synchronize(self._device)
        for name, outer, start, end in self._events:
            self._add(name, outer, start.elapsed_time(end) / 1e3)
        self._events.clear()
        # The rest of a span that is all inner spans may round to less than nothing.
        return {name: max(took, 0.0) for name, took in self._seconds.items()}

    def _add(self, name: str, outer: str | None, seconds: float) -> None:
        self._seconds[name] += seconds
        if outer is not None:
            self._seconds[outer] -= seconds


class EpochClock:
    """The spans of an epoch's steps at next to no cost: all that happens between steps, and the inside of a few steps.

    On a GPU the wait is the time in which the stream had nothing to do before a step, not the host's.

    Args:
        device: where the steps run.
        steps: steps of the epoch, of which about `samples` are looked into.
    """

    def __init__(self, device: torch.device, steps: int, samples: int = 8, clock: Clock = time.perf_counter):
        self._between = SpanClock(device, names=False, clock=clock)
        self._inside = SpanClock(device, names=False, clock=clock)
        every = max(1, steps // samples)
        # The first step of an epoch starts things up; it is taken only where there is no other.
        self._sampled = range(min(every // 2 + 1, steps - 1), steps, every)

    @contextmanager
    def load(self) -> Iterator[None]:
        """Measure getting one batch: `load` is the wait alone, without the spans inside (`augment`)."""
        with self._between, span("load"):
            yield

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Measure step number `number`. Where another clock is running already, only that one counts."""
        if _clocks or number not in self._sampled:
            yield
            return
        with self._inside, span("other"):
            yield

    def seconds(self, whole: float) -> dict[str, float]:
        """Each span's share of `whole`, the seconds of all steps with their waits: `load` and the spans within it as
        measured, the others as in the sampled steps; `other` is the rest. Waits for the GPU."""
        between, inside = {"load": 0.0, **self._between.seconds()}, self._inside.seconds()
        sampled = sum(inside.values())
        inside.pop("other", None)
        scale = max(whole - sum(between.values()), 0.0) / sampled if sampled > 0 else 0.0
        spans = {**between, **{name: took * scale for name, took in inside.items()}}
        return {**spans, "other": max(whole - sum(spans.values()), 0.0)}


def shares(spans: Mapping[str, float]) -> dict[str, float]:
    """Each span's share of all of them.

    >>> shares({"load": 1.0, "forward": 3.0})
    {'load': 0.25, 'forward': 0.75}
    """
    whole = sum(spans.values())
    return {name: took / whole if whole > 0 else 0.0 for name, took in spans.items()}
