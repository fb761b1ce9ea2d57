"""Triton: the point (1 - t) theta + t source on a path, written in the dtype of the working weights."""

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _interpolate_kernel(theta_ptr, source_ptr, t_ptr, out_ptr, numel, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    t = tl.load(t_ptr)
    theta = tl.load(theta_ptr + offsets, mask=mask)
    source = tl.load(source_ptr + offsets, mask=mask).to(tl.float32)
    # torch.lerp's form: exact at both ends, and constant where both ends agree.
    difference = source - theta
    value = tl.where(t < 0.5, theta + t * difference, source - (1.0 - t) * difference)
    tl.store(out_ptr + offsets, value.to(out_ptr.dtype.element_ty), mask=mask)


def launch(theta: torch.Tensor, source: torch.Tensor, t: torch.Tensor, out: torch.Tensor) -> None:
    """The kernel over arguments that `operations.interpolate` has checked."""
    numel = theta.numel()
    with torch.cuda.device_of(theta):  # Triton launches on the current device
        _interpolate_kernel[(triton.cdiv(numel, BLOCK),)](
            theta, source, t, out, numel, BLOCK=BLOCK, enable_fp_fusion=True
        )
