"""How much memory is free, and how many models may therefore be held at once."""

from __future__ import annotations

import os
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
LIMIT = 4 << 30


def free_bytes(device: torch.device) -> int:
    """Bytes that can be had on `device` now: free memory of a GPU; of the host, what can be had without swapping.

    A container's limit counts. What torch holds in its cache on a GPU but does not use counts as free.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    free = _available_on_host()
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return free if limit == "max" else max(0, min(free, int(limit) - int(used)))
    except (OSError, ValueError):  # no container limit of this kind
        return free


def resident_models(numel: int, device: torch.device, wanted: int) -> int:
    """How many of `wanted` fp32 rows of `numel` to hold at once: what fits in half of the free memory, at least 1.

    At most 4 GiB of them: past some dozens of models a batch's cost is shared well enough, and a GPU needs the rest for
    activations.
    """
    return max(1, min(wanted, min(free_bytes(device) // 2, LIMIT) // (4 * numel)))


def _available_on_host() -> int:
    try:
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
