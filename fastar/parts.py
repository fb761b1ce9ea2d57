"""Names for the parts of training (load, interpolate, forward, backward, update, ...), and the time each takes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

_NOTHING = nullcontext()
_clock: PartClock | None = None


def part(name: str) -> AbstractContextManager[object]:
    """Work inside belongs to `name`: a `PartClock` that is running counts its time. Else it costs nothing."""
    return _NOTHING if _clock is None else _clock.measure(name)


@contextmanager
def no_parts() -> Iterator[None]:
    """Inside, no clock counts: what is captured into a CUDA graph must not hold a clock's events."""
    global _clock
    before, _clock = _clock, None
    try:
        yield
    finally:
        _clock = before


class PartClock:
    """While it is entered, adds up the time of every part; a torch profiler shows their names.

    On a GPU a part lasts from when the stream reaches its beginning to when it reaches its end, by events: the work of
    autograd's own thread counts, and so does waiting for the host. Elsewhere it is the clock's time.

    Args:
        device: where the work runs.
        names: whether torch's profiler is to see the parts; it costs some microseconds each.
    """

    def __init__(self, device: torch.device, *, names: bool = True):
        self._device = device
        self._names = names
        self._spans: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds: dict[str, float] = {}

    def __enter__(self) -> PartClock:
        global _clock
        assert _clock is None, "one clock at a time"
        _clock = self
        return self

    def __exit__(self, *error: object) -> None:
        global _clock
        _clock = None

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Work inside belongs to `name`, whether or not this clock is entered."""
        with torch.profiler.record_function(name) if self._names else _NOTHING:
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


class EpochClock:
    """The parts of an epoch's steps at next to no cost: every wait for a batch, and the inside of a few steps.

    On a GPU the wait is the time in which the stream had nothing to do before a step, not the host's.

    Args:
        device: where the steps run.
        steps: steps of the epoch, of which about `samples` are looked into.
    """

    def __init__(self, device: torch.device, steps: int, samples: int = 8):
        self._clock = PartClock(device, names=False)
        every = max(1, steps // samples)
        # The first step of an epoch starts things up; it is taken only where there is no other.
        self._sampled = range(min(every // 2 + 1, steps - 1), steps, every)
        self._counted = 0

    @contextmanager
    def load(self) -> Iterator[None]:
        """Around the wait for one batch."""
        with part("load"), self._clock.measure("load"):
            yield

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around step number `number`. Where another clock is running already, only that one counts."""
        if _clock is not None or number not in self._sampled:
            yield
            return
        self._counted += 1
        with self._clock.measure("step"), self._clock:
            yield

    def seconds(self, whole: float) -> dict[str, float]:
        """Each part's share of `whole`, the seconds of all steps with their waits: `load` as measured, the others as
        in the sampled steps; `other` is the rest. Waits for the GPU."""
        found = self._clock.seconds()
        load, sampled = found.pop("load", 0.0), found.pop("step", 0.0)
        scale = max(whole - load, 0.0) / sampled if sampled > 0 else 0.0
        parts = {"load": load, **{name: took * scale for name, took in found.items()}}
        return {**parts, "other": max(whole - sum(parts.values()), 0.0)}


def shares(parts: Mapping[str, float]) -> dict[str, float]:
    """Each part's share of all of them.

    >>> shares({"load": 1.0, "forward": 3.0})
    {'load': 0.25, 'forward': 0.75}
    """
    whole = sum(parts.values())
    return {name: took / whole if whole > 0 else 0.0 for name, took in parts.items()}
