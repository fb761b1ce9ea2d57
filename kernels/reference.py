"""Plain torch versions of the kernels: their oracle, the CPU path, and the fallback where Triton is missing.

On the CPU they work through the buffers in blocks that stay in cache, so that main memory is touched about once, and
reading a 0-d tensor there is no synchronisation. Elsewhere they work on whole buffers and never synchronise.
"""

import torch

# 1 Mi elements: a block's scratch (4 MiB) stays in the last-level cache. Measured over 2^14 to 2^20 on one core: flat
# from 2^18 up, 2.3 times slower at 2^14. The largest has the fewest parallel regions, which cost on a busy machine.
BLOCK = 1 << 20


def _in_blocks(device: torch.device) -> bool:
    return device.type == "cpu"


def interpolate(
    theta: torch.Tensor, source: torch.Tensor, t: torch.Tensor, out: torch.Tensor, index: torch.Tensor | None
) -> None:
    """`operations.interpolate` over checked arguments."""
    if not _in_blocks(theta.device):
        row = source if index is None else _row_on_device(source, index)
        if out.dtype == torch.float32:
            torch.lerp(theta, row.float(), t, out=out)
        else:
            out.copy_(torch.lerp(theta, row.float(), t))
        return
    row = source if index is None else _row_on_cpu(source, int(index))
    weight = float(t)
    if row.dtype == out.dtype == torch.float32:
        torch.lerp(theta, row, weight, out=out)
        return
    scratch = torch.empty(min(BLOCK, theta.numel()))
    for theta_block, row_block, out_block in zip(theta.split(BLOCK), row.split(BLOCK), out.split(BLOCK), strict=True):
        point = scratch[: theta_block.numel()]
        other = row_block if row_block.dtype == torch.float32 else point.copy_(row_block)
        out_block.copy_(torch.lerp(theta_block, other, weight, out=point))


def sgd_update(
    theta: torch.Tensor,
    gradient: torch.Tensor,
    momentum_buffer: torch.Tensor | None,
    lr: torch.Tensor,
    scale: torch.Tensor,
    inverse_loss_scale: torch.Tensor,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
    found_nonfinite: torch.Tensor | None,
) -> None:
    """`operations.sgd_update` over checked arguments."""
    factor = scale * inverse_loss_scale
    if not _in_blocks(theta.device):
        _sgd_update_on_device(
            theta, gradient, momentum_buffer, lr, factor, weight_decay, momentum, nesterov, found_nonfinite
        )
        return
    if found_nonfinite is not None and float(found_nonfinite) != 0:
        return
    factor_value = float(factor)
    ready = gradient.dtype == torch.float32 and factor_value == 1  # as in regular training: no scratch, one block
    size = theta.numel() if ready else min(BLOCK, theta.numel())
    scratch = gradient if ready else torch.empty(size)
    for start in range(0, theta.numel(), size):
        block = slice(start, start + size)
        theta_block = theta[block]
        step = scratch[: theta_block.numel()]
        if gradient.dtype != torch.float32:
            # Multiplying in the gradient's dtype would round twice.
            step.copy_(gradient[block]).mul_(factor_value)
        elif not ready:
            torch.mul(gradient[block], factor_value, out=step)
        # What torch.optim.SGD(fused=True) calls: the whole update of a block in one pass; it only reads `step`.
        torch._fused_sgd_(
            [theta_block],
            [step],
            [] if momentum_buffer is None else [momentum_buffer[block]],
            weight_decay=weight_decay,
            momentum=momentum,
            lr=float(lr),
            dampening=0.0,
            nesterov=nesterov,
            maximize=False,
            is_first_step=False,
        )


def _sgd_update_on_device(
    theta: torch.Tensor,
    gradient: torch.Tensor,
    momentum_buffer: torch.Tensor | None,
    lr: torch.Tensor,
    factor: torch.Tensor,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
    found_nonfinite: torch.Tensor | None,
) -> None:
    """Whole buffers, scalars left on the device."""
    step = (gradient.float() * factor).add_(theta, alpha=weight_decay)
    buffer = None
    if momentum_buffer is not None:
        buffer = (momentum_buffer * momentum).add_(step)
        step = step.add_(buffer, alpha=momentum) if nesterov else buffer
    updated = theta - lr * step
    if found_nonfinite is not None:
        skip = found_nonfinite != 0
        updated = torch.where(skip, theta, updated)
        buffer = None if buffer is None or momentum_buffer is None else torch.where(skip, momentum_buffer, buffer)
    theta.copy_(updated)
    if momentum_buffer is not None and buffer is not None:
        momentum_buffer.copy_(buffer)


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
