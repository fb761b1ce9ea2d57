"""What a call has a GPU do, as torch's profiler sees it."""

from __future__ import annotations

import collections
from collections.abc import Callable
from pathlib import Path

import torch

from fastar.runtime.device import synchronize
from fastar.training.profiling import Profile, union


def profiler_sees_gpu() -> bool:
    """Whether torch's profiler can record what a GPU does (not in a CPU build, nor where CUPTI is missing)."""
    return torch.profiler.ProfilerActivity.CUDA in torch.profiler.supported_activities()


def gpu_work(run: Callable[[], object], device: torch.device) -> dict[str, float]:
    """What a call has a GPU do: kernels, copies and waits of the host, and milliseconds in which the GPU was busy."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as found:
        run()
        synchronize(device)
    names = collections.Counter(event.name for event in found.events())
    spans = [e.time_range for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]

    def total(*words: str) -> int:
        return sum(number for name, number in names.items() if any(word in name for word in words))

    return {
        "launches": total("LaunchKernel"),
        "copies": total("cudaMemcpy"),
        "waits": total("StreamSynchronize", "DeviceSynchronize", "EventSynchronize"),
        "gpu_busy_ms": union((span.start, span.end) for span in spans) / 1e3,
    }


def profile(run: Callable[[], object], device: torch.device, *, trace: Path | None = None) -> Profile:
    """Call `run` (the work, such as ten training steps), which has been warmed up, twice: see `Profile`.

    Raises:
        FastarError: the trace cannot be written.
    """
    found = Profile(device, trace=trace)
    with found.clocked():
        run()
    with found.profiled():
        run()
    return found
