"""What a run will take, before anything runs: memory of the GPU and the host, disk, and hours.

Bytes of weights, gradients, moments, sources and of matching follow from the number of parameters; activations are
counted tensor by tensor (`training.footprint`); seconds are measured on the present device, or stated.
"""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fastar import data
from fastar.config import Settings, parse_bytes
from fastar.data.device import NORMALISED_BYTES
from fastar.data.reading import BATCH as READ_AT_ONCE
from fastar.data.reading import BUFFERS
from fastar.errors import FastarError
from fastar.experiments.context import Context, Shape
from fastar.experiments.hours import DataFacts, Work, evaluated_models, measured_rates, training_sides, work_of
from fastar.matching import working_bytes
from fastar.memory import free_bytes, gpu_bytes, resident_limit
from fastar.progress import size_text
from fastar.runs import RunFolder
from fastar.training import PART_ROWS, resolve_precision
from fastar.training.feed import SLOTS
from fastar.training.footprint import Footprint, evaluation_footprint, training_footprint
from fastar.training.placement import automatic, pinned_bytes

# Published sizes (train, test) and classes, for sets that are not written yet.
PUBLISHED = {
    "digits": (1_437, 360, 10),
    "fashion-mnist": (60_000, 10_000, 10),
    "mnist": (60_000, 10_000, 10),
    "cifar10": (50_000, 10_000, 10),
    "cifar100": (50_000, 10_000, 100),
    "imagenet": (1_281_167, 50_000, 1000),
}
# States of the model kept on the device to go back to, and files of a training kept at a time (two, the best, one new).
KEPT_STATES, KEPT_FILES = 2, 4

PHASES = ("reading", "training", "matching", "evaluation")


@dataclass(frozen=True)
class Item:
    """Some bytes in a place ("gpu", "host" or "disk") during a phase (None: always)."""

    place: str
    what: str
    bytes: int
    phase: str | None = None


@dataclass(frozen=True)
class Plan:
    """What a run will take. `limits`: bytes that each place has. `problems`: one line for each that does not fit."""

    title: str
    device: str
    items: list[Item]
    work: list[Work]
    limits: dict[str, int]
    rates: str
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def peak(self, place: str) -> int:
        """The most bytes that are taken in `place` at a time."""
        return max(self.during(place, phase) for phase in PHASES)

    def during(self, place: str, phase: str) -> int:
        """Bytes taken in `place` during a phase."""
        return sum(item.bytes for item in self.items if item.place == place and item.phase in (None, phase))

    def seconds(self) -> float | None:
        """Of all work; None where a rate is not known."""
        if any(work.seconds is None for work in self.work):
            return None
        return sum(work.times * (work.seconds or 0.0) for work in self.work)

    def as_dict(self) -> dict[str, Any]:
        """All of it, JSON-able: what the report shows."""
        needed = {place: {phase: self.during(place, phase) for phase in PHASES} for place in self.limits}
        return {**asdict(self), "needed": needed, "seconds": self.seconds()}


def plan_run(settings: Settings, out: Path, rate: float | None = None, loader: float | None = None) -> Plan:
    """Plan the run of `settings` in the folder `out`; nothing is written and no data are read.

    Args:
        rate: images per second of training, stated; None: measured here, where the run would be here.
        loader: images per second that loading can give; None: it is taken not to limit.

    Raises:
        FastarError: a setting out of range, or a set whose size is not known.
    """
    for option, value in (("--images-per-second", rate), ("--loader-images-per-second", loader)):
        if value is not None and not 0 < value < math.inf:
            raise FastarError(f"{option}={value} must be above 0")
    context = Context(settings, RunFolder(out))
    elsewhere = settings.gpu_memory is not None and context.device.type == "cpu"
    with nullcontext() if elsewhere else context.threads():
        return make_plan(context, images_per_second=rate, loader_images_per_second=loader, measure=not elsewhere)


