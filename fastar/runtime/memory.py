"""Free memory, the number of models that may be held at once, and whether freed memory is kept."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch

from fastar.errors import FastarError
from fastar.runtime import ranks

CGROUP = Path("/sys/fs/cgroup")
# Of models that are held at once on a host.
LIMIT = 4 << 30
# One part of so many of a GPU's free memory is left to its libraries and to what the allocator rounds up.
FOR_LIBRARIES = 8


def free_bytes(device: torch.device, *, cgroup: Path = CGROUP) -> int:
    """Bytes that can be had on `device` now: free memory of a GPU; of the host, what can be had without swapping.

    A container's limit counts. What torch holds in its cache on a GPU but does not use counts as free, the memory of
    CUDA graphs does not. Ranks share a host's.
    """
    if device.type == "cuda":
        # What graphs hold in pools of their own is no cache: nothing else can have it.
        in_graphs = sum(
            segment["total_size"] - segment["allocated_size"]
            for segment in torch.cuda.memory_snapshot()
            if segment["device"] == _index(device) and tuple(segment["segment_pool_id"]) != (0, 0)
        )
        held = torch.cuda.memory_allocated(device) + in_graphs
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - held
        cap = _caps.get(_index(device))
        return free if cap is None else max(0, min(free, cap - held))
    free, container = int(psutil.virtual_memory().available), _left_in_container(cgroup)
    free = free if container is None else min(free, container)
    return free if ranks.world() == 1 else free // ranks.on_this_host()


_caps: dict[int, int] = {}


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def cap_gpu(device: torch.device, size: int) -> None:
    """Let this process take at most `size` bytes of a GPU, as if it were a smaller one: more is out of memory."""
    _, total = torch.cuda.mem_get_info(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, size / total), _index(device))
    _caps[_index(device)] = size


def gpu_bytes(device: torch.device) -> int:
    """Bytes of a GPU's memory that this process may take: all of it, or the cap."""
    total = torch.cuda.mem_get_info(device)[1]
    return min(total, _caps.get(_index(device), total))


def peak_bytes(device: torch.device) -> int:
    """The most memory taken so far: of a GPU by torch's tensors, or by this process on a host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # of Unix alone

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_models(each: int, device: torch.device, wanted: int, extra: int | None = None) -> int:
    """The number of models to hold at once on `device`: `models_that_fit` in what is free there."""
    return models_that_fit(each, free_bytes(device), wanted, extra, gpu=device.type == "cuda")


def models_that_fit(each: int, free: int, wanted: int, extra: int | None = None, *, gpu: bool) -> int:
    """The number of `wanted` models of `each` bytes to hold at once where `free` bytes are free, `extra` of which are
    needed for something else (None: not known; half is left for it); at least 1.

    The more models share a batch, the fewer times the data are read: on a GPU as many as fit, but for what its
    libraries take. On a host they take at most half and 4 GiB: its memory also holds the data's file, and others' work.
    """
    if not gpu:
        space = min(free // 2, LIMIT)
    elif extra is None:
        space = free // 2
    else:
        space = free - free // FOR_LIBRARIES - extra
    return max(1, min(wanted, space // each))


def _left_in_container(cgroup: Path) -> int | None:
    """Bytes left of a container's memory limit; pages of files that can be dropped are not counted as used."""
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((cgroup / "memory.current").read_text())
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return max(int(limit) - used + int(statistics.get("inactive_file", 0)), 0)
    except (OSError, ValueError):  # no container limit of this kind
        return None


# Parameters of glibc's mallopt, and the values that glibc comes to by itself after 32 MiB were freed at once.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_GLIBC_OWN = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside, the process keeps memory that is freed, for the next buffer; at the end it gives back what is free.

    Large buffers are otherwise given back to the system at each training step and taken anew, each page zeroed: 17,000
    page faults a step of a ResNet-18 of width 0.25, a tenth of its CPU time. Has an effect on Linux with glibc
    alone, and none where the user has set the allocator: MALLOC_* or GLIBC_TUNABLES in the environment.
    """
    libc = _glibc()
    if libc is None or "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        yield
        return
    if not libc.mallopt(_MMAP_THRESHOLD, 1 << 30):
        libc.mallopt(_MMAP_THRESHOLD, 32 << 20)  # the most that older ones take
    libc.mallopt(_TRIM_THRESHOLD, -1)  # never
    try:
        yield
    finally:
        for parameter, value in _GLIBC_OWN.items():
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)


@cache
def _glibc() -> Any:
    """The C library, if it is glibc; else None."""
    return ctypes.CDLL(None) if sys.platform == "linux" and platform.libc_ver()[0] == "glibc" else None


@contextmanager
def within_memory(what: str, remedy: str) -> Iterator[None]:
    """Inside, memory of a GPU that runs out is an error for users."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise FastarError(f"{what}: out of memory ({reason}); {remedy}") from error
