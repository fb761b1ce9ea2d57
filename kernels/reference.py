"""Plain torch versions of the kernels: their oracle, the CPU path, and the fallback where Triton is missing.

On the CPU they work through the buffers in blocks that stay in cache, so that main memory is touched about once, and
reading a 0-d tensor there is no synchronisation. Elsewhere they work on whole buffers and never synchronise.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .arguments import Given, NextPoint

# 1 Mi elements: a block's scratch (4 MiB) stays in the last-level cache. Measured over 2^14 to 2^20 on one core: flat
# from 2^18 up, 2.3 times slower at 2^14. The largest has the fewest parallel regions, which cost on a busy machine.
BLOCK = 1 << 20

Block = slice | None
"""Elements of a flat buffer; None: all."""


def _in_blocks(device: torch.device) -> bool:
    return device.type == "cpu"


def interpolate(theta: torch.Tensor, next_point: NextPoint) -> None:
    """`operations.interpolate` over checked arguments."""
    if not _in_blocks(theta.device):
        _interpolate_on_device(theta, next_point)
        return
    point = _PointOnCpu.of(next_point)
    if point.direct:
        torch.lerp(theta, point.row, point.weight, out=point.out)
        return
    scratch = torch.empty(min(BLOCK, theta.numel()), dtype=torch.float32, device="cpu")
    for block in _blocks(theta.numel(), BLOCK):
        point.write(theta, block, scratch)


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
    """`update(block, factor * gradient[block], lr=...)`, and the next point, while each block is in cache."""
    gradient, found, factors = given.gradient, given.found_nonfinite, given.scale * given.inverse_loss_scale
    if not _in_blocks(theta.device):
        skipped = None if found is None else (found != 0).float()
        update(None, gradient.to(torch.float32, copy=True).mul_(factors), lr=given.lr, found_inf=skipped)
        if given.next_point is not None:
            _interpolate_on_device(theta, given.next_point)
        return
    rate, factor = float(given.lr), float(factors)
    point = None if given.next_point is None else _PointOnCpu.of(given.next_point)  # refuses before anything changes
    counts = found is None or float(found) == 0
    ready = gradient.dtype == torch.float32 and factor == 1  # as in regular training: no scratch
    whole = ready and point is None  # one call is enough
    size = theta.numel() if whole else min(BLOCK, theta.numel())
    scratch = torch.empty(0 if whole else size, dtype=torch.float32, device="cpu")
    for block in _blocks(theta.numel(), size):
        part = _cut(gradient, block)
        if counts:
            step = part if ready else scratch[: part.numel()]
            if gradient.dtype != torch.float32:
                # Multiplying in the gradient's dtype would round twice.
                step.copy_(part).mul_(factor)
            elif not ready:
                torch.mul(part, factor, out=step)
            update(block, step, lr=rate)
        if point is not None:
            point.write(theta, block, scratch)


class _PointOnCpu(NamedTuple):
    """A `NextPoint` whose scalars have been read."""

    row: torch.Tensor
    weight: float
    out: torch.Tensor

    @classmethod
    def of(cls, point: NextPoint) -> "_PointOnCpu":
        row = point.source if point.index is None else _row_on_cpu(point.source, int(point.index))
        return cls(row, float(point.t), point.out)

    @property
    def direct(self) -> bool:
        """True where `write` needs no scratch."""
        return self.row.dtype == self.out.dtype == torch.float32

    def write(self, theta: torch.Tensor, block: Block, scratch: torch.Tensor) -> None:
        theta, row, out = _cut(theta, block), _cut(self.row, block), _cut(self.out, block)
        if self.direct:
            torch.lerp(theta, row, self.weight, out=out)
            return
        value = scratch[: theta.numel()]
        other = row if row.dtype == torch.float32 else value.copy_(row)
        out.copy_(torch.lerp(theta, other, self.weight, out=value))


def _blocks(numel: int, size: int) -> Sequence[Block]:
    return [slice(start, start + size) for start in range(0, numel, size)] if size < numel else (None,)


def _cut(buffer: torch.Tensor, block: Block) -> torch.Tensor:
    """A block of the buffer; a small network's only one is not worth the microseconds of slicing it."""
    return buffer if block is None else buffer[block]


def _interpolate_on_device(theta: torch.Tensor, point: NextPoint) -> None:
    """The whole buffer, scalars left on the device."""
    row = point.source if point.index is None else _row_on_device(point.source, point.index)
    if point.out.dtype == torch.float32:
        torch.lerp(theta, row.float(), point.t, out=point.out)
    else:
        point.out.copy_(torch.lerp(theta, row.float(), point.t))


def _row_on_cpu(store: torch.Tensor, index: int) -> torch.Tensor:
    if not 0 <= index < store.shape[0]:
        raise ValueError(
            f"interpolate: index {index} is outside the store's {store.shape[0]} sources; draw from [0, N)"
        )
    return store[index]


def _row_on_device(store: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Row `index`, or NaN where it is out of range: as the kernel, and without a synchronisation."""
    inside = (index >= 0) & (index < store.shape[0])
    row = store.index_select(0, index.clamp(0, store.shape[0] - 1).view(1))[0]
    return torch.where(inside, row, torch.nan)
