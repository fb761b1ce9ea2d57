"""How long the parts of a run take: how often each is done, and seconds that are measured here or stated."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass

import torch

from fastar import data
from fastar.experiments.facts import DataFacts, evaluated_models, training_sides
from fastar.experiments.session import Session
from fastar.experiments.statistics_batches import LOOKED_AT
from fastar.matching import (
    EXAMPLE_BATCHES,
    ActivationCache,
    UnitActivations,
    match,
    matching_threads,
)
from fastar.runtime.device import synchronize
from fastar.runtime.seeds import derive_seed
from fastar.symmetry import Permutations
from fastar.training.footprint import seconds_per_image

# A step is timed with a whole batch, or what takes this much memory of it.
TIMED_BYTES = {"cpu": 64 << 20, "cuda": 4 << 30}
# Loading is timed for so long, after the first batches, which were read ahead while nothing was timed.
LOADED_SECONDS, LOADED_BEFORE = 3.0, 4
# Sources are matched to a theta from which this share of hidden units has to move: the mean over the epochs of the
# runs of docs/star-models.md, whose first epochs move a third and whose last ones a hundredth.
MOVED = 0.1
# Sources timed at once on a GPU, which matches them together.
MATCHED = 8


@dataclass(frozen=True)
class Work:
    """A part of the run: how often, and seconds of each time (None where no rate is known)."""

    what: str
    times: int
    seconds: float | None


@dataclass(frozen=True)
class Asked:
    """Images per second of training and of loading that are stated (None: not), and what may be measured: all (true),
    what any machine can tell something of (false), nothing (None)."""

    training: float | None
    loading: float | None
    measure: bool | None


@dataclass(frozen=True)
class Rates:
    """Seconds per image of training and of evaluation, and per source of matching; what they are from."""

    training: float | None
    evaluation: float | None
    matching: float | None
    text: str


def measured_rates(context: Session, facts: DataFacts, dtype: torch.dtype, asked: Asked, *, per_image: float) -> Rates:
    """Stated rates, and what steps, loading and matching take here, where `asked.measure` allows it.

    Args:
        dtype: that is trained in.
        per_image: bytes that a step takes for each image.
    """
    device, settings = context.device, context.settings
    training = evaluation = matching = None
    parts, measure = [], asked.measure
    if asked.training is not None:
        training = evaluation = 1 / asked.training
        parts.append(f"{asked.training:,.0f} images/s stated, for evaluation too")
    elif measure:
        context.progress.line("planning: timing some steps")
        training, evaluation = _steps(context, dtype, per_image)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine's CPU"
        parts.append(
            f"{1 / training:,.0f} images/s of training and {1 / evaluation:,.0f} of evaluation measured on {name}"
        )
    elif measure is not None:
        parts.append("give --images-per-second: the GPU's speed cannot be measured here")
    loading, said = asked.loading, "stated"
    if loading is None and measure is not None and facts.streams and facts.written:
        context.progress.line("planning: timing the loading of some batches")
        loading, said = loaded_per_second(context), "measured here"
    if loading is not None:
        parts.append(f"loading {loading:,.0f} images/s {said}")
        if training is not None and evaluation is not None:
            training, evaluation = max(training, 1 / loading), max(evaluation, 1 / loading)
    if not settings.star_matched_every:
        matching = 0.0
    elif measure is not None and settings.matching.method in ("weight", "activation"):
        context.progress.line("planning: timing a matching")
        matching = matching_seconds(context)
        parts.append(f"{matching:.2g} s a source to match again measured on {device}")
    return Rates(training, evaluation, matching, "; ".join(parts) or "no rates: nothing was measured or stated")


def _steps(context: Session, dtype: torch.dtype, per_image: float) -> tuple[float, float]:
    """Seconds per image of training, over all epochs, and of evaluation."""
    device, sides = context.device, training_sides(context)
    timed = min(context.settings.train.batch_size, max(2, int(TIMED_BYTES[device.type] // per_image)))

    def build() -> torch.nn.Module:
        return context.network.build(seed=0, device="cpu")

    image = context.data.image
    largest = (image[0], max(sides), max(sides)) if context.settings.dataset.spec.variable_size else image
    training, evaluation = seconds_per_image(build, largest, dtype, device, timed)
    if largest != image:
        _, evaluation = seconds_per_image(build, image, dtype, device, timed)
    # Smaller images take less by as much.
    return training * sum(side**2 for side in sides) / len(sides) / max(sides) ** 2, evaluation


def loaded_per_second(context: Session) -> float:
    """Images per second that the training set's files give at the largest side that is trained at, decoded, cut and on
    the device."""
    settings = context.settings
    loaded = data.StreamingDataset(
        context.data.files,
        "train",
        context.device,
        size=max(training_sides(context)),
        crop=settings.dataset.crop,
        order=settings.dataset.order,
        threads=settings.dataset.threads,
        limit=settings.dataset.limit,
        validation=settings.dataset.validation,
        progress=context.progress,
    )
    size = min(settings.train.batch_size, max(2, len(loaded) // (2 * LOADED_BEFORE)))
    images, begun = 0, 0.0
    with closing(loaded.batches(size, seed=0, epoch=0)) as batches:
        for number, (pixels, _) in enumerate(batches):
            if number == LOADED_BEFORE - 1:
                begun = time.perf_counter()
            elif number >= LOADED_BEFORE:
                images += len(pixels)
                if time.perf_counter() - begun > LOADED_SECONDS:
                    break
    return images / (time.perf_counter() - begun)


def matching_seconds(context: Session) -> float:
    """Seconds a source takes to be matched again: sources that are theta with some noise, and of each group's hidden
    units a share in other places; where what units do is looked at, on images that are noise."""
    device, symmetry, settings = context.device, context.network.symmetry, context.settings
    count = min(settings.sources.number, MATCHED if device.type == "cuda" else 1)
    theta = {name: value.to(device) for name, value in context.network.build(seed=0, device="cpu").state_dict().items()}
    generator = torch.Generator().manual_seed(derive_seed(0, "plan", "matching"))
    sources = {}
    for name in symmetry.parameters:
        value = theta[name]
        noise = torch.randn(count, *value.shape, generator=generator, dtype=torch.float32, device="cpu").to(device)
        sources[name] = value + 0.5 * value.std(correction=0) * noise
    symmetry.apply_rows(
        Permutations(
            {g.name: torch.stack([_some_moved(g.size, generator) for _ in range(count)]) for g in symmetry.groups}
        ),
        sources,
    )
    activations = None
    if settings.matching.by_activations and symmetry.groups:
        size = min(settings.train.batch_size, LOOKED_AT)
        images = [
            torch.randn(size, *context.data.image, generator=generator, dtype=torch.float32, device="cpu")
            for _ in range(EXAMPLE_BATCHES)
        ]
        look = UnitActivations(context.network.build(seed=0, device="cpu"), symmetry, images, device)
        states = [{name: rows[n] for name, rows in sources.items()} for n in range(count)]
        kept = ActivationCache(look, states, [f"source {n}" for n in range(count)])
        activations = kept.permuted(symmetry.identity())
    seconds, looking = [], 0.0
    for _ in range(2 if device.type == "cuda" else 1):  # kernels are chosen, and memory is had, in the first
        if activations is not None:
            synchronize(device)
            begun = time.perf_counter()
            activations = activations.with_theta(theta)
            synchronize(device)
            looking = time.perf_counter() - begun  # once for all sources
        found = match(
            settings.matching,
            symmetry,
            theta,
            sources,
            start=symmetry.identity(),
            threads=matching_threads(device, settings.workers),
            activations=activations,
        )
        seconds.append(found.seconds / count)
    return seconds[-1] + looking / settings.sources.number


def _some_moved(size: int, generator: torch.Generator) -> torch.Tensor:
    """A permutation [size] that moves a share of the units."""
    index = torch.arange(size, device="cpu")
    chosen = torch.randperm(size, generator=generator, device="cpu")[: max(2, round(MOVED * size))]
    index[chosen] = chosen.roll(1)
    return index


def work_of(context: Session, facts: DataFacts, rates: Rates) -> list[Work]:
    """All parts of the run, in order."""
    settings = context.settings
    train, evaluation = settings.train, settings.evaluation
    regular = settings.sources.heldout + (settings.sources.number if settings.sources.folder is None else 0)
    epoch = None if rates.training is None else facts.train * rates.training
    star = None
    if epoch is not None and rates.matching is not None:
        every = settings.star_matched_every
        star = epoch + (settings.sources.number * rates.matching / every if every else 0.0)
    once = seen = sum(
        min(count, limit or count)
        for count, limit in (
            (facts.train, evaluation.limit),
            (facts.validation, evaluation.limit),
            (facts.test, evaluation.test_limit),
        )
    )
    if context.network.has_batch_norm:
        statistics = facts.train if evaluation.bn_batches is None else evaluation.bn_batches * train.batch_size
        seen += min(facts.train, statistics)
    measuring = None if rates.evaluation is None else seen * rates.evaluation
    own = None if rates.evaluation is None else once * rates.evaluation
    return [
        Work("epoch of a regular model", regular * train.epochs, epoch),
        Work("epoch of the star, matching included", settings.star.epochs or train.epochs, star),
        Work("model measured when it is trained", regular + 1, own),
        Work("point of a path measured", evaluated_models(context), measuring),
    ]
