"""Where the sources are kept: in device memory, in host memory, or in a file."""

from __future__ import annotations

from typing import Literal

import torch

from fastar.errors import FastarError
from fastar.memory import free_bytes

Placement = Literal["device", "host", "file"]
# At most this share of what is free now: activations, matching and evaluation need the rest.
SHARE = 0.5


def choose_placement(setting: str, needed: int, device: torch.device, *, sources: int) -> Placement:
    """The place that `sources.store` means for `needed` bytes of rows that are used on `device`.

    auto: the first of device, pinned host memory (for a GPU) and a file of which half of the free memory is enough.

    Raises:
        FastarError: a place was forced, and the rows do not fit there.
    """
    host = torch.device("cpu")
    pinned = _power_of_two(needed)  # what torch's pinned allocator takes
    if setting == "auto":
        if needed <= SHARE * free_bytes(device):
            return "device"
        if device.type == "cuda" and pinned <= SHARE * free_bytes(host):
            return "host"
        return "file"
    if setting == "device":
        _require(needed, device, sources, "device", "use sources.store=auto, host or file, or fewer sources")
        return "device"
    if setting == "host":
        bytes_there = pinned if device.type == "cuda" else needed
        _require(bytes_there, host, sources, "host", "use sources.store=auto or file, or fewer sources")
        return "host"
    return "file"


def _require(needed: int, device: torch.device, sources: int, setting: str, remedy: str) -> None:
    free = free_bytes(device)
    if needed > free:
        raise does_not_fit(needed, device, sources, setting, remedy, free)


def does_not_fit(needed: int, device: torch.device, sources: int, setting: str, remedy: str, free: int) -> FastarError:
    """The error for sources that are too many for the place they were put in."""
    return FastarError(
        f"sources.store={setting}: {sources} sources need {needed / 1e9:.2f} GB on {device}, "
        f"{free / 1e9:.2f} GB are free; {remedy}"
    )


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()
