"""What a run will take, before anything runs: memory of the GPU and the host, disk, and hours.

Bytes of weights, gradients, moments, sources and of matching follow from the number of parameters; activations are
counted tensor by tensor (`fastar.runtime.footprint`); seconds are measured on the present device, or stated.
"""

from __future__ import annotations

import functools
import itertools
import math
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fastar.config import Settings, as_override, parse_bytes
from fastar.data import PRESETS
from fastar.errors import FastarError
from fastar.evaluation.forward import forward_bytes, statistics_bytes
from fastar.experiments.facts import DataFacts, data_facts, evaluated_models, published_gigabytes, training_sides
from fastar.experiments.hours import Asked, Work, measured_rates, work_of
from fastar.experiments.needs import PHASES, Choice, Item, Sizes, during, items_of, remedy
from fastar.experiments.session import Session, new_session, threads, with_shape
from fastar.experiments.task import Shape
from fastar.matching import EXAMPLE_BATCHES, cache_bytes
from fastar.runs import RunFolder
from fastar.runtime.memory import free_bytes, gpu_bytes
from fastar.runtime.progress import SILENT, Progress, size_text
from fastar.training import check_batch, resolve_precision
from fastar.training.footprint import training_footprint
from fastar.training.optimizer import rows_of_an_update
from fastar.training.prefetch import SLOTS


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
        return during(self.items, place, phase)

    def seconds(self) -> float | None:
        """Of all work; None where a rate is not known."""
        if any(work.seconds is None for work in self.work):
            return None
        return sum(work.times * (work.seconds or 0.0) for work in self.work)

    def as_dict(self) -> dict[str, Any]:
        """All of it, JSON-able: what the report shows."""
        needed = {place: {phase: self.during(place, phase) for phase in PHASES} for place in self.limits}
        return {**asdict(self), "needed": needed, "seconds": self.seconds()}


def plan_run(
    settings: Settings,
    out: Path,
    rate: float | None = None,
    loader: float | None = None,
    progress: Progress = SILENT,
) -> Plan:
    """Plan the run of `settings` in the folder `out`; nothing is written, and of data only some batches are read, to
    measure their loading.

    Args:
        rate: images per second of training, stated; None: measured here, where the run would be here.
        loader: images per second that loading can give, stated; None: measured where the files are there.

    Raises:
        FastarError: a setting out of range, or a set whose size is not known.
    """
    for option, value in (("--images-per-second", rate), ("--loader-images-per-second", loader)):
        if value is not None and not 0 < value < math.inf:
            raise FastarError(f"{option}={value} must be above 0")
    context = new_session(settings, RunFolder(out), progress)
    elsewhere = settings.gpu_memory is not None and context.device.type == "cpu"
    with nullcontext() if elsewhere else threads(context):
        return make_plan(context, images_per_second=rate, loader_images_per_second=loader, measure=not elsewhere)


def check_fits(context: Session) -> Plan:
    """Plan the run of `context` without timing anything: where it is now, whatever it is planned for.

    Raises:
        FastarError: it does not fit; which setting makes it fit.
    """
    settings = context.settings
    if settings.gpu_memory is not None and context.device.type == "cpu":
        context.progress.line(f"gpu_memory={settings.gpu_memory}: this run is on the CPU, where it bounds nothing")
    plan = make_plan(context, measure=None, here=True)
    if plan.problems:
        raise FastarError(f"this run does not fit: {plan.problems[0]} (see `fastar plan`)")
    return plan


