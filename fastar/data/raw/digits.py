"""scikit-learn's real 8x8 digits, which come with the package and need no network."""

import math

import numpy as np

from fastar.config import DatasetSpec
from fastar.data.raw.raw_split import ArraySplit, RawDataset
from fastar.data.sampling import stratified_split
from fastar.errors import FastarError

TEST_SHARE = 0.2


def read_digits(spec: DatasetSpec) -> RawDataset:
    """1,437 training and 360 test images. Grey levels 0..16 become 0..240 (times 15, so exactly invertible)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise FastarError("digits: scikit-learn is missing; run `pip install scikit-learn`") from error
    bunch = load_digits()
    images = (np.asarray(bunch.images) * 15).astype(np.uint8)[..., None]
    labels = np.asarray(bunch.target, dtype=np.int64)
    rest, held = stratified_split(labels, math.ceil(len(labels) * TEST_SHARE), "digits")
    return RawDataset(
        train=ArraySplit(images[rest], labels[rest], spec.classes, "scikit-learn digits (train)"),
        test=ArraySplit(images[held], labels[held], spec.classes, "scikit-learn digits (test)"),
        kind="scikit-learn digits",
        where=None,
    )
