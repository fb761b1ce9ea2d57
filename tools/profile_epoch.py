"""Where the time of a star epoch goes: matching, loading, the steps' parts, evaluation; operations; a Chrome trace.

    python tools/profile_epoch.py --arch resnet18 --sources 8 [--images 12800] [--trace epoch.json]

A first epoch warms up, the second is looked at: its sources are re-matched as in every epoch of a run, and the star is
evaluated on all images afterwards (statistics and losses). An epoch's first point is `interpolate`, the others are
written within `update`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import add_problem_arguments, problem_of, where

from fastar.errors import FastarError
from fastar.evaluation import evaluate_rows
from fastar.runtime.timing import part
from fastar.training import fit
from fastar.training.profiling import profile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_problem_arguments(parser)
    parser.add_argument("--images", type=int, default=12_800, help="images in an epoch")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--graph", action="store_true", help="with CUDA graphs (the parts inside have no times then)")
    parser.add_argument("--trace", type=Path, help="file for a Chrome trace (large: keep --images small)")
    parser.add_argument("--memory", type=Path, help="file for a GPU memory snapshot")
    arguments = parser.parse_args()
    try:
        problem = problem_of(arguments)
        data = problem.dataset(arguments.images)
        step = problem.star_step(matching="weight", compile=arguments.compile, graph=arguments.graph)
        evaluated = problem.network(0)

        def run() -> None:
            fit(step, data, problem.settings, name="star", seed=0, epochs=1)
            with part("evaluation"):
                evaluate_rows(
                    evaluated,
                    step.layout,
                    step.theta[None],
                    {"train": lambda: data.sequential(1000)},
                    statistics_batches=lambda: data.sequential(1000),
                )

        run()
        found = profile(run, problem.device, trace=arguments.trace, memory=arguments.memory)
    except FastarError as error:
        parser.error(str(error))
    steps = data.batch_count(problem.settings.batch_size)
    print(found.operations)
    print(f"star epoch of {steps} steps, {problem.facts()}, {where(problem.device)['device']}")
    print(found.table(steps))


if __name__ == "__main__":
    main()
