"""Where the time of a training step goes: its parts, the top operations, a Chrome trace.

    python tools/profile_step.py --arch resnet18 --batch 128 [--kind star|regular] [--trace step.json]

Steps are warmed up first. Images are random and on the device: loading is part of profile_epoch.py. The star's first
point is `interpolate`, the others are written within `update`. `idle`: the GPU ran nothing; on a CPU: the calling
thread was kept waiting, by other programs too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from bench import add_problem_arguments, problem_of, where

from fastar.errors import FastarError
from fastar.training.profiling import profile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_problem_arguments(parser)
    parser.add_argument("--kind", default="star", choices=["star", "regular"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--graph", action="store_true", help="with CUDA graphs (the parts inside have no times then)")
    parser.add_argument("--trace", type=Path, help="file for a Chrome trace")
    parser.add_argument("--memory", type=Path, help="file for a GPU memory snapshot")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error("--steps must be at least 1")
    try:
        problem = problem_of(arguments)
        make = problem.star_step if arguments.kind == "star" else problem.regular_step
        step = make(compile=arguments.compile, graph=arguments.graph)
        images, labels = problem.batch()
        lr = torch.tensor(problem.settings.lr, device=problem.device)

        def run() -> None:
            step.begin_epoch(0, arguments.steps)
            for _ in range(arguments.steps):
                step(images, labels, lr)

        run()
        found = profile(run, problem.device, trace=arguments.trace, memory=arguments.memory)
    except FastarError as error:
        parser.error(str(error))
    print(found.operations)
    print(f"{arguments.kind} step, {problem.facts()}, {where(problem.device)['device']}")
    print(found.table(arguments.steps))


if __name__ == "__main__":
    main()
