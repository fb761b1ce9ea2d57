"""Adam and AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastar.config import TrainSettings
from fastar.kernels import adam_update
from fastar.training.amp import LossScale
from fastar.training.optimizers.flat_optimizer import FlatOptimizer, Sections


class Adam(FlatOptimizer):
    """torch.optim.Adam; beside the two moments, the number of steps done, on the device."""

    MOMENTS = 2
    DECOUPLED: ClassVar[bool] = False

    def __init__(self, settings: TrainSettings, theta: Tensor, sections: Sections, matrices: int):
        super().__init__(settings, theta, sections, matrices)
        self.steps_done = torch.zeros((), device=theta.device, dtype=torch.float32)

    def kernel(self, theta: Tensor, gradient: Tensor, *moments: Tensor, **given: Any) -> None:
        own: dict[str, Any] = {"betas": self.settings.betas, "eps": self.settings.eps, "decoupled": self.DECOUPLED}
        adam_update(theta, gradient, *moments, steps_done=self.steps_done, **own, **given)

    def update(self, gradients: Sequence[Tensor], *, loss_scale: LossScale, **given: Any) -> None:
        super().update(gradients, loss_scale=loss_scale, **given)
        found = loss_scale.found_nonfinite
        # A skipped step does not count: its moments were not taken either.
        self.steps_done.add_(1 if found is None else 1 - found)

    def state(self) -> list[Tensor]:
        return [*self.moments, self.steps_done]


class AdamW(Adam):
    """torch.optim.AdamW."""

    DECOUPLED = True
