"""Names for the parts of a step, which a profiler shows."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

PREFIX = "fastar."
_NOTHING = nullcontext()


def part(name: str) -> AbstractContextManager[object]:
    """Inside, work belongs to `name` (interpolate, forward, backward, update, ...) in a profile; else it is free."""
    if torch.autograd._profiler_enabled():
        return torch.profiler.record_function(PREFIX + name)
    return _NOTHING
