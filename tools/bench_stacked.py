"""Small networks trained together against one after the other: one JSON line per case and number of networks.

    python tools/bench_stacked.py --width 8 [--numbers 3 10 35] [--size 8 --channels 1] [--rounds 20]

    apart        a step of each of K networks in turn
    together     a step of a stack of K, on the same batches, the losses taken in the fastest way that has the same bits

Cases take turns in one process; `apart_of_together` is the ratio of their times, median and quartiles over rounds
(`_cpu`: of CPU time, which a busy machine changes less). `same_bits` says whether K networks have the same parameters
after some steps of both; where not, a run trains them apart. Networks are MLPs in fp32; what a run does beside steps
(records, checkpoints) is not in these times.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from bench import Case, Problem, add_problem_arguments, claim, line, problem_of, ratio, time_in_turns, where

from fastar.errors import FastarError
from fastar.training import RegularStep
from fastar.training.stacked import StackedStep

CHECKED = 5  # steps after which bits are compared


def cases_of(problem: Problem, count: int) -> tuple[list[Case], bool]:
    """A step of `count` networks apart and together; and whether the bits are the same."""
    settings, device = problem.settings, problem.device
    generator = torch.Generator(device).manual_seed(0)
    size, lr = (count, settings.batch_size), torch.tensor(settings.lr, device=device)
    images = torch.randn(*size, *problem.shape, device=device, generator=generator)
    labels = torch.randint(problem.classes, size, device=device, generator=generator)

    def built() -> list[RegularStep]:
        return [RegularStep(problem.network(seed), settings) for seed in range(count)]

    def apart(steps: list[RegularStep]) -> Callable[[], object]:
        return lambda: [step(images[k], labels[k], lr) for k, step in enumerate(steps)]

    steps, way, ways, same = built(), 0, 1, False
    for _ in range(CHECKED):
        apart(steps)()
    while not same and way < ways:
        stack = StackedStep([problem.network(seed) for seed in range(count)], settings, way=way)
        for _ in range(CHECKED):
            stack(images, labels, lr)
        same = all(torch.equal(stack.of(k).save()["theta"], step.save()["theta"]) for k, step in enumerate(steps))
        way, ways = way + 1, stack.ways
    facts = {**problem.facts(), "networks": count}
    found = [Case("apart", apart(steps), facts), Case("together", lambda: stack(images, labels, lr), facts)]
    return found, same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_problem_arguments(parser)
    parser.set_defaults(arch="mlp", size=8, channels=1, precision="fp32")
    parser.add_argument("--numbers", type=int, nargs="+", default=[3, 10, 35], help="of networks")
    parser.add_argument("--rounds", type=int, default=20, help="measurements of each case")
    arguments = parser.parse_args()
    if arguments.rounds < 2 or min(arguments.numbers) < 1 or arguments.precision != "fp32":
        parser.error("--rounds must be at least 2, --numbers at least 1, --precision fp32")
    try:
        problem = problem_of(arguments)
        for number in arguments.numbers:
            cases, same = cases_of(problem, number)
            apart, together = time_in_turns(cases, problem.device, rounds=arguments.rounds, repeats=5)
            found = {"apart_of_together": ratio(apart, together)}
            if problem.device.type == "cpu":
                found["apart_of_together_cpu"] = ratio(apart, together, cpu=True)
            print(line("stacked", apart, problem.device), flush=True)
            print(line("stacked", together, problem.device, same_bits=same, **found), flush=True)
            if same:
                text = f"a step of {number} {arguments.arch}s of {problem.parameters:,} parameters at once, same bits"
                times = [(together.seconds, apart.seconds), (together.cpu, apart.cpu)]
                both = [{"ours": ours, "peer": peer} for ours, peer in times]
                print(claim("stacked", text, "fastar, one by one", *both, **where(problem.device)), flush=True)
    except FastarError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
