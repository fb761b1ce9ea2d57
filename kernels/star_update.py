"""Triton: (1 - t) scaling, loss-scale removal, weight decay, momentum, Nesterov and the step, in one pass."""

import torch
import triton
import triton.language as tl

from .dispatch import launch_device

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
    if GUARDED:  # noqa: SIM102 (nested: GUARDED is known when compiling, so the load exists only where there is a guard)
        if tl.load(found_nonfinite_ptr) != 0:
            return
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    lr = tl.load(lr_ptr)
    factor = tl.load(scale_ptr) * tl.load(inverse_loss_scale_ptr)
    theta = tl.load(theta_ptr + offsets, mask=mask)
    gradient = tl.load(gradient_ptr + offsets, mask=mask).to(tl.float32)
    step = factor * gradient + weight_decay * theta
    if MOMENTUM:
        buffer = momentum * tl.load(momentum_buffer_ptr + offsets, mask=mask) + step
        tl.store(momentum_buffer_ptr + offsets, buffer, mask=mask)
        step = step + momentum * buffer if NESTEROV else buffer
    tl.store(theta_ptr + offsets, theta - lr * step, mask=mask)


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
) -> None:
    """The kernel over arguments that `operations.sgd_update` has checked."""
    numel = theta.numel()
    with launch_device(theta.device):
        _sgd_update_kernel[(triton.cdiv(numel, BLOCK),)](
            theta,
            gradient,
            theta if momentum_buffer is None else momentum_buffer,
            lr,
            scale,
            inverse_loss_scale,
            lr if found_nonfinite is None else found_nonfinite,
            numel,
            weight_decay,
            momentum,
            MOMENTUM=momentum_buffer is not None,
            NESTEROV=nesterov,
            GUARDED=found_nonfinite is not None,
            BLOCK=BLOCK,
            # Named, because Triton's default changes with its version.
            enable_fp_fusion=True,
        )
