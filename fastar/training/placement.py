"""Where the sources are kept: in device memory, in host memory, or in a file."""

from __future__ import annotations

from typing import Literal

import torch

from fastar.errors import FastarError
from fastar.runtime.memory import free_bytes

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
    if setting == "auto":
        return automatic(needed, free_bytes(device), free_bytes(host) if device.type == "cuda" else None)
    if setting == "device":
        _require(needed, device, sources, "device", "use sources.store=auto, host or file, or fewer sources")
        return "device"
    if setting == "host":
        bytes_there = pinned_bytes(needed) if device.type == "cuda" else needed
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


def automatic(needed: int, free: int, free_on_host: int | None) -> Placement:
    """What auto chooses for `free` bytes on the device, and `free_on_host` beside a GPU (None: there is no GPU)."""
    if needed <= SHARE * free:
        return "device"
    if free_on_host is not None and pinned_bytes(needed) <= SHARE * free_on_host:
        return "host"
    return "file"


def pinned_bytes(count: int) -> int:
    """What torch's pinned allocator takes for `count` bytes: the next power of two."""
    return 1 << max(count - 1, 0).bit_length()
