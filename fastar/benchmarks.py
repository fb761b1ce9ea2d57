"""What benchmarks share: cases timed in turns inside one process, and one line of JSON per case."""

from __future__ import annotations

import argparse
import collections
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fastar import matching
from fastar.config import MatchingSettings, StarSettings, TrainSettings
from fastar.data import Augmentation, DeviceDataset
from fastar.devices import synchronize
from fastar.errors import FastarError
from fastar.experiments.context import resolve_device
from fastar.experiments.star import match_store
from fastar.flat import FlatLayout
from fastar.graphs import record_cuda_graph
from fastar.kernels import backend
from fastar.matching import derive_symmetry
from fastar.models import build_model, parameter_count
from fastar.progress import SILENT, Progress
from fastar.runs import versions
from fastar.training import RegularStep, SourcesStore, StarStep, fit, resolve_precision
from fastar.training.profiling import union

# Steps of a benchmark's epoch: a star step draws anew after so many.
EPOCH = 1000


@dataclass(frozen=True)
class Case:
    """Something to time: `run` does it once (`calls` times, where it cannot do less); `facts` are added to its line."""

    name: str
    run: Callable[[], object]
    facts: Mapping[str, Any] = field(default_factory=dict)
    calls: int = 1


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one case, one figure per round; `first`: of the very first run, with all that it builds,
    compiles and captures."""

    case: Case
    seconds: list[float]
    first: float = 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


OnFailure = Callable[[Case, Exception], None]


def built_when_run(make: Callable[[], Callable[[], object]]) -> Callable[[], object]:
    """What `make` makes, made when it is run for the first time: what cannot be built fails as its own case."""
    made: list[Callable[[], object]] = []

    def run() -> object:
        if not made:
            made.append(make())
        return made[0]()

    return run


def in_one_graph(run: Callable[[], object], times: int, device: torch.device) -> Callable[[], object]:
    """`run` so many times as one CUDA graph, so that the device's own time is seen and not that of its launches.

    Elsewhere than on a GPU: a plain loop.
    """

    def repeated() -> None:
        for _ in range(times):
            run()

    return record_cuda_graph(repeated, repeated) if device.type == "cuda" else repeated


def time_in_turns(
    cases: Sequence[Case],
    device: torch.device,
    *,
    rounds: int,
    repeats: int = 1,
    warm_up: int = 3,
    on_failure: OnFailure | None = None,
    progress: Progress = SILENT,
) -> list[Timing]:
    """Time every case once a round, so that ratios within a round hold while the machine's speed drifts.

    Seconds are of `repeats` calls, divided: by CUDA events on a GPU (so that launches overlap), else by the clock.
    Every second round goes through the cases backwards, so that none always follows the same one.

    Args:
        on_failure: told of a case that fails, which is left out then; None: its error ends everything.
    """
    if len({case.name for case in cases}) != len(cases):
        raise ValueError(f"cases need names of their own: {[case.name for case in cases]}")
    first: dict[str, float] = {}
    taken: dict[str, list[float]] = {}

    def attempt(case: Case, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:
            if on_failure is None:
                raise
            taken.pop(case.name, None)
            on_failure(case, error)

    def warm(case: Case) -> None:
        first[case.name] = _clocked(case.run, device)
        for _ in range(warm_up - 1):
            case.run()
        synchronize(device)  # what a kernel did wrong shows here, and not in the next case
        taken[case.name] = []

    def measure(case: Case) -> None:
        taken[case.name].append(_seconds(case, device, max(1, repeats // case.calls)))

    for case in cases:
        attempt(case, lambda case=case: warm(case))  # type: ignore[misc]
    gc.collect()
    with progress.task("measuring", total=rounds, unit="rounds") as advance:
        for number in range(rounds):
            for case in cases if number % 2 == 0 else reversed(cases):
                if case.name in taken:
                    attempt(case, lambda case=case: measure(case))  # type: ignore[misc]
            advance(1)
    return [Timing(case, taken[case.name], first[case.name]) for case in cases if case.name in taken]


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
        **({"first_s": timing.first} if timing.first else {}),
        **where(device),
    }
    return json.dumps(record)


def failure(bench: str, case: str, error: Exception, device: torch.device, **facts: Any) -> str:
    """The JSON line of a case that failed: its name and facts, and what was wrong. Told on stderr in full as well."""
    print(f"{bench}, {case}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    said = f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]
    return json.dumps({"bench": bench, "case": case, "error": said, **facts, **where(device)})


def where(device: torch.device) -> dict[str, Any]:
    """The device, the kernels' path on it, and versions with the commit."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"cpu, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return {"device": name, "kernels": backend(device), "versions": {**versions(), "cuda": torch.version.cuda}}


@contextmanager
def failing_alone(bench: str, case: str, device: torch.device, **facts: Any) -> Iterator[None]:
    """Whatever goes wrong inside is told as the case's line, and ends nothing else."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - an error of any kind is the case's result
        print(failure(bench, case, error, device, **facts), flush=True)


def profiler_sees_gpu() -> bool:
    """Whether torch's profiler can record what a GPU does (not in a CPU build, nor where CUPTI is missing)."""
    return torch.profiler.ProfilerActivity.CUDA in torch.profiler.supported_activities()


def gpu_work(run: Callable[[], object], device: torch.device) -> dict[str, float]:
    """What a call has a GPU do: kernels, copies and waits of the host, and milliseconds in which the GPU was busy."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as found:
        run()
        synchronize(device)
    names = collections.Counter(event.name for event in found.events())
    spans = [e.time_range for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]

    def total(*words: str) -> int:
        return sum(number for name, number in names.items() if any(word in name for word in words))

    return {
        "launches": total("LaunchKernel"),
        "copies": total("cudaMemcpy"),
        "waits": total("StreamSynchronize", "DeviceSynchronize", "EventSynchronize"),
        "gpu_busy_ms": union((span.start, span.end) for span in spans) / 1e3,
    }


def matching_threads(device: torch.device) -> int:
    """CPU threads to match with: as a run has them, but on a CPU as many as torch."""
    return matching.matching_threads(device, torch.get_num_threads())


def _clocked(run: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    begin = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - begin


def _seconds(case: Case, device: torch.device, repeats: int) -> float:
    calls = repeats * case.calls
    if device.type == "cuda":
        with torch.cuda.device(device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(repeats):
                case.run()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
    begin = time.perf_counter()
    for _ in range(repeats):
        case.run()
    return (time.perf_counter() - begin) / calls


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
    parser.add_argument("--cudnn-benchmark", action="store_true", help="let cuDNN time its algorithms, in every case")
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
    torch.backends.cudnn.benchmark = arguments.cudnn_benchmark
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

    def endless(self, step: RegularStep | StarStep) -> Callable[[], object]:
        """`step` again and again on one batch, epochs begun as needed."""
        images, labels = self.batch()
        lr = torch.tensor(self.settings.lr, device=self.device)
        numbers = itertools.count()

        def run() -> object:
            number = next(numbers)
            if number % EPOCH == 0:
                step.begin_epoch(number // EPOCH, EPOCH)
            return step(images, labels, lr)

        return run

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
            threads = matching_threads(self.device)
            match_store(symmetry, theta, sources, MatchingSettings(), start=start, seed=epoch, threads=threads)

        model = self.network(0)
        model.load_state_dict(states[0])
        star = StarSettings(match_every_epochs=int(matching))
        settings = self.settings.model_copy(update=changes)
        return StarStep(model, settings, star, store, seed=0, match=match, fuse=fuse)

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
