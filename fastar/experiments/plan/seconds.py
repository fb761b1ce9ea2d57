"""Seconds of the parts of a run: how often each is done, and rates that are stated or measured on the device here."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import torch

from fastar.experiments.plan.sizes import DataCounts, evaluated_models, training_sides
from fastar.experiments.session import Session
from fastar.experiments.statistics_batches import LOOKED_AT
from fastar.matching import EXAMPLE_BATCHES, Examples, match
from fastar.runtime.device import synchronize
from fastar.training import RegularStep

# A step is timed after a first one, no more than so often and no longer than this many seconds in all.
TIMES, SECONDS = 3, 2.0
# What a step that is timed may take; the rate of larger batches is the same.
TIMED_BYTES = {"cpu": 64 << 20, "cuda": 4 << 30}
# Batches whose loading is timed, after the first ones, which were read ahead while nothing was timed.
LOADED, LOADED_BEFORE = 8, 4


@dataclass(frozen=True)
class Work:
    """A part of the run: how often, and seconds of each time (None where no rate is known)."""

    what: str
    times: int
    seconds: float | None


@dataclass
class Rates:
    """Seconds per image of training and of evaluation, and per source of matching; None: not known. `said`: what they
    are from."""

    training: float | None
    evaluation: float | None
    matching: float | None
    said: list[str]


def rates_of(
    session: Session, counts: DataCounts, stated: float | None, loader: float | None, *, per_image: float, here: bool
) -> Rates:
    """The rates of a run, measured where none is stated.

    Args:
        stated: images per second of training and evaluation.
        loader: images per second of loading.
        per_image: bytes that a step takes for each image.
        here: whether the run is on the device that is here.
    """
    device, sides, settings = session.device, training_sides(session), session.settings
    rates = Rates(None, None, None, [])
    if stated is not None:
        rates.training = rates.evaluation = 1 / stated
        rates.said.append(f"{stated:,.0f} images/s stated, for evaluation too")
    elif here:
        session.progress.line("planning: timing some steps")
        training, rates.evaluation = seconds_per_image(session, per_image)
        # Images of another side take more, or less, by as much.
        rates.training = training * sum(side**2 for side in sides) / len(sides) / max(session.data.image[1:]) ** 2
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine's CPU"
        said = f"{1 / rates.training:,.0f} images/s of training and {1 / rates.evaluation:,.0f} of evaluation"
        rates.said.append(f"{said} measured on {name}")
    else:
        rates.said.append("give --images-per-second: the GPU's speed cannot be measured here")
    how = "stated"
    if loader is None and counts.written and settings.dataset.spec.variable_size:
        session.progress.line("planning: timing the loading of some batches")
        loader, how = loaded_per_second(session, max(sides)), "measured here"
    if loader is not None:
        rates.said.append(f"loading {loader:,.0f} images/s {how}")
        if rates.training is not None and rates.evaluation is not None:
            rates.training, rates.evaluation = max(rates.training, 1 / loader), max(rates.evaluation, 1 / loader)
    if not settings.star_matched_every:
        rates.matching = 0.0
    elif settings.matching.method in ("weight", "activation"):
        session.progress.line("planning: timing a matching")
        rates.matching = matching_seconds(session)
        rates.said.append(f"{rates.matching:.2g} s a source to match again measured on {device}")
    return rates


def seconds_per_image(session: Session, per_image: float) -> tuple[float, float]:
    """Seconds of a regular step and of an evaluation in fp32, per made image of the size that evaluation takes."""
    device, train = session.device, session.settings.train
    batch = min(train.batch_size, max(2, int(TIMED_BYTES[device.type] // per_image)))
    images = torch.randn(batch, *session.data.image, device=device, dtype=torch.float32)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    lr = torch.zeros((), dtype=torch.float32, device=device)
    step = RegularStep(session.network.build(seed=0), train.model_copy(update={"graph": False, "compile": False}))
    model = session.network.build(seed=0).eval()
    training = _median(lambda: step(images, labels, lr), device)
    with torch.no_grad():
        return training / batch, _median(lambda: model(images), device) / batch


def _median(run: Callable[[], object], device: torch.device) -> float:
    run()
    taken: list[float] = []
    while not taken or (len(taken) < TIMES and sum(taken) < SECONDS):
        synchronize(device)
        begin = time.perf_counter()
        run()
        synchronize(device)
        taken.append(time.perf_counter() - begin)
    return sorted(taken)[len(taken) // 2]


def loaded_per_second(session: Session, side: int) -> float:
    """Images per second that the training set's files give at `side`, decoded, cut and on the device."""
    size = min(session.settings.train.batch_size, max(2, len(session.data.train) // (2 * LOADED_BEFORE)))
    with closing(session.data.train.batches(size, seed=0, epoch=0, size=side)) as batches:  # type: ignore[type-var]
        for _ in itertools.islice(batches, LOADED_BEFORE):
            pass
        begun = time.perf_counter()
        images = sum(len(labels) for _, labels in itertools.islice(batches, LOADED))
        synchronize(session.device)
    return images / (time.perf_counter() - begun)


def matching_seconds(session: Session) -> float:
    """Seconds of matching a source to theta where few sweeps find it, as in all epochs but the first ones: it is theta
    with some noise, its units in other places. Images are random."""
    device, symmetry, settings = session.device, session.network.symmetry, session.settings
    theta = {name: value.to(device) for name, value in session.network.build(seed=0, device="cpu").state_dict().items()}
    noise = {name: theta[name] for name in symmetry.parameters}
    for number, (name, value) in enumerate(noise.items()):
        generator = torch.Generator().manual_seed(number)
        drawn = torch.randn(value.shape, generator=generator, dtype=torch.float32, device="cpu").to(device)
        noise[name] = value + 0.5 * value.std(correction=0) * drawn
    source = symmetry.apply(symmetry.random(0), {**theta, **noise})

    def examples() -> Examples:
        size, generator = min(settings.train.batch_size, LOOKED_AT), torch.Generator().manual_seed(0)
        images = torch.randn(size, *session.data.image, generator=generator, dtype=torch.float32, device="cpu")
        labels = torch.zeros(size, dtype=torch.int64, device=device)
        return Examples(session.network.build(seed=0), [(images.to(device), labels)] * EXAMPLE_BATCHES)

    sources, threads = {name: source[name][None] for name in symmetry.parameters}, settings.workers
    return _median(
        lambda: match(settings.matching, symmetry, theta, sources, examples=examples, threads=threads), device
    )


def work_of(session: Session, counts: DataCounts, rates: Rates) -> list[Work]:
    """All parts of the run, in order."""
    settings = session.settings
    sources, train, evaluation = settings.sources, settings.train, settings.evaluation
    regular = sources.heldout + (sources.number if sources.folder is None else 0)
    epoch = star = None
    if rates.training is not None:
        epoch = counts.train * rates.training
        if rates.matching is not None:
            star = epoch + sources.number * rates.matching / (settings.star_matched_every or 1)
    limits = (evaluation.limit, evaluation.limit, evaluation.test_limit)
    splits = (counts.train, counts.validation, counts.test)
    once = seen = sum(min(n, limit or n) for n, limit in zip(splits, limits, strict=True))
    if session.network.has_batch_norm:
        batches = evaluation.bn_batches
        seen += counts.train if batches is None else min(counts.train, batches * train.batch_size)
    own = None if rates.evaluation is None else once * rates.evaluation
    point = None if rates.evaluation is None else seen * rates.evaluation
    return [
        Work("epoch of a regular model", regular * train.epochs, epoch),
        Work("epoch of the star, matching included", settings.star.epochs or train.epochs, star),
        Work("model measured when it is trained", regular + 1, own),
        Work("point of a path measured", evaluated_models(settings), point),
    ]
