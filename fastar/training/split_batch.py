"""A batch whose samples are split between ranks: parts of the loss, and their sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastar.flat.parameters import SPARE, with_spare
from fastar.runtime import ranks


class SplitBatch:
    """The sum over ranks of a step's gradient and loss, each rank having its own samples of the batch.

    A loss is a mean over terms (samples, tokens). Ranks sum theirs, and divide by the number of all terms when that is
    known: afterwards, so that one exchange a step is enough. So shares may differ in length, and in ignored targets.

    Args:
        batch_size: samples of a whole batch: gradients are summed over this many times smaller numbers.
        weight: of this rank's mean in that of all, where it is fixed, whatever its terms (`star.draws=each`); None: the
            mean is over the terms of all ranks.
    """

    def __init__(self, batch_size: int, weight: float | None = None):
        self._batch_size, self._weight = batch_size, weight
        self._number: Tensor | float = 0.0

    def part(self, total: Tensor, number: Tensor | int) -> Tensor:
        """The part of the batch's loss that is this rank's, of the sum over its terms and their number."""
        if self._weight is None:
            self._number = number / self._batch_size
            return total / self._batch_size
        self._number = self._weight
        number = number.clamp(min=1) if isinstance(number, Tensor) else max(number, 1)
        return total / number * self._weight

    def nothing(self, model: nn.Module) -> Tensor:
        """The part of a rank without samples: the gradient and the loss are zero."""
        first = next(model.parameters())  # one is enough: parameters without a gradient count as zero
        first.grad = torch.zeros_like(first)
        self._number = 0.0
        return torch.zeros((), device=first.device, dtype=torch.float32)

    def sum_(self, gradients: Sequence[Tensor], loss: Tensor) -> tuple[Tensor, Tensor]:
        """Sum the parts of all ranks, in place.

        Returns:
            The factor [] that the gradient is to be multiplied by then, and the loss of the batch.
        """
        *others, last = gradients
        if last.dtype == torch.float32:
            last = with_spare(last)
        else:  # there are no vectors, and bf16 is too coarse for a loss
            others, last = list(gradients), torch.empty(SPARE, device=loss.device, dtype=torch.float32)
        last[-2], last[-1] = loss, self._number
        ranks.sum_(*others, last)
        share = 1 / last[-1]
        return share, last[-2] * share