def make_plan(
    context: Session,
    *,
    images_per_second: float | None = None,
    loader_images_per_second: float | None = None,
    measure: bool | None = True,
    here: bool = False,
) -> Plan:
    """Plan the run of `context`; nothing is written.

    Args:
        images_per_second: of training's forward and backward, stated; None: measured on the present device.
        loader_images_per_second: what loading can give, stated; None: measured where the files are there.
        measure: seconds, of everything; false: of what any machine can tell something of, matching and loading; None:
            none, and no data are read.
        here: on the present device, whatever GPU `gpu_memory` speaks of.

    Raises:
        FastarError: an unknown dataset, architecture or setting.
    """
    settings = context.settings
    facts = data_facts(context)
    check_batch(settings.train, facts.train)
    gpu_memory = None if settings.gpu_memory is None else parse_bytes(settings.gpu_memory)
    on_gpu = context.device.type == "cuda" or (gpu_memory is not None and not here)
    dtype = _precision(settings.train.precision, context.device, on_gpu)
    context = with_shape(context, Shape(context.data.image, facts.classes))  # the data need not be there
    _check_last_batch(context, facts.train)
    if measure is not None:
        context.progress.line("planning: counting bytes")
    sizes = sizes_of(context, facts, dtype, _limits(context, gpu_memory, on_gpu), on_gpu)
    choice = Choice(
        store=settings.sources.store,
        batch=settings.train.batch_size,
        measured_batch=settings.evaluation.batch_size,
        graph=settings.train.graph,
        evaluation_graph=settings.evaluation.graph,
        chunk=settings.matching.chunk,
    )
    rates = measured_rates(
        context,
        facts,
        dtype,
        Asked(images_per_second, loader_images_per_second, measure),
        per_image=sizes.training.per_image,
    )
    stored = sizes.stored(choice)
    plan = Plan(
        title=f"{settings.dataset.label}, {settings.model.arch}: {sizes.sources} sources, {sizes.heldouts} heldouts",
        device=f"a GPU of {size_text(sizes.free)}" if on_gpu else "this machine's CPU",
        items=items_of(sizes, choice),
        work=work_of(context, facts, rates),
        limits=dict(sizes.limits),
        rates=rates.text,
        notes=_notes(facts, stored, settings, on_gpu),
    )
    return replace(plan, problems=list(_problems(plan, sizes, choice)))


def sizes_of(context: Session, facts: DataFacts, dtype: torch.dtype, limits: dict[str, int], on_gpu: bool) -> Sizes:
    """What the tensors of the run take: counted on networks without data."""
    settings = context.settings
    model, layout = context.network.build(seed=0, device="cpu"), context.network.layout
    sides = training_sides(context)
    image = (
        (context.data.image[0], max(sides), max(sides))
        if context.settings.dataset.spec.variable_size
        else context.data.image
    )
    row = 4 * layout.numel
    largest = max(settings.evaluation.batch_size, settings.train.batch_size)
    given = 0
    if settings.sources.folder is not None:
        paths = settings.sources.folder.expanduser().glob("*")
        given = min(sum(path.suffix in (".pt", ".pth") for path in paths), settings.sources.number)
    return Sizes(
        device=torch.device("cuda" if on_gpu else "cpu"),
        limits=limits,
        facts=facts,
        sources=settings.sources.number,
        heldouts=settings.sources.heldout,
        folder=settings.sources.folder is not None,
        given=given,
        evaluated=evaluated_models(context),
        row=row,
        low=row if dtype == torch.float32 else row // 2,
        buffers=sum(b.numel() * b.element_size() for b in model.buffers()),
        statistics=statistics_bytes(model),
        moments=row * (1 if settings.train.optimizer == "sgd" else 2),
        update=row * rows_of_an_update(settings.train.optimizer, context.device),
        optimizer=settings.train.optimizer,
        image=image,
        measured_image=context.data.image,
        training=training_footprint(
            lambda: context.network.build(seed=0, device="cpu"), image, dtype, settings.train.batch_size
        ),
        forward=forward_bytes(model, context.data.image, largest),
        symmetry=context.network.symmetry,
        kicks=settings.matching.perturbations,
        by_activations=settings.matching.by_activations,
        kept=functools.cache(
            lambda batch: cache_bytes(
                model,
                context.network.symmetry,
                [torch.empty(batch, *context.data.image, device="meta", dtype=torch.float32)] * EXAMPLE_BATCHES,
            )
        ),
        batch_norm=context.network.has_batch_norm,
        drop_last=settings.train.drop_last,
        threads=settings.workers,
    )


