"""Bytes of each part of a run, for each place and phase: what follows from its sizes and from what can be chosen.

A phase is as large as its fullest moment. What another moment of it takes beyond that is an item of its own, so that
the items of a phase add up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastar.evaluation.forward import ENDS, ForwardBytes, Shown, beside_models, passes_bytes
from fastar.experiments.facts import (
    DRAWN_BESIDE,
    DataFacts,
    gathered,
    short_batch,
    shown_bytes,
)
from fastar.experiments.statistics_batches import LOOKED_AT
from fastar.matching import EXAMPLE_BATCHES, comparing_bytes, working_bytes
from fastar.runtime.footprint import Footprint
from fastar.runtime.memory import models_that_fit
from fastar.symmetry import Symmetry
from fastar.training import PART_ROWS
from fastar.training.prefetch import SLOTS
from fastar.training.sources import automatic, pinned_bytes

PHASES = ("reading", "training", "matching", "evaluation")
# Files of a training kept at a time: two, the best, one new.
KEPT_FILES = 4
# Batches of decoded images on the host at a time: two ahead, the one in use and the one being filled.
DECODED = 4
# What cuBLAS takes for each thread and stream that multiplies matrices on a Hopper GPU (`CUBLAS_WORKSPACE_CONFIG`).
CUBLAS_BYTES = 32 << 20
# Threads that multiply: the main one, autograd's, and two lanes of matching.
CUBLAS_THREADS, CUBLAS_OF_A_GRAPH = 4, 2


@dataclass(frozen=True)
class Item:
    """Some bytes in a place ("gpu", "host" or "disk") during a phase (None: always)."""

    place: str
    what: str
    bytes: int
    phase: str | None = None


@dataclass(frozen=True)
class Choice:
    """The settings that can be chosen to make a run fit."""

    store: str
    batch: int
    measured_batch: int
    graph: bool
    evaluation_graph: bool
    chunk: int | None

    def settings(self) -> dict[str, object]:
        """Keys and values."""
        return {
            "sources.store": self.store,
            "train.batch_size": self.batch,
            "evaluation.batch_size": self.measured_batch,
            "train.graph": self.graph,
            "evaluation.graph": self.evaluation_graph,
            "matching.chunk": self.chunk,
        }


@dataclass(frozen=True)
class Sizes:
    """What a run's tensors take, whatever is chosen. Bytes, where nothing else is said.

    Args:
        device: where the run is, or would be.
        limits: bytes that each place has.
        facts: the data set.
        sources, heldouts, evaluated: numbers of models.
        folder: whether the sources are given in files; `given`: how many of those are read whole.
        row: parameters of one network in fp32; `low`: in the precision that is trained in.
        buffers: of one network; `statistics`: what one takes while its batch-norm is re-estimated.
        moments: of the optimizer; `update`: what an update takes for a moment.
        optimizer: its name.
        image, measured_image: (C, H, W) in training, at its largest, and in evaluation.
        training, forward: of a step, and of evaluating a batch.
        symmetry: what is matched; `kicks`: how often out of its optimum.
        by_activations: whether it is matched by what units do; `kept`: bytes of a source's, by the images of a batch.
        batch_norm: whether statistics are taken.
        drop_last: whether training leaves out short batches.
        threads: CPU threads of matching.
    """

    device: torch.device
    limits: Mapping[str, int]
    facts: DataFacts
    sources: int
    heldouts: int
    folder: bool
    given: int
    evaluated: int
    row: int
    low: int
    buffers: int
    statistics: int
    moments: int
    update: int
    optimizer: str
    image: tuple[int, int, int]
    measured_image: tuple[int, int, int]
    training: Footprint
    forward: ForwardBytes
    symmetry: Symmetry
    kicks: int
    by_activations: bool
    kept: Callable[[int], int]
    batch_norm: bool
    drop_last: bool
    threads: int

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def place(self) -> str:
        """Where models are trained."""
        return "gpu" if self.gpu else "host"

    @property
    def free(self) -> int:
        """Bytes there."""
        return self.limits[self.place]

    def stored(self, choice: Choice) -> str:
        """Where the sources are: device, host or file."""
        if choice.store != "auto":
            return choice.store
        needed = self.sources * (self.row + self.beside(choice))
        return automatic(needed, self.free, self.limits["host"] if self.gpu else None)

    def beside(self, choice: Choice) -> int:
        """Bytes of what a source's units do, which are kept where its parameters are."""
        return self.kept(min(choice.batch, LOOKED_AT)) if self.by_activations else 0

    def holds_all(self, choice: Choice) -> bool:
        """Whether all sources are in the memory of the place where they are used."""
        stored = self.stored(choice)
        return stored == "device" or (stored == "host" and not self.gpu)


