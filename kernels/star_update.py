"""Triton: (1 - t) scaling, loss-scale removal, weight decay, momentum, Nesterov and the step, in one pass."""

import torch
import triton
import triton.language as tl

from .arguments import Given

BLOCK = 1024


@triton.jit
def _sgd_update_kernel(
    theta_ptr,
    gradient_ptr,
    momentum_buffer_ptr,
    lr_ptr,
    scale_ptr,
    inverse_loss_scale_ptr,
    found_nonfinite_ptr,
    numel,
    weight_decay,
    momentum,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    GUARDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    kept = mask
    if GUARDED:
        kept = offsets < tl.where(tl.load(found_nonfinite_ptr) == 0, numel, 0)
    lr = tl.load(lr_ptr)
    factor = tl.load(scale_ptr) * tl.load(inverse_loss_scale_ptr)
    theta = tl.load(theta_ptr + offsets, mask=mask)
    gradient = tl.load(gradient_ptr + offsets, mask=mask).to(tl.float32)
    step = factor * gradient + weight_decay * theta
    if MOMENTUM:
        buffer = momentum * tl.load(momentum_buffer_ptr + offsets, mask=mask) + step
        tl.store(momentum_buffer_ptr + offsets, buffer, mask=kept)
        step = step + momentum * buffer if NESTEROV else buffer
    updated = theta - lr * step
    tl.store(theta_ptr + offsets, updated, mask=kept)


def launch(
    theta: torch.Tensor, given: Given, momentum_buffer: torch.Tensor | None, momentum: float, nesterov: bool
) -> None:
    """The kernel over arguments that `operations.sgd_update` has checked."""
    with torch.cuda.device_of(theta):  # Triton launches on the current device
        _sgd_update_kernel[(triton.cdiv(theta.numel(), BLOCK),)](
            momentum_buffer_ptr=theta if momentum_buffer is None else momentum_buffer,
            momentum=momentum,
            MOMENTUM=momentum_buffer is not None,
            NESTEROV=nesterov,
            BLOCK=BLOCK,
            **given.to_kernel(theta),
        )
