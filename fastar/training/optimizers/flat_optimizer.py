"""An optimizer of theta [P]: its moments, and one update through the kernels, piece by piece."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastar.config import TrainSettings
from fastar.training.amp import LossScale

Sections = Callable[[Tensor], tuple[Tensor, ...]]
"""Cuts a buffer [P] into the parts that the gradient comes in."""


@dataclass(frozen=True)
class _Piece:
    """Elements [begin, end) of one part of the gradient, which one call updates; None: the whole part."""

    part: int
    weight_decay: float
    bounds: tuple[int, int] | None = None

    def of(self, parts: Sequence[Tensor]) -> Tensor:
        whole = parts[self.part]
        return whole if self.bounds is None else whole[..., self.bounds[0] : self.bounds[1]]


def _pieces(settings: TrainSettings, parts: Sequence[Tensor], matrices: int) -> list[_Piece]:
    """One piece for each part; where 1-D parameters do not decay, a part that holds both kinds is cut between them."""
    decay, begin, pieces = settings.weight_decay, 0, []
    for number, part in enumerate(parts):
        size = len(part)
        cut = min(max(matrices - begin, 0), size)  # 1-D parameters lie behind all others
        if settings.decay_1d or decay == 0 or cut == size:
            pieces.append(_Piece(number, decay))
        elif cut == 0:
            pieces.append(_Piece(number, 0.0))
        else:
            pieces += [_Piece(number, decay, (0, cut)), _Piece(number, 0.0, (cut, size))]
        begin += size
    return pieces


class FlatOptimizer(ABC):
    """An optimizer of theta [P] that remembers some moments [P] of the gradient.

    Args:
        settings: weight decay and the optimizer's own settings.
        theta: [P], updated in place.
        sections: cuts theta into the parts that the gradient comes in.
        matrices: where parameters of less than two dimensions begin (`FlatLayout.matrices`): with `decay_1d` false they
            do not decay.
    """

    MOMENTS: ClassVar[int]

    def __init__(self, settings: TrainSettings, theta: Tensor, sections: Sections, matrices: int):
        self.settings = settings
        self.moments = [torch.zeros_like(theta) for _ in range(self.MOMENTS)]
        parts, *moments = (sections(buffer) for buffer in (theta, *self.moments))
        self._pieces = [
            (piece, piece.of(parts), [piece.of(moment) for moment in moments])
            for piece in _pieces(settings, parts, matrices)
        ]

    def update(self, gradients: Sequence[Tensor], *, lr: Tensor, scale: Tensor, loss_scale: LossScale) -> None:
        """One step along `scale` times the gradient; weight decay is not scaled."""
        for piece, theta, moments in self._pieces:
            self.kernel(
                theta,
                piece.of(gradients),
                *moments,
                lr=lr,
                scale=scale,
                inverse_loss_scale=loss_scale.inverse,
                weight_decay=piece.weight_decay,
                found_nonfinite=loss_scale.found_nonfinite,
            )

    @abstractmethod
    def kernel(self, theta: Tensor, gradient: Tensor, *moments: Tensor, **given: Any) -> None:
        """Update one piece; `given` as in `fastar.kernels`."""

    def state(self) -> list[Tensor]:
        """All that an update moves besides theta; the tensors themselves."""
        return list(self.moments)
