"""One training step: regular and star, fastar's and plain PyTorch's, one JSON line per case.

    python tools/bench_step.py --arch resnet18 --batch 128 [--precision bf16] [--compile] [--graph]

Cases take turns inside each round of one process. `of_regular` is a case's time over that of `regular`, fastar's
regular step (median and quartiles of per-round ratios); steps are on one random batch, so `loading` is not in them.

    regular, star                fastar's steps (star without matching: that is bench_epoch.py)
    loading                      a batch of a data set on the device: shuffled, cropped, mirrored, normalised
    plain regular                the network, autocast, torch.optim
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

from fastar.benchmarks import Case, Problem, add_problem_arguments, line, problem_of, ratio, time_in_turns
from fastar.config import StarSettings, TrainSettings
from fastar.errors import FastarError
from fastar.training import RegularStep, StarStep, draw, resolve_precision

EPOCH = 1000  # steps after which a star step draws anew


class PlainStep:
    """What one writes without fastar: the paper's reference does the same in outline."""

    def __init__(self, model: nn.Module, problem: Problem, network: Any):
        self.model, self.network, self.device = model.train(), network, problem.device
        self.dtype = resolve_precision(problem.settings.precision, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.optimizer = self.make_optimizer(list(model.parameters()), problem.settings)

    @staticmethod
    def make_optimizer(parameters: list[nn.Parameter], settings: TrainSettings) -> torch.optim.Optimizer:
        if settings.optimizer == "sgd":
            more = {"momentum": settings.momentum, "nesterov": settings.nesterov}
            return torch.optim.SGD(parameters, settings.lr, weight_decay=settings.weight_decay, **more)
        kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
        return kind(parameters, settings.lr, settings.betas, settings.eps, settings.weight_decay)

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

    def __init__(self, model: nn.Module, problem: Problem, network: Any, sources: list[nn.Module]):
        super().__init__(model, problem, network)
        self.sources = [self.flat(source) for source in sources]
        self.theta = nn.Parameter(self.flat(self.model))
        self.optimizer = self.make_optimizer([self.theta], problem.settings)
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


def loading(problem: Problem) -> Callable[[], object]:
    """The next batch, again and again; a data set of 100 batches."""
    data = problem.dataset(100 * problem.settings.batch_size)
    epochs = (data.batches(problem.settings.batch_size, seed=0, epoch=epoch) for epoch in itertools.count())
    batches = itertools.chain.from_iterable(epochs)
    return lambda: next(batches)


def make_cases(problem: Problem, *, compiled: bool, graph: bool) -> list[Case]:
    images, labels = problem.batch()
    lr = torch.tensor(problem.settings.lr, device=problem.device)
    sources = [problem.network(1 + n) for n in range(problem.sources)]

    def regular(**changes: Any) -> Callable[[], object]:
        return endless(problem.regular_step(**changes), images, labels, lr)

    def star(**changes: Any) -> Callable[[], object]:
        return endless(problem.star_step(**changes), images, labels, lr)

    def plain(star: bool, compiled: bool) -> Callable[[], object]:
        model = problem.network(0)
        run: Any = torch.compile(model, dynamic=False) if compiled else model
        step = PlainStarStep(model, problem, run, sources) if star else PlainStep(model, problem, run)
        return lambda: step(images, labels)

    cases = {
        "regular": regular(),
        "star": star(),
        "star, interpolation apart": star(fuse=False),
        "loading": loading(problem),
        "plain regular": plain(False, False),
        "plain star": plain(True, False),
    }
    if compiled:
        cases |= {
            "regular, compiled": regular(compile=True),
            "star, compiled": star(compile=True),
            "plain regular, compiled": plain(False, True),
            "plain star, compiled": plain(True, True),
        }
    if graph:
        cases |= {"regular, graph": regular(graph=True), "star, graph": star(graph=True)}
    if compiled and graph:
        cases |= {
            "regular, compiled, graph": regular(compile=True, graph=True),
            "star, compiled, graph": star(compile=True, graph=True),
        }
    return [Case(name, run, problem.facts()) for name, run in cases.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_problem_arguments(parser)
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each case")
    parser.add_argument("--repeats", type=int, help="steps in one measurement (20 on a GPU, 1 elsewhere)")
    parser.add_argument("--compile", action="store_true", help="the compiled cases too")
    parser.add_argument("--graph", action="store_true", help="the CUDA graph cases too (GPU)")
    parser.add_argument("--only", nargs="+", help="cases to measure; `regular` is always among them")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds must be at least 2")
    try:
        problem = problem_of(arguments)
        cases = make_cases(problem, compiled=arguments.compile, graph=arguments.graph)
    except FastarError as error:
        parser.error(str(error))
    if arguments.only:
        unknown = set(arguments.only) - {case.name for case in cases}
        if unknown:
            parser.error(f"--only: no case {sorted(unknown)[0]!r}; there are {[case.name for case in cases]}")
        cases = [case for case in cases if case.name in ("regular", *arguments.only)]
    device = problem.device
    repeats = arguments.repeats or (20 if device.type == "cuda" else 1)
    timings = time_in_turns(cases, device, rounds=arguments.rounds, repeats=repeats)
    for timing in timings:
        images = arguments.batch / timing.median
        print(line("step", timing, device, images_per_s=images, of_regular=ratio(timing, timings[0])), flush=True)


if __name__ == "__main__":
    main()
