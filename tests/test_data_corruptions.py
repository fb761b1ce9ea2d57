"""Corruptions and made images, against Pillow, SciPy and what they should be on average."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, stats

from fastar.data.corruptions import CORRUPTIONS, SEVERITIES, corrupted, uniform
from fastar.data.made_images import MADE, made


@cache
def images(channels: int, size: int = 32) -> torch.Tensor:
    """Smooth images of 8 bits, with some noise."""
    numbers = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(numbers.normal(size=(6, channels, size, size)), (0, 0, 3, 3)) * 3 + 0.5
    noisy = np.clip(smooth + 0.03 * numbers.normal(size=smooth.shape), 0, 1)
    return torch.from_numpy(np.round(noisy * 255) / 255)


def at(kind: str, severity: int, given: torch.Tensor, first: int = 0) -> torch.Tensor:
    return corrupted(given, kind, severity, seed=3, index=torch.arange(first, first + len(given)))


def bytes_of(given: torch.Tensor) -> np.ndarray:
    return (given * 255).round().byte().permute(0, 2, 3, 1).numpy()


def pictures(given: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(one.squeeze(2) if one.shape[2] == 1 else one) for one in bytes_of(given)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_no_image_depends_on_its_batch(kind: str, channels: int) -> None:
    """To the 8 bits that networks see; rows and columns of other numbers than blocks have, too."""
    given = images(channels, 19)
    whole = bytes_of(at(kind, 4, given))
    parts = [bytes_of(at(kind, 4, given[i : i + 1], i)) for i in range(len(given))]
    assert np.array_equal(whole, np.concatenate(parts))
    assert whole.shape == (6, 19, 19, channels)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_severer_corruption_moves_images_further(kind: str) -> None:
    given = images(3)
    moved = [float((at(kind, severity, given) - given).square().mean()) for severity in range(1, SEVERITIES + 1)]
    assert moved == sorted(moved)
    assert moved[0] > 0


@pytest.mark.parametrize(("channels", "apart"), [(1, 0.4), (3, 1.5)])
def test_jpeg_is_pillow_s(channels: int, apart: float) -> None:
    """On average so many levels of 255 apart, a fraction of what the file changes: libjpeg has whole numbers."""
    given = images(channels, 40)
    for severity, quality in enumerate(CORRUPTIONS["jpeg"], start=1):
        found, wanted = bytes_of(at("jpeg", severity, given)).astype(int), []
        for picture in pictures(given):
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=int(quality))
            wanted.append(np.asarray(Image.open(file)).reshape(found.shape[1:]).astype(int))
        assert np.abs(found - np.stack(wanted)).mean() < apart
        assert np.abs(found - bytes_of(given)).mean() > 2.5 * apart


def test_pixelate_is_pillow_s() -> None:
    given = images(3)
    for severity, share in enumerate(CORRUPTIONS["pixelate"], start=1):
        small = int(32 * share)
        boxes = Image.Resampling.BOX
        wanted = [np.asarray(one.resize((small,) * 2, boxes).resize((32, 32), boxes)) for one in pictures(given)]
        assert np.abs(bytes_of(at("pixelate", severity, given)).astype(int) - np.stack(wanted).astype(int)).max() <= 1


def test_blur_is_scipy_s() -> None:
    given = images(3)
    for severity, sigma in enumerate(CORRUPTIONS["blur"], start=1):
        wanted = ndimage.gaussian_filter(given.numpy(), (0, 0, sigma, sigma), mode="nearest")
        assert np.abs(at("blur", severity, given).numpy() - wanted).max() < 1e-12


def test_brightness_keeps_hue_and_saturation() -> None:
    import colorsys

    given, found = images(3)[:1, :, :4, :4], at("brightness", 2, images(3)[:1, :, :4, :4])
    for before, after in zip(given[0].flatten(1).T, found[0].flatten(1).T, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*before.tolist())
        assert after.tolist() == pytest.approx(colorsys.hsv_to_rgb(hue, saturation, min(value + 0.1, 1)))
    assert float(at("brightness", 2, torch.zeros(1, 3, 4, 4, dtype=torch.float64)).max()) == pytest.approx(0.1)


def test_noise_has_its_distribution() -> None:
    grey = torch.full((40, 1, 32, 32), 51 / 255, dtype=torch.float64)
    noise = at("gaussian noise", 1, grey) - grey
    assert float(noise.std()) == pytest.approx(0.04, rel=0.02)
    assert stats.kstest((noise / 0.04).flatten().numpy(), "norm").pvalue > 1e-3
    counts = at("shot noise", 5, grey) * 50  # a rate of 10
    assert torch.allclose(counts, counts.round())
    found = np.bincount(counts.round().long().flatten().numpy(), minlength=30)[:30]
    wanted = stats.poisson(10).pmf(np.arange(30)) * grey.numel()
    kept = wanted > 20
    assert stats.chisquare(found[kept], wanted[kept] * found[kept].sum() / wanted[kept].sum()).pvalue > 1e-3
    assert not at("shot noise", 5, grey * 0).any()
    impulses = at("impulse noise", 5, grey)
    assert float((impulses == 0).double().mean()) == pytest.approx(0.035, rel=0.1)
    assert float((impulses == 1).double().mean()) == pytest.approx(0.035, rel=0.1)


def test_draws_of_images_pixels_and_kinds_are_others() -> None:
    grey = torch.full((50, 1, 8, 8), 0.5, dtype=torch.float64)
    index = torch.arange(50)
    draws = uniform(grey, 1, index)
    assert len(draws.unique()) == draws.numel()
    assert abs(np.corrcoef(draws[0].flatten(), draws[1].flatten())[0, 1]) < 0.4
    assert not torch.equal(draws, uniform(grey, 2, index))
    assert not torch.equal(draws, uniform(grey, 1, index, stream=1))
    assert stats.kstest(draws.flatten().numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("kind", MADE)
def test_made_images_do_not_depend_on_their_batch(kind: str) -> None:
    given = images(3, 18)
    index = torch.arange(6)
    whole = made(given, kind, seed=0, index=index)
    parts = [made(given[i : i + 1], kind, seed=0, index=index[i : i + 1]) for i in range(6)]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-9)
    assert whole.shape == given.shape
    assert not torch.equal(whole, given)


def test_blocks_are_the_image_s_own() -> None:
    given = images(3)
    found = made(given, "blocks", seed=0, index=torch.arange(6))
    assert torch.equal(found.flatten(2).sort().values, given.flatten(2).sort().values)
    tiles = [one.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 0, 3, 4).flatten(0, 1) for one in (given[0], found[0])]
    assert all(any(torch.equal(tile, other) for other in tiles[0]) for tile in tiles[1])


def test_scrambled_phases_keep_the_power_spectrum() -> None:
    given = images(3) * 0.2 + 0.4  # far from 0 and 1, where it is cut
    found = made(given, "phase", seed=0, index=torch.arange(6))
    assert torch.allclose(torch.fft.fft2(found).abs(), torch.fft.fft2(given).abs(), atol=1e-6)
    assert torch.allclose(found.mean((2, 3)), given.mean((2, 3)))
