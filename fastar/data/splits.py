"""The images of a file that make a split: those kept for validation lie in the training set's file.

The validation images are taken first, of all that the file holds; a limit then takes its images from the rest. So they
are the same whatever the limit, and no model of any limit has seen them.
"""

from collections.abc import Sequence

import numpy as np

from fastar.data.sampling import balanced_subset, stratified_split
from fastar.errors import FastarError

VALIDATION = "validation"


def stored_in(split: str) -> str:
    """The split whose file holds the images of `split`.

    >>> stored_in("validation"), stored_in("test")
    ('train', 'test')
    """
    return "train" if split == VALIDATION else split


def held_out(count: int, share: float, name: str) -> int:
    """The number of the `count` training samples of the dataset `name` that the `share` for validation is.

    Raises:
        FastarError: not one, or all.
    """
    if not share:
        return 0
    held = round(share * count)
    if held < 1:
        raise FastarError(f"validation={share} of the {count} training samples of {name} is not one sample; raise it")
    if held >= count:
        raise FastarError(f"validation={share} leaves none of the {count} training samples of {name}; lower it")
    return held


def check_limit(limit: int | None, *, count: int, classes: int, split: str, name: str, validation: float = 0.0) -> None:
    """Raise FastarError unless `limit` images can be kept, classes balanced, of the `count` of a split (of the training
    set: those that the share `validation` leaves)."""
    if limit is None:
        return
    if limit > count:
        left = f" that validation={validation} leaves" if validation and split == "train" else ""
        raise FastarError(f"limit={limit} is more than the {count} {split} images of {name}{left}; lower it")
    if limit < classes:
        raise FastarError(f"limit={limit} is below one image per class; {name} needs at least {classes}")


def chosen_images(
    labels: np.ndarray, split: str, *, validation: float, limit: int | None, classes: Sequence[str], name: str
) -> np.ndarray:
    """Positions (sorted, int64) in the file of a split's images.

    Validation images are drawn so that each class keeps its share (`stratified_split`), by the dataset's name alone:
    every run, whatever its seed, has the same ones.

    Args:
        labels: of all images of the file, int64 [n].
        split: train, validation or test.
        validation: share of the training images that are kept for validation; of no meaning for test.
        limit: at most so many, classes balanced; None: all.
        classes: their names.
        name: of the dataset.

    Raises:
        FastarError: a share that is not one image, or leaves a class without a training image; a limit that the images
            cannot give.
    """
    index = np.arange(len(labels))
    if split == VALIDATION and not validation:
        raise ValueError("no images are kept for validation")
    if validation and split in ("train", VALIDATION):
        rest, held = stratified_split(labels, held_out(len(labels), validation, name), name, VALIDATION)
        without = np.setdiff1d(labels, labels[rest])
        if len(without):
            raise FastarError(
                f"validation={validation} leaves no training image of class {classes[without[0]]} of {name}; lower it"
            )
        index = held if split == VALIDATION else rest
    check_limit(limit, count=len(index), classes=len(classes), split=split, name=name, validation=validation)
    if limit is not None and limit < len(index):
        index = index[balanced_subset(labels[index], limit, name, split)]
    return index


def leaving_no_single(count: int, batch_size: int) -> int:
    """`batch_size`, lowered where a last batch of one sample would be left: batch-norm after a global pooling cannot
    take the statistics of a single sample."""
    while batch_size > 2 and count % batch_size == 1:
        batch_size -= 1
    return batch_size
