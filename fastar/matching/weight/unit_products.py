"""Inner products of what units own, without copies where the memory layout allows it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastar.matching.weight.problem import Site
from fastar.symmetry.batched_index import Rows

_DOT_BLOCK = 1 << 16  # float32 partial sums this long, added up in float64


def add_products(score: Tensor, theta: Tensor, sources: Tensor, site: Site, offset: int, rows: Rows) -> None:
    """score[n, u, v] += inner product of what unit u owns of `theta` and what unit v owns of source n, of `rows`; as
    often as it counts.

    Args:
        score: [N, size, size], float32.
        theta: a parameter (or a part of it, along other axes) in memory order, [1, ...]; or [m, ...], one for each.
        sources: [m, ...], likewise, of as many sources as there are rows.
        offset: where the site's stretch of its axis begins.
    """
    a, b = (_per_unit(x, site, offset, score.shape[1]) for x in (theta, sources))
    b = b.mT
    if len(rows) == 1:
        rows.of(score)[0].addmm_(a[0], b[0], alpha=site.times)
        return
    a = a.expand(len(rows), *a.shape[1:])
    if rows.index is None:
        rows.of(score).baddbmm_(a, b, alpha=site.times)
    else:
        score.index_add_(0, rows.index, torch.bmm(a, b), alpha=site.times)


def _per_unit(x: Tensor, site: Site, offset: int, size: int) -> Tensor:
    """[m, size, everything that a unit owns] of [m, ...]."""
    member, axis = site.member, site.axis
    if site.within is not None:
        size //= x.shape[site.within + 1]
    if site.part is not None:
        on, begin, length = site.part
        x = x.narrow(on + 1, begin, length)
    x = x.narrow(axis + 1, offset, size * member.inner * member.outer)
    if site.within is not None:
        x = x.unflatten(axis + 1, (member.outer, size, member.inner))
        within = site.within + (2 * (site.within > axis))
        return x.movedim((within + 1, axis + 2), (1, 2)).flatten(1, 2).flatten(2)
    before, after = math.prod(x.shape[1 : axis + 1]) * member.outer, math.prod(x.shape[axis + 2 :]) * member.inner
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
