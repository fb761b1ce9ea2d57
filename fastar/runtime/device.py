"""Devices: choosing one by its name, waiting for it, and telling a simulated GPU from a real one."""

from __future__ import annotations

import os

import torch

from fastar.errors import FastarError

# The name that torch has for the GPU of tools/rehearse.py, and the version of its CUDA.
SIMULATED = "simulated"


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was launched, so that a clock read afterwards tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def simulated() -> bool:
    """Tell whether the GPU here is host memory under another name: it shows no speed, and nothing compiles for it."""
    return torch.version.cuda == SIMULATED


def cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resolve_device(name: str) -> torch.device:
    """The device called `name`; auto is the GPU where there is one.

    Raises:
        FastarError: unknown name, or a GPU that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise FastarError(f"device={name!r} is not a device; use auto, cpu, cuda or cuda:0") from error
    if device.type not in ("cpu", "cuda"):
        raise FastarError(f"device={name!r}: fastar runs on cpu or cuda")
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise FastarError(f"device={name!r}: no such GPU here; use device=cpu or see `fastar doctor`")
    if device.type == "cuda":
        if device.index is not None:  # streams, events and graphs are made on the current device
            torch.cuda.set_device(device)
        device = torch.device("cuda", torch.cuda.current_device())
    return device
