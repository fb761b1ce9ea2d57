"""Number formats of forward and backward passes, the loss scale of fp16, clipping by the norm; all on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastar.errors import FastarError
from fastar.kernels import find_nonfinite

# Keeps a gradient of zeros from a division by zero, as in torch.nn.utils.clip_grad_norm_.
_TINY = 1e-6
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
        self._good_steps = torch.zeros((), device=device, dtype=torch.int32)

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
        # The operation that torch.amp.GradScaler calls.
        torch._amp_update_scale_(self.scale, self._good_steps, self.found_nonfinite, 2.0, 0.5, self.growth_interval)
        self.inverse.copy_(1 / self.scale)

    def state(self) -> list[Tensor]:
        """All that `check` and `update` move; the tensors themselves."""
        found = [] if self.found_nonfinite is None else [self.found_nonfinite]
        return [self.scale, self.inverse, self._good_steps, *found]


def shortening(gradients: Sequence[Tensor], scale: Tensor, longest: float) -> Tensor:
    """The factor [] fp32, at most 1, that makes a gradient's L2 norm at most `longest`; not waited for.

    The gradient is `scale` (0-d, not negative) times `gradients`, the parts [P_i] of one flat gradient, which are left
    as they are: norms are summed in fp32 whatever their dtype. As torch.nn.utils.clip_grad_norm_, which multiplies with
    longest / (norm + 1e-6). NaN where the gradient has a NaN, and 0 where it has an infinity, of which 0 times it makes
    a NaN: such a step spoils the parameters with clipping as without it, unless loss scaling skips it.
    """
    norms = [torch.linalg.vector_norm(part, dtype=torch.float32) for part in gradients]
    norm = scale * torch.linalg.vector_norm(torch.stack(norms))
    return torch.clamp(longest / (norm + _TINY), max=1.0)