def _check_last_batch(context: Session, images: int) -> None:
    """Raise FastarError where a batch of training is of one image, and a layer takes no variance of that."""
    train = context.settings.train
    size = train.batch_size
    if size > 1 and (train.drop_last or images % size != 1):
        return
    layer = context.network.layer_of_single_values(min(training_sides(context)) if train.resolutions else None)
    if layer is None:
        return
    none = f"batch-norm layer {layer} takes no variance of one image"
    if size == 1:
        raise FastarError(f"train.batch_size=1: {none}; raise it")
    other = next(other for other in itertools.count(size + 1) if images % other != 1)
    raise FastarError(
        f"train.drop_last=false: the last of {images} images in batches of {size} is alone, and {none}; set "
        f"train.batch_size={other} or train.drop_last=true"
    )


def _precision(setting: str, device: torch.device, on_gpu: bool) -> torch.dtype:
    if on_gpu and device.type == "cpu":  # a GPU that is not here: any that is worth planning for has bf16
        return {"fp32": torch.float32, "fp16": torch.float16}.get(setting, torch.bfloat16)
    return resolve_precision(setting, device)


def _limits(context: Session, gpu_memory: int | None, on_gpu: bool) -> dict[str, int]:
    """Bytes that may be taken: of a GPU all, of the host and the disk what is free (what this run holds counts)."""
    there = next(path for path in (context.run.path.absolute(), *context.run.path.absolute().parents) if path.exists())
    own = sum(f.stat().st_size for f in there.rglob("*") if f.is_file()) if context.run.config.is_file() else 0
    limits = {}
    if on_gpu:
        here = gpu_bytes(context.device) if context.device.type == "cuda" else None
        limits["gpu"] = min(size for size in (gpu_memory, here) if size is not None)
    return {**limits, "host": free_bytes(torch.device("cpu")), "disk": shutil.disk_usage(there).free + own}


def _notes(facts: DataFacts, stored: str, settings: Settings, on_gpu: bool) -> list[str]:
    notes = []
    if facts.validation:
        notes.append(
            f"data: {facts.train:,} images to train on, {facts.validation:,} for validation, {facts.test:,} for testing"
        )
    if facts.disk is None:
        notes.append(f"disk: the .beton files are not written yet: {_size_of_files(settings)}")
    elif facts.written:
        notes.append(f"disk: {size_text(facts.disk)} of .beton files are there already")
    if stored == "device":
        where = "the GPU" if on_gpu else "memory"
        notes.append(f"sources are kept in {where} (sources.store=device)")
    else:
        notes.append(
            f"sources are kept outside (sources.store={stored}): {SLOTS} rows at a time, whatever their number"
        )
    if on_gpu:
        notes.append("memory: cuDNN's workspaces and CUDA's own memory are not counted")
    return notes


def _size_of_files(settings: Settings) -> str:
    """How large the .beton files become, in words."""
    ours = "tools/write_ffcv.py predicts their size from a sample"
    name = settings.dataset.encoding or "rn50"
    size = published_gigabytes(PRESETS[name]) if settings.dataset.name == "imagenet" else None
    if size is None:
        return ours
    return f"about {size:,.0f} GB for training as {name}, by FFCV's published sizes; {ours}"


def _problems(plan: Plan, sizes: Sizes, choice: Choice) -> Iterator[str]:
    """A line for each place that is too small, and when: how much is missing, and what would make it fit."""
    if plan.peak("disk") > plan.limits["disk"]:
        sizes_there = f"{size_text(plan.peak('disk'))} are needed, {size_text(plan.limits['disk'])} are there"
        yield f"disk: {sizes_there}; free some, choose --out on another disk, or use fewer sources"
    short = [
        (where, phase)
        for where, phase in itertools.product(("gpu", "host"), PHASES)
        if plan.during(where, phase) > plan.limits.get(where, 0)
    ]
    changes = remedy(sizes, choice) if short else None
    for where, phase in short:
        text = (
            f"{where}: {phase} needs {size_text(plan.during(where, phase))}, {size_text(plan.limits[where])} are there"
        )
        if changes:
            yield f"{text}; {' '.join(as_override(key, value) for key, value in changes.items())} makes it fit"
        elif phase == "reading":
            yield f"{text}; use a smaller dataset.limit, or more memory"
        else:
            yield f"{text}, and no smaller batch makes it fit; use a smaller network (model.width), or more memory"
