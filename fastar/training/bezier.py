"""Training of the bend of a quadratic Bezier curve between two fixed networks (Garipov et al., 2018).

The point (1 - t)^2 A + 2 t (1 - t) theta + t^2 B is (1 - w) theta + w r, with w = 1 - 2 t (1 - t) and r the point
t^2 / w of the segment from A to B: the step of a star whose one source moves on that segment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastar.kernels import interpolate
from fastar.training.prefetch import RowFeed
from fastar.training.star import StarStep


class BezierStep(StarStep):
    """A step of the bend theta by the loss at the curve's point t, t as of a star; its two sources are the ends."""

    def resume_epoch(self, epoch: int, steps: int, begin: int) -> None:
        super().resume_epoch(epoch, steps, begin)
        draws, t = self._draws, self._draws.t
        draws.t = 1 - 2 * t * (1 - t)
        draws.feed = _Between(self.sources.rows, t * t / draws.t)

    def describe(self, step: int) -> str:
        return f" (t={self._draws.ts[step - self._draws.begin]:.4f})"


class _Between(RowFeed):
    """Points of the segment between two rows, one for each step.

    Args:
        ends: [2, P], on the device of the steps.
        at: the place of each step's point: 0 at the first row, 1 at the second; fp32.
    """

    def __init__(self, ends: Tensor, at: Tensor):
        super().__init__(ends, ())
        self._at, self._row = at, torch.empty_like(ends[0])

    def take(self, step: int) -> Tensor:
        return interpolate(self._table[0], self._table[1], self._at[step], self._row)
