"""What benchmarks share: cases timed in turns inside one process, and one line of JSON per case."""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastar.config import MatchingSettings, StarSettings, TrainSettings
from fastar.data import Augmentation, DeviceDataset
from fastar.errors import FastarError
from fastar.experiments.context import resolve_device
from fastar.experiments.star import match_store
from fastar.flat import FlatLayout
from fastar.kernels import backend
from fastar.matching import derive_symmetry
from fastar.models import build_model, parameter_count
from fastar.progress import SILENT, Progress
from fastar.runs import versions
from fastar.training import RegularStep, SourcesStore, StarStep, fit, resolve_precision


@dataclass(frozen=True)
class Case:
    """Something to time: `run` does it once; `facts` are added to its line."""

    name: str
    run: Callable[[], object]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one case, one figure per round."""

    case: Case
    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def time_in_turns(
    cases: Sequence[Case],
    device: torch.device,
    *,
    rounds: int,
    repeats: int = 1,
    warm_up: int = 3,
    progress: Progress = SILENT,
) -> list[Timing]:
    """Time every case once a round, so that ratios within a round hold while the machine's speed drifts.

    Seconds are of `repeats` calls, divided: by CUDA events on a GPU (so that launches overlap), else by the clock.
    Every second round goes through the cases backwards, so that none always follows the same one.
    """
    for case in cases:
        for _ in range(warm_up):
            case.run()
    taken: dict[str, list[float]] = {case.name: [] for case in cases}
    if len(taken) != len(cases):
        raise ValueError(f"cases need names of their own: {[case.name for case in cases]}")
    gc.collect()
    with progress.task("measuring", total=rounds, unit="rounds") as advance:
        for round_number in range(rounds):
            for case in cases if round_number % 2 == 0 else reversed(cases):
                taken[case.name].append(_seconds(case, device, repeats))
            advance(1)
    return [Timing(case, taken[case.name]) for case in cases]


def ratio(first: Timing, second: Timing) -> dict[str, float]:
    """first / second: the median and quartiles of the ratios within each round."""
    return quantiles([a / b for a, b in zip(first.seconds, second.seconds, strict=True)])


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and smallest of at least two values."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "q25": low, "q75": high, "min": min(values)}


def line(bench: str, timing: Timing, device: torch.device, **facts: Any) -> str:
    """The JSON line of one case: its name and facts, milliseconds, n, device, versions and commit."""
    record = {
        "bench": bench,
        "case": timing.case.name,
        **timing.case.facts,
        **facts,
        "ms": {name: value * 1e3 for name, value in quantiles(timing.seconds).items()},
        "n": len(timing.seconds),
        **where(device),
    }
    return json.dumps(record)


def where(device: torch.device) -> dict[str, Any]:
    """The device, the kernels' path on it, and versions with the commit."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"cpu, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return {"device": name, "kernels": backend(device), "versions": {**versions(), "cuda": torch.version.cuda}}


