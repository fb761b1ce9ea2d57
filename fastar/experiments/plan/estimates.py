"""Bytes of a run for any choice of settings: what is exact, and activations as a straight line over the batch size."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastar.config import Settings
from fastar.data.in_memory import BLOCK_BYTES
from fastar.evaluation.batch_norm import evaluating, statistics_bytes
from fastar.evaluation.paths import ENDS
from fastar.experiments.plan.sizes import (
    PHASES,
    DataCounts,
    Exact,
    Item,
    during,
    evaluated_models,
    held_bytes,
    limits_of,
    training_sides,
)
from fastar.experiments.session import Session
from fastar.experiments.statistics_batches import LOOKED_AT
from fastar.kernels import backend
from fastar.matching import EXAMPLE_BATCHES, Extent, cache_bytes, extra_bytes
from fastar.runtime.live_bytes import Network, PeakLine, peak_line
from fastar.runtime.memory import models_that_fit
from fastar.symmetry import Symmetry
from fastar.training import PART_ROWS, resolve_precision

# Batches of decoded images on the host at a time: two ahead, the one in use and the one being filled.
DECODED = 4
# Bytes of each value of the next images while they are made beside the last ones: fp32, and what they are made of.
NEXT = 5


class Choice(NamedTuple):
    """The settings that can be changed to make a run fit."""

    batch: int
    measured: int
    store: str
    graph: bool

    def changed(self, settings: Settings) -> dict[str, object]:
        """Keys and values that differ from `settings`."""
        own = Choice.of(settings)
        keys = ("train.batch_size", "evaluation.batch_size", "sources.store", "train.graph")
        return {key: value for key, value, given in zip(keys, self, own, strict=True) if value != given}

    @classmethod
    def of(cls, settings: Settings) -> Choice:
        """As the settings are."""
        train = settings.train
        return cls(train.batch_size, settings.evaluation.batch_size, settings.sources.store, train.graph)


@dataclass(frozen=True)
class Needs:
    """Bytes of a run for any choice of the settings that can make it fit.

    Args:
        exact: what is known by arithmetic.
        symmetry: what is matched.
        statistics: bytes of a model whose batch-norm is re-estimated; 0: there is none.
        update: bytes that an update takes for a moment.
        training, forward: of a step, and of evaluating a batch.
        image, measured_image: (C, H, W) in training, at its largest, and in evaluation.
    """

    exact: Exact
    symmetry: Symmetry
    statistics: int
    update: int
    training: PeakLine
    forward: PeakLine
    image: tuple[int, int, int]
    measured_image: tuple[int, int, int]

    @classmethod
    def of(cls, session: Session, counts: DataCounts) -> Needs:
        """Count them on networks without data."""
        settings, image = session.settings, session.data.image
        limits = limits_of(session, here=False)
        dtype = _precision(settings, session.device, "gpu" in limits)
        model = session.network.build(seed=0, device="cpu")
        row, kept = 4 * session.network.layout.numel, 0
        largest = image
        if settings.dataset.spec.variable_size:
            side = max(training_sides(session))
            largest = (image[0], side, side)
        if settings.matching.by_activations and session.network.symmetry.groups:
            looked_at = min(settings.train.batch_size, LOOKED_AT)
            images = torch.empty(looked_at, *image, device="meta", dtype=torch.float32)
            kept = cache_bytes(model, session.network.symmetry, [images] * EXAMPLE_BATCHES)
        exact = Exact(
            settings,
            counts,
            row=row,
            low=row * dtype.itemsize // 4,
            buffers=sum(buffer.nbytes for buffer in model.buffers()),
            activations=kept,
            limits=limits,
        )
        batch = settings.train.batch_size
        return cls(
            exact=exact,
            symmetry=session.network.symmetry,
            statistics=statistics_bytes(model),
            # Without Triton a GPU's update holds the gradient once more; elsewhere it is done in blocks.
            update=row if session.device.type == "cuda" and backend(session.device) == "reference" else 0,
            training=training_line(model, largest, dtype, batch),
            forward=forward_line(model, image, max(batch, settings.evaluation.batch_size)),
            image=largest,
            measured_image=image,
        )

    @property
    def gpu(self) -> bool:
        """True where models are trained on a GPU."""
        return self.exact.place == "gpu"

    @property
    def free(self) -> int:
        """Bytes of the place where models are trained."""
        return self.exact.limits[self.exact.place]

    def items(self, choice: Choice) -> list[Item]:
        """All that the run takes."""
        exact, place, pixels = self.exact, self.exact.place, math.prod(self.image)
        items = list(exact.items(choice.store))

        def estimate(what: str, size: int, phase: str) -> None:
            items.append(Item(place, what, size, phase, exact=False))

        step = max(self.training.at(choice.batch), self.update)
        block = pixels * self._made(pixels, choice.batch)
        if choice.graph:  # its memory is its own for as long as it can be replayed
            for phase in ("training", "matching"):
                estimate("graph: activations and inputs", step + 4 * pixels * choice.batch, phase)
            short = 0 if exact.settings.train.drop_last else exact.counts.train % choice.batch
            step = self.training.at(short) if short else 0
        estimate(f"a step on {choice.batch} images", 4 * block + max(step, NEXT * block), "training")
        part = exact.settings.sources.number
        if self.gpu and not exact.in_place(choice.store):  # as `SourcesStore.parts`
            part = min(part, PART_ROWS, max(1, self.free // 8 // exact.row))
            items.append(Item(place, f"matching: {part} sources at a time", part * exact.row, "matching"))
        left = max(0, self.free - during(items, place, "matching"))
        estimate("matching: copies and scores", self._matching(choice, part, left), "matching")
        models, passes = self._evaluation(choice)
        whole = f"{models} of {evaluated_models(exact.settings)} models at a time"
        items.append(Item(place, whole, models * (exact.row + self.statistics), "evaluation"))
        ends = (ENDS + 1) * exact.row + exact.buffers
        items.append(Item(place, "ends of paths, and a network", ends, "evaluation"))
        estimate("evaluation: images and activations", passes, "evaluation")
        if not exact.settings.dataset.spec.variable_size:
            return items
        shown = max(self._passes(choice)) * math.prod(self.measured_image)
        decoded = DECODED * choice.batch * pixels, DECODED * shown
        return [
            *items,
            *(Item("host", "decoded batches ahead", n, p) for n, p in zip(decoded, PHASES[::2], strict=True)),
        ]

    def _passes(self, choice: Choice) -> tuple[int, ...]:
        """Images of a batch of losses, and of batch-norm statistics where they are taken."""
        return (choice.measured, choice.batch) if self.statistics else (choice.measured,)

    def _made(self, pixels: int, batch: int) -> int:
        """Images that are on the device in fp32 at a time: a batch, or a block of batches of a set that is held."""
        if self.exact.settings.dataset.spec.variable_size:
            return batch
        block = BLOCK_BYTES["cuda" if self.gpu else "cpu"]
        return min(max(1, block // (4 * pixels * batch)) * batch, self.exact.counts.train)

    def _matching(self, choice: Choice, part: int, left: int) -> int:
        settings, images = self.exact.settings, min(choice.batch, LOOKED_AT)
        cached = self.exact.activations
        forward = self.forward.at(images) + 4 * images * math.prod(self.measured_image) if cached else 0
        extent = Extent(settings.matching, self.symmetry, part, left, self.gpu, settings.workers, cached, forward)
        return extra_bytes(extent)

    def _evaluation(self, choice: Choice) -> tuple[int, int]:
        """Models that are held at a time, and bytes of the images and activations of a batch."""
        exact, pixels = self.exact, math.prod(self.measured_image)
        passes = 0
        for batch in self._passes(choice):
            block = pixels * self._made(pixels, batch)
            passes = max(passes, 4 * block + max(self.forward.at(batch), NEXT * block))
        held = held_bytes(exact.settings, exact.counts)
        free = max(0, self.free - held - exact.row - exact.buffers)
        extra = passes + ENDS * exact.row if self.gpu else None
        wanted = evaluated_models(exact.settings)
        return models_that_fit(exact.row + self.statistics, free, wanted, extra, gpu=self.gpu), passes


def _precision(settings: Settings, device: torch.device, on_gpu: bool) -> torch.dtype:
    if on_gpu and device.type == "cpu":  # a GPU that is not here: any that is worth planning for has bf16
        return {"fp32": torch.float32, "fp16": torch.float16}.get(settings.train.precision, torch.bfloat16)
    return resolve_precision(settings.train.precision, device)


def training_line(model: nn.Module, shape: tuple[int, int, int], dtype: torch.dtype, batch: int) -> PeakLine:
    """Peak bytes of forward and backward in `dtype` on up to `batch` images of `shape`, new gradients among them."""

    def run(network: Network, images: Tensor, labels: Tensor) -> None:
        with _autocast(dtype):
            logits = network(images)
        F.cross_entropy(logits.float(), labels).backward()

    return peak_line(model.train(), run, shape, batch, dtype)


def forward_line(model: nn.Module, shape: tuple[int, int, int], batch: int) -> PeakLine:
    """Peak bytes of evaluating one network in fp32 on up to `batch` images of `shape`."""

    @torch.no_grad()
    def run(network: Network, images: Tensor, labels: Tensor) -> None:
        F.cross_entropy(network(images).float(), labels, reduction="sum")

    with evaluating(model):
        return peak_line(model, run, shape, batch)


def _autocast(dtype: torch.dtype) -> AbstractContextManager[object]:
    return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype, cache_enabled=False)
