"""Whether the fused operations can run, asked before work begins."""

from __future__ import annotations

import torch

from fastar.errors import FastarError
from fastar.kernels import backend


def check_kernels(device: torch.device) -> None:
    """Choose the path that operations on `device` take; on a GPU by a trial launch.

    Raises:
        FastarError: FASTAR_KERNELS names no path, or one that cannot run here.
    """
    try:
        backend(device)
    except ValueError as error:
        raise FastarError(str(error)) from error
