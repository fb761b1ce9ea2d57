"""A star epoch, matching included, over a regular epoch: one JSON line for each, with the star's two parts.

    python tools/bench_epoch.py --sources 50 [--arch resnet18] [--images 50000] [--matching weight activation]
    python tools/bench_epoch.py --ranks 2 --sources 8 [--arch resnet18] [--images 2000]

Epochs of both kinds take turns in one process, on random images with CIFAR's augmentation. The star and its sources
have each seen one epoch, so that they are like trained ones. Every star epoch matches first: the first time `cold`,
from the sources as they were trained; afterwards from the permutations of the epoch before, which take the longer
to improve, the farther theta has gone since: `moved_by` is its way in an epoch over its length, at --lr, which is the
mean of a cosine from CIFAR's 0.1. With --ranks 2, a star epoch of two ranks (torchrun) takes turns with one of a single
rank at the same global batch, matching included; on a CPU the single one has as many threads as a run gives it.
`of_regular` is a part's time over a regular epoch's (median and quartiles of
per-round ratios). By activations, what the sources' units do is looked at beforehand, once a run: setup_seconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any, get_args

import torch
from bench import Case, Problem, Timing, add_problem_arguments, claim, line, problem_of, quantiles, ratio, where
from bench.problem import Method

from fastar.data.dataset import Dataset
from fastar.errors import FastarError
from fastar.runtime import ranks
from fastar.runtime.device import cpus
from fastar.training import Epoch, Step, fit, suitable_threads


def epoch_of(step: Step, problem: Problem, data: Dataset, number: int) -> Epoch:
    (epoch,) = fit(step, data, problem.settings, name="benchmark", seed=number, epochs=1)
    return epoch


def named(case: str, method: Method) -> str:
    """The case of a star that is matched by `method`; by weights, as in the paper, it goes without saying."""
    return case if method == "weight" else f"{case}, by {method}s"


def recipe_of(arguments: argparse.Namespace) -> Problem:
    problem = problem_of(arguments)
    return replace(problem, settings=problem.settings.model_copy(update={"lr": arguments.lr}))


def ranks_beside_one(arguments: argparse.Namespace, problem: Problem) -> None:
    """Time epochs of all ranks, and of the first one alone, in turns; the first rank prints the lines."""
    warm, data = problem.dataset(arguments.warm_images), problem.dataset(arguments.images)
    states = ranks.by_first(lambda: problem.trained(warm))
    shared, every = cpus(), ranks.by_first(cpus)
    torch.set_num_threads(shared)
    together = problem.star_step(matching="weight", states=states, compile=arguments.compile)
    alone: list[Step] = []
    taken: dict[str, list[float]] = {"ours": [], "peer": []}
    parts: dict[str, list[float]] = {"matching": [], "exchange": []}

    def of_one(number: int) -> None:
        torch.set_num_threads(every)
        if not alone:
            alone.append(problem.star_step(matching="weight", states=states, compile=arguments.compile))
        with suitable_threads(problem.network(0), problem.batch()[0]):
            its = epoch_of(alone[0], problem, data if number else warm, number)
        torch.set_num_threads(shared)
        taken["peer"].append(its.begin_seconds + its.seconds)

    for number in range(1 + arguments.rounds):
        its = epoch_of(together, problem, data if number else warm, number)
        taken["ours"].append(its.begin_seconds + its.seconds)
        parts["matching"].append(its.begin_seconds / (its.begin_seconds + its.seconds))
        parts["exchange"].append(its.parts.get("ranks", 0.0) / (its.begin_seconds + its.seconds))
        ranks.by_first(lambda number=number: of_one(number))  # type: ignore[misc]
    if ranks.is_first():
        size = f"{arguments.arch}, N={arguments.sources}, {arguments.images:,} images, batch {arguments.batch}"
        text = f"an epoch of a star of {ranks.started()} ranks, matching included ({size})"
        facts = {**problem.facts(), "ranks": ranks.started(), "threads_each": shared, "cpus": every}
        shares = {f"share_of_{name}": quantiles(values[1:]) for name, values in parts.items()}
        seconds = {side: values[1:] for side, values in taken.items()}  # the first of each warms up
        print(claim("epoch", text, "fastar, one rank", seconds, **facts, **shares, **where(problem.device)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_problem_arguments(parser)
    parser.add_argument("--images", type=int, default=50_000, help="images in an epoch")
    parser.add_argument("--warm-images", type=int, default=5_000, help="images that star and sources see beforehand")
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each kind")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate of all epochs")
    parser.add_argument("--matching", nargs="+", choices=get_args(Method), default=["weight"], help="one star for each")
    parser.add_argument("--seconds", type=float, help="begin no further round after so many, but for two")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--graph", action="store_true", help="with CUDA graphs")
    parser.add_argument("--ranks", type=int, default=1, help="compare so many ranks with one")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds must be at least 2")
    if not 0 < arguments.lr < float("inf"):
        parser.error(f"--lr {arguments.lr} must be above 0")
    if arguments.ranks > 1 and (arguments.matching != ["weight"] or arguments.graph):
        parser.error("--ranks is of stars that are matched by weights, without --graph")
    if arguments.ranks > 1 and not ranks.launched():
        start = ["-m", "torch.distributed.run", f"--nproc-per-node={arguments.ranks}"]
        sys.exit(subprocess.run([sys.executable, *start, *sys.argv]).returncode)
    begin = time.perf_counter()
    try:
        if ranks.launched():
            with ranks.joined():
                ranks_beside_one(arguments, recipe_of(arguments))
            return
        problem = recipe_of(arguments)
        changes = {"compile": arguments.compile, "graph": arguments.graph}
        data = problem.dataset(arguments.images)
        warm = problem.dataset(arguments.warm_images)
        regular = problem.regular_step(**changes)
        epoch_of(regular, problem, warm, 0)
        states = problem.trained(warm)
        stars, cold = {}, {}
        for method in arguments.matching:
            stars[method] = problem.star_step(matching=method, states=states, **changes)
            cold[method] = epoch_of(stars[method], problem, warm, 0).begin_seconds
            found = {"cold_seconds": cold[method], "setup_seconds": time.perf_counter() - begin}
            told = {"bench": "epoch", "case": named("first matching", method), **problem.facts(), **found}
            print(json.dumps({**told, **where(problem.device)}), flush=True)
            begin = time.perf_counter()
        del states
        taken: dict[str, list[float]] = {"regular": []}
        cpu: dict[str, list[float]] = {name: [] for name in ("regular", *stars)}
        moved_by: dict[str, list[float]] = {}
        for number in range(1, 1 + arguments.rounds):
            if number > 2 and arguments.seconds is not None and time.perf_counter() - begin > arguments.seconds:
                break
            used = time.process_time()
            taken["regular"].append(epoch_of(regular, problem, data, number).seconds)
            cpu["regular"].append(time.process_time() - used)
            for method, star in stars.items():
                before = star.theta.clone()
                used = time.process_time()
                its = epoch_of(star, problem, data, number)
                cpu[method].append(time.process_time() - used)
                moved_by.setdefault(method, []).append(float((star.theta - before).norm() / before.norm()))
                parts = {"star": its.begin_seconds + its.seconds, "matching": its.begin_seconds, "steps": its.seconds}
                for name, seconds in parts.items():
                    taken.setdefault(named(name, method), []).append(seconds)
    except FastarError as error:
        parser.error(str(error))
    facts = {
        **problem.facts(),
        **changes,
        "lr": arguments.lr,
        "images": arguments.images,
        "threads": torch.get_num_threads(),
    }
    timings = {name: Timing(Case(name, lambda: None, facts), seconds) for name, seconds in taken.items()}
    of_method = {named("matching", method): method for method in stars}
    for name, timing in timings.items():
        more: dict[str, Any] = {"of_regular": ratio(timing, timings["regular"])}
        if name in of_method:
            more["ms_per_source"] = timing.median * 1e3 / problem.sources
            more["cold_ms_per_source"] = cold[of_method[name]] * 1e3 / problem.sources
            more["moved_by"] = quantiles(moved_by[of_method[name]])
        print(line("epoch", timing, problem.device, **more), flush=True)
    size = f"{arguments.arch}, N={arguments.sources}, {arguments.images:,} images"
    for method in stars:
        name = named("star", method)
        found = ({"ours": of[own], "peer": of["regular"]} for of, own in ((taken, name), (cpu, method)))
        text = f"an epoch of a {name}, matching included ({size})"
        print(claim("epoch", text, "fastar, regular", *found, **facts, **where(problem.device)), flush=True)


if __name__ == "__main__":
    main()
