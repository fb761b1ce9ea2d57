"""Profiles of training: the time of its parts, the top operations, a Chrome trace."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from fastar.errors import FastarError, refusal
from fastar.runtime.device import synchronize
from fastar.runtime.memory import peak_bytes
from fastar.runtime.timing import SpanClock


class Profile:
    """Two looks at the same kind of work: one by the clock, which the profiler does not slow down, and one under
    torch's profiler.

    `seconds`, and `parts`, the seconds of each part in the order of first use, are of the first look; so is
    `peak_bytes`, of GPU memory or the process's largest. `operations`, rows of torch's profiler by their own time, and
    the trace are of the second. `idle`: the seconds in which the GPU ran nothing, as in the second look (on a CPU: in
    which the calling thread did not run, in the first), which lie within the parts.

    Args:
        device: where the work runs.
        trace: file for a Chrome trace (chrome://tracing, ui.perfetto.dev), with memory in use over time.
    """

    def __init__(self, device: torch.device, *, trace: Path | None = None) -> None:
        self._device, self._trace = device, trace
        self._cuda = device.type == "cuda"
        self.seconds = self.idle = 0.0
        self.parts: dict[str, float] = {}
        self.peak_bytes = 0
        self.operations = ""

    @property
    def other(self) -> float:
        """The rest of `seconds`."""
        return self.seconds - sum(self.parts.values())

    def table(self, steps: int) -> str:
        """The parts as lines of text; times per step."""
        rows = [*self.parts.items(), ("other", self.other), ("all", self.seconds), ("idle within", self.idle)]
        lines = [f"{'part':<14} {'ms per step':>12} {'share':>7}"]
        lines += [f"{name:<14} {took / steps * 1e3:12.3f} {took / self.seconds:7.1%}" for name, took in rows]
        return "\n".join([*lines, f"peak memory {self.peak_bytes / 1e6:,.0f} MB"])

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
            self.seconds, ran = time.perf_counter() - start, time.thread_time() - running
        self.parts, self.idle = clock.seconds(), self.seconds - ran
        self.peak_bytes = peak_bytes(self._device)

    @contextmanager
    def profiled(self) -> Iterator[None]:
        """Around the second look; writes the trace.

        Raises:
            FastarError: it cannot be written.
        """
        # Where CUPTI is missing the profiler cannot see kernels; it then says what the host did.
        kernels = self._cuda and ProfilerActivity.CUDA in torch.profiler.supported_activities()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if kernels else [])]
        with (
            torch.profiler.profile(activities=activities, profile_memory=self._trace is not None) as found,
            SpanClock(self._device, names=True),
        ):
            yield
            synchronize(self._device)
        if self._trace is not None:
            with refusal(f"{self._trace}: cannot be written", "choose another file"):
                self._trace.touch()  # the profiler itself says nothing when it cannot write
                found.export_chrome_trace(str(self._trace))
        if kernels:
            # A part's annotation reaches from its first kernel to its last: not time in which the GPU was busy.
            spans = [
                (event.time_range.start, event.time_range.end)
                for event in found.events()
                if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
            ]
            first, last = min((a for a, _ in spans), default=0), max((b for _, b in spans), default=0)
            self.idle = self.seconds * (1 - union(spans) / (last - first)) if spans else self.seconds
        key = "self_device_time_total" if kernels else "self_cpu_time_total"
        self.operations = found.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=50)


class StepsProfile:
    """Looks at `steps` steps in the middle of a training by the clock, and at the `steps` after them by the profiler.

    It begins with the second epoch, its matching included, or with the first where there is no second.
    """

    def __init__(self, steps: int, profile: Profile):
        self.steps = steps
        self.result: Profile | None = None
        self._profile = profile
        self._looks: Generator[None, None, None] | None = None

    def check(self, epochs: int, steps_per_epoch: int) -> None:
        """Raise FastarError unless a training of so many steps is long enough."""
        possible = max(epochs - 1, 1) * steps_per_epoch // 2
        if not 1 <= self.steps <= possible:
            raise FastarError(
                f"profile={self.steps}: this training ({epochs} epochs of {steps_per_epoch} steps) has room for 1 to "
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
        for look in (self._profile.clocked, self._profile.profiled):
            with look():
                for _ in range(self.steps):
                    yield
        self.result = self._profile


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
