"""Triton: the point (1 - t) theta + t source on a path, written in the dtype of the working weights."""

from typing import Any

import torch
import triton
import triton.language as tl

from .arguments import NextPoint

BLOCK = 1024


@triton.jit
def read_source(source_ptr, index_ptr, offsets, mask, rows, row_stride, INDEXED: tl.constexpr):
    """A block of the source in fp32: of a vector, or of row `index` of a store."""
    if INDEXED:
        index = tl.load(index_ptr)
        inside = (index >= 0) & (index < rows)
        row_ptr = source_ptr + tl.where(inside, index, 0) * row_stride
        source = tl.load(row_ptr + offsets, mask=mask).to(tl.float32)
        # An index out of range must not read foreign memory, nor pass unseen: NaN shows it without a synchronisation.
        source = tl.where(inside, source, float("nan"))
    else:
        source = tl.load(source_ptr + offsets, mask=mask).to(tl.float32)
    return source


@triton.jit
def point_on_path(theta, source, t):
    """(1 - t) theta + t source in torch.lerp's form: exact at both ends, and constant where both ends agree."""
    difference = source - theta
    return tl.where(t < 0.5, theta + t * difference, source - (1.0 - t) * difference)


@triton.jit
def _interpolate_kernel(
    theta_ptr,
    source_ptr,
    t_ptr,
    index_ptr,
    out_ptr,
    numel,
    rows,
    row_stride,
    INDEXED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    t = tl.load(t_ptr)
    theta = tl.load(theta_ptr + offsets, mask=mask)
    source = read_source(source_ptr, index_ptr, offsets, mask, rows, row_stride, INDEXED)
    value = point_on_path(theta, source, t)
    tl.store(out_ptr + offsets, value.to(out_ptr.dtype.element_ty), mask=mask)


def point_arguments(point: NextPoint) -> dict[str, Any]:
    """The kernel arguments for a point; a stand-in where a kernel compiled without an index never looks."""
    source, t, out, index = point
    return {
        "source_ptr": source,
        "t_ptr": t,
        "index_ptr": t if index is None else index,
        "out_ptr": out,
        "rows": 1 if index is None else source.shape[0],
        "row_stride": 0 if index is None else source.stride(0),
        "INDEXED": index is not None,
        # Named, because Triton's default changes with its version.
        "enable_fp_fusion": True,
    }


def launch(theta: torch.Tensor, point: NextPoint) -> None:
    """The kernel over arguments that `operations.interpolate` has checked."""
    numel = theta.numel()
    with torch.cuda.device_of(theta):  # Triton launches on the current device
        _interpolate_kernel[(triton.cdiv(numel, BLOCK),)](
            theta_ptr=theta, numel=numel, BLOCK=BLOCK, **point_arguments(point)
        )
