"""SGD, Adam and AdamW over theta [P]: what they remember, and one update through the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastar.config import TrainSettings
from fastar.kernels import NextPoint, adam_update, sgd_update
from fastar.training.precision import LossScale

Sections = Callable[[Tensor], tuple[Tensor, ...]]


class FlatOptimizer(Protocol):
    """Moves theta, in the parts that the gradient comes in."""

    def update(
        self,
        gradients: Sequence[Tensor],
        *,
        lr: Tensor,
        scale: Tensor,
        loss_scale: LossScale,
        next_points: Sequence[NextPoint] | None = None,
    ) -> None:
        """One step along `scale` times the gradient; weight decay is not scaled. Then the next points, if given."""
        ...

    def state(self) -> list[Tensor]:
        """All that an update moves besides theta; the tensors themselves."""
        ...


def flat_optimizer(settings: TrainSettings, theta: Tensor, sections: Sections) -> FlatOptimizer:
    """The optimizer of `train.optimizer` for theta [P], whose gradient comes in the parts that `sections` makes."""
    if settings.optimizer == "sgd":
        return FlatSgd(settings, theta, sections)
    return FlatAdam(settings, theta, sections)


class FlatSgd:
    """torch.optim.SGD with dampening 0; `momentum` [P] is its buffer."""

    def __init__(self, settings: TrainSettings, theta: Tensor, sections: Sections):
        self.momentum = torch.zeros_like(theta)
        self._settings = settings
        self._parts = list(zip(sections(theta), sections(self.momentum), strict=True))

    def update(
        self,
        gradients: Sequence[Tensor],
        *,
        lr: Tensor,
        scale: Tensor,
        loss_scale: LossScale,
        next_points: Sequence[NextPoint] | None = None,
    ) -> None:
        points = next_points or [None] * len(gradients)
        for (theta, momentum), gradient, point in zip(self._parts, gradients, points, strict=True):
            sgd_update(
                theta,
                gradient,
                momentum,
                lr=lr,
                scale=scale,
                inverse_loss_scale=loss_scale.inverse,
                weight_decay=self._settings.weight_decay,
                momentum=self._settings.momentum,
                nesterov=self._settings.nesterov,
                found_nonfinite=loss_scale.found_nonfinite,
                next_point=point,
            )

    def state(self) -> list[Tensor]:
        return [self.momentum]


class FlatAdam:
    """torch.optim.Adam, or AdamW; the moments [P] and the number of steps done, on the device."""

    def __init__(self, settings: TrainSettings, theta: Tensor, sections: Sections):
        self.first_moment, self.second_moment = torch.zeros_like(theta), torch.zeros_like(theta)
        self.steps_done = torch.zeros((), device=theta.device)
        self._settings = settings
        parts = (sections(buffer) for buffer in (theta, self.first_moment, self.second_moment))
        self._parts = list(zip(*parts, strict=True))

    def update(
        self,
        gradients: Sequence[Tensor],
        *,
        lr: Tensor,
        scale: Tensor,
        loss_scale: LossScale,
        next_points: Sequence[NextPoint] | None = None,
    ) -> None:
        settings, found = self._settings, loss_scale.found_nonfinite
        points = next_points or [None] * len(gradients)
        for (theta, first, second), gradient, point in zip(self._parts, gradients, points, strict=True):
            adam_update(
                theta,
                gradient,
                first,
                second,
                steps_done=self.steps_done,
                lr=lr,
                scale=scale,
                inverse_loss_scale=loss_scale.inverse,
                weight_decay=settings.weight_decay,
                betas=settings.betas,
                eps=settings.eps,
                decoupled=settings.optimizer == "adamw",
                found_nonfinite=found,
                next_point=point,
            )
        # A skipped step does not count: its moments were not taken either.
        self.steps_done.add_(1 if found is None else 1 - found)

    def state(self) -> list[Tensor]:
        return [self.first_moment, self.second_moment, self.steps_done]
