"""Seconds of a run: how often each part of it is done, at a speed that is stated or measured here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastar.experiments.plan.sizes import DataCounts, evaluated_models, training_sides
from fastar.experiments.session import Session
from fastar.experiments.statistics_batches import LOOKED_AT
from fastar.matching import EXAMPLE_BATCHES, Examples, match
from fastar.runtime.memory import free_bytes
from fastar.training import RegularStep

# Steps that are timed, and what one may take on a CPU: a larger batch's speed is the same.
STEPS, CPU_BYTES = 3, 64 << 20


@dataclass(frozen=True)
class Work:
    """A part of the run: how often, and seconds of each time (None where no speed is known)."""

    what: str
    times: int
    seconds: float | None


def images_per_second(session: Session, step_bytes: Callable[[int], int]) -> float:
    """The speed of regular steps on made images, on the run's device; loading is not timed.

    Args:
        step_bytes: what a step takes, by its number of images.
    """
    device, train, image = session.device, session.settings.train, session.data.image
    batch, most = train.batch_size, free_bytes(device) // 2 if device.type == "cuda" else CPU_BYTES
    while batch > 2 and step_bytes(batch) > most:
        batch //= 2
    images = torch.randn(batch, *image, device=device, dtype=torch.float32).to(memory_format=torch.channels_last)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    lr = torch.zeros((), dtype=torch.float32, device=device)
    step = RegularStep(session.network.build(seed=0), train.model_copy(update={"graph": False, "compile": False}))
    taken = _seconds(lambda: step(images, labels, lr), STEPS)
    # Epochs on smaller images take less, by as much.
    sides = training_sides(session)
    return batch / taken * max(image[1:]) ** 2 * len(sides) / sum(side**2 for side in sides)


def _seconds(run: Callable[[], object], times: int = 1) -> float:
    """The mean of so many times, after two that are not timed."""
    from torch.utils.benchmark import Timer  # takes a third of a second to import

    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return float(timer.timeit(times).mean)


def matching_seconds(session: Session) -> float:
    """Seconds of matching a source that few sweeps match, as in all epochs but the first ones. Images are random."""
    device, symmetry, settings = session.device, session.network.symmetry, session.settings
    theta = {name: value.to(device) for name, value in session.network.build(seed=0, device="cpu").state_dict().items()}
    moved = symmetry.apply(symmetry.random(0), theta)
    sources = {name: moved[name][None] for name in symmetry.parameters}

    def examples() -> Examples:
        size = min(settings.train.batch_size, LOOKED_AT)
        images = torch.randn(size, *session.data.image, device=device, dtype=torch.float32)
        labels = torch.zeros(size, dtype=torch.int64, device=device)
        return Examples(session.network.build(seed=0), [(images, labels)] * EXAMPLE_BATCHES)

    return _seconds(
        lambda: match(settings.matching, symmetry, theta, sources, examples=examples, threads=settings.workers)
    )


def work_of(session: Session, counts: DataCounts, speed: float | None, matching: float | None) -> list[Work]:
    """All parts of the run, in order.

    Args:
        speed: images per second, of training and of evaluation; None: not known.
        matching: seconds of matching a source; None: not known.
    """
    settings, train, evaluation = session.settings, session.settings.train, session.settings.evaluation
    regular = settings.sources.heldout + (settings.sources.number if settings.sources.folder is None else 0)
    epochs, every = settings.star.epochs or train.epochs, settings.star_matched_every
    limits = (evaluation.limit, evaluation.limit, evaluation.test_limit)
    splits = (counts.train, counts.validation, counts.test)
    measured = sum(min(n, limit or n) for n, limit in zip(splits, limits, strict=True))
    if session.network.has_batch_norm:
        batches = evaluation.bn_batches
        measured += counts.train if batches is None else min(counts.train, batches * train.batch_size)
    epoch, model = (None if speed is None else images / speed for images in (counts.train, measured))
    return [
        Work("epoch of a regular model", regular * train.epochs, epoch),
        Work("epoch of the star", epochs, epoch),
        *([Work("matching of a source", settings.sources.number * -(-epochs // every), matching)] if every else []),
        Work("model or point of a path measured", regular + 1 + evaluated_models(settings), model),
    ]