def check_fits(context: Context) -> Plan:
    """Plan the run of `context` without timing anything.

    Raises:
        FastarError: it does not fit; which setting makes it fit.
    """
    plan = make_plan(context, measure=None)
    if plan.problems:
        raise FastarError(f"this run does not fit: {plan.problems[0]} (see `fastar plan`)")
    return plan


def data_facts(context: Context) -> DataFacts:
    """What is known of the data: from their files, from the names of raw images, or of what is published.

    Raises:
        FastarError: a set of the user's own whose files are not written yet.
    """
    chosen = context.settings.dataset
    folder = chosen.directory.expanduser() / chosen.label
    files: data.Files | None = None
    listed = None
    if data.is_finished(folder):
        files = data.open_images(folder) if chosen.of_any_size else data.open_files(folder)
    elif chosen.of_any_size and chosen.root is not None:
        listed = data.count_images(chosen.root.expanduser(), val_share=chosen.val_share)
    if files is not None:
        train, test, classes = files.count("train"), files.count("test"), len(files.classes)
        disk = sum(files.path(split).stat().st_size for split in ("train", "test"))
    elif listed is not None or chosen.name in PUBLISHED:
        train, test, classes = listed or PUBLISHED[chosen.name]
        disk = None
    else:
        raise FastarError(f"{folder}: not written yet; `python tools/write_ffcv.py --dataset {chosen.name}` writes it")
    train = min(train, chosen.limit or train)
    resident = reading = 0
    if not chosen.of_any_size:
        spec = data.dataset_spec(chosen.name)
        pixels = spec.channels * spec.height * spec.width
        whole = {"train": PUBLISHED[chosen.name][0] * pixels, "test": PUBLISHED[chosen.name][1] * pixels}
        if files is None:
            disk = sum(whole.values())
        else:
            whole = {split: files.path(split).stat().st_size for split in whole}
        on_host = 0
        for split, count in _splits_held(context.settings, train, test):
            # Bytes, and beside them normalised floats where those are few; the file they come from is mapped meanwhile.
            held = count * pixels * (5 if count * pixels * 4 <= NORMALISED_BYTES else 1)
            resident += held
            on_host = held + (on_host if context.device.type == "cpu" and context.settings.gpu_memory is None else 0)
            reading = max(reading, on_host + whole[split])
        reading += BUFFERS * READ_AT_ONCE * pixels
    return DataFacts(train, test, classes, disk, files is not None, resident, reading)


def _splits_held(settings: Settings, train: int, test: int) -> Iterator[tuple[str, int]]:
    """(split, images) of each data set that a run holds on the device, in the order in which they are read."""
    evaluation = settings.evaluation
    yield "train", train
    yield "test", test
    if evaluation.limit is not None and evaluation.limit < train:
        yield "train", evaluation.limit
    if evaluation.test_limit is not None and evaluation.test_limit < test:
        yield "test", evaluation.test_limit


