"""Triton: whether a buffer holds NaN or infinite values, noted on the device."""

import torch
import triton
import triton.language as tl

BLOCK = 4096


@triton.jit
def _find_nonfinite_kernel(values_ptr, found_ptr, numel, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    values = tl.load(values_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    finite = tl.abs(values) < float("inf")  # false for NaN too
    # Whoever writes, writes the same; usually nobody does.
    tl.store(found_ptr + offsets * 0, 1.0, mask=mask & (finite == 0))


def launch(values: torch.Tensor, found: torch.Tensor) -> None:
    """The kernel over arguments that `operations.find_nonfinite` has checked."""
    numel = values.numel()
    with torch.cuda.device_of(values):  # Triton launches on the current device
        _find_nonfinite_kernel[(triton.cdiv(numel, BLOCK),)](values, found, numel, BLOCK=BLOCK)
