"""Profile of a training step or a star epoch: its spans, the top operations, a Chrome trace.

    python tools/profile_training.py step --arch resnet18 --batch 128 [--kind star|regular] [--trace step.json]
    python tools/profile_training.py epoch --arch resnet18 --sources 8 [--images 12800] [--trace epoch.json]

The first run warms up, the second is profiled. `step`: `--steps` steps on one batch on the device, of random images.
`epoch`: sources are re-matched as in every epoch of a run, images are loaded, and the star is evaluated on all of them
afterwards (statistics and losses). A star's first point is `interpolate`, the others are written within `update`.
`idle`: the GPU ran nothing; on a CPU: the calling thread waited, for other programs too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from bench import Problem, add_problem_arguments, problem_of, profile, where

from fastar.errors import FastarError
from fastar.evaluation import evaluate_rows
from fastar.runtime.timing import span
from fastar.training import Profile, fit


def step_profile(problem: Problem, arguments: argparse.Namespace) -> Profile:
    make = problem.star_step if arguments.kind == "star" else problem.regular_step
    step = make(compile=arguments.compile, graph=arguments.graph)
    images, labels = problem.batch()
    lr = torch.tensor(problem.settings.lr, device=problem.device, dtype=torch.float32)

    def run() -> None:
        step.begin_epoch(0, arguments.steps)
        for _ in range(arguments.steps):
            step(images, labels, lr)

    run()
    return profile(run, problem.device, trace=arguments.trace)


def epoch_profile(problem: Problem, arguments: argparse.Namespace) -> Profile:
    data = problem.dataset(arguments.images)
    arguments.steps = data.batch_count(problem.settings.batch_size)
    step = problem.star_step(matching="weight", compile=arguments.compile, graph=arguments.graph)
    evaluated = problem.network(0)

    def batches() -> object:
        return data.sequential(1000)

    def run() -> None:
        fit(step, data, problem.settings, name="star", seed=0, epochs=1)
        with span("evaluation"):
            evaluate_rows(evaluated, step.layout, step.theta[None], {"train": batches}, statistics_batches=batches)

    run()
    return profile(run, problem.device, trace=arguments.trace)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "epoch"])
    add_problem_arguments(parser)
    parser.add_argument("--kind", default="star", choices=["star", "regular"], help="of a step (an epoch is a star's)")
    parser.add_argument("--steps", type=int, default=10, help="steps that are profiled")
    parser.add_argument("--images", type=int, default=12_800, help="images in an epoch")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--graph", action="store_true", help="with CUDA graphs (the spans inside have no times then)")
    parser.add_argument("--trace", type=Path, help="file for a Chrome trace (large: keep --images small)")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error("--steps must be at least 1")
    try:
        problem = problem_of(arguments)
        found = (step_profile if arguments.what == "step" else epoch_profile)(problem, arguments)
    except FastarError as error:
        parser.error(str(error))
    print(found.operations)
    print(f"{arguments.what}, {arguments.steps} steps, {problem.facts()}, {where(problem.device)['device']}")
    print(found.table(arguments.steps))


if __name__ == "__main__":
    main()
