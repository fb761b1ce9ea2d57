"""Clipping of the gradient by its norm, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Keeps a gradient of zeros from a division by zero, as in torch.nn.utils.clip_grad_norm_.
_TINY = 1e-6


def shortening(gradients: Sequence[Tensor], scale: Tensor, longest: float) -> Tensor:
    """What to multiply a gradient with so that its L2 norm is at most `longest`; at most 1. 0-d, fp32, not waited for.

    The gradient is `scale` (0-d, not negative) times `gradients`, the parts [P_i] of one flat gradient, which are left
    as they are: norms are summed in fp32 whatever their dtype. As torch.nn.utils.clip_grad_norm_, which multiplies with
    longest / (norm + 1e-6). NaN where the gradient has a NaN, and 0 where it has an infinity, of which 0 times it makes
    a NaN: such a step spoils the parameters with clipping as without it, unless loss scaling skips it.
    """
    norms = [torch.linalg.vector_norm(part, dtype=torch.float32) for part in gradients]
    norm = scale * torch.linalg.vector_norm(torch.stack(norms))
    return torch.clamp(longest / (norm + _TINY), max=1.0)
