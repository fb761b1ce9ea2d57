"""Folders of images for benchmarks: random JPEGs of ImageNet's size, or real ones repeated."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fastar.data.raw.listing import SUFFIXES
from fastar.errors import FastarError

SIZES = ((375, 500), (500, 375), (333, 500), (500, 334), (400, 600), (768, 1024))  # usual ones of ImageNet
COARSE = 6  # sides of the patterns of small images


def make_images(root: Path, count: int, *, classes: int = 10, sizes: tuple[tuple[int, int], ...] = SIZES) -> None:
    """Write `count` JPEGs (height, width of `sizes` in turn) to `root`/train/<class>/ and one a class to `root`/val.

    Blurred noise: about as many bytes per pixel as photographs.
    """
    generator = np.random.default_rng(0)
    for number in range(max(count, classes)):
        height, width = sizes[number % len(sizes)]
        coarse = Image.fromarray(generator.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8))
        image = coarse.resize((width, height), Image.Resampling.BICUBIC)
        for split in ("train", "val") if number < classes else ("train",):
            path = root / split / f"class{number % classes}" / f"{number:06}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, quality=90)


def make_small_images(root: Path, classes: Sequence[str], size: tuple[int, int], counts: Mapping[str, int]) -> None:
    """Write `counts` of PNGs (height, width) of each split to `root`/<split>/<class>/, learnt in some hundred
    steps: a blurred pattern of the class under one of the image's own, and noise."""
    generator = np.random.default_rng(0)
    patterns = generator.random((len(classes), COARSE, COARSE, 3))
    for split, count in counts.items():
        for number in range(count):
            which = number % len(classes)
            share = generator.uniform(0.4, 0.7)
            coarse = share * patterns[which] + (1 - share) * generator.random((COARSE, COARSE, 3))
            blurred = Image.fromarray((255 * coarse).astype(np.uint8)).resize(size[::-1], Image.Resampling.BICUBIC)
            pixels = np.asarray(blurred, np.float32) + 25 * generator.standard_normal((*size, 3), np.float32)
            path = root / split / classes[which] / f"{number:06}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)


def link_images(source: Path, root: Path, count: int) -> None:
    """Link the images of `source` (or `source`/train), class folders, into `root`/train until there are `count`.

    Repeated as often as needed; each image once, at most `count`, in `root`/val.
    """
    folder = source / "train" if (source / "train").is_dir() else source
    paths = sorted(path for path in folder.glob("*/*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise FastarError(f"{folder}: holds no images in class folders; give another --data-root")
    for number, path in enumerate(itertools.islice(itertools.cycle(paths), count)):
        for split in ("train", "val") if number < len(paths) else ("train",):
            link = root / split / path.parent.name / f"{number:06}{path.suffix}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
