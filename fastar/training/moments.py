"""A training that gathers moments of its parameters after each epoch: SWA and SWAG."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastar.config import TrainSettings
from fastar.losses import Loss
from fastar.training.steps import RegularStep


class MomentsStep(RegularStep):
    """Ordinary training; after each epoch theta is collected (Maddox and others 2019, algorithm 1).

    Of all that were collected: their number, mean, and sum of squared deviations (Welford's, which cancels nothing);
    of the last `rank`: their deviations from the mean so far.
    """

    def __init__(self, model: nn.Module, settings: TrainSettings, *, rank: int, loss: Loss | None = None):
        super().__init__(model, settings, loss=loss)
        self._count = torch.zeros((), dtype=torch.int64, device=self.device)
        self._mean, self._squares = torch.zeros_like(self.theta), torch.zeros_like(self.theta)
        self._deviations = torch.zeros(rank, len(self.theta), dtype=self.theta.dtype, device=self.device)

    def begin_epoch(self, epoch: int, steps: int) -> dict[str, float]:
        """Collect what the epoch before has left."""
        if epoch:
            self._collect()
        return super().begin_epoch(epoch, steps)

    def save(self) -> dict[str, Tensor]:
        return {
            **super().save(),
            "moments.count": self._count,
            "moments.mean": self._mean,
            "moments.squares": self._squares,
            "moments.deviations": self._deviations,
        }

    def moments(self) -> dict[str, Tensor]:
        """The moments with what the last epoch has left: count, mean [P], variance [P] and deviations [rank, P], those
        that are not there yet zeros. Once, when the training is over."""
        self._collect()
        return {
            "count": self._count,
            "mean": self._mean,
            "variance": self._squares / self._count,
            "deviations": self._deviations,
        }

    def _collect(self) -> None:
        before = self.theta - self._mean
        place = int(self._count) % len(self._deviations)
        self._count += 1
        self._mean += before / self._count
        self._deviations[place] = self.theta - self._mean
        self._squares += before * self._deviations[place]
