"""Corruptions of images at five severities, as tensor operations on any device.

Kinds and constants are those of CIFAR-10-C (Hendrycks and Dietterich 2019, make_cifar_c.py of hendrycks/robustness).
They were chosen for images of 32 x 32 pixels; lengths are in pixels and stay as they are for other sizes. Random draws
are functions of a key, the image's number and the pixel (`fastar.data.sampling`): no result depends on batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from fastar.data.sampling import draw
from fastar.runtime.seeds import derive_seed

CORRUPTIONS: dict[str, tuple[float, ...]] = {
    "gaussian noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "shot noise": (500, 250, 100, 75, 50),
    "impulse noise": (0.01, 0.02, 0.03, 0.05, 0.07),
    "blur": (0.4, 0.6, 0.7, 0.8, 1.0),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
    "jpeg": (80, 65, 58, 50, 40),
}
"""Kind -> its constant at severities 1 to 5: standard deviation; photons of a white pixel; share of pixels; standard
deviation in pixels; factor; addition to the value of HSV; side of the smaller image as a share; quality."""
SEVERITIES = 5
LEVELS = 255


def corrupted(images: Tensor, kind: str, severity: int, *, seed: int, index: Tensor) -> Tensor:
    """Images with a corruption.

    Args:
        images: float64 [n, C, H, W] in [0, 1].
        kind: of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: of random draws, which are the same at every severity.
        index: int64 [n]: the images' numbers, below 2^32.

    Returns:
        float64 [n, C, H, W] in [0, 1].
    """
    key = derive_seed(seed, "corruption", kind.replace(" ", "_"))
    return _OPERATIONS[kind](images, CORRUPTIONS[kind][severity - 1], key, index).clamp(0, 1)


def uniform(images: Tensor, key: int, index: Tensor, stream: int = 0) -> Tensor:
    """A draw from (0, 1) for each pixel: float64, of the images' shape; a function of key, number and pixel."""
    pixels = torch.arange(images[0].numel(), dtype=torch.int64, device=images.device)
    both = draw(key, pixels, 2 * stream)[None] ^ draw(key, index, 2 * stream + 1)[:, None]
    return (draw(key, both, 2 * stream).double().add_(0.5) / 2**32).view(images.shape)


def normal(images: Tensor, key: int, index: Tensor) -> Tensor:
    """A draw from the standard normal distribution for each pixel; see `uniform`."""
    return torch.special.ndtri(uniform(images, key, index))


def both_sides(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Images [..., H, W] times matrices: rows [h, H] from the left, the transpose of columns [w, W] from the right."""
    return rows.to(images.device) @ images @ columns.to(images.device).T


def _gaussian_noise(images: Tensor, std: float, key: int, index: Tensor) -> Tensor:
    return images + std * normal(images, key, index)


def _shot_noise(images: Tensor, photons: float, key: int, index: Tensor) -> Tensor:
    """Poisson counts by inversion: images of 8 bits have 256 rates, each with its table of cumulative probabilities,
    the tables one after the other in one sorted row."""
    levels = (images * LEVELS).round()
    table = _poisson_tables(photons).to(images.device)
    place = torch.searchsorted(table.flatten(), (levels + uniform(images, key, index)).flatten())
    return (place.view(images.shape) - levels.long() * table.shape[1]) / photons


@cache
def _poisson_tables(photons: float) -> Tensor:
    """Level + P(count <= k) [256, k]: below level + 1, in rising order."""
    rates = torch.arange(LEVELS + 1, dtype=torch.float64, device="cpu")[:, None] * photons / LEVELS
    k = torch.arange(int(photons + 12 * math.sqrt(photons) + 12), dtype=torch.float64, device="cpu")
    chances = (torch.xlogy(k, rates) - rates - torch.lgamma(k + 1)).exp().cumsum(1).clamp(max=1 - 1e-12)
    return chances + torch.arange(LEVELS + 1, dtype=torch.float64, device="cpu")[:, None]


def _impulse_noise(images: Tensor, share: float, key: int, index: Tensor) -> Tensor:
    """Salt and pepper, half of each, in every channel by itself."""
    salt = (uniform(images, key, index, stream=1) < 0.5).double()
    return torch.where(uniform(images, key, index) < share, salt, images)


def _blur(images: Tensor, sigma: float, key: int, index: Tensor) -> Tensor:
    return both_sides(images, *(_gaussian_filter(size, sigma) for size in images.shape[2:]))


@cache
def _gaussian_filter(size: int, sigma: float) -> Tensor:
    """A Gaussian filter cut off at four standard deviations, the border pixels repeated: [size, size]."""
    radius = int(4 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.int64, device="cpu")
    weights = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    places = torch.arange(size, dtype=torch.int64, device="cpu")
    there = (places[:, None] + offsets).clamp(0, size - 1)
    found = torch.zeros(size, size, dtype=torch.float64, device="cpu")
    return found.scatter_add_(1, there, (weights / weights.sum()).expand(size, -1).contiguous())


def _contrast(images: Tensor, factor: float, key: int, index: Tensor) -> Tensor:
    mean = images.mean((2, 3), keepdim=True)
    return (images - mean) * factor + mean


def _brightness(images: Tensor, more: float, key: int, index: Tensor) -> Tensor:
    """The value of HSV, which is the largest channel, raised; hue and saturation stay."""
    value = images.amax(1, keepdim=True)
    raised = (value + more).clamp(max=1)
    return torch.where(value > 0, images * (raised / value.clamp_min(1e-12)), raised)


def _pixelate(images: Tensor, share: float, key: int, index: Tensor) -> Tensor:
    """Made smaller and larger again, by boxes."""
    sizes = [(size, max(int(size * share), 1)) for size in images.shape[2:]]
    smaller = both_sides(images, *(_boxes(size, small) for size, small in sizes))
    return both_sides(smaller, *(_boxes(small, size) for size, small in sizes))


@cache
def _boxes(size: int, wanted: int) -> Tensor:
    """Resizing by a box filter, as Pillow's: means of the pixels whose centres are in each box: [wanted, size]."""
    scale = size / wanted
    centres = (torch.arange(wanted, dtype=torch.float64, device="cpu")[:, None] + 0.5) * scale
    offsets = (torch.arange(size, dtype=torch.float64, device="cpu") + 0.5 - centres) / max(scale, 1.0)
    inside = ((offsets > -0.5) & (offsets <= 0.5)).double()
    return inside / inside.sum(1, keepdim=True)


# Tables K.1 and K.2 of the JPEG standard (ITU-T T.81), which libjpeg scales by the quality.
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
_TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))


