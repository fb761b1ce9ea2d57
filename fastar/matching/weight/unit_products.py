"""Inner products of what units own, without copies where the memory layout allows it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastar.symmetry import Member
from fastar.symmetry.batched_index import Rows

_DOT_BLOCK = 1 << 16  # float32 partial sums this long, added up in float64


def add_products(
    score: Tensor, theta: Tensor, sources: Tensor, member: Member, axis: int, size: int, rows: Rows
) -> None:
    """score[n, u, v] += inner product of what unit u owns of `theta` and what unit v owns of source n, of `rows`.

    Args:
        score: [N, size, size], float32.
        theta: a parameter (or a part of it, along other axes) in memory order, [1, ...]; or [m, ...], one for each.
        sources: [m, ...], likewise, of as many sources as there are rows.
        axis: the member's axis, in memory order.
    """
    length = size * member.inner * member.outer
    left, right = (x.narrow(axis + 1, member.offset, length) for x in (theta, sources))
    before = math.prod(sources.shape[1 : axis + 1]) * member.outer
    after = math.prod(sources.shape[axis + 2 :]) * member.inner
    a, b = _per_unit(left, before, size, after), _per_unit(right, before, size, after).mT
    if len(rows) == 1:
        rows.of(score)[0].addmm_(a[0], b[0])
        return
    a = a.expand(len(rows), *a.shape[1:])
    if rows.index is None:
        rows.of(score).baddbmm_(a, b)
    else:
        score.index_add_(0, rows.index, torch.bmm(a, b))


def _per_unit(x: Tensor, before: int, size: int, after: int) -> Tensor:
    """[m, size, everything that a unit owns] of [m, ...]."""
    return x.reshape(len(x), before, size, after).transpose(1, 2).reshape(len(x), size, -1)


def dot(first: Tensor, second: Tensor) -> float:
    """Inner product of two contiguous tensors [length] on a CPU, accumulated in float64."""
    if len(first) <= _DOT_BLOCK:
        return float(torch.dot(first, second))
    blocks = zip(first.split(_DOT_BLOCK), second.split(_DOT_BLOCK), strict=True)
    return math.fsum(float(torch.dot(x, y)) for x, y in blocks)


def dots(theta: Tensor, sources: Tensor) -> Tensor:
    """[N] float64, inner products of `theta` with each of sources [N, *theta.shape]; nothing waits for the device."""
    return (sources * theta).reshape(len(sources), -1).sum(1, dtype=torch.float64)  # theta may have no axis