def items_of(sizes: Sizes, choice: Choice) -> list[Item]:
    """All that the run takes."""
    place, row = sizes.place, sizes.row
    held = _training(sizes, choice)
    items = [
        Item("host", "data set while it is read, and its file", sizes.facts.reading, "reading"),
        *(Item(place, "data set", sizes.facts.resident, phase) for phase in ("training", "evaluation")),
        *held,
        # While sources are matched, all of the star's training stays but what steps make and drop.
        *(replace(item, phase="matching") for item in held if item.what not in _OF_AN_EPOCH),
        Item(place, "data set", sizes.facts.resident, "matching"),
        *(Item(place, "cuBLAS: workspaces", _workspaces(sizes, choice), phase) for phase in PHASES[1:]),
    ]
    items += _matching(sizes, choice, sum(item.bytes for item in items if item.phase == "matching"))
    items += _evaluation(sizes, choice)
    if sizes.facts.streams:
        for phase, image, batch in (
            ("training", sizes.image, choice.batch),
            ("evaluation", sizes.measured_image, _shown(sizes, choice).batch),
        ):
            items.append(Item("host", "decoded batches ahead", DECODED * batch * math.prod(image), phase))
    items += _beside(sizes, choice)
    stored = sizes.stored(choice)
    if stored == "host" and sizes.gpu:
        pinned = pinned_bytes(sizes.sources * row)
        items += [Item("host", "sources, pinned", pinned, phase) for phase in ("training", "matching")]
    if stored == "file":
        items.append(Item("disk", "sources in a file", sizes.sources * row))
    kept = row + sizes.moments + sizes.buffers
    items.append(Item("host", "checkpoints while they are written", 2 * kept, "training"))
    models = sizes.heldouts + 1 + (0 if sizes.folder else sizes.sources)
    items.append(Item("disk", f"{models} models", models * (row + sizes.buffers)))
    items.append(Item("disk", "checkpoints of a training", KEPT_FILES * kept))
    if sizes.given:
        items.append(Item("host", "sources given as .pt files", sizes.given * row))
    if sizes.facts.disk is not None and not sizes.facts.written:
        items.append(Item("disk", "data set (.beton files)", sizes.facts.disk))
    return items


def _beside(sizes: Sizes, choice: Choice) -> list[Item]:
    """What the sources' units do, and the images it was seen on, while the star is trained."""
    if not sizes.by_activations:
        return []
    what, needed, stored = "what sources' units do", sizes.sources * sizes.beside(choice), sizes.stored(choice)
    images = EXAMPLE_BATCHES * min(choice.batch, LOOKED_AT) * 4 * math.prod(sizes.measured_image)
    phases = ("training", "matching")
    items = [Item("host", "images that they are seen on", images, phase) for phase in phases]
    if stored == "file":
        return [*items, Item("disk", what + ", in a file", needed)]
    if stored == "host" and sizes.gpu:
        return [*items, *(Item("host", what + ", pinned", pinned_bytes(needed), phase) for phase in phases)]
    return [*items, *(Item(sizes.place, what, needed, phase) for phase in phases)]


def _workspaces(sizes: Sizes, choice: Choice) -> int:
    """Of cuBLAS, which keeps them."""
    if not sizes.gpu:
        return 0
    return CUBLAS_BYTES * (CUBLAS_THREADS + (CUBLAS_OF_A_GRAPH if choice.graph or choice.evaluation_graph else 0))


