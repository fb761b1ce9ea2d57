"""What is timed: steps and epochs of networks of one architecture on random images."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bench.lines import CannotRun
from fastar import matching
from fastar.config import Augmentation, MatchingSettings, StarSettings, TrainSettings
from fastar.data.in_memory import DeviceDataset
from fastar.errors import FastarError
from fastar.experiments.statistics_batches import LOOKED_AT
from fastar.flat import FlatLayout
from fastar.losses import Loss, split_of
from fastar.matching import EXAMPLE_BATCHES, ActivationCache, UnitActivations, cache_bytes
from fastar.models import build_model, parameter_count
from fastar.models.registry import seeded
from fastar.runtime.device import resolve_device, simulated
from fastar.symmetry import derive_symmetry
from fastar.training import Matcher, RegularStep, SourceShares, SourcesStore, StarStep, fit, resolve_precision

Method = Literal["weight", "activation"]
# Steps of a benchmark's epoch: a star step draws anew after so many.
EPOCH = 1000


def matching_threads(device: torch.device) -> int:
    """CPU threads to match with: as a run has them, but on a CPU as many as torch."""
    return matching.matching_threads(device, torch.get_num_threads())


def add_problem_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a tool that times or profiles training; `problem_of` reads them."""
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--width", type=float, help="the architecture's width setting")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--channels", type=int, default=3, help="of the images")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--optimizer", default="sgd", choices=["sgd", "adam", "adamw"])
    parser.add_argument("--sources", type=int, default=3)
    parser.add_argument("--store", default="auto", choices=["auto", "device", "host", "file"])
    parser.add_argument("--cudnn-benchmark", action="store_true", help="let cuDNN time its algorithms, in every case")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def problem_of(arguments: argparse.Namespace) -> Problem:
    """The problem that the options describe.

    Raises:
        FastarError: a value out of range, or a precision that the device lacks.
    """
    if arguments.batch < 2 or min(arguments.sources, arguments.size, arguments.channels) < 1:
        raise FastarError("--batch must be at least 2; --sources, --size and --channels at least 1")
    device = resolve_device(arguments.device)
    resolve_precision(arguments.precision, device)
    torch.backends.cudnn.benchmark = arguments.cudnn_benchmark
    settings = TrainSettings(
        lr=1e-3,
        batch_size=arguments.batch,
        precision=arguments.precision,
        optimizer=arguments.optimizer,
        schedule="constant",
    )
    return Problem(
        arguments.arch,
        device,
        settings,
        arguments.sources,
        arguments.size,
        arguments.width,
        arguments.store,
        channels=arguments.channels,
    )


