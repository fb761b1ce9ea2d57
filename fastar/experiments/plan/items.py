"""Memory and disk at a run's fullest moments: exact by arithmetic, and activations by counting at two batch sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from fastar.config import Settings
from fastar.data.in_memory import BLOCK_BYTES
from fastar.evaluation.batch_norm import statistics_bytes
from fastar.evaluation.paths import ENDS
from fastar.experiments.plan.sizes import DataCounts, evaluated_models, held_bytes, training_sides
from fastar.experiments.session import Session
from fastar.experiments.statistics_batches import LOOKED_AT
from fastar.flat import FlatLayout
from fastar.matching import EXAMPLE_BATCHES, Extent, cache_bytes, extra_bytes
from fastar.runtime.live_bytes import LiveBytes
from fastar.runtime.memory import models_that_fit
from fastar.runtime.progress import size_text
from fastar.symmetry import Symmetry
from fastar.training import PART_ROWS, resolve_precision
from fastar.training.optimizers import OPTIMIZERS
from fastar.training.prefetch import SLOTS
from fastar.training.sources import automatic, pinned_bytes

MATCHING = "matching, at most"
MOMENTS = ("training", "evaluation")
# Files of a training kept at a time: two, the best, one new.
KEPT_FILES = 4
# Bytes of each value of the next images while they are made beside the last ones: fp32, and what they are made of.
NEXT = 5


@dataclass(frozen=True)
class Item:
    """Some bytes in a place ("gpu", "host" or "disk") at a moment (None: always); `exact`, or estimated."""

    place: str
    what: str
    bytes: int
    phase: str | None = None
    exact: bool = True


class NetworkBytes(NamedTuple):
    """Bytes of a network: a `row` of its parameters in fp32, the same in the precision that is trained in (`low`), its
    `buffers`, and what is `kept` of each source to match by activations."""

    row: int
    low: int
    buffers: int
    kept: int = 0


def network_bytes(model: nn.Module, dtype: torch.dtype, kept: int = 0) -> NetworkBytes:
    """Count the bytes of `model`, trained in `dtype`."""
    numel = FlatLayout.from_module(model).numel
    return NetworkBytes(4 * numel, dtype.itemsize * numel, sum(buffer.nbytes for buffer in model.buffers()), kept)


def place_of_sources(settings: Settings, network: NetworkBytes, limits: dict[str, int]) -> str:
    """The place of the sources' rows: device (on a CPU the host is the device), host or file."""
    store, needed = settings.sources.store, settings.sources.number * (network.row + network.kept)
    if "gpu" in limits:
        return automatic(needed, limits["gpu"], limits["host"]) if store == "auto" else store
    if store == "auto":
        return automatic(needed, limits["host"], None)
    return "file" if store == "file" else "device"


def exact_items(settings: Settings, counts: DataCounts, network: NetworkBytes, limits: dict[str, int]) -> list[Item]:
    """All that is known without running anything."""
    device = "gpu" if "gpu" in limits else "host"
    stored, number, row = place_of_sources(settings, network, limits), settings.sources.number, network.row
    rows, kept = number if stored == "device" else SLOTS, number * network.kept
    moments = row * OPTIMIZERS[settings.train.optimizer].MOMENTS
    star = 2 * row + 2 * network.low + moments + network.buffers
    items = [
        Item(device, "data set", held_bytes(settings, counts)),
        Item(device, "star: weights, gradients, moments, last good state", star, "training"),
        Item(device, f"sources: {rows} of {number} rows", rows * row, "training"),
    ]
    if stored == "device":
        items.append(Item(device, "sources' activations", kept, "training"))
    elif stored == "host":
        items.append(Item("host", "sources, pinned", pinned_bytes(number * row) + pinned_bytes(kept), "training"))
    else:
        items.append(Item("disk", "sources in a file", number * row + kept))
    models = settings.sources.heldout + 1 + (0 if settings.sources.folder is not None else number)
    items.append(Item("disk", f"{models} models", models * (row + network.buffers)))
    items.append(Item("disk", "checkpoints of a training", KEPT_FILES * (row + moments + network.buffers)))
    if counts.disk is not None and not counts.written:
        items.append(Item("disk", "data set (.beton files)", counts.disk))
    return items


def total(items: list[Item], place: str, moment: str | None = None) -> int:
    """Bytes taken in `place` at a moment."""
    return sum(item.bytes for item in items if item.place == place and item.phase in (None, moment))


def shortages(items: list[Item], limits: dict[str, int]) -> list[str]:
    """A line for all that does not fit; of the disk it says what to do."""
    found = []
    moments = [(place, moment) for place in limits if place != "disk" for moment in MOMENTS]
    for place, moment in (*moments, ("disk", "the run")):
        needed = total(items, place, moment)
        if needed > limits[place]:
            remedy = "; free some, choose --out on another disk, or use fewer sources" if place == "disk" else ""
            sizes = f"needs {size_text(needed)}, {size_text(limits[place])} are there"
            found.append(f"{place}: {moment} {sizes}{remedy}")
    return found


