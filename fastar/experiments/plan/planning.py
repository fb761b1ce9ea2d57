"""`fastar plan`: memory of the GPU and the host, disk and hours of a run, before anything runs.

Rows, data set, store and disk are exact (`sizes`). Activations are counted on tensors without memory at two batch
sizes (`estimates`), and seconds are measured here or stated (`seconds`).
"""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastar.config import Settings, as_override
from fastar.data import PRESETS, Encoding
from fastar.errors import FastarError
from fastar.experiments.plan.estimates import Choice, Needs
from fastar.experiments.plan.preflight import check_batches
from fastar.experiments.plan.seconds import Rates, Work, rates_of, work_of
from fastar.experiments.plan.sizes import PHASES, DataCounts, Item, data_counts, disk_problem, during
from fastar.experiments.session import new_session, threads
from fastar.experiments.task import Shape
from fastar.runs import RunFolder
from fastar.runtime.progress import SILENT, Progress, size_text
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
    *,
    timed: bool = True,
) -> Plan:
    """Plan the run of `settings` in the folder `out`; nothing is written, and the data need not be there.

    Args:
        rate: images per second of training, stated; None: measured here, where the run would be here.
        loader: images per second that loading can give, stated; None: measured where the files are there.
        timed: measure seconds; false: bytes alone.

    Raises:
        FastarError: a setting out of range, or a set whose size is not known.
    """
    for option, value in (("--images-per-second", rate), ("--loader-images-per-second", loader)):
        if value is not None and not 0 < value < math.inf:
            raise FastarError(f"{option}={value} must be above 0")
    counts = data_counts(settings)
    if counts is None:
        raise FastarError(_not_written(settings))
    run, image = RunFolder(out), new_session(settings, RunFolder(out)).data.image
    session = new_session(settings, run, progress, shape=Shape(image, counts.classes))
    check_batches(session, counts.train)
    here = settings.gpu_memory is None or session.device.type == "cuda"
    with threads(session) if here else nullcontext():
        progress.line("planning: counting bytes")
        needs = Needs.of(session, counts)
        rates = Rates(None, None, None, [])
        if timed:
            rates = rates_of(session, counts, rate, loader, per_image=needs.training.per_image, here=here)
    plan = Plan(
        title=f"{settings.dataset.label}, {settings.model.arch}: {settings.sources.number} sources, "
        f"{settings.sources.heldout} heldouts",
        device=f"a GPU of {size_text(needs.exact.limits['gpu'])}" if needs.gpu else "this machine's CPU",
        items=needs.items(Choice.of(settings)),
        work=work_of(session, counts, rates),
        limits=needs.exact.limits,
        rates="; ".join(rates.said) or "no rates: nothing was measured or stated",
        notes=list(_notes(settings, counts, needs)),
    )
    return replace(plan, problems=list(_problems(plan, needs)))


def _not_written(settings: Settings) -> str:
    chosen = settings.dataset
    options = f"--dataset {chosen.name} --name {shlex.quote(chosen.label)} --source FOLDER"
    return (
        f"{chosen.directory.expanduser() / chosen.label}: not written yet; `python tools/write_ffcv.py {options} "
        f"--out {shlex.quote(str(chosen.directory))}` writes it"
    )


def published_gigabytes(settings: Settings, encoding: Encoding) -> float | None:
    """Gigabytes of the training set as `encoding` writes it, on a straight line between the published sizes; None for
    a set, a quality or a side that nothing is published of."""
    side, published = encoding.max_resolution, settings.dataset.spec.gigabytes
    sides = sorted(published)
    if not sides or side is None or encoding.jpeg_quality != 90 or not sides[0] <= side <= sides[-1]:
        return None
    raw, jpeg = (float(np.interp(side, sides, sizes)) for sizes in zip(*(published[s] for s in sides), strict=True))
    return raw + encoding.compress_probability * (jpeg - raw)


def _notes(settings: Settings, counts: DataCounts, needs: Needs) -> Iterator[str]:
    if counts.validation:
        yield (
            f"data: {counts.train:,} images to train on, {counts.validation:,} for validation, {counts.test:,} for "
            "testing"
        )
    if counts.disk is None:
        name = settings.dataset.encoding or "rn50"
        size = published_gigabytes(settings, PRESETS[name])
        about = "" if size is None else f"about {size:,.0f} GB for training as {name}, by FFCV's published sizes; "
        tool = "tools/write_ffcv.py predicts their size from a sample"
        yield f"disk: the .beton files are not written yet: {about}{tool}"
    elif counts.written:
        yield f"disk: {size_text(counts.disk)} of .beton files are there already"
    stored = needs.exact.stored(settings.sources.store)
    if stored == "device":
        yield f"sources are kept in {'the GPU' if needs.gpu else 'memory'} (sources.store=device)"
    else:
        yield f"sources are kept outside (sources.store={stored}): {SLOTS} rows at a time, whatever their number"
    yield "~: estimated, activations from two batches of tensors without memory; all other sizes are exact"
    if needs.gpu:
        yield "memory: workspaces of cuDNN and cuBLAS and CUDA's own memory are not counted"


def _problems(plan: Plan, needs: Needs) -> Iterator[str]:
    """A line for each place that is too small, and when: how much is missing, and what would make it fit."""
    disk = disk_problem(plan.items, plan.limits)
    if disk is not None:
        yield disk
    short = _short(plan.items, plan.limits)
    changes = remedy(needs) if short else None
    made = "no smaller batch makes it fit; use a smaller network (model.width), or more memory"
    for place, phase in short:
        needed = f"{place}: {phase} needs {size_text(plan.during(place, phase))}, {size_text(plan.limits[place])}"
        if changes is None:
            yield f"{needed} are there, and {made}"
        else:
            chosen = " ".join(as_override(key, value) for key, value in changes.items())
            yield f"{needed} are there; {chosen} makes it fit"


def _short(items: list[Item], limits: dict[str, int]) -> list[tuple[str, str]]:
    """(place, phase) where memory does not suffice."""
    pairs = itertools.product(("gpu", "host"), PHASES)
    return [(place, phase) for place, phase in pairs if during(items, place, phase) > limits.get(place, 0)]


def remedy(needs: Needs) -> dict[str, object] | None:
    """The fewest settings that make the run's memory suffice; smaller batches of training, which change the result,
    last. None: there are none."""
    settings = needs.exact.settings
    own = Choice.of(settings)
    batches, measured = ([size >> n for n in range(max(1, size.bit_length() - 1))] for size in own[:2])
    stores = [own.store, *(["host"] if needs.gpu else []), "file"]
    choices = [Choice(*each) for each in itertools.product(batches, measured, stores, {own.graph, False})]
    choices.sort(key=lambda choice: (-choice.batch, len(choice.changed(settings)), -choice.measured))
    fitting = (choice for choice in choices if not _short(needs.items(choice), needs.exact.limits))
    chosen = next(fitting, None)
    return None if chosen is None else chosen.changed(settings)
