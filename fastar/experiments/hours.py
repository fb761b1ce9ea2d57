"""How long the parts of a run take: how often each is done, and seconds that are measured here or stated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastar.experiments.context import Context
from fastar.matching import match_weights
from fastar.training import resolution
from fastar.training.footprint import Footprint, seconds_per_image

# A step is timed with a whole batch, or what takes this much memory of it.
TIMED_BYTES = 256 << 20


@dataclass(frozen=True)
class DataFacts:
    """Images of each split, classes, bytes of the files (None: not known until they are written), on the device, and
    on the host while a split is read."""

    train: int
    test: int
    classes: int
    disk: int | None
    written: bool
    resident: int
    reading: int


@dataclass(frozen=True)
class Work:
    """A part of the run: how often, and seconds of each time (None where no rate is known)."""

    what: str
    times: int
    seconds: float | None


def evaluated_models(context: Context) -> int:
    """Models that evaluation looks at: the inner points of all paths, and the ends."""
    settings = context.settings
    sources, heldouts, wanted = settings.sources.number, settings.sources.heldout, settings.evaluation.star_sources
    regular = sources + heldouts
    pairs = min(settings.evaluation.regular_pairs, regular * (regular - 1) // 2)
    stars = heldouts + (sources if wanted is None else min(sources, wanted))
    paths = stars + pairs * (2 if settings.ends_matched else 1)
    return paths * (settings.evaluation.points - 2) + 1 + stars + min(2 * pairs * 2, regular + pairs)


def training_sides(context: Context) -> list[int]:
    """The side of the images of each epoch of training."""
    train, star = context.settings.train, context.settings.star
    epochs = max(train.epochs, star.epochs or 0)
    return [resolution(train, epoch) or max(context.image[1:]) for epoch in range(epochs)]


@dataclass(frozen=True)
class Rates:
    """Seconds per image of training and of evaluation, and per source of matching; what they are from."""

    training: float | None
    evaluation: float | None
    matching: float | None
    text: str


def measured_rates(
    context: Context,
    build: Callable[[], torch.nn.Module],
    dtype: torch.dtype,
    stated: float | None,
    loader: float | None,
    measure: bool | None,
    batch: int,
    activations: Footprint,
) -> Rates:
    """Stated rates, and where `measure` says so (see `plan.make_plan`) what steps and matching take on the device."""
    device = context.device
    training = evaluation = matching = None
    parts = []
    if stated is not None:
        training = evaluation = 1 / stated
        parts.append(f"{stated:,.0f} images/s stated, for evaluation too")
    elif measure:
        timed = min(batch, max(2, int(TIMED_BYTES // activations.per_image)))
        sides = training_sides(context)
        shape = (context.image[0], max(sides), max(sides))
        training, _ = seconds_per_image(build, shape, dtype, device, timed)
        training *= sum(side**2 for side in sides) / len(sides) / max(sides) ** 2  # smaller ones take less by as much
        _, evaluation = seconds_per_image(build, context.image, dtype, device, timed)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine's CPU"
        parts.append(
            f"{1 / training:,.0f} images/s of training and {1 / evaluation:,.0f} of evaluation measured on {name}"
        )
    if loader is not None and training is not None and evaluation is not None:
        training, evaluation = max(training, 1 / loader), max(evaluation, 1 / loader)
        parts.append(f"loading gives {loader:,.0f} images/s")
    if not context.settings.star_matched_every:
        matching = 0.0
    elif measure is not None and context.settings.matching.method == "weight":
        theta = {name: value.to(device) for name, value in build().state_dict().items()}
        found = match_weights(
            context.symmetry,
            theta,
            {name: value[None].clone() for name, value in theta.items()},
            start=context.symmetry.identity(),
            threads=context.settings.workers,
        )
        matching = found.seconds
        parts.append(f"{matching:.2g} s a source to match again measured on {device}")
    return Rates(training, evaluation, matching, "; ".join(parts) or "no rates: nothing was measured or stated")


def work_of(context: Context, facts: DataFacts, rates: Rates, evaluated: int) -> list[Work]:
    settings = context.settings
    train, evaluation = settings.train, settings.evaluation
    regular = settings.sources.heldout + (settings.sources.number if settings.sources.folder is None else 0)
    epoch = None if rates.training is None else facts.train * rates.training
    star = None
    if epoch is not None and rates.matching is not None:
        every = settings.star_matched_every
        star = epoch + (settings.sources.number * rates.matching / every if every else 0.0)
    once = seen = min(facts.train, evaluation.limit or facts.train) + min(
        facts.test, evaluation.test_limit or facts.test
    )
    if context.has_batch_norm:
        statistics = facts.train if evaluation.bn_batches is None else evaluation.bn_batches * train.batch_size
        seen += min(facts.train, statistics)
    measuring = None if rates.evaluation is None else seen * rates.evaluation
    own = None if rates.evaluation is None else once * rates.evaluation
    return [
        Work("epoch of a regular model", regular * train.epochs, epoch),
        Work("epoch of the star, matching included", settings.star.epochs or train.epochs, star),
        Work("model measured when it is trained", regular + 1, own),
        Work("point of a path measured", evaluated, measuring),
    ]
