"""Numbers of a run that are known beforehand: images, models that are measured, and bytes that each place has."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fastar.config import Settings, parse_bytes
from fastar.data.in_memory import NORMALISED_BYTES
from fastar.data.raw_arrays import RawArrays, stands_in
from fastar.data.splits import check_limit, held_out
from fastar.experiments.session import Session
from fastar.runtime.memory import free_bytes, gpu_bytes
from fastar.training import resolution

if TYPE_CHECKING:
    from fastar.data.ffcv.folder import DatasetFiles

# Label and place (int64) of an image in a set that is held.
HELD_EXTRA = 16


@dataclass(frozen=True)
class DataCounts:
    """Numbers of images that are trained on, kept out of training, and tested on; classes. `disk`: bytes of the files,
    None: not known until they are `written`."""

    train: int
    validation: int
    test: int
    classes: int
    disk: int | None
    written: bool


def data_counts(settings: Settings, files: DatasetFiles | RawArrays | None = None) -> DataCounts | None:
    """The counts by the files that are there, by the names of raw images, or by what is published; None: nobody knows
    before the files are written.

    Args:
        files: the data set, where it is open already.

    Raises:
        FastarError: a limit that is more than there are images, or fewer than classes.
    """
    from fastar.data.raw.class_folders import count_images

    chosen = settings.dataset
    spec, folder, disk = chosen.spec, chosen.directory.expanduser() / chosen.label, None
    if stands_in(spec):
        disk = 0
    elif files is None:
        from fastar.data.ffcv.folder import is_finished, open_files  # only here: FFCV takes seconds

        files = open_files(folder) if is_finished(folder) else None
    written = files is not None
    if files is not None:
        train, test, classes = files.count("train"), files.count("test"), len(files.classes)
        if not isinstance(files, RawArrays):
            disk = sum(files.path(split).stat().st_size for split in ("train", "test"))
    else:
        listed = None
        if spec.variable_size and chosen.root is not None:
            listed = count_images(chosen.root.expanduser(), val_share=chosen.val_share)
        published = (spec.train, spec.test, spec.class_count)
        known = listed if listed is not None else tuple(number for number in published if number is not None)
        if len(known) < len(published):
            return None
        train, test, classes = known
        if disk is None and not spec.variable_size:
            disk = (train + test) * spec.channels * spec.height * spec.width
    validation = held_out(train, chosen.validation, chosen.label)
    train -= validation
    check_limit(
        chosen.limit, count=train, classes=classes, split="train", name=chosen.label, validation=chosen.validation
    )
    return DataCounts(min(train, chosen.limit or train), validation, test, classes, disk, written)


def held_bytes(settings: Settings, counts: DataCounts) -> int:
    """Bytes of a data set that is held on the device, as `in_memory.load` makes it; 0: it streams."""
    spec, evaluation = settings.dataset.spec, settings.evaluation
    if spec.variable_size:
        return 0
    kept = [counts.train, counts.test, min(counts.validation, evaluation.limit or counts.validation)]
    limited = (evaluation.limit, counts.train), (evaluation.test_limit, counts.test)
    kept += [limit for limit, whole in limited if limit is not None and limit < whole]
    pixels = spec.channels * spec.height * spec.width
    return sum(n * (pixels * (5 if 4 * n * pixels <= NORMALISED_BYTES else 1) + HELD_EXTRA) for n in kept)


def evaluated_models(settings: Settings) -> int:
    """Models that evaluation looks at: the inner points of all paths, and the ends."""
    sources, heldouts, wanted = settings.sources.number, settings.sources.heldout, settings.evaluation.star_sources
    regular = sources + heldouts
    pairs = min(settings.evaluation.regular_pairs, regular * (regular - 1) // 2)
    stars = heldouts + (sources if wanted is None else min(sources, wanted))
    paths = stars + pairs * (2 if settings.ends_matched else 1)
    return paths * (settings.evaluation.points - 2) + 1 + stars + min(2 * pairs * 2, regular + pairs)


def training_sides(session: Session) -> list[int]:
    """The side of the images of each epoch of training."""
    train, star = session.settings.train, session.settings.star
    epochs = max(train.epochs, star.epochs or 0)
    return [resolution(train, epoch) or max(session.data.image[1:]) for epoch in range(epochs)]


def limits_of(session: Session, *, here: bool) -> dict[str, int]:
    """Bytes that may be taken: of a GPU all, of the host and the disk what is free (what this run holds counts).

    `here`: on the present device, whatever GPU `gpu_memory` speaks of.
    """
    path, cap = session.run.path.absolute(), session.settings.gpu_memory
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    own = sum(f.stat().st_size for f in there.rglob("*") if f.is_file()) if session.run.config.is_file() else 0
    sizes = [] if cap is None or (here and session.device.type == "cpu") else [parse_bytes(cap)]
    if session.device.type == "cuda":
        sizes.append(gpu_bytes(session.device))
    limits = {"host": free_bytes(torch.device("cpu")), "disk": shutil.disk_usage(there).free + own}
    return {"gpu": min(sizes), **limits} if sizes else limits