def _seconds(case: Case, device: torch.device, repeats: int) -> float:
    if device.type == "cuda":
        with torch.cuda.device(device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(repeats):
                case.run()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        case.run()
    return (time.perf_counter() - begin) / repeats


def add_problem_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a tool that times or profiles training; `problem_of` reads them."""
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--width", type=float, help="the architecture's width setting")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--optimizer", default="sgd", choices=["sgd", "adam", "adamw"])
    parser.add_argument("--sources", type=int, default=3)
    parser.add_argument("--store", default="auto", choices=["auto", "device", "host", "file"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def problem_of(arguments: argparse.Namespace) -> Problem:
    """The problem that the options describe.

    Raises:
        FastarError: a value out of range, or a precision that the device lacks.
    """
    if arguments.batch < 2 or arguments.sources < 1 or arguments.size < 1:
        raise FastarError("--batch must be at least 2, --sources and --size at least 1")
    device = resolve_device(arguments.device)
    resolve_precision(arguments.precision, device)
    settings = TrainSettings(
        lr=1e-3,
        batch_size=arguments.batch,
        precision=arguments.precision,
        optimizer=arguments.optimizer,
        schedule="constant",
    )
    return Problem(
        arguments.arch, device, settings, arguments.sources, arguments.size, arguments.width, arguments.store
    )


@dataclass(frozen=True)
class Problem:
    """Networks of one architecture on random images: what steps and epochs are timed on."""

    arch: str
    device: torch.device
    settings: TrainSettings
    sources: int
    size: int = 32
    width: float | None = None
    store: str = "auto"
    classes: int = 10

    @property
    def shape(self) -> tuple[int, int, int]:
        return (3, self.size, self.size)

    def network(self, seed: int) -> nn.Module:
        """A fresh network on the device."""
        width = self.width
        options = {} if width is None else {"width": int(width) if width == int(width) else width}
        model = build_model(self.arch, input_shape=self.shape, classes=self.classes, seed=seed, **options)
        return model.to(self.device)

    def batch(self) -> tuple[Tensor, Tensor]:
        """One batch of images (channels-last) and labels."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.settings.batch_size, *self.shape, generator=generator)
        labels = torch.randint(self.classes, (len(images),), generator=generator)
        return images.to(self.device).to(memory_format=torch.channels_last), labels.to(self.device)

    def dataset(self, count: int) -> DeviceDataset:
        """Random images with CIFAR's augmentation; each class is brighter than the one before, so as to be learnt."""
        generator = torch.Generator().manual_seed(1)
        labels = torch.randint(self.classes, (count,), generator=generator)
        images = torch.randint(0, 156, (count, self.size, self.size, 3), generator=generator) + 10 * labels.view(
            -1, 1, 1, 1
        )
        return DeviceDataset(
            images.to(torch.uint8).to(self.device),
            labels.to(self.device),
            classes=self.classes,
            mean=(0.5,) * 3,
            std=(0.25,) * 3,
            augmentation=Augmentation(pad=4, flip=True),
        )

    def regular_step(self, **changes: Any) -> RegularStep:
        """A regular step on a fresh network; `changes` of `settings`."""
        return RegularStep(self.network(0), self.settings.model_copy(update=changes))

    def star_step(
        self, *, fuse: bool = True, matching: bool = False, trained: DeviceDataset | None = None, **changes: Any
    ) -> StarStep:
        """A star step on fresh networks. `trained`: theta and the sources first see an epoch of it each."""
        models = [self.network(n) for n in range(1 + self.sources)]
        if trained is not None:
            for n, model in enumerate(models):
                fit(RegularStep(model, self.settings), trained, self.settings, name=str(n), seed=n, epochs=1)
        states = [{k: v.float() for k, v in model.state_dict().items()} for model in models]
        layout = FlatLayout.from_module(models[0])
        names = [str(n) for n in range(self.sources)]
        store = SourcesStore(layout, states[1:], names, self.device, store=self.store)
        name = [self.arch, {"width": self.width}, list(self.shape), self.classes]
        symmetry = derive_symmetry(self.network(0).cpu(), (torch.zeros(2, *self.shape),), name=name)
        calls = iter(range(1_000_000))

        def match(theta: Tensor, sources: SourcesStore, epoch: int) -> None:
            start = symmetry.identity() if next(calls) else None
            threads = torch.get_num_threads()
            match_store(symmetry, theta, sources, MatchingSettings(), start=start, seed=epoch, threads=threads)

        model = self.network(0)
        model.load_state_dict(states[0])
        star = StarSettings(match_every_epochs=int(matching))
        settings = self.settings.model_copy(update=changes)
        return StarStep(model, settings, star, store, seed=0, match=match, fuse=fuse)

    def facts(self) -> dict[str, Any]:
        """What a line says of the problem."""
        return {
            "arch": self.arch,
            "parameters": parameter_count(self.network(0)),
            "batch": self.settings.batch_size,
            "size": self.size,
            "precision": str(resolve_precision(self.settings.precision, self.device)).removeprefix("torch."),
            "sources": self.sources,
        }
