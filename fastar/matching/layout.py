"""Parameters as matrices with one row per unit, without copies where the memory layout allows it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastar.matching.symmetry import Member

_DOT_BLOCK = 1 << 16  # float32 partial sums this long, added up in float64


def memory_order(tensor: Tensor) -> list[int]:
    """The axes of `tensor` from the slowest to the fastest in memory, so that `tensor.permute(order)` is contiguous.

    Channels-last convolution weights of shape (O, I, H, W) give [0, 2, 3, 1].
    """
    strides = tensor.stride()
    return sorted(range(tensor.ndim), key=lambda axis: (-strides[axis], axis))


def add_products(score: Tensor, theta: Tensor, sources: Tensor, member: Member, axis: int, size: int) -> None:
    """score[n, u, v] += inner product of what unit u owns of `theta` and what unit v owns of sources[n].

    Args:
        score: [N, size, size], float32.
        theta: a parameter (or a part of it, along other axes) in memory order.
        sources: [N, *theta.shape], likewise.
        axis: the member's axis, in memory order.
    """
    length = size * member.inner * member.outer
    left, right = theta.narrow(axis, member.offset, length), sources.narrow(axis + 1, member.offset, length)
    before = math.prod(theta.shape[:axis]) * member.outer
    after = math.prod(theta.shape[axis + 1 :]) * member.inner
    count = sources.shape[0]
    if before == 1:
        a, b = left.reshape(size, after), right.reshape(count, size, after).mT
    elif after == 1:
        a, b = left.reshape(before, size).mT, right.reshape(count, before, size)
    else:
        a = left.reshape(before, size, after).transpose(0, 1).reshape(size, -1)
        b = right.reshape(count, before, size, after).transpose(1, 2).reshape(count, size, -1).mT
    if count == 1:
        score[0].addmm_(a, b[0])
    else:
        score.baddbmm_(a.expand(count, *a.shape), b)


def dot(first: Tensor, second: Tensor) -> float:
    """Inner product of two contiguous tensors, accumulated in float64."""
    a, b = first.reshape(-1), second.reshape(-1)
    if a.device.type != "cpu":
        return float((a * b).sum(dtype=torch.float64))
    blocks = zip(a.split(_DOT_BLOCK), b.split(_DOT_BLOCK), strict=True)
    return math.fsum(float(torch.dot(x, y)) for x, y in blocks)


def in_memory_order(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """`tensor` with its axes in `order` and contiguous: a view where the memory allows it."""
    return tensor.detach().permute(list(order)).contiguous()
