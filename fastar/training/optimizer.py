"""SGD, Adam and AdamW over theta [P]: what they remember, and one update through the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastar.config import TrainSettings
from fastar.kernels import NextPoint, adam_update, backend, sgd_update
from fastar.training.amp import LossScale

# Copies of theta that an update by torch's own operations takes on a GPU for a moment.
PLAIN_ROWS = {"sgd": 4, "adam": 5, "adamw": 6}

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


def rows_of_an_update(optimizer: str, device: torch.device) -> int:
    """How many times theta's bytes an update on `device` takes for a moment: none by the Triton kernels, which a GPU
    that is not here is taken to have, and none on a CPU, where it is done in blocks."""
    return PLAIN_ROWS[optimizer] if device.type == "cuda" and backend(device) == "reference" else 0


@dataclass(frozen=True)
class _Piece:
    """Elements [begin, end) of one part of the gradient, which one call updates; None: the whole part."""

    part: int
    weight_decay: float
    bounds: tuple[int, int] | None = None

    def of(self, parts: Sequence[Tensor]) -> Tensor:
        whole = parts[self.part]
        return whole if self.bounds is None else whole[..., self.bounds[0] : self.bounds[1]]

    def point(self, points: Sequence[NextPoint] | None) -> NextPoint | None:
        """What is to be written of the next step's point."""
        if points is None or self.bounds is None:
            return None if points is None else points[self.part]
        whole, (begin, end) = points[self.part], self.bounds
        return whole._replace(source=whole.source[..., begin:end], out=whole.out[begin:end])


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


def flat_optimizer(settings: TrainSettings, theta: Tensor, sections: Sections, matrices: int) -> FlatOptimizer:
    """The optimizer of `train.optimizer` for theta [P], whose gradient comes in the parts that `sections` makes.

    `matrices` is where parameters of less than two dimensions begin (`FlatLayout.matrices`): with `decay_1d` false they
    do not decay.
    """
    kind = FlatSgd if settings.optimizer == "sgd" else FlatAdam
    return kind(settings, theta, sections, matrices)


class FlatSgd:
    """torch.optim.SGD with dampening 0; `momentum` [P] is its buffer."""

    def __init__(self, settings: TrainSettings, theta: Tensor, sections: Sections, matrices: int):
        self.momentum = torch.zeros_like(theta)
        self._settings = settings
        parts, momenta = sections(theta), sections(self.momentum)
        self._pieces = [(piece, piece.of(parts), piece.of(momenta)) for piece in _pieces(settings, parts, matrices)]

    def update(
        self,
        gradients: Sequence[Tensor],
        *,
        lr: Tensor,
        scale: Tensor,
        loss_scale: LossScale,
        next_points: Sequence[NextPoint] | None = None,
    ) -> None:
        for piece, theta, momentum in self._pieces:
            sgd_update(
                theta,
                piece.of(gradients),
                momentum,
                lr=lr,
                scale=scale,
                inverse_loss_scale=loss_scale.inverse,
                weight_decay=piece.weight_decay,
                momentum=self._settings.momentum,
                nesterov=self._settings.nesterov,
                found_nonfinite=loss_scale.found_nonfinite,
                next_point=piece.point(next_points),
            )

    def state(self) -> list[Tensor]:
        return [self.momentum]


class FlatAdam:
    """torch.optim.Adam, or AdamW; the moments [P] and the number of steps done, on the device."""

    def __init__(self, settings: TrainSettings, theta: Tensor, sections: Sections, matrices: int):
        self.first_moment, self.second_moment = torch.zeros_like(theta), torch.zeros_like(theta)
        self.steps_done = torch.zeros((), device=theta.device, dtype=torch.float32)
        self._settings = settings
        parts, first, second = (sections(buffer) for buffer in (theta, self.first_moment, self.second_moment))
        self._pieces = [
            (piece, piece.of(parts), piece.of(first), piece.of(second)) for piece in _pieces(settings, parts, matrices)
        ]

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
        for piece, theta, first, second in self._pieces:
            adam_update(
                theta,
                piece.of(gradients),
                first,
                second,
                steps_done=self.steps_done,
                lr=lr,
                scale=scale,
                inverse_loss_scale=loss_scale.inverse,
                weight_decay=piece.weight_decay,
                betas=settings.betas,
                eps=settings.eps,
                decoupled=settings.optimizer == "adamw",
                found_nonfinite=found,
                next_point=piece.point(next_points),
            )
        # A skipped step does not count: its moments were not taken either.
        self.steps_done.add_(1 if found is None else 1 - found)

    def state(self) -> list[Tensor]:
        return [self.first_moment, self.second_moment, self.steps_done]
