"""One training step: regular and star, fastar's and plain PyTorch's, one JSON line per case.

    python tools/bench_step.py --arch resnet18 --batch 128 [--precision bf16] [--modes eager graph kernels compiled ...]

Modes are measured one after another, and the lines of each printed when it is done; within one, cases take turns in
each round of one process. A case that fails, or that this machine cannot run, has a line that says so. Modes: eager;
graph (`train.graph`); compiled (`train.compile`), compiled-graph (both) and compiled-star; kernels runs
tools/bench_kernels.py. The default is all of them on a GPU, eager elsewhere.

    regular, star                fastar's steps (star without matching: that is bench_epoch.py)
    star, graph, host store      sources in pinned host memory, fetched while steps run
    loading                      a batch of a data set on the device: shuffled, cropped, mirrored, normalised
    regular, user's network      `--model module:function`: the same network (as --arch) of a user's function; its
                                 batches are taken apart at each step
    regular, user's loss         the same, with a user's function as the loss; and so for `star`
    loading, user's data         batches of a user's tensors: shuffled
    plain regular                the network, autocast, torch.optim
    plain star                   the same; parameters concatenated, interpolated, gradients copied back

Ratios are the median and quartiles of per-round ratios of times: `of_regular` over fastar's regular step, `of_like`
over the regular step of the same kind (what a star step costs more), `of_plain`, `of_plain_star` and
`of_plain_compiled` over plain PyTorch's, `of_registered` a user's network over the same network registered (`_cpu`: of
CPU time, which a busy machine changes less). With `--model`, these cases alone are measured, as in

    python tools/bench_step.py --arch mlp --width 8 --channels 1 --size 8 --model tools/bench/user_networks.py:mlp \
        --precision fp32 --repeats 50

Steps are on one random batch, so `loading` is not in them. `first_s`: seconds
of the first step, with all that is built, compiled and captured.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench import (
    EPOCH,
    Case,
    Problem,
    Timing,
    add_problem_arguments,
    built_when_run,
    claim,
    failure,
    line,
    problem_of,
    ratio,
    time_in_turns,
    where,
)
from torch import Tensor, nn
from torch.nn import functional as F

from fastar.config import StarSettings, TrainSettings
from fastar.data.dataset import Dataset
from fastar.data.user_data import TensorData
from fastar.errors import FastarError
from fastar.flat import FlatLayout
from fastar.losses import find_loss
from fastar.runtime.user_code import find_function
from fastar.training import draw, resolve_precision

BATCHES = 100  # of an epoch of `loading`
# What is measured in each mode, in turns; a case that is in several is told of once.
MODES = {
    "eager": ("regular", "star", "loading", "plain regular", "plain star"),
    "graph": ("regular", "regular, graph", "star, graph", "star, graph, host store", "plain regular", "plain star"),
    "compiled": ("regular", "plain regular", "plain regular, compiled", "regular, compiled"),
    "compiled-graph": (
        *("regular", "plain regular", "plain regular, compiled", "regular, compiled, graph"),
        "star, compiled, graph",
    ),
    "compiled-star": ("plain regular, compiled", "regular, compiled", "star, compiled", "plain star, compiled"),
}
# What is measured with --model, in turns.
USERS = (
    *("regular", "regular, user's network", "regular, user's loss"),
    *("star", "star, user's network", "star, user's loss", "loading", "loading, user's data"),
)
# What others are compared with: measured again in every mode.
BASES = ("regular", "plain regular", "plain star", "plain regular, compiled", "regular, compiled")


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
            more: dict[str, Any] = {"momentum": settings.momentum, "nesterov": settings.nesterov}
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


def user_cases(problem: Problem, reference: str) -> dict[str, Case]:
    """A user's network in place of the registered one, by itself and with a user's loss; and a user's data.

    Raises:
        FastarError: `reference` makes another network than the registered one.
    """
    theirs = replace(problem, build=find_function(reference, "--model"))
    sizes = [[one.shape for one in FlatLayout.from_module(of.network(0)).entries] for of in (problem, theirs)]
    if sizes[0] != sizes[1]:
        raise FastarError(f"--model {reference}: its parameters have other shapes than those of {problem.arch}")
    with_loss = replace(
        theirs, loss=find_loss(lambda outputs, batch: F.cross_entropy(outputs, batch[1], reduction="none"))
    )
    makes = {
        "regular, user's network": lambda: theirs.endless(theirs.regular_step()),
        "regular, user's loss": lambda: with_loss.endless(with_loss.regular_step()),
        "star, user's network": lambda: theirs.endless(theirs.star_step()),
        "star, user's loss": lambda: with_loss.endless(with_loss.star_step()),
    }
    cases = {name: Case(name, built_when_run(make), problem.facts()) for name, make in makes.items()}
    name = "loading, user's data"
    return {
        **cases,
        name: Case(name, built_when_run(lambda: loading(problem, users=True)), problem.facts(), calls=BATCHES),
    }


def loading(problem: Problem, *, users: bool = False) -> Callable[[], object]:
    """A whole epoch of BATCHES batches, since they are made many at a time; another one at each call."""
    data: Dataset = problem.dataset(BATCHES * problem.settings.batch_size)
    if users:
        images, labels = (torch.cat(parts) for parts in zip(*data.sequential(1000), strict=True))
        data = TensorData("data", (images, labels), problem.device)
    epochs = itertools.count()

    def run() -> None:
        for _ in data.batches(problem.settings.batch_size, seed=0, epoch=next(epochs)):
            pass

    return run


def make_cases(problem: Problem) -> dict[str, Case]:
    """Every case by its name; none is built before it is run."""
    kinds: dict[str, dict[str, Any]] = {
        "": {},
        ", graph": {"graph": True},
        ", compiled": {"compile": True},
        ", compiled, graph": {"compile": True, "graph": True},
    }

    def regular(problem: Problem, changes: dict[str, Any]) -> Callable[[], object]:
        return problem.endless(problem.regular_step(**changes))

    def star(problem: Problem, changes: dict[str, Any]) -> Callable[[], object]:
        return problem.endless(problem.star_step(**changes))

    def plain(star: bool, compiled: bool) -> Callable[[], object]:
        problem.changed(compile=compiled)  # refused where nothing compiles
        images, labels = problem.batch()
        model = problem.network(0)
        run: Any = torch.compile(model, dynamic=False) if compiled else model
        sources = [problem.network(1 + n) for n in range(problem.sources)]
        step = PlainStarStep(model, problem, run, sources) if star else PlainStep(model, problem, run)
        return lambda: step(images, labels)

    on_host = replace(problem, store="host")
    makes: dict[str, Callable[[], Callable[[], object]]] = {
        **{f"regular{kind}": partial(regular, problem, changes) for kind, changes in kinds.items()},
        **{f"star{kind}": partial(star, problem, changes) for kind, changes in kinds.items()},
        "star, graph, host store": partial(star, on_host, {"graph": True}),
        "plain regular": partial(plain, False, False),
        "plain star": partial(plain, True, False),
        "plain regular, compiled": partial(plain, False, True),
        "plain star, compiled": partial(plain, True, True),
    }
    cases = {name: Case(name, built_when_run(make), problem.facts()) for name, make in makes.items()}
    cases["loading"] = Case("loading", built_when_run(lambda: loading(problem)), problem.facts(), calls=BATCHES)
    return cases


def like(name: str) -> str:
    """The regular step of the same kind as this case."""
    plain = "plain " if name.startswith("plain") else ""
    return f"{plain}regular" + "".join(kind for kind in (", compiled", ", graph") if kind in name)


def ratios(timing: Timing, timings: dict[str, Timing]) -> dict[str, dict[str, float]]:
    """Its time over those of the cases it is to be compared with, where they took turns with it."""
    name = timing.case.name
    wanted = {
        "of_regular": "regular",
        "of_like": like(name) if "star" in name else None,
        "of_plain": "plain regular",
        "of_plain_compiled": "plain regular, compiled",
        "of_plain_star": "plain star" if "star" in name else None,
        "of_registered": registered(name),
    }
    found = {key: ratio(timing, timings[base]) for key, base in wanted.items() if base is not None and base in timings}
    if "of_registered" in found:
        found["of_registered_cpu"] = ratio(timing, timings[registered(name) or ""], cpu=True)
    return found


def registered(name: str) -> str | None:
    """The case of the registered network that a user's is compared with."""
    first, comma, _ = name.partition(", user's")
    return first if comma else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_problem_arguments(parser)
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each case")
    parser.add_argument("--repeats", type=int, help="steps in one measurement (20 on a GPU, 1 elsewhere)")
    parser.add_argument("--model", help="module:function or file.py:function that makes the network of --arch")
    parser.add_argument("--modes", nargs="+", choices=[*MODES, "kernels"], help="what to measure, in this order")
    parser.add_argument("--only", nargs="+", help="cases to measure; `regular` is always among them")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds must be at least 2")
    try:
        problem = problem_of(arguments)
        cases = make_cases(problem)
        if arguments.model:
            cases |= user_cases(problem, arguments.model)
    except FastarError as error:
        parser.error(str(error))
    device = problem.device
    modes = arguments.modes or (["eager", "graph", "kernels", *list(MODES)[2:]] if device.type == "cuda" else ["eager"])
    if arguments.only:
        unknown = set(arguments.only) - set(cases)
        if unknown:
            parser.error(f"--only: no case {sorted(unknown)[0]!r}; there are {list(cases)}")
    if arguments.model:
        modes = ["model"]
    repeats = arguments.repeats or (20 if device.type == "cuda" else 1)
    told: set[str] = set()

    def failed(case: Case, error: Exception) -> None:
        told.add(case.name)
        print(failure("step", case.name, error, device, **problem.facts()), flush=True)

    for mode in modes:
        if mode == "kernels":
            sys.stdout.flush()
            script = str(Path(__file__).resolve().parent / "bench_kernels.py")
            subprocess.run([sys.executable, script, "--device", str(device), "--rounds", str(arguments.rounds)])
            continue
        names = [name for name in MODES.get(mode, USERS) if not arguments.only or name in ("regular", *arguments.only)]
        group = [cases[name] for name in names if name not in told or name in BASES]
        timings = time_in_turns(group, device, rounds=arguments.rounds, repeats=repeats, on_failure=failed)
        found = {timing.case.name: timing for timing in timings}
        for timing in timings:
            if timing.case.name in told:
                continue
            told.add(timing.case.name)
            images = arguments.batch / timing.median
            print(line("step", timing, device, images_per_s=images, **ratios(timing, found)), flush=True)
        for name in ("regular", "star"):
            if mode == "eager" and {name, f"plain {name}"} <= found.keys():
                ours, peer, size = found[name], found[f"plain {name}"], f"{arguments.arch}, batch {arguments.batch}"
                seconds, cpu = ({"ours": a, "peer": b} for a, b in ((ours.seconds, peer.seconds), (ours.cpu, peer.cpu)))
                facts = {**problem.facts(), "threads": torch.get_num_threads(), **where(device)}
                print(claim("step", f"a {name} step ({size})", "plain PyTorch", seconds, cpu, **facts), flush=True)


if __name__ == "__main__":
    main()