def _jpeg(images: Tensor, quality: float, key: int, index: Tensor) -> Tensor:
    """Quantised as a JPEG file's blocks are. Of three channels the two of colour at half the resolution (4:2:0); of any
    other number each is a grey image."""
    height, width = images.shape[2:]
    pixels = (images * LEVELS).round()
    if images.shape[1] != 3:
        return _quantised(_padded(pixels, 8), _LUMINANCE, quality)[..., :height, :width] / LEVELS
    luminance, *chroma = _mixed(_padded(pixels, 16), _TO_YCC).round().split(1, 1)
    smaller = F.avg_pool2d(torch.cat(chroma, 1) + 128, 2).round()
    colour = F.interpolate(_quantised(smaller, _CHROMINANCE, quality), scale_factor=2, mode="bilinear").round() - 128
    whole = torch.cat([_quantised(luminance, _LUMINANCE, quality), colour], 1)
    return _mixed(whole, _TO_RGB).round()[..., :height, :width] / LEVELS


def _mixed(pixels: Tensor, matrix: tuple[tuple[float, ...], ...]) -> Tensor:
    weights = torch.tensor(matrix, dtype=torch.float64, device=pixels.device)
    return torch.einsum("dc,nchw->ndhw", weights, pixels)


def _padded(pixels: Tensor, side: int) -> Tensor:
    """Pixels whose sides are multiples of `side`, the last row and column repeated."""
    height, width = pixels.shape[2:]
    return F.pad(pixels, (0, -width % side, 0, -height % side), mode="replicate")


def _quantised(pixels: Tensor, table: tuple[tuple[int, ...], ...], quality: float) -> Tensor:
    """Pixels 0 to 255 after the 8 x 8 cosine transform, rounded to multiples of the table at a quality, and back."""
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    steps = torch.tensor(table, dtype=torch.float64, device=pixels.device).mul(scale).add(50).div(100).floor()
    steps, dct = steps.clamp(1, 255), _cosines().to(pixels.device)
    blocks = (pixels - 128).unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)
    found = (dct @ blocks @ dct.T / steps).round() * steps
    back = (dct.T @ found @ dct).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return (back + 128).round().clamp(0, LEVELS)


@cache
def _cosines() -> Tensor:
    """The orthonormal cosine transform of eight values: [8, 8]."""
    k = torch.arange(8, dtype=torch.float64, device="cpu")
    found = torch.cos(math.pi / 8 * (k + 0.5) * k[:, None]) / 2
    found[0] /= math.sqrt(2)
    return found


_OPERATIONS: dict[str, Callable[[Tensor, float, int, Tensor], Tensor]] = {
    "gaussian noise": _gaussian_noise,
    "shot noise": _shot_noise,
    "impulse noise": _impulse_noise,
    "blur": _blur,
    "contrast": _contrast,
    "brightness": _brightness,
    "pixelate": _pixelate,
    "jpeg": _jpeg,
}
