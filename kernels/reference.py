"""Plain torch versions of the kernels: their oracle, the CPU path, and the fallback where Triton is missing.

On the CPU they work through the buffers in blocks that stay in cache, so that main memory is touched about once, and
reading a 0-d tensor there is no synchronisation. Elsewhere they work on whole buffers and never synchronise.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .arguments import Given

# 1 Mi elements: a block's scratch (4 MiB) stays in the last-level cache. Measured over 2^14 to 2^20 on one core: flat
# from 2^18 up, 2.3 times slower at 2^14. The largest has the fewest parallel regions, which cost on a busy machine.
BLOCK = 1 << 20

Block = slice | None
"""Elements of a flat buffer; None: all."""


def _in_blocks(device: torch.device) -> bool:
    return device.type == "cpu"


def interpolate(theta: torch.Tensor, source: torch.Tensor, t: torch.Tensor, out: torch.Tensor) -> None:
    """`operations.interpolate` over checked arguments."""
    if not _in_blocks(theta.device):
        if out.dtype == torch.float32:
            torch.lerp(theta, source.float(), t, out=out)
        else:
            out.copy_(torch.lerp(theta, source.float(), t))
        return
    weight = float(t)
    if source.dtype == out.dtype == torch.float32:
        torch.lerp(theta, source, weight, out=out)
        return
    scratch = torch.empty(min(BLOCK, theta.numel()), dtype=torch.float32, device="cpu")
    for block in _blocks(theta.numel(), BLOCK):
        here, other = _cut(theta, block), _cut(source, block)
        value = scratch[: here.numel()]
        if other.dtype != torch.float32:
            other = value.copy_(other)
        _cut(out, block).copy_(torch.lerp(here, other, weight, out=value))


def sgd_update(
    theta: torch.Tensor, given: Given, momentum_buffer: torch.Tensor | None, momentum: float, nesterov: bool
) -> None:
    """`operations.sgd_update` over checked arguments."""

    def update(block: Block, step: torch.Tensor, **scalars: Any) -> None:
        # What torch.optim.SGD(fused=True) calls: the whole update of a block in one pass; it only reads `step`.
        torch._fused_sgd_(
            [_cut(theta, block)],
            [step],
            [] if momentum_buffer is None else [_cut(momentum_buffer, block)],
            weight_decay=given.weight_decay,
            momentum=momentum,
            dampening=0.0,
            nesterov=nesterov,
            maximize=False,
            is_first_step=False,
            **scalars,
        )

    _update(update, theta, given)


def adam_update(
    theta: torch.Tensor,
    given: Given,
    first_moment: torch.Tensor,
    second_moment: torch.Tensor,
    steps_done: torch.Tensor,
    betas: tuple[float, float],
    eps: float,
    decoupled: bool,
) -> None:
    """`operations.adam_update` over checked arguments."""
    fused, steps = torch._fused_adamw_ if decoupled else torch._fused_adam_, [steps_done + 1]

    def update(block: Block, step: torch.Tensor, **scalars: Any) -> None:
        # What torch.optim.Adam(fused=True) and AdamW(fused=True) call; they only read `step`.
        fused(
            [_cut(theta, block)],
            [step],
            [_cut(first_moment, block)],
            [_cut(second_moment, block)],
            [],
            steps,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=given.weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
            **scalars,
        )

    _update(update, theta, given)


def _update(update: Callable[..., None], theta: torch.Tensor, given: Given) -> None:
    """`update(block, factor * gradient[block], lr=...)`, while each block is in cache."""
    gradient, found, factors = given.gradient, given.found_nonfinite, given.scale * given.inverse_loss_scale
    if not _in_blocks(theta.device):
        skipped = None if found is None else (found != 0).float()
        update(None, gradient.to(torch.float32, copy=True).mul_(factors), lr=given.lr, found_inf=skipped)
        return
    rate, factor = float(given.lr), float(factors)
    if found is not None and float(found) != 0:
        return
    if gradient.dtype == torch.float32 and factor == 1:  # as in regular training: one call, no scratch
        update(None, gradient, lr=rate)
        return
    scratch = torch.empty(min(BLOCK, theta.numel()), dtype=torch.float32, device="cpu")
    for block in _blocks(theta.numel(), BLOCK):
        part = _cut(gradient, block)
        step = scratch[: part.numel()]
        if gradient.dtype == torch.float32:
            torch.mul(part, factor, out=step)
        else:
            step.copy_(part).mul_(factor)  # multiplying in the gradient's dtype would round twice
        update(block, step, lr=rate)


def _blocks(numel: int, size: int) -> Sequence[Block]:
    return [slice(start, start + size) for start in range(0, numel, size)] if size < numel else (None,)


def _cut(buffer: torch.Tensor, block: Block) -> torch.Tensor:
    """A block of the buffer; a small network's only one is not worth the microseconds of slicing it."""
    return buffer if block is None else buffer[block]
