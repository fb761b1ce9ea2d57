"""What work on any device needs: to wait for it, and to know a simulated GPU from a real one."""

from __future__ import annotations

import torch

# What torch calls the GPU of tools/rehearse.py, and the version of its CUDA.
SIMULATED = "simulated"


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was launched, so that a clock read afterwards tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def simulated() -> bool:
    """Whether the GPU here is host memory under another name: it says nothing of speed, and nothing compiles for it."""
    return torch.version.cuda == SIMULATED
