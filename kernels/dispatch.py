"""The choice of a path for a device: Triton kernels or the plain-torch reference. It is logged once, never silent."""

import functools
import logging
import os
import subprocess
from typing import Literal

import torch

Backend = Literal["triton", "reference"]
SETTING = "FASTAR_KERNELS"

logger = logging.getLogger("fastar.kernels")


def backend(device: torch.device | str) -> Backend:
    """The path that operations on `device` take: "triton" on CUDA where Triton works, else "reference".

    The environment variable FASTAR_KERNELS forces it: `auto` (default), `reference`, or `triton` (on a CPU this needs
    TRITON_INTERPRET=1, and is meant for tests). Raises ValueError for another value or a forced path that cannot run.
    The first call for CUDA makes a trial launch, so make it before capturing a CUDA graph.
    """
    setting = os.environ.get(SETTING, "auto")
    interpreted = os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes", "y")
    return _choose(torch.device(device).type, setting, interpreted)


@functools.cache
def _choose(device_type: str, setting: str, interpreted: bool) -> Backend:
    if setting not in ("auto", "reference", "triton"):
        raise ValueError(f"{SETTING}={setting}: no such kernel path; use auto, reference or triton")
    forced = f"forced by {SETTING}" if setting != "auto" else None
    if setting == "reference" or (device_type != "cuda" and not forced):
        return _logged("reference", device_type, forced or "the Triton kernels are for CUDA")
    if device_type != "cuda" and not interpreted:
        raise ValueError(
            f"{SETTING}=triton on {device_type}: Triton compiles for CUDA only; "
            f"set TRITON_INTERPRET=1 to interpret the kernels, or {SETTING}=reference"
        )
    problem = _triton_problem(device_type)
    if not problem:
        return _logged("triton", device_type, forced or "a trial launch succeeded")
    if forced:
        raise ValueError(f"{SETTING}=triton: {problem}; install a working Triton or set {SETTING}=reference")
    logger.warning("kernels on cuda: reference, which is slower, because %s", problem)
    return "reference"


def _logged(choice: Backend, device_type: str, reason: str) -> Backend:
    logger.info("kernels on %s: %s (%s)", device_type, choice, reason)
    return choice


def _triton_problem(device_type: str) -> str | None:
    """The reason that Triton cannot be used here, or None; found by a launch of one element."""
    try:
        from triton.errors import TritonError

        from .interpolation import launch
    except ImportError as error:
        return f"Triton cannot be imported ({_one_line(error)})"
    value = torch.ones(1, device=device_type, dtype=torch.float32)
    try:
        launch(value, value, value[0], torch.empty_like(value))
    except (RuntimeError, OSError, AssertionError, subprocess.SubprocessError, TritonError) as error:
        return f"a trial Triton launch failed ({_one_line(error)})"
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
