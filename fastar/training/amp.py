"""Which number format forward and backward passes run in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastar.errors import FastarError
from fastar.kernels import find_nonfinite

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of `train.precision` on `device`; auto is bf16 on a GPU that has it, else fp32.

    Raises:
        FastarError: bf16 on a GPU without it, or fp16 on a CPU.
    """
    if precision == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float32
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise FastarError("train.precision=bf16: this GPU has no bf16; use fp16 or fp32")
    if precision == "fp16" and device.type != "cuda":
        raise FastarError("train.precision=fp16 needs a GPU; use bf16 or fp32")
    return DTYPES[precision]


class LossScale:
    """The dynamic loss scale of fp16 training, on the device: no host synchronisation.

    Halved after a step whose gradient was not finite (that step changes nothing), doubled after `growth_interval`
    good steps in a row. Without scaling (`enabled=False`) it stays 1.
    """

    def __init__(self, device: torch.device, *, enabled: bool, initial: float = 2.0**16, growth_interval: int = 2000):
        self.enabled = enabled
        self.growth_interval = growth_interval
        self.scale = torch.tensor(initial if enabled else 1.0, device=device, dtype=torch.float32)
        self.inverse = 1 / self.scale
        self.found_nonfinite = torch.zeros((), device=device, dtype=torch.float32) if enabled else None
        self._good_steps = torch.zeros((), device=device, dtype=torch.float32)

    def check(self, gradients: Sequence[Tensor]) -> None:
        """Note whether any of the flat `gradients` is not finite."""
        if self.found_nonfinite is not None:
            self.found_nonfinite.zero_()
            for gradient in gradients:
                find_nonfinite(gradient, self.found_nonfinite)

    def update(self) -> None:
        """Choose the next step's scale."""
        if self.found_nonfinite is None:
            return
        bad = self.found_nonfinite > 0
        self._good_steps.copy_(torch.where(bad, 0.0, self._good_steps + 1))
        grow = self._good_steps >= self.growth_interval
        self.scale.mul_(torch.where(bad, 0.5, torch.where(grow, 2.0, 1.0)))
        self._good_steps.copy_(torch.where(grow, 0.0, self._good_steps))
        self.inverse.copy_(1 / self.scale)

    def state(self) -> list[Tensor]:
        """All that `check` and `update` move; the tensors themselves."""
        found = [] if self.found_nonfinite is None else [self.found_nonfinite]
        return [self.scale, self.inverse, self._good_steps, *found]
