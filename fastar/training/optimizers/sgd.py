"""SGD with momentum."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastar.kernels import sgd_update
from fastar.training.optimizers.flat_optimizer import FlatOptimizer


class Sgd(FlatOptimizer):
    """torch.optim.SGD with dampening 0; its moment is the momentum buffer."""

    MOMENTS = 1

    def kernel(self, theta: Tensor, gradient: Tensor, *moments: Tensor, **given: Any) -> None:
        settings = self.settings
        sgd_update(theta, gradient, *moments, momentum=settings.momentum, nesterov=settings.nesterov, **given)
