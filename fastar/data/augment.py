"""Augmentation and normalisation of many images at once: plain torch on any device, and a compiled loop for CPUs.

Both give the same bits: the draws are integers (see `fastar.data.sampling`), and a pixel is normalised by one
subtraction and one multiplication in fp32, each rounded by itself.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch

from fastar.config import Augmentation
from fastar.data.compiled import compiled
from fastar.data.sampling import AugmentationKeys, draw_below, draw_mirrored


class Normalisation:
    """(pixel - mean) * scale per channel, as tables over a whole image (one long vector: three times as fast)."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], height: int, width: int, device: torch.device):
        self.shape = (height, width, len(mean))
        pixel_mean = torch.tensor(mean, dtype=torch.float64, device="cpu") * 255
        pixel_scale = 1 / (torch.tensor(std, dtype=torch.float64, device="cpu") * 255)
        self.mean = pixel_mean.to(device, torch.float32).repeat(height * width)
        self.scale = pixel_scale.to(device, torch.float32).repeat(height * width)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [n, H, W, C] to fp32 [n, H, W, C]."""
        flat = images.reshape(len(images), -1).to(torch.float32)
        return flat.sub_(self.mean).mul_(self.scale).view(len(images), *self.shape)


Draws = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def draw_augmentation(augmentation: Augmentation, keys: AugmentationKeys, index: torch.Tensor) -> Draws:
    """(rows down, columns right, mirrored) of each sample: int64 in -pad..pad, int64 in -pad..pad, bool; all [b].

    The crop starts that far from the unpadded image's corner. Streams 0, 1 and 2 of the keys, at the samples `index`.
    """
    span = 2 * augmentation.pad + 1
    down = draw_below(span, keys.crop, index, 0) - augmentation.pad
    right = draw_below(span, keys.crop, index, 1) - augmentation.pad
    mirrored = draw_mirrored(keys, index)
    return down, right, mirrored if augmentation.flip else torch.zeros_like(mirrored)


def augmented(images: torch.Tensor, chosen: torch.Tensor, draws: Draws, normalisation: Normalisation) -> torch.Tensor:
    """fp32 [b, H, W, C]: `images[chosen]` (uint8 [n, H, W, C]) zero-padded, cropped back, mirrored, normalised."""
    if images.device.type != "cpu":
        return normalisation(crop_and_mirror(images, chosen, *draws))
    out = torch.empty(len(chosen), *images.shape[1:], dtype=torch.float32, device="cpu")
    tensors = (chosen, *draws, normalisation.mean, normalisation.scale, out.view(len(chosen), -1))
    arrays = [
        np.ascontiguousarray(one) for one in (images.reshape(len(images), -1).numpy(), *(t.numpy() for t in tensors))
    ]
    _compiled()(*arrays, *images.shape[1:])
    return out


def mirrored_and_normalised(
    images: torch.Tensor, mirrored: torch.Tensor | None, normalisation: Normalisation
) -> torch.Tensor:
    """fp32 [b, H, W, C] of uint8 [b, H, W, C]; those where `mirrored` (bool [b]) says so flipped left to right."""
    if mirrored is None:
        return normalisation(images)
    if images.device.type != "cpu":
        return normalisation(torch.where(mirrored[:, None, None, None], images.flip(2), images))
    still = torch.zeros(len(images), dtype=torch.int64, device="cpu")
    return augmented(images, torch.arange(len(images), device="cpu"), (still, still, mirrored), normalisation)


def crop_and_mirror(
    images: torch.Tensor, chosen: torch.Tensor, down: torch.Tensor, right: torch.Tensor, mirrored: torch.Tensor
) -> torch.Tensor:
    """uint8 [b, H, W, C], the arithmetic written out in torch: what CUDA runs, and the compiled loop's oracle."""
    _, height, width, _ = images.shape
    rows = torch.arange(height, device=images.device) + down[:, None]
    columns = torch.arange(width, device=images.device)
    columns = torch.where(mirrored[:, None], width - 1 - columns, columns) + right[:, None]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    return images[chosen[:, None, None], rows[:, :, None], columns[:, None, :]] * inside[..., None]


@cache
def _compiled() -> Callable[..., Any]:
    flat, indices = "float32[::1]", "int64[::1]"
    types = ("uint8[:, ::1]", *3 * [indices], "boolean[::1]", flat, flat, "float32[:, ::1]", *3 * ["int64"])
    return compiled(_crop_mirror_normalise, f"void({', '.join(types)})")


def _crop_mirror_normalise(
    images: np.ndarray,
    chosen: np.ndarray,
    down: np.ndarray,
    right: np.ndarray,
    mirrored: np.ndarray,
    mean: np.ndarray,
    scale: np.ndarray,
    out: np.ndarray,
    height: int,
    width: int,
    channels: int,
) -> None:
    stride = width * channels
    row = np.empty(stride, np.uint8)
    for sample in range(len(chosen)):
        source, shift = chosen[sample], right[sample]
        first, last = max(0, -shift), min(width, width - shift)  # columns of the crop that lie inside the image
        for y in range(height):
            row[:] = 0
            source_y = y + down[sample]
            if 0 <= source_y < height:
                start = source_y * stride + shift * channels
                if mirrored[sample]:
                    for x in range(first, last):
                        for c in range(channels):
                            row[(width - 1 - x) * channels + c] = images[source, start + x * channels + c]
                else:
                    for j in range(first * channels, last * channels):
                        row[j] = images[source, start + j]
            for j in range(stride):
                out[sample, y * stride + j] = (np.float32(row[j]) - mean[j]) * scale[j]
