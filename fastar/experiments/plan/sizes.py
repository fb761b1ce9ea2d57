"""Sizes of a run that follow from its settings and data: samples, models, bytes, and what does not fit."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from fastar.config import Settings, parse_bytes
from fastar.data.in_memory import BLOCK_BYTES, NORMALISED_BYTES
from fastar.data.raw_arrays import RawArrays, stands_in
from fastar.data.splits import check_limit, held_out
from fastar.experiments.session import Session
from fastar.experiments.user_task import UserData
from fastar.flat import FlatLayout
from fastar.runtime.memory import free_bytes, gpu_bytes
from fastar.runtime.progress import size_text
from fastar.training import resolution
from fastar.training.optimizers import OPTIMIZERS
from fastar.training.prefetch import SLOTS
from fastar.training.sources import automatic, pinned_bytes

if TYPE_CHECKING:
    from fastar.data.ffcv.folder import DatasetFiles

MOMENTS = ("training", "evaluation")
# Label and place (int64) of an image in a set that is held.
HELD_EXTRA = 16
# Files of a training kept at a time: two, the best, one new.
KEPT_FILES = 4


@dataclass(frozen=True)
class DataCounts:
    """Numbers of samples that are trained on, kept out of training, and tested on.

    Args:
        classes: None: nothing depends on their number.
        disk: bytes of the files, where all images are of one size.
        written: they are there.
        held: bytes of tensors that a user gave.
    """

    train: int
    validation: int
    test: int
    classes: int | None
    disk: int | None
    written: bool
    held: int | None = None


def counts_of(session: Session) -> DataCounts | None:
    """The counts of a run's data: of named ones as `data_counts`, of a user's by themselves."""
    data = session.data
    if not isinstance(data, UserData):
        return data_counts(session.settings)
    numbers = {split: data.size(split) for split in data.names()}
    return DataCounts(
        numbers["train"], numbers.get("validation", 0), numbers.get("test", 0), None, 0, True, data.held_bytes()
    )


def data_counts(settings: Settings, files: DatasetFiles | RawArrays | None = None) -> DataCounts | None:
    """The counts by the files that are there, by the names of raw images, or by what is published; None: nobody knows
    before the files are written.

    Args:
        files: the data set, where it is open already.

    Raises:
        FastarError: a limit that is more than there are images, or fewer than classes.
    """
    from fastar.data.raw.class_folders import count_images

    chosen, spec, listed = settings.dataset, settings.dataset.spec, None
    folder = chosen.directory.expanduser() / chosen.label
    if files is None and not stands_in(spec):
        from fastar.data.ffcv.folder import is_finished, open_files  # only here: FFCV takes seconds

        files = open_files(folder) if is_finished(folder) else None
    if files is not None:
        listed = files.count("train"), files.count("test"), len(files.classes)
    elif spec.variable_size and chosen.root is not None:
        listed = count_images(chosen.root.expanduser(), val_share=chosen.val_share)
    train, test, classes = listed or (spec.train, spec.test, spec.class_count)
    if train is None or test is None or classes is None:
        return None
    disk = None if spec.variable_size else (train + test) * spec.channels * spec.height * spec.width
    if stands_in(spec):
        disk = 0
    validation = held_out(train, chosen.validation, chosen.label)
    train -= validation
    check_limit(
        chosen.limit, count=train, classes=classes, split="train", name=chosen.label, validation=chosen.validation
    )
    return DataCounts(min(train, chosen.limit or train), validation, test, classes, disk, files is not None)


def held_bytes(settings: Settings, counts: DataCounts) -> int:
    """Bytes of a data set that is held on the device, as `in_memory.load` makes it; 0: it streams."""
    spec, evaluation = settings.dataset.spec, settings.evaluation
    if counts.held is not None:
        return counts.held
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


def training_sides(settings: Settings) -> list[int]:
    """The side of the images of each epoch of training, where it changes; else nothing."""
    train, star = settings.train, settings.star
    if not train.resolutions:
        return []
    epochs = max(train.epochs, star.epochs or 0)
    return [resolution(train, epoch) or settings.dataset.side for epoch in range(epochs)]


def limits_of(session: Session, *, here: bool) -> dict[str, int]:
    """Bytes that may be taken: of a GPU all, of the host and the disk what is free (what this run holds counts: its
    files, and tensors of a user on a CPU).

    `here`: on the present device, whatever GPU `gpu_memory` speaks of.
    """
    path, cap = session.run.path.absolute(), session.settings.gpu_memory
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    own = sum(f.stat().st_size for f in there.rglob("*") if f.is_file()) if session.run.config.is_file() else 0
    sizes = [] if cap is None or (here and session.device.type == "cpu") else [parse_bytes(cap)]
    if session.device.type == "cuda":
        sizes.append(gpu_bytes(session.device))
    held = 0 if sizes else session.data.held_bytes()
    limits = {"host": free_bytes(torch.device("cpu")) + held, "disk": shutil.disk_usage(there).free + own}
    return {"gpu": min(sizes), **limits} if sizes else limits


@dataclass(frozen=True)
class Item:
    """Some bytes in a place ("gpu", "host" or "disk") at a moment (None: always); `exact`, or estimated."""

    place: str
    what: str
    bytes: int
    phase: str | None = None
    exact: bool = True


def exact_items(
    settings: Settings, counts: DataCounts, limits: dict[str, int], model: nn.Module, dtype: torch.dtype, kept: int = 0
) -> list[Item]:
    """All that is known without running anything.

    Args:
        model: of the architecture; it is trained in `dtype`.
        kept: bytes that are kept of each source to match by activations.
    """
    device, on_gpu, spec = ("gpu" if "gpu" in limits else "host"), "gpu" in limits, settings.dataset.spec
    store, number, numel = settings.sources.store, settings.sources.number, FlatLayout.from_module(model).numel
    row, buffers = 4 * numel, sum(buffer.nbytes for buffer in model.buffers())
    if store == "auto":
        store = automatic(number * (row + kept), limits[device], limits["host"] if on_gpu else None)
    elif store == "host" and not on_gpu:
        store = "device"
    rows = number if store == "device" else SLOTS
    moments = row * OPTIMIZERS[settings.train.optimizer].MOMENTS
    star = 2 * row + 2 * dtype.itemsize * numel + moments + buffers
    items = [
        Item(device, "data set", held_bytes(settings, counts)),
        Item(device, "star: weights, gradients, moments, last good state", star, "training"),
        Item(device, f"sources: {rows} of {number} rows (sources.store={store})", rows * row, "training"),
    ]
    if not spec.variable_size and counts.held is None:
        images = 4 * spec.channels * spec.height * spec.width * counts.train
        items.append(Item(device, "images made at a time", min(BLOCK_BYTES["cuda" if on_gpu else "cpu"], images)))
    if store == "device":
        items.append(Item(device, "sources' activations", number * kept, "training"))
    elif store == "host":
        items.append(
            Item("host", "sources, pinned", pinned_bytes(number * row) + pinned_bytes(number * kept), "training")
        )
    else:
        items.append(Item("disk", "sources in a file", number * (row + kept)))
    models = settings.sources.heldout + 1 + (0 if settings.sources.folder is not None else number)
    items.append(Item("disk", f"{models} models", models * (row + buffers)))
    items.append(Item("disk", "checkpoints of a training", KEPT_FILES * (row + moments + buffers)))
    if counts.disk is not None and not counts.written:
        items.append(Item("disk", "data set (.beton files)", counts.disk))
    return items


def total(items: list[Item], place: str, moment: str | None = None) -> int:
    """Bytes taken in `place` at a moment."""
    return sum(item.bytes for item in items if item.place == place and item.phase in (None, moment))


def shortages(items: list[Item], limits: dict[str, int]) -> list[str]:
    """A line for all that does not fit; of the disk it says what to do."""
    found = []
    for place, limit in limits.items():
        for moment in MOMENTS if place != "disk" else ("the run",):
            needed = total(items, place, moment)
            if needed > limit:
                remedy = (
                    "; free some, choose a run folder (out) on another disk, or use fewer sources"
                    if place == "disk"
                    else ""
                )
                sizes = f"needs {size_text(needed)}, {size_text(limit)} are there"
                found.append(f"{place}: {moment} {sizes}{remedy}")
    return found
