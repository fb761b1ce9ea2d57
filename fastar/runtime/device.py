"""Devices: choosing one by its name, waiting for it, and telling a simulated GPU from a real one."""

from __future__ import annotations

import os

import torch

from fastar.errors import FastarError
from fastar.runtime import ranks

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
    """CPUs that this process may use: its share, where ranks on one host work at the same time."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return there if ranks.world() == 1 else max(1, there // ranks.on_this_host())


def resolve_device(name: str) -> torch.device:
    """The device called `name`; auto is the GPU where there is one. Each rank of a host has a GPU of its own.

    Raises:
        FastarError: unknown name, a GPU that is not there, or one GPU for several ranks.
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
    if device.type == "cuda" and ranks.started() > 1:
        device = _of_rank(name, device)
    if device.type == "cuda":
        if device.index is not None:  # streams, events and graphs are made on the current device
            torch.cuda.set_device(device)
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def _of_rank(name: str, device: torch.device) -> torch.device:
    """The GPU of this rank."""
    there, wanted = torch.cuda.device_count(), ranks.on_this_host()
    if device.index is not None:
        raise FastarError(f"device={name!r} is one GPU for {wanted} ranks; use device=cuda, and each has its own")
    if wanted > there:
        raise FastarError(
            f"{wanted} ranks on a host of {there} GPU{'s' if there > 1 else ''}: start as many as there are "
            f"(--nproc-per-node={there}), or use device=cpu"
        )
    return torch.device("cuda", ranks.local_rank())
