"""One training step: regular and star, fastar's and plain PyTorch's, one JSON line per case.

    python tools/bench_step.py [--arch resnet18] [--batch 128] [--precision fp32|bf16|fp16] [--compile] [--graph]

Cases take turns inside each round of one process. `of_regular` is a case's time over that of `regular`, fastar's
regular step (median and quartiles of per-round ratios); images are random, so data loading is not in it.

    regular, star                fastar's steps (star without matching: that is bench_epoch.py)
    plain regular                the network, autocast, torch.optim.SGD
    plain star                   the same; parameters concatenated, interpolated, gradients copied back
    ..., compiled / graph        with torch.compile, and as a CUDA graph (`train.compile`, `train.graph`)
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastar.benchmarks import Case, line, ratio, time_in_turns
from fastar.config import StarSettings, TrainSettings
from fastar.flat import FlatLayout
from fastar.models import build_model, parameter_count
from fastar.training import RegularStep, SourcesStore, StarStep, draw, resolve_precision

EPOCH = 1000  # steps after which a star step draws anew


class PlainStep:
    """What one writes without fastar: the paper's reference does the same in outline."""

    def __init__(self, model: nn.Module, settings: TrainSettings, dtype: torch.dtype, network: Any):
        self.model, self.network, self.dtype = model.train(), network, dtype
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.SGD(
            model.parameters(),
            lr=settings.lr,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
            weight_decay=settings.weight_decay,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)

    def backward(self, images: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = F.cross_entropy(self.network(images).float(), labels)
        self.scaler.scale(loss).backward()

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        self.backward(images, labels)
        self.scaler.step(self.optimizer)
        self.scaler.update()


class PlainStarStep(PlainStep):
    """Parameters are concatenated, interpolated and copied into the network; its gradients go back scaled by 1 - t."""

    def __init__(self, *arguments: Any, sources: list[nn.Module]):
        super().__init__(*arguments)
        self.sources = [self.flat(source) for source in sources]
        self.theta = nn.Parameter(self.flat(self.model))
        defaults = self.optimizer.defaults
        names = ("lr", "momentum", "nesterov", "weight_decay")
        self.optimizer = torch.optim.SGD([self.theta], **{name: defaults[name] for name in names})
        self.draws = itertools.cycle(zip(*draw(StarSettings(), len(sources), EPOCH, seed=0), strict=True))

    @staticmethod
    def flat(model: nn.Module) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        index, t = next(self.draws)
        point = (1 - t) * self.theta.detach() + t * self.sources[index]
        start = 0
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.grad = None
                parameter.copy_(point[start : start + parameter.numel()].view(parameter.shape))
                start += parameter.numel()
        self.backward(images, labels)
        gradients = [p.grad.reshape(-1) for p in self.model.parameters() if p.grad is not None]
        self.theta.grad = (1 - t) * torch.cat(gradients)
        self.scaler.step(self.optimizer)
        self.scaler.update()


def endless(step: RegularStep | StarStep, images: Tensor, labels: Tensor, lr: Tensor) -> Callable[[], object]:
    """`step` again and again, epochs begun as needed."""
    count = itertools.count()

    def run() -> object:
        number = next(count)
        if number % EPOCH == 0:
            step.begin_epoch(number // EPOCH, EPOCH)
        return step(images, labels, lr)

    return run


def make_cases(arguments: argparse.Namespace, device: torch.device) -> list[Case]:
    options = {} if arguments.width is None else {"width": arguments.width}
    shape = (3, arguments.size, arguments.size)

    def network(seed: int) -> nn.Module:
        model = build_model(arguments.arch, input_shape=shape, classes=10, seed=seed, **options)
        return model.to(device)

    settings = TrainSettings(lr=1e-3, precision=arguments.precision)
    dtype = resolve_precision(settings.precision, device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(arguments.batch, *shape, generator=generator)
    images = images.to(device).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (arguments.batch,), generator=generator).to(device)
    lr = torch.tensor(1e-3, device=device)
    layout = FlatLayout.from_module(network(0))
    sources = [network(1 + n) for n in range(arguments.sources)]
    names = [str(n) for n in range(arguments.sources)]

    def regular(**changes: Any) -> Callable[[], object]:
        return endless(RegularStep(network(0), settings.model_copy(update=changes)), images, labels, lr)

    def star(fuse: bool = True, **changes: Any) -> Callable[[], object]:
        store = SourcesStore(layout, [s.state_dict() for s in sources], names, device, store=arguments.store)
        chosen, never = settings.model_copy(update=changes), StarSettings(match_every_epochs=0)
        step = StarStep(network(0), chosen, never, store, seed=0, match=lambda *_: None, fuse=fuse)
        return endless(step, images, labels, lr)

    def plain(star: bool, compiled: bool) -> Callable[[], object]:
        model = network(0)
        run: Any = torch.compile(model, dynamic=False) if compiled else model
        step = (
            PlainStarStep(model, settings, dtype, run, sources=sources)
            if star
            else PlainStep(model, settings, dtype, run)
        )
        return lambda: step(images, labels)

    cases = {
        "regular": regular(),
        "star": star(),
        "star, interpolation apart": star(fuse=False),
        "plain regular": plain(False, False),
        "plain star": plain(True, False),
    }
    if arguments.compile:
        cases |= {
            "regular, compiled": regular(compile=True),
            "star, compiled": star(compile=True),
            "plain regular, compiled": plain(False, True),
            "plain star, compiled": plain(True, True),
        }
    if arguments.graph:
        cases |= {"regular, graph": regular(graph=True), "star, graph": star(graph=True)}
        if arguments.compile:
            cases |= {"regular, compiled, graph": regular(graph=True, compile=True)}
    facts = {
        "arch": arguments.arch,
        "parameters": parameter_count(sources[0]),
        "batch": arguments.batch,
        "size": arguments.size,
        "precision": str(dtype).removeprefix("torch."),
        "sources": arguments.sources,
    }
    return [Case(name, run, facts) for name, run in cases.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--width", type=float, help="the architecture's width setting")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--sources", type=int, default=3)
    parser.add_argument("--store", default="auto", choices=["auto", "device", "host", "file"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each case")
    parser.add_argument("--repeats", type=int, help="steps in one measurement (20 on a GPU, 1 elsewhere)")
    parser.add_argument("--compile", action="store_true", help="the compiled cases too")
    parser.add_argument("--graph", action="store_true", help="the CUDA graph cases too (GPU)")
    parser.add_argument("--only", nargs="+", help="cases to measure; `regular` is always among them")
    arguments = parser.parse_args()
    if arguments.rounds < 2 or arguments.sources < 1 or arguments.batch < 2:
        parser.error("--rounds and --batch must be at least 2, --sources at least 1")
    if arguments.width is not None and arguments.width == int(arguments.width):
        arguments.width = int(arguments.width)
    device = torch.device(arguments.device)
    cases = make_cases(arguments, device)
    if arguments.only:
        unknown = set(arguments.only) - {case.name for case in cases}
        if unknown:
            parser.error(f"--only: no case {sorted(unknown)[0]!r}; there are {[case.name for case in cases]}")
        cases = [case for case in cases if case.name in ("regular", *arguments.only)]
    repeats = arguments.repeats or (20 if device.type == "cuda" else 1)
    timings = time_in_turns(cases, device, rounds=arguments.rounds, repeats=repeats)
    for timing in timings:
        images = arguments.batch / timing.median
        print(line("step", timing, device, images_per_s=images, of_regular=ratio(timing, timings[0])), flush=True)


if __name__ == "__main__":
    main()
