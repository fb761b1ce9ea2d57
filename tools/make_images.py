"""Make a set of JPEGs like ImageNet's in form: sizes, grey ones among them, train/CLASS and val/CLASS; deterministic.

    python tools/make_images.py OUT [--train 2000] [--val 500] [--seed 0] [--workers 2]

The 10 classes are patterns (stripes, checks, dots, ...) that a small network can learn, though not from a few pixels or
a colour: period, direction, place, two colours, light, noise, and things lying in front differ from image to image. An
image is a function of the seed, its split and its number, so a longer set begins with a shorter one's images.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from fastar.errors import FastarError
from fastar.runtime.progress import TerminalProgress
from fastar.runtime.seeds import derive_seed

CLASSES = ("checks", "crosses", "dots", "grid", "rays", "rings", "spiral", "stripes", "triangles", "waves")
# Width, height and weight: ImageNet's most frequent sizes, and some small, large and long ones as it has.
SIZES = (
    (500, 375, 32),
    (500, 333, 18),
    (375, 500, 10),
    (333, 500, 6),
    (500, 400, 4),
    (500, 500, 4),
    (400, 300, 6),
    (320, 240, 5),
    (240, 180, 3),
    (200, 150, 3),
    (150, 200, 2),
    (640, 480, 3),
    (800, 600, 2),
    (1280, 960, 1),
    (500, 180, 1),
)
GREY = 0.015
QUALITIES = (75, 90, 96)


def pattern(name: str, x: np.ndarray, y: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Where the first of two colours is, bool [H, W]; `x` and `y` are in units of the shorter side, 0 in the middle."""
    angle, period = random.uniform(0, 2 * np.pi), random.uniform(0.16, 0.4)
    u = (x * np.cos(angle) + y * np.sin(angle)) / period + random.uniform(0, 1)
    v = (y * np.cos(angle) - x * np.sin(angle)) / period + random.uniform(0, 1)
    in_u, in_v = np.abs(u % 1 - 0.5), np.abs(v % 1 - 0.5)
    if name == "checks":
        return (np.floor(u) + np.floor(v)) % 2 == 0
    if name == "crosses":
        return (np.minimum(in_u, in_v) < 0.12) & (np.maximum(in_u, in_v) < 0.4)
    if name == "dots":
        return in_u**2 + in_v**2 < 0.3**2
    if name == "grid":
        return np.minimum(in_u, in_v) < 0.12
    if name == "stripes":
        return u % 1 < 0.5
    if name == "triangles":
        return u % 1 < v % 1
    if name == "waves":
        return (u + 0.35 * np.sin(np.pi * v)) % 1 < 0.5
    dx, dy = x - random.uniform(-0.25, 0.25), y - random.uniform(-0.25, 0.25)
    radius, turn = np.hypot(dx, dy) / period, np.arctan2(dy, dx) / (2 * np.pi)
    if name == "rings":
        return (radius + u[0, 0]) % 1 < 0.5
    if name == "rays":
        return (turn * random.integers(5, 10) + u[0, 0]) % 1 < 0.5
    assert name == "spiral"
    return (radius + turn * random.choice((-2, -1, 1, 2)) + u[0, 0]) % 1 < 0.5


def image(name: str, random: np.random.Generator) -> Image.Image:
    """One image of the class `name`."""
    weights = np.array([weight for *_, weight in SIZES], dtype=np.float64)
    width, height, _ = SIZES[random.choice(len(SIZES), p=weights / weights.sum())]
    short = min(width, height)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x, y = (x - width / 2) / short, (y - height / 2) / short
    colours = random.uniform(20, 235, (2, 3))
    while np.abs(colours[0].mean() - colours[1].mean()) < 45:  # so that a grey image still shows its pattern
        colours = random.uniform(20, 235, (2, 3))
    chosen = pattern(name, x, y, random)[..., None]
    pixels = np.where(chosen, colours[0], colours[1]).astype(np.float32)
    for _ in range(random.integers(0, 4)):  # things in front
        at_x, at_y = random.uniform(-0.5, 0.5, 2)
        wide, high = random.uniform(0.05, 0.18, 2)
        inside = ((x - at_x) / wide) ** 2 + ((y - at_y) / high) ** 2 < 1
        pixels[inside] = random.uniform(0, 255, 3)
    light = 1 + random.uniform(-0.5, 0.5) * x + random.uniform(-0.5, 0.5) * y
    pixels = pixels * light[..., None] + random.uniform(5, 35) * random.standard_normal((height, width, 1), np.float32)
    made = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return made.convert("L") if random.uniform() < GREY else made


def write(root: Path, split: str, seed: int, number: int) -> int:
    """Write image `number` of a split; its bytes."""
    name = CLASSES[number % len(CLASSES)]
    random = np.random.default_rng(derive_seed(seed, "made image", split, number))
    path = root / split / name / f"{name}_{number:06}.JPEG"
    image(name, random).save(path, quality=int(random.choice(QUALITIES)))
    return path.stat().st_size


def make(root: Path, counts: dict[str, int], seed: int, workers: int) -> None:
    """Write all of it below `root`, which must not hold a train or val folder yet."""
    if min(counts.values()) < len(CLASSES) or workers < 1:
        raise FastarError(f"--train and --val must be at least {len(CLASSES)}, one image a class, --workers at least 1")
    for split in counts:
        if (root / split).exists():
            raise FastarError(f"{root / split}: is there already; choose another folder")
    progress, size = TerminalProgress(), 0
    with ProcessPoolExecutor(workers) as pool:
        for split, count in counts.items():
            for name in CLASSES:
                (root / split / name).mkdir(parents=True)
            with progress.task(f"making {split}", count, "images") as advance:
                for made in pool.map(partial(write, root, split, seed), range(count), chunksize=16):
                    size += made
                    advance()
    total = sum(counts.values())
    print(f"{root}: {total} images of {len(CLASSES)} classes, {size / total / 1000:.0f} kB each on average")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--val", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    make(options.out, {"train": options.train, "val": options.val}, options.seed, options.workers)


if __name__ == "__main__":
    try:
        main()
    except FastarError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.filename}: cannot be written ({error.strerror}); choose another folder")
