"""Parts that the Triton update kernels share: the end of their pass over a block, and the arguments for it."""

from typing import Any

import torch
import triton
import triton.language as tl

from .arguments import Given, NextPoint
from .interpolation import point_arguments, point_on_path, read_source


@triton.jit
def write_block(
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
    NEXT: tl.constexpr,
    INDEXED: tl.constexpr,
):
    """Store the updated theta; with NEXT write the next point, of the theta now stored.

    kept: where the step counts (`mask`, or nowhere in a step that is skipped); the rest is done all the same.
    """
    tl.store(theta_ptr + offsets, updated, mask=kept)
    if NEXT:
        theta = tl.where(kept, updated, theta)
        source = read_source(source_ptr, index_ptr, offsets, mask, rows, row_stride, INDEXED)
        value = point_on_path(theta, source, tl.load(t_ptr))
        tl.store(out_ptr + offsets, value.to(out_ptr.dtype.element_ty), mask=mask)


def shared_arguments(theta: torch.Tensor, given: Given) -> dict[str, Any]:
    """The kernel arguments for `given`; stand-ins where a kernel compiled without them never looks."""
    found, point = given.found_nonfinite, given.next_point
    return {
        "theta_ptr": theta,
        "gradient_ptr": given.gradient,
        "lr_ptr": given.lr,
        "scale_ptr": given.scale,
        "inverse_loss_scale_ptr": given.inverse_loss_scale,
        "found_nonfinite_ptr": given.lr if found is None else found,
        "numel": theta.numel(),
        "weight_decay": given.weight_decay,
        "GUARDED": found is not None,
        "NEXT": point is not None,
        **point_arguments(NextPoint(theta, theta, theta) if point is None else point),
    }