def make_plan(
    context: Context,
    *,
    images_per_second: float | None = None,
    loader_images_per_second: float | None = None,
    measure: bool | None = True,
) -> Plan:
    """Plan the run of `context`; nothing is written and no data are read.

    Args:
        images_per_second: of training's forward and backward, stated; None: measured on the present device.
        loader_images_per_second: what loading can give; None: loading is taken not to limit.
        measure: seconds, of everything; false: of matching alone, which any machine can tell something of; None: none.

    Raises:
        FastarError: an unknown dataset, architecture or setting.
    """
    settings = context.settings
    facts = data_facts(context)
    gpu_memory = None if settings.gpu_memory is None else parse_bytes(settings.gpu_memory)
    on_gpu = context.device.type == "cuda" or gpu_memory is not None
    place = "gpu" if on_gpu else "host"
    dtype = _precision(settings.train.precision, context.device, on_gpu)
    context.known = Shape(context.image, facts.classes)  # the data need not be there

    def build() -> torch.nn.Module:
        return context.build(seed=0, device="cpu")

    model, layout = build(), context.layout
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    row, low = 4 * layout.numel, layout.numel * (4 if dtype == torch.float32 else 2)
    moments = row * (1 if settings.train.optimizer == "sgd" else 2)
    sources, heldouts = settings.sources.number, settings.sources.heldout
    batch = settings.train.batch_size
    sides = training_sides(context)
    shape = (context.image[0], max(sides), max(sides))  # of training, whose images may grow
    # Images as bytes and normalised, the batch in use and the next.
    images, measured_images = (2 * 5 * batch * math.prod(one) for one in (shape, context.image))

    limits = _limits(context, gpu_memory, on_gpu)
    free = limits[place]
    stored: str = settings.sources.store
    if stored == "auto":
        stored = automatic(sources * row, free, limits["host"] if on_gpu else None)
    resident = sources if stored == "device" else SLOTS
    activations = training_footprint(build, shape, dtype)
    items = [
        Item("host", "data set while it is read, and its file", facts.reading, "reading"),
        *(Item(place, "data set", facts.resident, phase) for phase in ("training", "evaluation")),
        Item(place, "star: theta, working weights, gradients", row + 2 * low, "training"),
        Item(place, f"{settings.train.optimizer}: moments", moments, "training"),
        Item(place, "last good states", KEPT_STATES * (row + buffers), "training"),
        Item(place, f"activations, batch of {batch}", activations.of(batch), "training"),
        Item(place, "batches", images, "training"),
        Item(place, f"sources: {resident} of {sources} rows", resident * row, "training"),
    ]
    if settings.train.graph:
        items.append(Item(place, "graph: what capturing puts back", 2 * row + low + moments, "training"))
    # While sources are matched, all of the star's training stays but activations and batches.
    over = ("activations", "batches", "graph")
    items += [replace(i, phase="matching") for i in items if i.phase == "training" and not i.what.startswith(over)]
    part = sources if stored == "device" else max(1, min(sources, PART_ROWS, free // 8 // row))  # as `store.parts`
    part_rows = 0 if stored == "device" else part * row
    left = max(free - sum(i.bytes for i in items if i.phase == "matching") - part_rows, 0)
    items.append(Item(place, f"matching: {part} sources at a time", part_rows, "matching"))
    working = working_bytes(context.symmetry, part, left, gpu=on_gpu, threads=settings.workers)
    items.append(Item(place, "matching: copies and scores", working, "matching"))
    evaluated = evaluated_models(context)
    rows = min(evaluated, max(1, resident_limit(free) // row))
    forward = evaluation_footprint(build, context.image)
    largest = max(settings.evaluation.batch_size, batch)
    items.append(Item(place, f"{rows} of {evaluated} models at a time", rows * (row + buffers), "evaluation"))
    items.append(Item(place, f"activations, batch of {largest}", forward.of(largest), "evaluation"))
    items.append(Item(place, "batches", measured_images * largest // batch, "evaluation"))
    if stored == "host" and on_gpu:
        items.append(Item("host", "sources, pinned", pinned_bytes(sources * row), "training"))
    if stored == "file":
        items.append(Item("disk", "sources in a file", sources * row))
    items.append(Item("host", "checkpoints while they are written", 2 * (row + moments + buffers), "training"))
    models = heldouts + 1 + (sources if settings.sources.folder is None else 0)
    items.append(Item("disk", f"{models} models", models * (row + buffers)))
    items.append(Item("disk", "checkpoints of a training", KEPT_FILES * (row + moments + buffers)))
    if settings.sources.folder is not None:
        given = [path for path in settings.sources.folder.expanduser().glob("*") if path.suffix in (".pt", ".pth")]
        items.append(Item("host", "sources given as .pt files", min(len(given), sources) * row))
    if facts.disk is not None and not facts.written:
        items.append(Item("disk", "data set (.beton files)", facts.disk))

    rates = measured_rates(
        context, build, dtype, images_per_second, loader_images_per_second, measure, batch, activations
    )
    plan = Plan(
        title=f"{settings.dataset.label}, {settings.model.arch}: {sources} sources, {heldouts} heldouts",
        device=f"a GPU of {size_text(limits[place])}" if on_gpu else "this machine's CPU",
        items=items,
        work=work_of(context, facts, rates, evaluated),
        limits=limits,
        rates=rates.text,
        notes=_notes(facts, stored, on_gpu),
    )
    return replace(plan, problems=list(_problems(plan, place, stored, batch, activations)))


def _precision(setting: str, device: torch.device, on_gpu: bool) -> torch.dtype:
    if on_gpu and device.type == "cpu":  # a GPU that is not here: any that is worth planning for has bf16
        return {"fp32": torch.float32, "fp16": torch.float16}.get(setting, torch.bfloat16)
    return resolve_precision(setting, device)


def _limits(context: Context, gpu_memory: int | None, on_gpu: bool) -> dict[str, int]:
    """Bytes that may be taken: of a GPU all, of the host and the disk what is free (what this run holds counts)."""
    there = next(path for path in (context.run.path.absolute(), *context.run.path.absolute().parents) if path.exists())
    own = sum(f.stat().st_size for f in there.rglob("*") if f.is_file()) if context.run.config.is_file() else 0
    limits = {}
    if on_gpu:
        here = gpu_bytes(context.device) if context.device.type == "cuda" else None
        limits["gpu"] = min(size for size in (gpu_memory, here) if size is not None)
    return {**limits, "host": free_bytes(torch.device("cpu")), "disk": shutil.disk_usage(there).free + own}


def _notes(facts: DataFacts, stored: str, on_gpu: bool) -> list[str]:
    notes = []
    if facts.disk is None:
        notes.append(
            "disk: the .beton files are not written yet; tools/write_ffcv.py predicts their size from a sample"
        )
    elif facts.written:
        notes.append(f"disk: {size_text(facts.disk)} of .beton files are there already")
    if stored == "device":
        where = "the GPU" if on_gpu else "memory"
        notes.append(f"sources are kept in {where} (sources.store=device)")
    else:
        notes.append(
            f"sources are kept outside (sources.store={stored}): {SLOTS} rows at a time, whatever their number"
        )
    return notes


def _problems(plan: Plan, place: str, stored: str, batch: int, activations: Footprint) -> Iterator[str]:
    """A line for each place that is too small, and when: how much is missing, and what would make it fit."""
    if plan.peak("disk") > plan.limits["disk"]:
        sizes = f"{size_text(plan.peak('disk'))} are needed, {size_text(plan.limits['disk'])} are there"
        yield f"disk: {sizes}; free some, choose --out on another disk, or use fewer sources"
    for where, phase in itertools.product(("gpu", "host"), PHASES):
        needed, limit = plan.during(where, phase), plan.limits.get(where, 0)
        if needed <= limit:
            continue
        remedies = []
        then = [item for item in plan.items if item.place == where and item.phase == phase]
        rows = sum(item.bytes for item in then if item.what.startswith("sources"))
        if where == "host" and place == "gpu":
            remedies.append("sources.store=file")
        elif stored == "device" and needed - rows <= limit:
            remedies.append("sources.store=host" if place == "gpu" else "sources.store=file")
        if phase == "reading":
            remedies.append("a smaller dataset.limit")
        if where == place and phase == "training":
            rest = needed - activations.of(batch)
            smaller = next((b for b in _halves(batch) if rest + activations.of(b) <= limit), None)
            if smaller is not None:
                remedies.append(f"train.batch_size={smaller}")
        if where == place and phase == "evaluation":
            remedies.append("a smaller evaluation.batch_size (and train.batch_size, in which statistics are taken)")
        text = f"{where}: {phase} needs {size_text(needed)}, {size_text(limit)} are there"
        if remedies:
            yield f"{text}; {' or '.join(remedies)} makes it fit"
        else:
            yield f"{text}; use a smaller network (model.width), or more memory"


def _halves(batch: int) -> Iterator[int]:
    while batch >= 4:
        batch //= 2
        yield batch