@dataclass(frozen=True)
class Problem:
    """Networks of one architecture on random images: what steps and epochs are timed on.

    Args:
        build: a user's function that makes the networks; None: `arch` of the registry.
        loss: of a batch; None: cross-entropy.
    """

    arch: str
    device: torch.device
    settings: TrainSettings
    sources: int
    size: int = 32
    width: float | None = None
    store: str = "auto"
    classes: int = 10
    channels: int = 3
    build: Callable[[], nn.Module] | None = None
    loss: Loss | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.channels, self.size, self.size)

    def network(self, seed: int) -> nn.Module:
        """A fresh network on the device."""
        if self.build is not None:
            with seeded(seed):
                return self.build().to(self.device)
        width = self.width
        options = {} if width is None else {"width": int(width) if width == int(width) else width}
        model = build_model(self.arch, input_shape=self.shape, classes=self.classes, seed=seed, **options)
        return model.to(self.device)

    def batch(self) -> tuple[Tensor, Tensor]:
        """One batch of images (channels-last) and labels."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(
            self.settings.batch_size, *self.shape, generator=generator, dtype=torch.float32, device="cpu"
        )
        labels = torch.randint(self.classes, (len(images),), generator=generator, device="cpu")
        return images.to(self.device).to(memory_format=torch.channels_last), labels.to(self.device)

    def dataset(self, count: int) -> DeviceDataset:
        """Random images with CIFAR's augmentation; each class is brighter than the one before, so as to be learnt."""
        generator = torch.Generator().manual_seed(1)
        labels = torch.randint(self.classes, (count,), generator=generator, device="cpu")
        images = torch.randint(
            0, 156, (count, self.size, self.size, self.channels), generator=generator, device="cpu"
        ) + 10 * labels.view(-1, 1, 1, 1)
        return DeviceDataset(
            images.to(torch.uint8).to(self.device),
            labels.to(self.device),
            mean=(0.5,) * self.channels,
            std=(0.25,) * self.channels,
            augmentation=Augmentation(pad=4, flip=True),
        )

    def endless(self, step: RegularStep | StarStep) -> Callable[[], object]:
        """`step` again and again on one batch, epochs begun as needed; users' batches are taken apart each time."""
        batch: Any = self.batch()
        whole = self.loss is not None and self.loss.whole
        split = (lambda batch: batch) if self.build is None else split_of(step.model, whole=whole)
        lr = torch.tensor(self.settings.lr, device=self.device, dtype=torch.float32)
        numbers = itertools.count()

        def run() -> object:
            number = next(numbers)
            if number % EPOCH == 0:
                step.begin_epoch(number // EPOCH, EPOCH)
            return step(*split(batch), lr)

        return run

    def changed(self, **changes: Any) -> TrainSettings:
        """The settings with these changes.

        Raises:
            CannotRun: this machine cannot do what they ask for.
        """
        settings = self.settings.model_copy(update=changes)
        if self.device.type == "cpu" and settings.graph:
            raise CannotRun("CUDA graphs need a GPU")
        if self.device.type == "cpu" and settings.precision == "fp16":
            raise CannotRun("fp16 needs a GPU")
        if self.device.type == "cuda" and settings.compile and simulated():
            raise CannotRun("nothing is compiled for the simulated GPU")
        return settings

    def regular_step(self, **changes: Any) -> RegularStep:
        """A regular step on a fresh network; `changes` of `settings`."""
        return RegularStep(self.network(0), self.changed(**changes), loss=self.loss)

    def trained(self, data: DeviceDataset | None) -> list[dict[str, Tensor]]:
        """State dicts of fresh networks, theta and then the sources, that have seen an epoch of `data` each, if any."""
        models = [self.network(n) for n in range(1 + self.sources)]
        if data is not None:
            for n, model in enumerate(models):
                fit(RegularStep(model, self.settings), data, self.settings, name=str(n), seed=n, epochs=1)
        return [{name: value.detach().float() for name, value in model.state_dict().items()} for model in models]

    def star_step(
        self,
        *,
        matching: Method | None = None,
        states: Sequence[dict[str, Tensor]] | None = None,
        **changes: Any,
    ) -> StarStep:
        """A star step on `states` (theta's and the sources'; fresh ones by default), matched at the start of every
        epoch by the method `matching`, or never."""
        settings = self.changed(**changes)
        theta, *others = self.trained(None) if states is None else states
        model = self.network(0)
        model.load_state_dict(theta)
        store, match = self._matched_by(matching, model, others)
        return StarStep(model, settings, StarSettings(), store, seed=0, match=match, loss=self.loss)

    def _matched_by(
        self, method: Method | None, model: nn.Module, states: list[dict[str, Tensor]]
    ) -> tuple[SourcesStore, Matcher | None]:
        """The sources, and what matches them to theta as a run does."""
        names = [str(n) for n in range(self.sources)]
        layout = FlatLayout.from_module(model)
        if method is None:
            return SourcesStore(layout, states, names, self.device, store=self.store), None
        name = [self.arch, {"width": self.width}, list(self.shape), self.classes]
        symmetry = derive_symmetry(
            self.network(0).cpu(), (torch.zeros(2, *self.shape, dtype=torch.float32, device="cpu"),), name=name
        )
        chosen = MatchingSettings(method=method)
        images = []
        if chosen.by_activations:
            size = min(self.settings.batch_size, LOOKED_AT)
            images = [batch.cpu() for batch, _ in self.dataset(EXAMPLE_BATCHES * size).sequential(size)]
        beside = cache_bytes(model, symmetry, images) if images else 0
        store = SourcesStore(layout, states, names, self.device, store=self.store, beside=beside)
        kept = None
        if images:
            look = UnitActivations(model, symmetry, images, self.device)
            kept = ActivationCache(look, states, names, allocate=store.make_beside)
        shares = SourceShares.here(self.sources, StarSettings())
        threads = matching_threads(self.device)
        return store, Matcher(symmetry, store, chosen, seed=0, threads=threads, kept=kept, shares=shares)

    @cached_property
    def parameters(self) -> int:
        """How many the network has."""
        return parameter_count(self.network(0))

    def facts(self) -> dict[str, Any]:
        """What a line says of the problem."""
        return {
            "arch": self.arch,
            "parameters": self.parameters,
            "batch": self.settings.batch_size,
            "size": self.size,
            "precision": str(resolve_precision(self.settings.precision, self.device)).removeprefix("torch."),
            "sources": self.sources,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
        }