def activation_bytes(
    model: nn.Module, shape: tuple[int, ...], most: int, dtype: torch.dtype = torch.float32, *, training: bool
) -> Callable[[int], int]:
    """Peak bytes of a batch by its number of images, on a straight line through those of two batches without memory.

    Peak memory is convex in the batch size: up to `most` images it is never underestimated.

    Args:
        model: put into training or evaluation mode; its tensors are not touched.
        shape: (C, H, W) of an image.
        training: a step in `dtype` (forward, backward, and the new gradients), else an evaluation.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes seconds to import

    def peak(images: int) -> int:
        tensors = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            low = training and tensor.ndim > 1  # as `flat.WorkingWeights` holds them
            tensors[name] = torch.empty_like(tensor, dtype=dtype if low else None, device="cpu")
            tensors[name].requires_grad_(tensor.requires_grad)
        pixels = torch.empty(images, *shape, dtype=torch.float32, device="cpu").to(memory_format=torch.channels_last)
        labels = torch.empty(images, dtype=torch.int64, device="cpu")
        with LiveBytes() as live, torch.set_grad_enabled(training):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32, cache_enabled=False):
                logits = torch.func.functional_call(model, tensors, (pixels,))
            loss = F.cross_entropy(logits.float(), labels)
            if training:
                loss.backward()
        return live.peak

    model.train(training)
    few = 16  # batch-norm takes statistics of at least two
    with FakeTensorMode(allow_non_fake_inputs=True):
        low, high = peak(few), peak(max(most, 2 * few))
    slope = (high - low) / (max(most, 2 * few) - few)
    return lambda images: max(0, round(low + slope * (images - few)))


class Counted(NamedTuple):
    """Counted once of a run, whatever is then changed to make it fit: batch-norm `statistics` are bytes of a model,
    `training` and `forward` bytes of a batch by its images, `pixels` and `shown` values of an image there."""

    network: NetworkBytes
    symmetry: Symmetry
    statistics: int
    training: Callable[[int], int]
    forward: Callable[[int], int]
    pixels: int
    shown: int


def count(session: Session, *, gpu: bool) -> Counted:
    """Count a run's network without data; `gpu`: it is trained on a GPU, here or elsewhere."""
    settings, image, symmetry = session.settings, session.data.image, session.network.symmetry
    batch, precision = settings.train.batch_size, settings.train.precision
    if gpu and session.device.type == "cpu":  # any GPU that is worth planning for has bf16
        dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(precision, torch.bfloat16)
    else:
        dtype = resolve_precision(precision, session.device)
    model, kept = session.network.build(seed=0, device="cpu"), 0
    if settings.matching.by_activations and symmetry.groups:
        images = torch.empty(min(batch, LOOKED_AT), *image, device="meta", dtype=torch.float32)
        kept = cache_bytes(model, symmetry, [images] * EXAMPLE_BATCHES)
    side = max(training_sides(session))
    largest = (image[0], side, side) if settings.dataset.spec.variable_size else image
    return Counted(
        network_bytes(model, dtype, kept),
        symmetry,
        statistics_bytes(model),
        activation_bytes(model, largest, batch, dtype, training=True),
        activation_bytes(model, image, max(batch, settings.evaluation.batch_size), training=False),
        math.prod(largest),
        math.prod(image),
    )


def items_of(settings: Settings, counts: DataCounts, limits: dict[str, int], counted: Counted) -> list[Item]:
    """All that the run takes with these settings."""
    device, network, batch = "gpu" if "gpu" in limits else "host", counted.network, settings.train.batch_size

    def images_and(running: int, images: int, pixels: int) -> int:
        """Bytes of a batch of images in fp32, and of `running` it or of making the next ones, whatever is more."""
        if not settings.dataset.spec.variable_size:  # a set that is held makes them in blocks of batches
            block = BLOCK_BYTES["cuda" if device == "gpu" else "cpu"] // (4 * pixels * images)
            images = min(max(1, block) * images, counts.train)
        return 4 * images * pixels + max(running, NEXT * images * pixels)

    items = exact_items(settings, counts, network, limits)
    step = images_and(counted.training(batch), batch, counted.pixels)
    matching = _matching_bytes(settings, limits, counted, max(0, limits[device] - total(items, device, "training")))
    what, most = (f"a step on {batch} images", step) if step >= matching else (MATCHING, matching)
    if settings.train.graph:  # its memory stays while there is matching
        what, most = f"a graph on {batch} images, and matching", step + matching
    items.append(Item(device, what, most, "training", exact=False))

    # Losses are measured in one batch size, batch-norm statistics in the other.
    batches = (settings.evaluation.batch_size, *([batch] if counted.statistics else []))
    running = max(images_and(counted.forward(size), size, counted.shown) for size in batches)
    ends = (ENDS + 1) * network.row + network.buffers
    free = max(0, limits[device] - total(items, device, "evaluation") - network.row - network.buffers)
    wanted, each = evaluated_models(settings), network.row + counted.statistics
    extra = running + ENDS * network.row if device == "gpu" else None
    models = models_that_fit(each, free, wanted, extra, gpu=device == "gpu")
    items.append(Item(device, f"{models} of {wanted} models at a time, and ends", models * each + ends, "evaluation"))
    items.append(Item(device, "images and activations", running, "evaluation", exact=False))
    return items


def _matching_bytes(settings: Settings, limits: dict[str, int], counted: Counted, left: int) -> int:
    """Bytes that matching takes at most, where `left` are: sources that are fetched, their copies and scores."""
    network, number, fetched, gpu = counted.network, settings.sources.number, 0, "gpu" in limits
    if gpu and place_of_sources(settings, network, limits) != "device":  # as `SourcesStore.parts`
        number = min(number, PART_ROWS, max(1, limits["gpu"] // 8 // network.row))
        fetched = number * network.row
    images = min(settings.train.batch_size, LOOKED_AT)
    forward = counted.forward(images) + 4 * images * counted.shown if network.kept else 0
    free, cached = max(0, left - fetched), network.kept
    extent = Extent(settings.matching, counted.symmetry, number, free, gpu, settings.workers, cached, forward)
    return fetched + extra_bytes(extent)
