"""Triton: (1 - t) scaling, loss-scale removal, weight decay, momentum, Nesterov and the step, in one pass."""

import torch
import triton
import triton.language as tl

from .next_point import NextPoint
from .update import next_arguments, write_block

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
    source_ptr,
    t_ptr,
    index_ptr,
    out_ptr,
    numel,
    weight_decay,
    momentum,
    rows,
    row_stride,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    GUARDED: tl.constexpr,
    NEXT: tl.constexpr,
    INDEXED: tl.constexpr,
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
    write_block(
        theta_ptr,
        source_ptr,
        t_ptr,
        index_ptr,
        out_ptr,
        offsets,
        mask,
        kept,
        theta,
        updated,
        rows,
        row_stride,
        NEXT,
        INDEXED,
    )


def launch(
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
    next_point: NextPoint | None,
) -> None:
    """The kernel over arguments that `operations.sgd_update` has checked."""
    numel = theta.numel()
    with torch.cuda.device_of(theta):  # Triton launches on the current device
        _sgd_update_kernel[(triton.cdiv(numel, BLOCK),)](
            theta,
            gradient,
            theta if momentum_buffer is None else momentum_buffer,
            lr,
            scale,
            inverse_loss_scale,
            lr if found_nonfinite is None else found_nonfinite,
            numel=numel,
            weight_decay=weight_decay,
            momentum=momentum,
            MOMENTUM=momentum_buffer is not None,
            NESTEROV=nesterov,
            GUARDED=found_nonfinite is not None,
            BLOCK=BLOCK,
            **next_arguments(theta, next_point),
            # Named, because Triton's default changes with its version.
            enable_fp_fusion=True,
        )
