"""Sizes of a run that follow from its settings and data: models, bytes, and what does not fit."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fastar.config import Settings, parse_bytes
from fastar.data.counts import DataCounts
from fastar.data.in_memory import BLOCK_BYTES
from fastar.experiments.session import Session
from fastar.flat import FlatLayout
from fastar.runs import files_below
from fastar.runtime import ranks
from fastar.runtime.memory import free_bytes, gpu_bytes
from fastar.runtime.progress import size_text
from fastar.training import resolution
from fastar.training.optimizers import OPTIMIZERS
from fastar.training.prefetch import SLOTS
from fastar.training.sources import automatic, pinned_bytes

MOMENTS = ("training", "evaluation")
# Files of a training kept at a time: two, the best, one new.
KEPT_FILES = 4


def evaluated_models(settings: Settings) -> int:
    """Models that evaluation looks at: the inner points of all paths, and the ends."""
    sources, heldouts, wanted = settings.sources.number, settings.sources.heldout, settings.evaluation.star_sources
    regular = sources + heldouts
    cross = settings.evaluation.cross
    if cross is None:
        pairs = min(int(settings.evaluation.regular_pairs), regular * (regular - 1) // 2)
    else:
        pairs = min(sources, cross[0] or sources) * min(heldouts, cross[1] or heldouts)
    stars = heldouts + (sources if wanted is None else min(sources, wanted))
    paths = stars + pairs * (2 if settings.ends_matched else 1)
    return paths * (settings.evaluation.points - 2) + 1 + stars + min(2 * pairs * 2, regular + pairs)


def training_sides(settings: Settings) -> list[int]:
    """The side of the images of each epoch of training, where it changes; else nothing."""
    train = settings.train
    if not train.resolutions:
        return []
    epochs = max(train.epochs, settings.star_epochs)
    return [resolution(train, epoch) or settings.dataset.side for epoch in range(epochs)]


def limits_of(session: Session, *, here: bool) -> dict[str, int]:
    """Bytes that may be taken: of a GPU all, of the host and the disk what is free (what this run holds counts: its
    files, and tensors of a user on a CPU); `here`: on the present device, whatever GPU `gpu_memory` speaks of.
    """
    path, cap = session.run.path.absolute(), session.settings.gpu_memory
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    own = sum(map(_size, files_below(there))) if session.run.config.is_file() else 0
    sizes = [] if cap is None or (here and session.device.type == "cpu") else [parse_bytes(cap)]
    if session.device.type == "cuda":
        sizes.append(gpu_bytes(session.device))
    held = 0 if sizes else session.data.held_bytes()
    limits = {"host": free_bytes(torch.device("cpu")) + held, "disk": shutil.disk_usage(there).free + own}
    return {"gpu": min(sizes), **limits} if sizes else limits


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # another process has deleted it, or its target is gone
        return 0


@dataclass(frozen=True)
class Item:
    """Some bytes in a place ("gpu", "host" or "disk") at a moment (None: always); `exact`, or estimated."""

    place: str
    what: str
    bytes: int
    phase: str | None = None
    exact: bool = True


def exact_items(
    settings: Settings,
    counts: DataCounts,
    limits: dict[str, int],
    model: nn.Module,
    dtype: torch.dtype,
    kept: int = 0,
    processes: int = 1,
) -> list[Item]:
    """All that is known without running anything.

    Args:
        model: of the architecture; it is trained in `dtype`.
        kept: bytes that are kept of each source to match by activations.
        processes: that train models at once.
    """
    sources, on_gpu, numel = settings.sources, "gpu" in limits, FlatLayout.from_module(model).numel
    device, store, number = "gpu" if on_gpu else "host", sources.store, sources.number
    if settings.star.draws == "each":
        number = -(-number // ranks.started())  # each rank holds its share
    row, buffers = 4 * numel, sum(buffer.nbytes for buffer in model.buffers())
    if store == "auto":
        store = automatic(number * (row + kept), limits[device], limits["host"] if on_gpu else None)
    elif store == "host" and not on_gpu:
        store = "device"
    rows = number if store == "device" else SLOTS
    moments = row * OPTIMIZERS[settings.train.optimizer].MOMENTS
    star = 2 * row + 2 * dtype.itemsize * numel + moments + buffers
    items = [
        Item(device, "data set", counts.held),
        Item(device, "star: weights, gradients, moments, last good state", star, "training"),
        Item(device, f"sources: {rows} of {number} rows (sources.store={store})", rows * row, "training"),
    ]
    if counts.pixels:
        block = min(BLOCK_BYTES["cuda" if on_gpu else "cpu"], 4 * counts.pixels * counts.train)
        items.append(Item(device, "images made at a time", block))
    if store == "device":
        items.append(Item(device, "sources' activations", number * kept, "training"))
    elif store == "host":
        pinned = pinned_bytes(number * row) + pinned_bytes(number * kept)
        items.append(Item("host", "sources, pinned", pinned, "training"))
    else:
        items.append(Item("disk", "sources in a file", number * (row + kept)))
    models = sources.heldout + 1 + (sources.number if sources.folder is None else 0)
    items.append(Item("disk", f"{models} models", models * (row + buffers)))
    trainings = "a training" if processes == 1 else f"{processes} trainings"
    items.append(Item("disk", f"checkpoints of {trainings}", processes * KEPT_FILES * (row + moments + buffers)))
    if counts.unwritten:
        items.append(Item("disk", "data set (.beton files)", counts.unwritten))
    return items


def total(items: list[Item], place: str, moment: str) -> int:
    """Bytes taken in `place` at a moment."""
    return sum(item.bytes for item in items if item.place == place and item.phase in (None, moment))


def shortages(items: list[Item], limits: dict[str, int]) -> list[str]:
    """A line for all that does not fit; of the disk it says what to do."""
    found = []
    for place, limit in limits.items():
        for moment in MOMENTS if place != "disk" else ("the run",):
            needed = total(items, place, moment)
            if needed > limit:
                found.append(f"{place}: {moment} needs {size_text(needed)}, {size_text(limit)} are there")
                if place == "disk":
                    found[-1] += "; free some, choose a run folder (out) on another disk, or use fewer sources"
    return found
