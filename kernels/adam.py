"""Triton: (1 - t) scaling, loss-scale removal, weight decay, Adam's moments and the step, in one pass."""

import math

import torch
import triton
import triton.language as tl

from .arguments import Given

BLOCK = 1024


@triton.jit
def _one_minus_power(log_beta, steps):
    """1 - beta^steps in fp32 to a few ulp: near beta^steps = 1 the plain difference would lose most of its digits."""
    x = log_beta * steps
    # expm1's series; for x in (-1/2, 0) the first term left out is below 1e-8 of the sum.
    series = 1.0 + x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * (1.0 + x / 5 * (1.0 + x / 6 * (1.0 + x / 7 * (1.0 + x / 8))))))
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _adam_update_kernel(
    theta_ptr,
    gradient_ptr,
    first_ptr,
    second_ptr,
    steps_done_ptr,
    lr_ptr,
    scale_ptr,
    inverse_loss_scale_ptr,
    found_nonfinite_ptr,
    numel,
    weight_decay,
    beta1,
    beta2,
    one_minus_beta1,
    one_minus_beta2,
    log_beta1,
    log_beta2,
    eps,
    DECOUPLED: tl.constexpr,
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
    steps = tl.load(steps_done_ptr) + 1.0
    theta = tl.load(theta_ptr + offsets, mask=mask)
    step = factor * tl.load(gradient_ptr + offsets, mask=mask).to(tl.float32)
    if DECOUPLED:
        shrunk = theta * (1.0 - lr * weight_decay)
    else:
        shrunk = theta
        step = step + weight_decay * theta
    first = beta1 * tl.load(first_ptr + offsets, mask=mask) + one_minus_beta1 * step
    second = beta2 * tl.load(second_ptr + offsets, mask=mask) + one_minus_beta2 * step * step
    tl.store(first_ptr + offsets, first, mask=kept)
    tl.store(second_ptr + offsets, second, mask=kept)
    size = lr / _one_minus_power(log_beta1, steps)
    root = tl.sqrt(_one_minus_power(log_beta2, steps))
    updated = shrunk - size * (first / (tl.sqrt(second) / root + eps))
    tl.store(theta_ptr + offsets, updated, mask=kept)


def launch(
    theta: torch.Tensor,
    given: Given,
    first_moment: torch.Tensor,
    second_moment: torch.Tensor,
    steps_done: torch.Tensor,
    betas: tuple[float, float],
    eps: float,
    decoupled: bool,
) -> None:
    """The kernel over arguments that `operations.adam_update` has checked."""
    beta1, beta2 = betas
    with torch.cuda.device_of(theta):  # Triton launches on the current device
        _adam_update_kernel[(triton.cdiv(theta.numel(), BLOCK),)](
            first_ptr=first_moment,
            second_ptr=second_moment,
            steps_done_ptr=steps_done,
            beta1=beta1,
            beta2=beta2,
            # In the host's float64: 1 - 0.999 in fp32 is off by 1e-5.
            one_minus_beta1=1.0 - beta1,
            one_minus_beta2=1.0 - beta2,
            log_beta1=_log(beta1),
            log_beta2=_log(beta2),
            eps=eps,
            DECOUPLED=decoupled,
            BLOCK=BLOCK,
            **given.to_kernel(theta),
        )


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf
