"""Profiles of training: the time of its parts, the top operations, a Chrome trace."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from fastar.errors import FastarError
from fastar.runtime.device import synchronize
from fastar.runtime.memory import peak_bytes
from fastar.runtime.timing import SpanClock


@dataclass(frozen=True)
class Profile:
    """Measurements of one call.

    `parts`: seconds of each part, in the order of first use; `other`, the rest of `seconds`; `idle`, the seconds in
    which the GPU ran nothing (on a CPU: in which the calling thread did not run), which lie within the parts.
    `operations`: rows of torch's profiler, by their own time. `peak_bytes`: GPU memory, or the process's largest.
    """

    seconds: float
    parts: dict[str, float]
    other: float
    idle: float
    operations: str
    peak_bytes: int

    def table(self, steps: int) -> str:
        """The parts as lines of text; times per step."""
        rows = [*self.parts.items(), ("other", self.other), ("all", self.seconds), ("idle within", self.idle)]
        lines = [f"{'part':<14} {'ms per step':>12} {'share':>7}"]
        lines += [f"{name:<14} {took / steps * 1e3:12.3f} {took / self.seconds:7.1%}" for name, took in rows]
        return "\n".join([*lines, f"peak memory {self.peak_bytes / 1e6:,.0f} MB"])


class Recording:
    """Two looks at the same kind of work: one by the clock, which the profiler does not slow down, and one under
    torch's profiler. Parts' times are of the first; operations, idle GPU time and the trace are of the second.

    Args:
        device: where the work runs.
        trace: file for a Chrome trace (chrome://tracing, ui.perfetto.dev), with memory in use over time.
        memory: file for a snapshot of the GPU's memory over time (pytorch.org/memory_viz).

    Raises:
        FastarError: a memory snapshot is asked of a CPU.
    """

    def __init__(self, device: torch.device, *, trace: Path | None = None, memory: Path | None = None) -> None:
        self._device, self._trace, self._memory = device, trace, memory
        self._cuda = device.type == "cuda"
        if memory is not None and not self._cuda:
            raise FastarError("a memory snapshot is of a GPU's memory; on a CPU, memory in use is in the trace")
        self._seconds = self._idle = 0.0
        self._parts: dict[str, float] = {}
        self._peak = 0
        self._operations = ""

    @contextmanager
    def clocked(self) -> Iterator[None]:
        """Around the first look."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        with SpanClock(self._device) as clock:
            synchronize(self._device)
            start, running = time.perf_counter(), time.thread_time()
            yield
            synchronize(self._device)
            self._seconds, ran = time.perf_counter() - start, time.thread_time() - running
        self._parts, self._idle = clock.seconds(), self._seconds - ran
        self._peak = peak_bytes(self._device)

    @contextmanager
    def profiled(self) -> Iterator[None]:
        """Around the second look; writes the files.

        Raises:
            FastarError: a file cannot be written.
        """
        if self._memory is not None:
            torch.cuda.memory._record_memory_history()
        # Where CUPTI is missing the profiler cannot see kernels; it then says what the host did.
        kernels = self._cuda and ProfilerActivity.CUDA in torch.profiler.supported_activities()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if kernels else [])]
        try:
            with (
                torch.profiler.profile(activities=activities, profile_memory=self._trace is not None) as found,
                SpanClock(self._device, names=True),
            ):
                yield
                synchronize(self._device)
            if self._memory is not None:
                torch.cuda.memory._dump_snapshot(str(self._memory))
            if self._trace is not None:
                self._trace.touch()  # the profiler itself says nothing when it cannot write
                found.export_chrome_trace(str(self._trace))
        except OSError as error:
            raise FastarError(
                f"{error.filename or self._trace}: cannot be written ({error.strerror}); choose another file"
            ) from error
        finally:
            if self._memory is not None:
                torch.cuda.memory._record_memory_history(enabled=None)
        if kernels:
            # A part's annotation reaches from its first kernel to its last: not time in which the GPU was busy.
            spans = [
                (event.time_range.start, event.time_range.end)
                for event in found.events()
                if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
            ]
            first, last = min((a for a, _ in spans), default=0), max((b for _, b in spans), default=0)
            self._idle = self._seconds * (1 - union(spans) / (last - first)) if spans else self._seconds
        key = "self_device_time_total" if kernels else "self_cpu_time_total"
        self._operations = found.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=50)

    def result(self) -> Profile:
        """The profile, once both looks are over."""
        other = self._seconds - sum(self._parts.values())
        return Profile(self._seconds, self._parts, other, self._idle, self._operations, self._peak)


class StepsProfile:
    """Looks at `steps` steps in the middle of a training by the clock, and at the `steps` after them by the profiler.

    It begins with the second epoch, its matching included, or with the first where there is no second.
    """

    def __init__(self, steps: int, recording: Recording):
        self.steps = steps
        self.result: Profile | None = None
        self._recording = recording
        self._looks: Generator[None, None, None] | None = None

    def check(self, epochs: int, steps_per_epoch: int) -> None:
        """Raise FastarError unless a training of so many steps is long enough."""
        possible = max(epochs - 1, 1) * steps_per_epoch // 2
        if not 1 <= self.steps <= possible:
            raise FastarError(
                f"--profile {self.steps}: this training ({epochs} epochs of {steps_per_epoch} steps) has room for 1 to "
                f"{possible}; choose from these"
            )

    def epoch_begins(self, epoch: int, epochs: int) -> None:
        """Before the matching of epoch number `epoch`."""
        if self._looks is None and self.result is None and epoch >= min(1, epochs - 1):
            self._looks = self._look()
            next(self._looks)

    def step_done(self) -> None:
        """After every step."""
        if self._looks is not None:
            next(self._looks, None)

    def close(self) -> None:
        """After training, however it ended: the next one, as after losses that were not finite, is looked at anew
        unless all was seen."""
        if self._looks is not None:
            self._looks.close()
            self._looks = None

    def _look(self) -> Generator[None, None, None]:
        """Both looks, gone on with after every step."""
        for look in (self._recording.clocked, self._recording.profiled):
            with look():
                for _ in range(self.steps):
                    yield
        self.result = self._recording.result()


def union(spans: Iterable[tuple[float, float]]) -> float:
    """The length that intervals cover together.

    >>> union([(0, 2), (5, 6), (1, 3)])
    4.0
    """
    covered, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered
