"""Exact sizes of a run: images, and bytes of rows, data set, store and disk, by arithmetic alone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fastar import data
from fastar.config import Settings, parse_bytes
from fastar.data.in_memory import NORMALISED_BYTES
from fastar.experiments.session import Session
from fastar.runtime.memory import free_bytes, gpu_bytes
from fastar.runtime.progress import size_text
from fastar.training import resolution
from fastar.training.prefetch import SLOTS
from fastar.training.sources import automatic, pinned_bytes

PHASES = ("training", "matching", "evaluation")
# Files of a training kept at a time: two, the best, one new.
KEPT_FILES = 4
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


@dataclass(frozen=True)
class Item:
    """Some bytes in a place ("gpu", "host" or "disk") during a phase (None: always); `exact`, or estimated."""

    place: str
    what: str
    bytes: int
    phase: str | None = None
    exact: bool = True


def data_counts(settings: Settings) -> DataCounts | None:
    """The counts by the files that are there, by the names of raw images, or by what is published; None: nobody knows
    before the files are written.

    Raises:
        FastarError: a limit that is more than there are images, or fewer than classes.
    """
    chosen = settings.dataset
    spec, folder, disk = chosen.spec, chosen.directory.expanduser() / chosen.label, None
    written = data.is_finished(folder)
    if written:
        files = data.open_files(folder)
        train, test, classes = files.count("train"), files.count("test"), len(files.classes)
        disk = sum(files.path(split).stat().st_size for split in ("train", "test"))
    else:
        listed = None
        if spec.variable_size and chosen.root is not None:
            listed = data.count_images(chosen.root.expanduser(), val_share=chosen.val_share)
        published = (spec.train, spec.test, spec.class_count)
        known = listed if listed is not None else tuple(number for number in published if number is not None)
        if len(known) < len(published):
            return None
        train, test, classes = known
        if not spec.variable_size:
            disk = (train + test) * spec.channels * spec.height * spec.width
    validation = data.held_out(train, chosen.validation, chosen.label)
    train -= validation
    data.check_limit(
        chosen.limit, count=train, classes=classes, split="train", name=chosen.label, validation=chosen.validation
    )
    return DataCounts(min(train, chosen.limit or train), validation, test, classes, disk, written)


def held_bytes(settings: Settings, counts: DataCounts) -> int:
    """Bytes of a data set that is held on the device, as `data.load` makes it; 0: it streams."""
    spec, evaluation = settings.dataset.spec, settings.evaluation
    if spec.variable_size:
        return 0
    kept = [counts.train, counts.test]
    if counts.validation:
        kept.append(min(counts.validation, evaluation.limit or counts.validation))
    if evaluation.limit is not None and evaluation.limit < counts.train:
        kept.append(evaluation.limit)
    if evaluation.test_limit is not None and evaluation.test_limit < counts.test:
        kept.append(evaluation.test_limit)
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


@dataclass(frozen=True)
class Exact:
    """What the exact items follow from. Bytes: `row` of a network's parameters in fp32, `low` in the precision that is
    trained in, `buffers` of a network, `activations` that are kept of each source to match by. `limits`: bytes that
    each place has."""

    settings: Settings
    counts: DataCounts
    row: int
    low: int
    buffers: int
    activations: int
    limits: dict[str, int]

    @property
    def place(self) -> str:
        """The place where models are trained: gpu or host."""
        return "gpu" if "gpu" in self.limits else "host"

    @property
    def moments(self) -> int:
        """Bytes of the optimizer's."""
        return self.row * (1 if self.settings.train.optimizer == "sgd" else 2)

    def stored(self, store: str) -> str:
        """The place that `sources.store` means: device, host or file."""
        if store != "auto":
            return store
        needed = self.settings.sources.number * (self.row + self.activations)
        return automatic(needed, self.limits[self.place], self.limits["host"] if self.place == "gpu" else None)

    def in_place(self, store: str) -> bool:
        """True where all sources are in the memory that they are used in."""
        return self.stored(store) == "device" or (self.stored(store) == "host" and self.place == "host")

    def items(self, store: str) -> Iterator[Item]:
        """The items that are known without running anything."""
        sources, place, stored = self.settings.sources, self.place, self.stored(store)
        rows = sources.number if self.in_place(store) else SLOTS
        held = held_bytes(self.settings, self.counts)
        yield from (Item(place, "data set", held, phase) for phase in PHASES)
        for phase in ("training", "matching"):
            star = 2 * self.row + 2 * self.low + self.moments + self.buffers
            yield Item(place, "star: weights, gradients, moments, last good state", star, phase)
            yield Item(place, f"sources: {rows} of {sources.number} rows", rows * self.row, phase)
            if self.in_place(store):
                yield Item(place, "sources' activations", sources.number * self.activations, phase)
            elif stored == "host":
                pinned = pinned_bytes(sources.number * self.row) + pinned_bytes(sources.number * self.activations)
                yield Item("host", "sources, pinned", pinned, phase)
        if stored == "file":
            yield Item("disk", "sources in a file", sources.number * (self.row + self.activations))
        models = sources.heldout + 1 + (0 if sources.folder is not None else sources.number)
        yield Item("disk", f"{models} models", models * (self.row + self.buffers))
        yield Item("disk", "checkpoints of a training", KEPT_FILES * (self.row + self.moments + self.buffers))
        if self.counts.disk is not None and not self.counts.written:
            yield Item("disk", "data set (.beton files)", self.counts.disk)


def limits_of(session: Session, *, here: bool) -> dict[str, int]:
    """Bytes that may be taken: of a GPU all, of the host and the disk what is free (what this run holds counts).

    `here`: on the present device, whatever GPU `gpu_memory` speaks of.
    """
    path = session.run.path.absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    own = sum(f.stat().st_size for f in there.rglob("*") if f.is_file()) if session.run.config.is_file() else 0
    limits = {"host": free_bytes(torch.device("cpu")), "disk": shutil.disk_usage(there).free + own}
    cap = session.settings.gpu_memory
    sizes = [] if cap is None or (here and session.device.type == "cpu") else [parse_bytes(cap)]
    if session.device.type == "cuda":
        sizes.append(gpu_bytes(session.device))
    return {"gpu": min(sizes), **limits} if sizes else limits


def during(items: list[Item], place: str, phase: str) -> int:
    """Bytes taken in `place` during a phase."""
    return sum(item.bytes for item in items if item.place == place and item.phase in (None, phase))


def disk_problem(items: list[Item], limits: dict[str, int]) -> str | None:
    """A line where the disk is too small."""
    needed = during(items, "disk", PHASES[0])
    if needed <= limits["disk"]:
        return None
    sizes = f"{size_text(needed)} are needed, {size_text(limits['disk'])} are there"
    return f"disk: {sizes}; free some, choose --out on another disk, or use fewer sources"
