"""A data set's content in numbers, the same whether FFCV's files hold it or memory: its digests and its statistics."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from fastar.errors import FastarError
from fastar.runtime.json_files import content_digest

_DIGESTED = ("dataset", "classes", "counts", "mean", "std", "content")
_DIGESTED_FIXED = ("channels", "height", "width")
_DIGESTED_VARIABLE = ("encoding", "shuffled", "skipped")


def dataset_digest(metadata: dict[str, Any]) -> str:
    """SHA-256, hexadecimal, of what a network can see: images, labels, classes and normalisation of both splits.

    Args:
        metadata: of a data set, as its metadata file holds them; what else they hold does not count.
    """
    more = _DIGESTED_FIXED if metadata.get("kind") is None else _DIGESTED_VARIABLE
    return content_digest({key: metadata[key] for key in (*_DIGESTED, *more)})


def content_of_one_size(images: hashlib._Hash, labels: np.ndarray) -> str:
    """SHA-256, hexadecimal, of a split's images of one size, whose own digest is `images`, and its labels, in order."""
    return hashlib.sha256(images.digest() + hashlib.sha256(labels.astype("<i8").data).digest()).hexdigest()


def pixel_statistics(
    images: Iterable[np.ndarray], channels: int, where: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population standard deviation, per channel, of pixels in 0..1.

    Args:
        images: of one size, uint8, the channel varying fastest.
        channels: of each.
        where: they come from, for a message.

    Raises:
        FastarError: a channel is one flat colour.
    """
    levels = np.arange(256)
    counts = np.zeros((channels, 256), np.int64)
    for image in images:
        pixels = image.reshape(-1, channels)
        counts += [np.bincount(pixels[:, channel], minlength=256) for channel in range(channels)]
    # Sums of whole numbers: exact, so the statistics do not depend on the order of samples.
    total, squares, number = counts @ levels, counts @ levels**2, counts[0].sum()
    mean = total / number
    std = np.sqrt(np.maximum(squares / number - mean**2, 0))
    if (std == 0).any():
        raise FastarError(f"{where}: every image is one flat colour; check the raw data")
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())
