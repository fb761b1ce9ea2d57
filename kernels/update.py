"""Parts that the Triton update kernels share: the end of their pass over a block, and the arguments for it."""

from typing import Any

import torch
import triton
import triton.language as tl

from .interpolation import point_on_path, read_source
from .next_point import NextPoint


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


def next_arguments(theta: torch.Tensor, next_point: NextPoint | None) -> dict[str, Any]:
    """The kernel arguments for `next_point`; stand-ins where a kernel compiled without them never looks."""
    if next_point is None:
        nothing = {"source_ptr": theta, "t_ptr": theta, "index_ptr": theta, "out_ptr": theta}
        return {**nothing, "rows": 1, "row_stride": 0, "NEXT": False, "INDEXED": False}
    source, t, out, index = next_point
    return {
        "source_ptr": source,
        "t_ptr": t,
        "index_ptr": t if index is None else index,
        "out_ptr": out,
        "rows": 1 if index is None else source.shape[0],
        "row_stride": 0 if index is None else source.stride(0),
        "NEXT": True,
        "INDEXED": index is not None,
    }
