"""Boxes cut out of images: within them, of the recipe's distribution, and functions of (key, index) alone."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastar.data.crops import Crop, centre, random_boxes
from fastar.data.sampling import draw

KEY = 0x1234_5678_9ABC_DEF


def sizes(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Index, height, width: usual sizes, single pixels, and strips that no ratio of 3/4 to 4/3 fits into."""
    generator = np.random.default_rng(0)
    height, width = generator.integers(1, 700, (2, count))
    height[:40], width[:40] = 1, np.arange(1, 41)
    width[40:80] = 9
    return generator.permutation(count).astype(np.int64), height, width


def random_resized(key: int, index: int, height: int, width: int) -> tuple[int, int, int, int]:
    """The recipe written out for one image; every draw is of its own stream."""

    def word(stream: int) -> int:
        return int(draw(key, np.array([index]), stream)[0])

    for attempt in range(10):
        stream = 8 + 4 * attempt
        area = height * width * (0.08 + 0.92 * word(stream) / 2**32)
        low, high = math.log(3 / 4), math.log(4 / 3)
        ratio = math.exp(low + (high - low) * word(stream + 1) / 2**32)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return (
                word(stream + 2) * (height - h + 1) >> 32,
                word(stream + 3) * (width - w + 1) >> 32,
                h,
                w,
            )
    if width / height < 3 / 4:
        w, h = width, min(height, round(width / (3 / 4)))
    elif width / height > 4 / 3:
        w, h = min(width, max(1, round(height * (4 / 3)))), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def test_random_resized_is_the_recipe() -> None:
    index, height, width = sizes(600)
    found = random_boxes("random-resized", KEY)(index, height, width)
    want = [random_resized(KEY, *row) for row in zip(index.tolist(), height.tolist(), width.tolist(), strict=True)]
    assert found.tolist() == [list(box) for box in want]


@pytest.mark.parametrize("crop", ["random-resized", "resize256-crop224"])
def test_boxes_lie_within_and_do_not_depend_on_company(crop: Crop) -> None:
    index, height, width = sizes(600)
    boxes = random_boxes(crop, KEY)
    found = boxes(index, height, width)
    top, left, h, w = found.T
    assert (h >= 1).all()
    assert (w >= 1).all()
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()
    some = np.array([500, 3, 77, 41])
    assert np.array_equal(boxes(index[some], height[some], width[some]), found[some])
    assert not np.array_equal(random_boxes(crop, KEY + 1)(index, height, width), found)


def test_random_resized_has_the_recipe_s_distribution() -> None:
    count = 20_000
    top, left, h, w = random_boxes("random-resized", KEY)(np.arange(count), *np.full((2, count), 400)).T
    area, ratio = h * w / 160_000, np.log(w / h)
    generator = np.random.default_rng(0)
    wanted = generator.uniform(0.08, 1, (count, 10))
    sides = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3), (count, 10)) / 2)
    fits = np.sqrt(wanted) * np.maximum(sides, 1 / sides) <= 1
    want = wanted[np.arange(count), fits.argmax(1)]  # nearly all fit within 10 draws
    assert abs(area.mean() - want.mean()) < 0.01  # each mean is known to 0.002
    assert abs(area.std() - want.std()) < 0.01
    assert area.min() < 0.085
    assert area.max() > 0.97
    assert abs(ratio.mean()) < 0.01
    assert np.log(4 / 3) - 0.05 < ratio.max() < np.log(4 / 3) + 0.03  # rounded to pixels
    small = (h < 200) & (w < 200)
    down, right = top[small] / (400 - h[small]), left[small] / (400 - w[small])
    assert abs(down.mean() - 0.5) < 0.02
    assert abs(right.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(down, right)[0, 1]) < 0.03  # streams of their own


def test_squares_are_of_the_shorter_side() -> None:
    height, width = np.array([300, 500, 64] * 500), np.array([500, 300, 64] * 500)
    top, left, h, w = random_boxes("resize256-crop224", KEY)(np.arange(1500), height, width).T
    assert (h == w).all()
    assert h[:3].tolist() == [262, 262, 56]  # 7/8, rounded down
    assert {0, 300 - 262} <= set(top[::3]) <= set(range(39))  # every place, ends included
    assert (left[::3].min(), left[::3].max()) == (0, 500 - 262)
    assert centre(np.arange(3), height[:3], width[:3]).tolist() == [
        [19, 119, 262, 262],
        [119, 19, 262, 262],
        [4, 4, 56, 56],
    ]