# Names of what comes and goes with each step, and of what a graph keeps.
BATCHES, ACTIVATIONS, BETWEEN = "batches", "activations", "between two steps"
SHORT = "graph: a short last batch"
_OF_AN_EPOCH = (BATCHES, ACTIVATIONS, BETWEEN, SHORT)  # gone while sources are matched
POOL = "graph: its activations and inputs"


def _training(sizes: Sizes, choice: Choice) -> list[Item]:
    """A star's; a regular model's takes less."""
    facts, row, low, pixels = sizes.facts, sizes.row, sizes.low, math.prod(sizes.image)
    resident = sizes.sources if sizes.holds_all(choice) else SLOTS
    activations = sizes.training.of(choice.batch)
    block = gathered(facts, pixels, choice.batch, facts.train, sizes.device.type)
    coming = block * pixels * facts.coming
    if not facts.streams:
        coming += facts.train * DRAWN_BESIDE
    # Whether an epoch has left all finite is seen by a copy of theta's sizes, and by tables of truths.
    between = max(coming, sizes.update, row + 3 * row // 4)
    items = [
        ("star: theta, working weights, gradients", row + 2 * low),
        (f"{sizes.optimizer}: moments", sizes.moments),
        ("last good state", row + sizes.buffers),
        (f"sources: {resident} of {sizes.sources} rows", resident * row),
        (BATCHES, 4 * pixels * block),
    ]
    if not choice.graph:
        items += [(ACTIVATIONS, activations), (BETWEEN, max(0, between - activations))]
    else:
        # The graph's memory is its own for as long as it can be replayed: what else is needed comes on top.
        items.append((POOL, max(activations, sizes.update) + 4 * pixels * choice.batch))
        before = row + low + sizes.moments + sizes.buffers  # what capturing puts back
        rest = 0 if sizes.drop_last else short_batch(facts.train, choice.batch)
        items += [(SHORT, sizes.training.of(rest) if rest else 0)]
        items += [(BETWEEN, max(0, between - items[-1][1], before - items[-1][1]))]
    return [Item(sizes.place, what, size, "training") for what, size in items]


def _matching(sizes: Sizes, choice: Choice, taken: int) -> list[Item]:
    """Beside what is `taken` by then."""
    if sizes.holds_all(choice) or not sizes.gpu:  # in place: a file's rows are a CPU's own memory too
        part, rows = sizes.sources, 0
    else:
        part = max(1, min(sizes.sources, PART_ROWS, sizes.free // 8 // sizes.row))  # as `SourcesStore.parts`
        rows = part * sizes.row
    left = max(sizes.free - taken - rows, 0)
    return [
        Item(sizes.place, f"matching: {part} sources at a time", rows, "matching"),
        Item(sizes.place, "matching: copies and scores", _working(sizes, choice, part, left), "matching"),
    ]


def _working(sizes: Sizes, choice: Choice, count: int, left: int) -> int:
    shared: dict[str, Any] = {"gpu": sizes.gpu, "threads": sizes.threads, "chunk": choice.chunk}
    by_weights = working_bytes(sizes.symmetry, count, left, kicks=sizes.kicks, **shared)
    if not sizes.by_activations:
        return by_weights
    images = min(choice.batch, LOOKED_AT)
    looking = sizes.forward.of(images, 1, sizes.device) + 4 * images * math.prod(sizes.measured_image)
    comparing = comparing_bytes(sizes.symmetry, sizes.beside(choice), looking, count, left, **shared)
    return max(by_weights, comparing)  # to measure the objective, sources are moved as weights' are


def _shown(sizes: Sizes, choice: Choice) -> Shown:
    batch = choice.batch if sizes.batch_norm else None
    return shown_bytes(sizes.facts, sizes.measured_image, choice.measured_batch, batch, sizes.device.type)


def _evaluation(sizes: Sizes, choice: Choice) -> list[Item]:
    facts, row, image = sizes.facts, sizes.row, sizes.measured_image
    shown, evaluated = _shown(sizes, choice), sizes.evaluated
    pixels, largest = math.prod(image), shown.batch
    network = row + sizes.buffers
    beside = beside_models(sizes.forward, row, evaluated, shown, sizes.device) if sizes.gpu else None
    free = max(0, sizes.free - facts.resident - network - _workspaces(sizes, choice))
    rows = models_that_fit(row + sizes.statistics, free, evaluated, beside, gpu=sizes.gpu)
    passes = passes_bytes(sizes.forward, evaluated, shown, sizes.device)
    models, ends = rows * (row + sizes.statistics), ENDS * row + network
    graph = 0
    if choice.evaluation_graph:
        short = max(
            short_batch(facts.train, choice.measured_batch),
            short_batch(facts.validation, choice.measured_batch),
            short_batch(facts.test, choice.measured_batch),
            short_batch(facts.train, choice.batch) if sizes.batch_norm else 0,
        )
        graph = 4 * pixels * largest + (sizes.forward.of(short, evaluated, sizes.device) if short else 0)
    barriers = models + ends + passes + graph
    # Other moments: a model is measured when it has just been trained, its state still there; pairs are matched.
    own = 4 * network + passes_bytes(sizes.forward, 1, shown, sizes.device)
    part = min(PART_ROWS, sizes.sources, models_that_fit(row, free, PART_ROWS, gpu=sizes.gpu))
    left = max(free - (part + 1) * row, 0)
    pairs = (part + 1) * row + _working(sizes, choice, part, left)
    items = [
        (f"{rows} of {evaluated} models at a time", models),
        ("ends of paths, and a network", ends),
        (f"images and activations, batch of {largest}", passes),
        ("graph: its inputs, and a short last batch", graph),
        ("a model just trained, or pairs matched", max(0, own - barriers, pairs - barriers)),
    ]
    return [Item(sizes.place, what, size, "evaluation") for what, size in items]


def during(items: list[Item], place: str, phase: str) -> int:
    """Bytes taken in `place` during a phase."""
    return sum(item.bytes for item in items if item.place == place and item.phase in (None, phase))


def too_small(items: list[Item], limits: Mapping[str, int]) -> set[tuple[str, str]]:
    """(place, phase) of all that does not fit."""
    return {(place, phase) for place in limits for phase in PHASES if during(items, place, phase) > limits[place]}


def _halves(number: int) -> Iterator[int]:
    while number >= 4:
        number //= 2
        yield number


def remedy(sizes: Sizes, choice: Choice) -> dict[str, object] | None:
    """The settings that make the run fit, as few and as harmless as can be: first what changes no result, then smaller
    batches of training. What none of them can change is left aside: the disk, and reading the data. None: there are
    none; empty: it fits as it is."""
    others = {
        (p, phase) for p, phase in too_small(items_of(sizes, choice), sizes.limits) if p == "disk" or phase == "reading"
    }
    stores = [s for s in ("device", "host", "file") if s != sizes.stored(choice) and (s != "host" or sizes.gpu)]
    options = (
        [choice.batch, *_halves(choice.batch)],
        [choice.measured_batch, *_halves(choice.measured_batch)],
        [choice.store, *(s for s in stores if s != "device")],
        list(dict.fromkeys([choice.graph, False])),
        list(dict.fromkeys([choice.evaluation_graph, False])),
        list(dict.fromkeys([choice.chunk, 1])),
    )
    wanted = choice.settings()
    best: dict[str, object] | None = None
    for batch, measured, store, graph, evaluation_graph, chunk in itertools.product(*options):
        if best is not None and batch != best.get("train.batch_size", choice.batch):
            break  # all with a larger batch were tried
        other = Choice(store, batch, measured, graph, evaluation_graph, chunk)
        changed = {key: value for key, value in other.settings().items() if value != wanted[key]}
        if (best is None or len(changed) < len(best)) and too_small(items_of(sizes, other), sizes.limits) <= others:
            best = changed
    return best
