"""Images that are of no class of a data set, made of nothing or of the set's own images, on any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastar.data.corruptions import normal, uniform
from fastar.data.sampling import draw
from fastar.runtime.seeds import derive_seed

GRID = 4
"""Blocks that are permuted lie in a grid of so many rows and columns."""


def made(images: Tensor, kind: str, *, seed: int, index: Tensor) -> Tensor:
    """Images of a kind of `MADE`, one for each image; arguments as of `fastar.data.corruptions.corrupted`."""
    return MADE[kind](images, derive_seed(seed, "made images", kind), index).clamp(0, 1)


def _gaussian(images: Tensor, key: int, index: Tensor) -> Tensor:
    return 0.5 + normal(images, key, index)


def _phase(images: Tensor, key: int, index: Tensor) -> Tensor:
    """The phases of the Fourier transform moved at random, alike in all channels: the power spectrum and the mean stay.
    Those of a real image's transform move it to a real image's."""
    moved = torch.fft.fft2(uniform(images[:, :1], key, index)).angle()
    return torch.fft.ifft2(torch.fft.fft2(images) * torch.polar(torch.ones_like(moved), moved)).real


def _blocks(images: Tensor, key: int, index: Tensor) -> Tensor:
    """Blocks of a 4 x 4 grid in another order; rows and columns that are left over stay."""
    rows, columns = (min(GRID, size) for size in images.shape[2:])
    height, width = images.shape[2] // rows, images.shape[3] // columns
    places = torch.arange(rows * columns, dtype=torch.int64, device=images.device)
    order = (draw(key, places)[None] ^ draw(key, index, 1)[:, None]).argsort(1)
    body = images[..., : rows * height, : columns * width]
    blocks = body.unflatten(3, (columns, width)).unflatten(2, (rows, height)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    blocks = blocks.take_along_dim(order[:, :, None, None, None], 1).unflatten(1, (rows, columns))
    found = images.clone()
    found[..., : rows * height, : columns * width] = blocks.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    return found


MADE: dict[str, Callable[[Tensor, int, Tensor], Tensor]] = {
    "noise": uniform,
    "gaussian": _gaussian,
    "phase": _phase,
    "blocks": _blocks,
}
"""noise: each pixel uniform in [0, 1]. gaussian: of mean 0.5 and standard deviation 1, cut to [0, 1]; both as Liang and
others 2018 have them. phase, blocks: the image with its Fourier phases scrambled, with its blocks permuted."""
