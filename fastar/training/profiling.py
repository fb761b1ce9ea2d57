"""Where the time of training goes: its parts, the top operations, a Chrome trace."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from fastar.errors import FastarError
from fastar.training.parts import PartClock


@dataclass(frozen=True)
class Profile:
    """What was measured over one call.

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


def profile(
    run: Callable[[], object],
    device: torch.device,
    *,
    trace: Path | None = None,
    memory: Path | None = None,
    rows: int = 15,
) -> Profile:
    """Call `run`, which has been warmed up, twice: once by the clock, and once under torch's profiler.

    The parts' times are of the first call, which the profiler does not slow down; operations, idle GPU time and the
    trace are of the second.

    Args:
        run: the work, such as ten training steps.
        device: where it runs.
        trace: file for a Chrome trace (chrome://tracing, ui.perfetto.dev), with memory in use over time.
        memory: file for a snapshot of the GPU's memory over time (pytorch.org/memory_viz).
        rows: operations to list.

    Raises:
        FastarError: a file cannot be written, or a memory snapshot is asked of a CPU.
    """
    cuda = device.type == "cuda"
    if memory is not None and not cuda:
        raise FastarError("a memory snapshot is of a GPU's memory; on a CPU, memory in use is in the trace")
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    with PartClock(device) as clock:
        _wait(device)
        start, running = time.perf_counter(), time.thread_time()
        run()
        _wait(device)
        seconds, ran = time.perf_counter() - start, time.thread_time() - running
    parts = clock.seconds()
    peak = (
        torch.cuda.max_memory_allocated(device) if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    idle = seconds - ran

    if memory is not None:
        torch.cuda.memory._record_memory_history()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities, profile_memory=trace is not None) as found, PartClock(device):
        run()
        _wait(device)
    try:
        if memory is not None:
            torch.cuda.memory._dump_snapshot(str(memory))
        if trace is not None:
            trace.touch()  # the profiler itself says nothing when it cannot write
            found.export_chrome_trace(str(trace))
    except OSError as error:
        raise FastarError(
            f"{error.filename or trace}: cannot be written ({error.strerror}); choose another file"
        ) from error
    finally:
        if memory is not None:
            torch.cuda.memory._record_memory_history(enabled=None)
    averages = found.key_averages()
    if cuda:
        kernels = [e.time_range for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        spans = [(span.start, span.end) for span in kernels]
        first, last = min((a for a, _ in spans), default=0), max((b for _, b in spans), default=0)
        idle = seconds * (1 - union(spans) / (last - first)) if spans else seconds
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    operations = averages.table(sort_by=key, row_limit=rows, max_name_column_width=50)
    return Profile(seconds, parts, seconds - sum(parts.values()), idle, operations, peak)


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


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
