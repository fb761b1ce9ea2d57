"""The part of an image of any size that becomes the network's square input: a box per image, before it is decoded.

Every random box is a function of a key and the image's index alone, through counter-based draws (streams from 8 on; the
mirroring's are below), so that threads, batches and where an epoch is begun cannot change it.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np

from fastar.data.sampling import draw, draw_below

Crop = Literal["random-resized", "resize256-crop224"]
Boxes = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(index, height, width), int64 [b] each, to int64 [b, 4]: top, left, height, width of the box."""

KEPT = 224 / 256
"""The share of the shorter side that evaluation and resize256-crop224 keep, whatever size comes out."""
SCALE = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
ATTEMPTS = 10
_STREAM = 8


def centre(index: np.ndarray, height: np.ndarray, width: np.ndarray, kept: float = KEPT) -> np.ndarray:
    """The centred square whose side is `kept` of the shorter side: `Boxes`."""
    side = _side(kept, height, width)
    return np.stack([(height - side) // 2, (width - side) // 2, side, side], axis=1)


def random_boxes(crop: Crop, key: int) -> Boxes:
    """The boxes of a training epoch whose augmentation has `key`.

    random-resized: of 8 to 100 % of the area and of a ratio of sides from 3/4 to 4/3 (uniform in its logarithm), the
    first of 10 draws that fits into the image, else the largest centred one of a permitted ratio. resize256-crop224:
    the shorter side resized to 256 and a square of 224 cut out at random, that is a square of 224/256 of the shorter
    side anywhere in the image.
    """
    return partial(_random_resized if crop == "random-resized" else _random_square, key)


def _side(kept: float, height: np.ndarray, width: np.ndarray) -> np.ndarray:
    return np.maximum(1, (kept * np.minimum(height, width)).astype(np.int64))


def _random_square(key: int, index: np.ndarray, height: np.ndarray, width: np.ndarray) -> np.ndarray:
    side = _side(KEPT, height, width)
    top = draw_below(height - side + 1, key, index, _STREAM)
    left = draw_below(width - side + 1, key, index, _STREAM + 1)
    return np.stack([top, left, side, side], axis=1)


def _random_resized(key: int, index: np.ndarray, height: np.ndarray, width: np.ndarray) -> np.ndarray:
    boxes = np.zeros((len(index), 4), np.int64)
    left = np.arange(len(index))  # those without a box so far
    for attempt in range(ATTEMPTS):
        some, h, w = index[left], height[left], width[left]
        stream = _STREAM + 4 * attempt
        area = h * w * _uniform(SCALE[0], SCALE[1], key, some, stream)
        ratio = np.exp(_uniform(math.log(RATIO[0]), math.log(RATIO[1]), key, some, stream + 1))
        box_w = np.rint(np.sqrt(area * ratio)).astype(np.int64)
        box_h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
        fits = (box_w > 0) & (box_w <= w) & (box_h > 0) & (box_h <= h)
        top = draw_below(np.maximum(h - box_h, 0) + 1, key, some, stream + 2)
        first = draw_below(np.maximum(w - box_w, 0) + 1, key, some, stream + 3)
        boxes[left[fits]] = np.stack([top, first, box_h, box_w], axis=1)[fits]
        left = left[~fits]
        if len(left) == 0:
            return boxes
    h, w = height[left], width[left]
    box_w = np.minimum(w, np.maximum(1, np.rint(h * RATIO[1]).astype(np.int64)))
    box_h = np.minimum(h, np.maximum(1, np.rint(w / RATIO[0]).astype(np.int64)))
    boxes[left] = np.stack([(h - box_h) // 2, (w - box_w) // 2, box_h, box_w], axis=1)
    return boxes


def _uniform(low: float, high: float, key: int, index: np.ndarray, stream: int) -> np.ndarray:
    return low + (high - low) * (draw(key, index, stream) / 2**32)
