"""Numbers of samples of a run's data, which may not be written yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastar.config import Settings
from fastar.data.in_memory import held_bytes
from fastar.data.raw_arrays import RawArrays, stands_in
from fastar.data.splits import check_limit, held_out

if TYPE_CHECKING:
    from fastar.data.ffcv.folder import DatasetFiles


@dataclass(frozen=True)
class DataCounts:
    """Numbers of samples that are trained on, kept out of training, and tested on.

    Args:
        held: bytes that they take on the device; 0: they stream.
        classes: None: nothing depends on their number.
        pixels: values in an image, where all are of one size.
        unwritten: bytes of files that are yet to be written, where they are known.
        written: the files are there.
    """

    train: int
    validation: int
    test: int
    held: int
    classes: int | None = None
    pixels: int = 0
    unwritten: int = 0
    written: bool = True


def data_counts(settings: Settings, files: DatasetFiles | RawArrays | None = None) -> DataCounts | None:
    """The counts of a data set of a name, by the files that are there, by the names of raw images, or by what is
    published; None: nobody knows before the files are written.

    Args:
        files: the data set, where it is open already.

    Raises:
        FastarError: a limit that is more than there are images, or fewer than classes.
    """
    from fastar.data.raw.class_folders import count_images

    chosen, spec, measured = settings.dataset, settings.dataset.spec, settings.evaluation
    folder = chosen.directory.expanduser() / chosen.label
    if files is None and not stands_in(spec):
        from fastar.data.ffcv.folder import is_finished, open_files  # only here: FFCV takes seconds

        files = open_files(folder) if is_finished(folder) else None
    listed = None
    if files is not None:
        listed = files.count("train"), files.count("test"), len(files.classes)
    elif spec.variable_size and chosen.root is not None:
        listed = count_images(chosen.root.expanduser(), val_share=chosen.val_share)
    stored, test, classes = listed or (spec.train, spec.test, spec.class_count)
    if stored is None or test is None or classes is None:
        return None
    kept = held_out(stored, chosen.validation, chosen.label)
    check_limit(
        chosen.limit,
        count=stored - kept,
        classes=classes,
        split="train",
        name=chosen.label,
        validation=chosen.validation,
    )
    train = min(stored - kept, chosen.limit or stored)
    pixels = 0 if spec.variable_size else spec.channels * spec.height * spec.width
    splits = [train, test, min(kept, measured.limit or kept)]  # and those that are measured in part
    limited = (measured.limit, train), (measured.test_limit, test)
    splits += [limit for limit, whole in limited if limit is not None and limit < whole]
    held = sum(held_bytes(count, pixels) for count in splits) if pixels else 0
    unwritten = 0 if files is not None or stands_in(spec) else (stored + test) * pixels
    return DataCounts(train, kept, test, held, classes, pixels, unwritten, files is not None)
