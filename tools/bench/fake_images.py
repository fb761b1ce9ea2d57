"""Folders of images for benchmarks: random JPEGs of ImageNet's size, or real ones repeated."""

import itertools
from pathlib import Path

import numpy as np
from PIL import Image

from fastar.data.raw.listing import SUFFIXES
from fastar.errors import FastarError

SIZES = ((375, 500), (500, 375), (333, 500), (500, 334), (400, 600), (768, 1024))  # usual ones of ImageNet


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
