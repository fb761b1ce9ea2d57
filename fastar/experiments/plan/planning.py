"""`fastar plan`: memory of the GPU and the host, disk and hours of a run, before anything runs."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastar.config import Settings, as_override
from fastar.errors import FastarError
from fastar.experiments.plan.items import MOMENTS, Counted, Item, count, items_of, place_of_sources, shortages, total
from fastar.experiments.plan.preflight import check_batches
from fastar.experiments.plan.seconds import Work, images_per_second, matching_seconds, work_of
from fastar.experiments.plan.sizes import DataCounts, data_counts, limits_of
from fastar.experiments.session import Session, new_session, threads
from fastar.experiments.task import Shape
from fastar.runs import RunFolder
from fastar.runtime.progress import SILENT, Progress, count_text, size_text


@dataclass(frozen=True)
class Plan:
    """The cost of a run. `limits`: bytes that each place has. `problems`: one line for each that does not fit."""

    title: str
    device: str
    items: list[Item]
    limits: dict[str, int]
    work: list[Work]
    rates: str
    notes: list[str]
    problems: list[str]

    def during(self, place: str, moment: str) -> int:
        """Bytes taken in `place` at a moment: training or evaluation."""
        return total(self.items, place, moment)

    def seconds(self) -> float | None:
        """Seconds of all work; None where a speed is not known."""
        if any(work.seconds is None for work in self.work):
            return None
        return sum(work.times * (work.seconds or 0.0) for work in self.work)

    def as_dict(self) -> dict[str, Any]:
        """All of it, JSON-able: what the report shows."""
        needed = {place: {moment: self.during(place, moment) for moment in MOMENTS} for place in self.limits}
        return {**asdict(self), "needed": needed, "seconds": self.seconds()}


def plan_run(
    settings: Settings, out: Path, speed: float | None = None, progress: Progress = SILENT, *, timed: bool = True
) -> Plan:
    """Plan the run of `settings` in the folder `out`; nothing is written, and the data need not be there.

    Args:
        speed: images per second, stated; None: measured here, where the run would be here.
        timed: measure seconds; false: bytes alone.

    Raises:
        FastarError: a setting out of range, or a set whose size is not known.
    """
    if speed is not None and not 0 < speed < math.inf:
        raise FastarError(f"--images-per-second={speed} must be above 0, and finite")
    counts, run = data_counts(settings), RunFolder(out)
    if counts is None:
        raise FastarError(_not_written(settings))
    shape = Shape(new_session(settings, run).data.image, counts.classes)
    session = new_session(settings, run, progress, shape=shape)
    check_batches(session, counts.train)
    limits, matching, said = limits_of(session, here=False), None, "nothing was timed"
    here = settings.gpu_memory is None or session.device.type == "cuda"
    with threads(session) if here else nullcontext():
        progress.line("planning: counting bytes")
        counted = count(session, gpu="gpu" in limits)
        if timed:
            speed, matching, said = _speeds(session, counted, speed, here=here)

    def ask(changed: Settings) -> list[str]:
        return shortages(items_of(changed, counts, limits, counted), limits)

    return Plan(
        title=f"{settings.dataset.label}, {settings.model.arch}: "
        f"{count_text(settings.sources.number, 'source')}, {count_text(settings.sources.heldout, 'heldout')}",
        device=f"a GPU of {size_text(limits['gpu'])}" if "gpu" in limits else "this machine's CPU",
        items=items_of(settings, counts, limits, counted),
        limits=limits,
        work=work_of(session, counts, speed, matching),
        rates=said,
        notes=_notes(settings, counts, place_of_sources(settings, counted.network, limits)),
        problems=_problems(settings, ask),
    )


def _speeds(
    session: Session, counted: Counted, speed: float | None, *, here: bool
) -> tuple[float | None, float | None, str]:
    """Images per second, seconds of matching a source (None: not known), and what they are from.

    `here`: the run is on the device that is here.
    """
    matching, said = None, "give --images-per-second: the GPU's speed cannot be measured here"
    if speed is not None:
        said = f"{speed:,.0f} images/s stated, for evaluation too"
    elif here:
        session.progress.line("planning: timing some steps")
        speed = images_per_second(session, counted.training)
        said = f"{speed:,.0f} images/s of training measured here, for evaluation too; loading is not counted"
    if session.settings.star_matched_every and session.settings.matching.method in ("weight", "activation"):
        session.progress.line("planning: timing a matching")
        matching = matching_seconds(session)
        said += f"; matching measured on {session.device}"
    return speed, matching, said


def _not_written(settings: Settings) -> str:
    chosen = settings.dataset
    options = f"--dataset {chosen.name} --name {shlex.quote(chosen.label)} --source FOLDER"
    tool = f"python tools/write_ffcv.py {options} --out {shlex.quote(str(chosen.directory))}"
    return f"{chosen.directory.expanduser() / chosen.label}: not written yet; `{tool}` writes it"


def _notes(settings: Settings, counts: DataCounts, stored: str) -> list[str]:
    notes = [
        f"sources are kept with sources.store={stored}",
        "~: estimated, from activations of two batches of tensors without memory; all other sizes are exact; memory of "
        "CUDA itself and its libraries comes on top",
    ]
    if counts.disk is None:
        preset = settings.dataset.encoding or "rn50"
        size = settings.dataset.spec.gigabytes.get(preset)
        about = "" if size is None else f"about {size} GB for training as {preset}, by FFCV's published sizes; "
        notes.append(f"disk: the .beton files are not written yet: {about}tools/write_ffcv.py predicts their size")
    return notes


def _problems(settings: Settings, ask: Callable[[Settings], list[str]]) -> list[str]:
    """A line for each place that is too small, and when: how much is missing, and what would make it fit."""

    def fits(changed: Settings) -> bool:
        return all(line.startswith("disk") for line in ask(changed))

    if fits(settings):
        return ask(settings)
    made = _remedy(settings, fits)
    remedy = "use a smaller network (model.width), or more memory" if made is None else f"{made} makes it fit"
    return [line if line.startswith("disk") else f"{line}; {remedy}" for line in ask(settings)]


def _remedy(settings: Settings, fits: Callable[[Settings], bool]) -> str | None:
    """The first settings that fit: sources elsewhere, then smaller batches of evaluation, and last of training, which
    change the result. None: there are none."""
    sizes = settings.train.batch_size, settings.evaluation.batch_size
    halved = [[size >> times for times in range(max(1, size.bit_length() - 1))] for size in sizes]
    for batch, measured, store in itertools.product(*halved, (settings.sources.store, "host", "file")):
        tried = {"sources.store": store, "evaluation.batch_size": measured, "train.batch_size": batch}
        changed = settings
        for name, value in tried.items():
            section, _, key = name.partition(".")
            new = getattr(settings, section).model_copy(update={key: value})
            changed = changed.model_copy(update={section: new})
        if fits(changed):
            own = (settings.sources.store, *reversed(sizes))
            differ = [as_override(*pair) for pair, now in zip(tried.items(), own, strict=True) if pair[1] != now]
            return " ".join(differ)
    return None
